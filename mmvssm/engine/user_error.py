"""Mistakes a user can make."""


class UserError(Exception):
    """Something the user can put right; its message is one clear sentence for them."""
