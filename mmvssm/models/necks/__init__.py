"""Necks."""

from .token_restoration import TokenRestoration

__all__ = ["TokenRestoration"]
