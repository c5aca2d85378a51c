"""The version of this package, also read by setup.py without importing the package."""

__version__ = "0.1.0"
