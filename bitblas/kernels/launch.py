"""What a kernel family hands over: launches, and the memory that they need besides the operands.

A family (portable, decode, ...) is a module with

    KERNELS: the values of its tiles' field `kernel`
    serves(config, m, arch) -> bool
    stands_for(measured, m) -> whether a tile measured with so many rows is taken for m
    candidates(config, m, ...) -> list of tiles, the first being the default
    launches(config, A, W, out, scale, zeros, bias, input_scale, global_scale, tile) -> list[Launch]

`launches` describes and allocates nothing: it is also called with tensors on the meta device, to
compile without a GPU and to prepare the calls that follow. A Launch's arguments are the operands
themselves (or views of them), Gluon's tensor descriptors of them, ints, None, and the placeholders
Workspace, Settled and Varying.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

# whether kernels start before the one ahead of them in the stream is complete (sm_90 and up)
PROGRAMMATIC_LAUNCH = os.environ.get("BITBLAS_PDL", "1") != "0"
# rows of A up to which a row has the same bits for all m that share their tiles
EQUAL_BITS = 512


@dataclass(frozen=True, eq=False)
class Workspace:
    """A temporary of the call, not initialised: every use of the same object is the same memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Settled:
    """An int argument: 1 where W, scale and zeros are as they were in the last call with them.

    Then a kernel that is started before the one ahead of it is done (launch_pdl) may read them at
    once: whatever wrote them was complete before that last call's kernel ran. 0: it must wait.
    """


@dataclass(frozen=True, eq=False)
class Varying:
    """An int argument that each call gives anew, as it does the addresses of its operands."""

    value: int  # of this call, where there is just one


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with.

    function: a @triton.jit or @gluon.jit function. arguments: the parameters that are no constexpr
    (None becomes one). options: further compile options, such as {"maxnreg": 128} and
    {"launch_pdl": True}. extra_shared: bytes of shared memory behind what the compiler knows of,
    which the kernel finds at the end of its dynamic shared memory.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)
    extra_shared: int = 0
