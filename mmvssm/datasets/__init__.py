"""Data that the package brings along."""

from mmvssm.datasets.shapes import ShapesGenerator

__all__ = ["ShapesGenerator"]
