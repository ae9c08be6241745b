"""Launches made to run: once, or prepared for calls that differ in their pointers alone.

Everything is started on the current stream of the operands' device. Nothing is copied to the host
and nothing waits, so a call whose kernels are loaded can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import torch

from . import driver
from .compile import Source
from .launch import Launch, Settled, Varying, Workspace

_ALL_ONES = (1 << 64) - 1
# what a build of torch for the CPU lacks is not called there
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", None)  # type: ignore[assignment]
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]
_kernels: dict[tuple[str, int], driver.Kernel] = {}  # (Source.key, device)


class Prepared:
    """Compiled and loaded launches: run(addresses of the operands) starts them."""

    def __init__(
        self,
        steps: Sequence[Launch],
        device: torch.device,
        operands: int,
        position: Callable[[Any], int],
    ) -> None:
        """operands: how many addresses `run` takes, and values of Varying among them; position:
        which of them a tensor's or a Varying's is. Of operands on the meta device steps may also
        take what begins later in them, such as rows."""
        self.index = current_device() if device.index is None else device.index
        self._device = torch.device(device.type, self.index)
        sources = [Source(step) for step in steps]
        kernels = [load(source, self.index) for source in sources]
        scratch = [_scratch(kernel.binary, step) for kernel, step in zip(kernels, steps)]
        arguments = [value for step in steps for value in step.arguments.values()]
        self._workspaces = _distinct(
            (*arguments, *(x for pair in scratch for x in pair)), Workspace
        )
        flags = _distinct(arguments, Settled)
        self.asks_settled = bool(flags)
        # what `run` gathers: the operands, workspaces, whether the weights are settled; then
        # numbers that never change
        places: dict[Any, int] = {}
        for workspace in self._workspaces:
            places[workspace] = operands + len(places)
        variable = operands + len(places) + 1
        places |= dict.fromkeys(flags, variable - 1)
        self._numbers: list[int] = []
        self._later: list[tuple[int, int, int]] = []  # (which value, operand, bytes into it)

        def place(value: Any) -> int:
            if isinstance(value, (torch.Tensor, Varying)):
                offset = _offset(value)
                if offset == 0:
                    return position(value)
                self._later.append((variable + len(self._numbers), position(value), offset))
                value = 0
            elif value in places:
                return places[value]
            self._numbers.append(value & _ALL_ONES)
            return variable + len(self._numbers) - 1

        self._steps: list[tuple[driver.Invocation, Callable[[Any], Any]]] = []
        for step, source, kernel, pointers in zip(steps, sources, kernels, scratch):
            slots: list[int] = []
            maps: dict[int, driver.TensorMap] = {}
            for name, kind in source.signature.items():
                value: Any = step.arguments.get(name)
                if kind.startswith("tensordesc"):  # the descriptor, then its numbers
                    metadata = kernel.binary.tensor_maps[len(maps)]
                    maps[len(slots)] = driver.TensorMap(metadata, value)
                    slots += map(place, (value.base, *value.shape, *value.strides))
                elif kind != "constexpr":
                    slots.append(place(value))
            slots += map(place, pointers)
            invocation = driver.Invocation(kernel, step.grid, len(slots), maps)
            self._steps.append((invocation, itemgetter(*slots)))

    def run(self, addresses: list[int], settled: bool = False) -> None:
        """Start the launches on the device's current stream. settled: see launch.Settled."""
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                self._start(addresses, settled)
        else:
            self._start(addresses, settled)

    def _start(self, addresses: list[int], settled: bool) -> None:
        stream = current_stream(self.index)
        if self._workspaces:
            held = [  # until the launches are in the stream, behind which the memory is reused
                torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in self._workspaces
            ]
            addresses = addresses + [x.data_ptr() for x in held]
        values = [*addresses, int(settled), *self._numbers]
        for which, operand, offset in self._later:
            values[which] = addresses[operand] + offset
        for invocation, slots in self._steps:
            invocation.start(stream, slots(values))


def execute(steps: Iterable[Launch], device: torch.device, settled: bool = False) -> None:
    """Start launches whose arguments are the operands of this one call. settled: see
    launch.Settled."""
    from triton import knobs

    steps = list(steps)
    if knobs.runtime.interpret:
        _interpret(steps, device)
        return
    values = [getattr(x, "base", x) for step in steps for x in step.arguments.values()]
    given = [x for x in values if isinstance(x, (torch.Tensor, Varying))]
    order = {id(x): i for i, x in enumerate(given)}
    prepared = Prepared(steps, device, len(given), lambda x: order[id(x)])
    addresses = [x.value if isinstance(x, Varying) else x.data_ptr() for x in given]
    prepared.run(addresses, settled)


def _interpret(steps: list[Launch], device: torch.device) -> None:
    """Through Triton's interpreter, which stands in for the jitted functions."""
    memory: dict[Any, torch.Tensor] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, Workspace) and value not in memory:
            memory[value] = torch.empty(value.shape, dtype=value.dtype, device=device)
        if isinstance(value, Settled):
            return 0
        if isinstance(value, Varying):
            return value.value
        return memory[value] if isinstance(value, Workspace) else value

    for step in steps:
        step.function[step.grid](
            **{name: resolve(value) for name, value in step.arguments.items()},
            **step.constants,
            num_warps=step.num_warps,
            num_stages=step.num_stages,
            **step.options,
        )


def load(source: Source, device: int) -> driver.Kernel:
    """The kernel on a device, compiled if need be. Raises triton's OutOfResources."""
    known = (source.key, device)
    if known not in _kernels:
        _kernels[known] = driver.Kernel(source.binary(architecture(device)), device)
    return _kernels[known]


@cache
def architecture(device: int) -> int:
    """A GPU's compute capability, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _offset(value: Any) -> int:
    """Where a tensor on the meta device begins in its operand, in bytes."""
    return value.data_ptr() if isinstance(value, torch.Tensor) and value.is_meta else 0


def _scratch(binary: driver.Binary, step: Launch) -> list[Workspace | int]:
    """What Triton's own two parameters, behind the kernel's, point at: memory if it wants any."""
    blocks = math.prod(step.grid) * binary.num_ctas
    sizes = (binary.global_scratch, binary.profile_scratch)
    return [Workspace((blocks * size,), torch.int8) if size else 0 for size in sizes]


def _distinct(values: Iterable[Any], kind: type) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(x for x in values if isinstance(x, kind)))
