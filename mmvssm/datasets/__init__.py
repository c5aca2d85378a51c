"""Checks of data sets, ``--data-root``, and a generated data set of shapes."""

from .shapes import ShapesGenerator

__all__ = ["ShapesGenerator"]
