"""Enumerations of the public interface."""

from __future__ import annotations

from enum import Enum, IntEnum


class TransformKind(IntEnum):
    """Layout transforms that BitBLAS 0.1 could apply to an operand; accepted, without effect."""

    NonTransform = 0
    InterWarpTransform = 1
    IntraWarpTransform = 2
    LDMatrixTransform = 3


class OptimizeStrategy(IntEnum):
    """What an operator is mostly used for: a tuning hint."""

    SingleBatchDecodeOnly = 0
    ContigousBatching = 1
    ContiguousBatching = 1


class BackendKind(Enum):
    """Backend names of BitBLAS 0.1; every one selects this library's own planner."""

    TIR = "tir"
    TileLang = "tl"
