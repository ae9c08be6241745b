"""Compile a kernel for a GPU that is not there, and read what came out.

    binary = compile_launch(portable.launches(config, A, W, out)[0], arch=90)
    statistics(binary).spills

Operands may live on any device, meta included: only their dtypes matter. cuobjdump and nvdisasm
are the ones that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import versions
from .launch import Counters, Launch, Workspace

ARCHITECTURES = (80, 89, 90)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Statistics:
    """What ptxas made of a kernel. local_bytes: stack and spilled registers, per thread."""

    registers: int
    shared_bytes: int
    local_bytes: int
    opcodes: Counter[str]  # with their modifiers, such as "LDG.E.128"

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of the prefixes."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))


def compile_launch(launch: Launch, arch: int) -> Any:
    """The launch's kernel, Triton or Gluon, compiled for compute capability `arch` (90 for 9.0)."""
    function = launch.function
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(function.arg_names):
        value = launch.arguments.get(name, launch.constants.get(name))
        if isinstance(value, (torch.Tensor, Workspace)):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, Counters):
            signature[name] = "*i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif (descriptor := versions.descriptor_type(value)) is not None:
            signature[name] = descriptor
        elif name in launch.arguments and value is not None:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = versions.source_class(function)(function, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def statistics(binary: Any) -> Statistics:
    """Registers, shared and local memory, and the machine instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump printed no resource usage: {usage}"
    registers, stack, _, local = map(int, found.groups())
    opcodes = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing))
    return Statistics(registers, binary.metadata.shared, stack + local, opcodes)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
