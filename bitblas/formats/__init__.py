"""The registry of weight formats: `get_format(name)`, `FORMATS`, `register`."""

from __future__ import annotations

from . import codebook, dense, integer, minifloat
from .base import Affine, Decoder, MiniFloat, Table, WeightFormat

__all__ = [
    "FORMATS",
    "Affine",
    "Decoder",
    "MiniFloat",
    "Table",
    "WeightFormat",
    "get_format",
    "register",
]

FORMATS: dict[str, WeightFormat] = {}


def register(format_class: type[WeightFormat]) -> type[WeightFormat]:
    """Make a format known under its name; every operator, test and benchmark then covers it."""
    if format_class.name in FORMATS:
        raise ValueError(f"a weight format named {format_class.name!r} is already registered")
    FORMATS[format_class.name] = format_class()
    return format_class


for _module in (integer, codebook, minifloat, dense):
    for _format_class in _module.FORMATS:
        register(_format_class)


def get_format(name: str) -> WeightFormat:
    """The format of that name; ValueError that lists the known ones otherwise."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"W_dtype: unknown weight format {name!r}; known: {', '.join(FORMATS)}"
        ) from None
