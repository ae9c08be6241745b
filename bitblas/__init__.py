"""Mixed-precision matrix multiplication for large models."""

__version__ = "0.2.0"
