"""Wrap a backbone as a function of images."""

from __future__ import annotations

from torch import Tensor, nn

from .preparation import UnsupportedModelError, prunes


class BackboneGraph(nn.Module):
    """A backbone that maps images to its feature maps, ``map0`` and so on, each ``(B, C, h, w)``.

    Args:
        backbone: A backbone that returns maps; images are normalised before it, as in training.

    Raises:
        UnsupportedModelError: If it prunes tokens, so that a neck has to restore the maps.
    """

    any_batch = True
    highest_opset = 26

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        if prunes(self):
            raise UnsupportedModelError(
                "a backbone that prunes tokens cannot be exported alone; export it with its neck"
            )
        self.outputs = tuple(f"map{i}" for i in range(len(backbone.out_indices)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of normalised images ``(B, 3, H, W)``."""
        return tuple(self.backbone(images))
