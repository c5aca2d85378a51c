"""Backbones."""

from .group_mamba import GroupMamba
from .plain_mamba import PlainMamba
from .vmamba import VMamba

__all__ = ["GroupMamba", "PlainMamba", "VMamba"]
