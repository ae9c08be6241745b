"""Kernels on a GPU through the CUDA driver itself: load a binary, start it.

Triton's own launcher costs a C compiler on the user's machine, loading it most of the time of a
first call, and its calling convention differs between releases. The driver's has not changed: a
kernel takes its parameters in order, then Triton's two scratch pointers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_INVALID_CONTEXT = 201
_INVALID_HANDLE = 400
_MAX_THREADS_PER_BLOCK, _SHARED_BYTES, _MAX_DYNAMIC_SHARED = 0, 1, 8  # CUfunction_attribute
_SHARED_PER_BLOCK_OPTIN = 97  # CUdevice_attribute
_PREFER_SHARED = 1  # CUfunc_cache
_COOPERATIVE, _CLUSTER, _CLUSTER_POLICY, _PDL = 2, 4, 5, 6  # CUlaunchAttributeID
_SPREAD = 1  # CUclusterSchedulingPolicy
_WITHOUT_OPT_IN = 49152  # bytes of shared memory

# CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes and how many there are
_CONFIG = struct.Struct("=7I4xQQI4x")
_STREAM = 32  # its offset; all from here on is written anew for each launch
_ATTRIBUTE = struct.Struct("=I4x3I52x")


class _Cuda:
    """The functions of libcuda that are used here."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        pointers = [ctypes.c_void_p] * 4
        self.launch = library.cuLaunchKernelEx
        self.launch.argtypes = pointers
        self.library = library

    def call(self, name: str, *arguments: Any) -> None:
        self.check(getattr(self.library, name)(*arguments))

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({code})")


@cache
def cuda() -> Any:
    """libcuda; on first use."""
    return _Cuda()


@dataclass(frozen=True)
class Binary:
    """A compiled kernel, on no device yet."""

    name: str
    cubin: bytes
    num_warps: int
    num_ctas: int
    shared: int  # bytes, dynamic
    global_scratch: int  # bytes for each block of the grid
    profile_scratch: int
    cooperative: bool
    pdl: bool
    tensor_maps: tuple[dict[str, Any], ...] = ()  # of its tensor descriptors, in their order

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], cubin: bytes) -> Binary:
        """metadata: what Triton writes beside the binary."""
        return cls(
            metadata["name"],
            cubin,
            metadata["num_warps"],
            metadata.get("num_ctas", 1),
            metadata["shared"],
            metadata.get("global_scratch_size") or 0,
            metadata.get("profile_scratch_size") or 0,
            bool(metadata.get("launch_cooperative_grid")),
            bool(metadata.get("launch_pdl")),
            tuple(metadata.get("tensordesc_meta") or ()),
        )


class Kernel:
    """A binary loaded on one device.

    Raises triton's OutOfResources where the device has too little shared memory or registers.
    """

    def __init__(self, binary: Binary, device: int) -> None:
        self.binary, self.device = binary, device
        with torch.cuda.device(device):
            make_context_current(device)
            self._load()

    def _load(self) -> None:
        from triton.runtime.errors import OutOfResources

        driver, binary = cuda(), self.binary
        optin = ctypes.c_int()
        driver.call(
            "cuDeviceGetAttribute", ctypes.byref(optin), _SHARED_PER_BLOCK_OPTIN, self.device
        )
        if binary.shared > optin.value:
            raise OutOfResources(binary.shared, optin.value, "shared memory")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), binary.cubin)
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
        self.function = function.value
        threads = self._attribute(_MAX_THREADS_PER_BLOCK)
        if 32 * binary.num_warps > threads:
            raise OutOfResources(32 * binary.num_warps, threads, "threads")
        if binary.shared > _WITHOUT_OPT_IN:
            room = optin.value - self._attribute(_SHARED_BYTES)
            driver.call("cuFuncSetCacheConfig", function, _PREFER_SHARED)
            driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, room)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        function = ctypes.c_void_p(self.function)
        cuda().call("cuFuncGetAttribute", ctypes.byref(value), attribute, function)
        return value.value


class TensorMap:
    """A TMA descriptor without its address and shape; 128 bytes, 64-byte aligned."""

    SIZE, ALIGNMENT = 128, 64
    _TYPES = {
        8: 10,
        9: 8,
        10: 9,
    }  # the kernel's number of a type -> the driver's, where they differ
    _L2_PROMOTION_128B = 2

    def __init__(self, metadata: dict[str, Any], descriptor: Any) -> None:
        """metadata: what the kernel expects; descriptor: Triton's or Gluon's TensorDescriptor, with
        an attribute `box` where what is loaded at a time is not what the kernel was told."""
        self.rank, size = len(descriptor.shape), metadata["elem_size"]
        strides = [size * stride for stride in descriptor.strides[:-1]]
        self._fields = (
            self._array(ctypes.c_uint64, [0, *strides]),  # of which the last is left out
            self._array(ctypes.c_uint32, getattr(descriptor, "box", metadata["block_size"])),
            self._array(ctypes.c_uint32, [1] * self.rank),
        )
        self._type = self._TYPES.get(metadata["elem_type"], metadata["elem_type"])
        self._swizzle = metadata["swizzle"]
        self._fill = int(descriptor.padding == "nan")

    def _array(self, kind: Any, values: Sequence[int]) -> Any:
        return (kind * self.rank)(*reversed(values))  # the driver counts from the last

    def encode(self, where: int, address: int, shape: Sequence[int]) -> None:
        """Write the descriptor of a tensor at `address` to the memory at `where`."""
        strides, block, steps = self._fields
        cuda().call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(where),
            self._type,
            self.rank,
            ctypes.c_void_p(address),
            self._array(ctypes.c_uint64, shape),
            strides,
            block,
            steps,
            0,  # not interleaved
            self._swizzle,
            self._L2_PROMOTION_128B,
            self._fill,
        )


_Buffer = tuple[Any, int, int, dict[int, Sequence[int]]]


class Invocation:
    """A kernel with its grid, to be started any number of times, from any thread."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        slots: int,
        maps: Mapping[int, TensorMap] | None = None,
    ) -> None:
        """slots: how many parameters the kernel takes, the scratch pointers among them. maps: the
        slots that are descriptors; their values are the tensors' addresses, behind which are their
        shapes."""
        self._maps = tuple((maps or {}).items())
        binary = kernel.binary
        self.kernel = kernel
        x, y, z = (*grid, 1, 1)[:3]
        self._fixed = (x * binary.num_ctas, y, z, 32 * binary.num_warps, 1, 1, binary.shared)
        attributes = _attributes(binary)
        self._attributes = ctypes.create_string_buffer(attributes)
        self._count = len(attributes) // _ATTRIBUTE.size
        self._address = ctypes.addressof(self._attributes) if self._count else 0
        self._slots = slots
        self._write = struct.Struct(f"=QQI4x{slots}Q").pack_into
        self._launch, self._function = cuda().launch, kernel.function
        self._free: list[_Buffer] = []  # that no thread is using

    def _buffer(self) -> _Buffer:
        """(memory, its address, that of the parameters, what the descriptors are of).

        It holds the config, the slots, a pointer to each parameter, and the descriptors.
        """
        size = _CONFIG.size + 16 * self._slots
        maps = len(self._maps) * TensorMap.SIZE + TensorMap.ALIGNMENT if self._maps else 0
        memory = ctypes.create_string_buffer(size + maps)
        start = ctypes.addressof(memory)
        first = start + _CONFIG.size
        _CONFIG.pack_into(memory, 0, *self._fixed, 0, 0, 0)
        pointers = [first + 8 * i for i in range(self._slots)]
        place = -(-(start + size) // TensorMap.ALIGNMENT) * TensorMap.ALIGNMENT
        for slot, _ in self._maps:
            pointers[slot], place = place, place + TensorMap.SIZE
        struct.pack_into(f"={self._slots}Q", memory, first + 8 * self._slots - start, *pointers)
        return memory, start, first + 8 * self._slots, {}

    def _encode(self, buffer: _Buffer, values: Sequence[int]) -> None:
        memory, start, parameters, encoded = buffer
        for slot, tensor_map in self._maps:
            tensor = values[slot : slot + 1 + tensor_map.rank]
            if encoded.get(slot) != tensor:
                where = struct.unpack_from("=Q", memory, parameters - start + 8 * slot)[0]
                tensor_map.encode(where, tensor[0], tensor[1:])
                encoded[slot] = tensor

    def start(self, stream: int, values: Sequence[int]) -> None:
        """Launch on a stream (its handle) of the current device; values fill the slots."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = self._buffer()
        if self._maps:
            self._encode(buffer, values)
        self._write(buffer[0], _STREAM, stream, self._address, self._count, *values)
        code = self._launch(buffer[1], self._function, buffer[2], None)
        if code in (_INVALID_CONTEXT, _INVALID_HANDLE):  # a thread's first use of CUDA
            make_context_current(self.kernel.device)
            code = self._launch(buffer[1], self._function, buffer[2], None)
        self._free.append(buffer)
        if code:
            cuda().check(code)


def _attributes(binary: Binary) -> bytes:
    """The array of CUlaunchAttribute for what the binary was compiled to expect."""
    found = b""
    if binary.pdl:
        found += _ATTRIBUTE.pack(_PDL, 1, 0, 0)
    if binary.cooperative:
        found += _ATTRIBUTE.pack(_COOPERATIVE, 1, 0, 0)
    if binary.num_ctas > 1:
        found += _ATTRIBUTE.pack(_CLUSTER, binary.num_ctas, 1, 1)
        found += _ATTRIBUTE.pack(_CLUSTER_POLICY, _SPREAD, 0, 0)
    return found


def make_context_current(device: int) -> None:
    """Give this thread, whose current device `device` is, that device's context.

    torch makes it current only when it has something to do there.
    """
    torch.cuda.current_stream(device)  # torch starts the device up
    driver = cuda()
    current, primary = ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuCtxGetCurrent", ctypes.byref(current))
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), device)
    driver.call("cuDevicePrimaryCtxRelease_v2", device)  # torch holds it
    if current.value != primary.value:
        driver.call("cuCtxSetCurrent", primary)
