"""Backbones."""

from .group_mamba import GroupMamba

__all__ = ["GroupMamba"]
