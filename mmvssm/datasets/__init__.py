"""Data that the package brings along."""

from .shapes import ShapesGenerator

__all__ = ["ShapesGenerator"]
