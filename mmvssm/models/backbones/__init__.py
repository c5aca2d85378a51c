"""Backbones."""

from .group_mamba import GroupMamba
from .plain_mamba import PlainMamba

__all__ = ["GroupMamba", "PlainMamba"]
