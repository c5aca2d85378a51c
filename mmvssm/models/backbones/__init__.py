"""Backbones."""

from .group_mamba import GroupMamba
from .plain_mamba import PlainMamba
from .plain_mamba_adapter import PlainMambaAdapter
from .spatial_mamba import SpatialMamba
from .vim import Vim
from .vmamba import VMamba

__all__ = ["GroupMamba", "PlainMamba", "PlainMambaAdapter", "SpatialMamba", "VMamba", "Vim"]
