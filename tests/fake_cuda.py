"""A CUDA driver that loads nothing and runs nothing, but remembers what it was asked to launch."""

import contextlib
import ctypes
import struct
from dataclasses import dataclass

import torch

from bitblas.kernels import driver, prepared


@dataclass
class Launched:
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    attributes: int
    values: tuple[int, ...]  # of the slots
    pointers: tuple[int, ...]  # to the parameters


@dataclass
class Encoded:
    """A tensor map; the innermost dimension first."""

    where: int
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


class FakeCuda:
    """Stands in for driver.cuda(): `launched` grows by one for each kernel started."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.encoded: list[Encoded] = []
        self.codes: list[int] = []  # what the next launches return
        self.contexts_set = 0

    def launch(self, config, function, parameters, extra):
        if self.codes and (code := self.codes.pop(0)):
            return code
        x, y, z, threads, _, _, shared, stream, _, count = struct.unpack(
            "=7I4xQQI4x", ctypes.string_at(config, 56)
        )
        # the slots follow the config, and the pointers to the parameters follow the slots
        slots = (parameters - config - 56) // 8
        values = struct.unpack(f"={slots}Q", ctypes.string_at(config + 56, 8 * slots))
        pointers = struct.unpack(f"={slots}Q", ctypes.string_at(parameters, 8 * slots))
        size = threads, shared, stream, count
        self.launched.append(Launched((x, y, z), *size, values, pointers))
        return 0

    def call(self, name, *arguments):
        if name in ("cuDeviceGetAttribute", "cuFuncGetAttribute"):
            arguments[0]._obj.value = {97: 232448, 0: 1024, 1: 0}[arguments[1]]
        if name == "cuTensorMapEncodeTiled":
            where, _, rank, address, shape, strides, box, *_ = arguments
            self.encoded.append(
                Encoded(
                    where.value, address.value, tuple(shape), tuple(strides)[: rank - 1], tuple(box)
                )
            )

    def check(self, code):
        if code:
            raise RuntimeError(f"CUDA driver: {code}")


def install(monkeypatch, cuda, arch: int = 90, stream: int = 7) -> None:
    """Have prepared launches run on `cuda` as if the operands' device were a GPU."""

    def set_context(device):
        cuda.contexts_set = getattr(cuda, "contexts_set", 0) + 1

    monkeypatch.setattr(driver, "cuda", lambda: cuda)
    monkeypatch.setattr(driver, "make_context_current", set_context)
    monkeypatch.setattr(prepared, "current_device", lambda: 0)
    monkeypatch.setattr(prepared, "current_stream", lambda device: stream)
    monkeypatch.setattr(prepared, "architecture", lambda device: arch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(prepared, "_kernels", {})
