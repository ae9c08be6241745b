"""Modules of IR -> callable addresses, with the object code kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import platformdirs
from llvmlite import ir

from .target import Target

_DIGEST = 32  # bytes of sha256 before the object code of a cache file


def cache_directory() -> Path:
    """$BITBLAS_CACHE_DIR/cpu, or the user's cache directory."""
    root = os.environ.get("BITBLAS_CACHE_DIR") or platformdirs.user_cache_dir("bitblas")
    return Path(root) / "cpu"


@cache
def _source_hash() -> str:
    """Of everything that decides the code of a kernel: this package, the formats, the layouts."""
    package = Path(__file__).parent
    files = [*package.glob("*.py"), *(package.parent / "formats").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([*files, package.parent / "layouts.py"]):
        digest.update(path.read_bytes())
    version = getattr(importlib.import_module("bitblas"), "__version__", "0")
    digest.update(repr((version, llvmlite.__version__, llvm.llvm_version_info)).encode())
    return digest.hexdigest()


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(target: Target) -> llvm.TargetMachine:
    _initialize()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=target.cpu, features=target.llvm_features, opt=3, jit=True
    )


def optimize(module: ir.Module, target: Target, name: str) -> tuple[llvm.ModuleRef, object]:
    """The module as optimised LLVM IR, its function renamed, and the machine for it."""
    machine = _machine(target)
    module.triple = llvm.get_process_triple()
    parsed = llvm.parse_assembly(str(module))
    parsed.get_function(module.name).name = name
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed, machine


def assembly(module: ir.Module, target: Target) -> str:
    """The machine code as text, for any target of this architecture."""
    parsed, machine = optimize(module, target, module.name)
    return machine.emit_assembly(parsed)  # type: ignore[attr-defined]


class Compiler:
    """Compiles kernels for one target, once per process, and keeps them for later ones."""

    def __init__(self, target: Target):
        self.target = target
        self._addresses: dict[object, int] = {}
        self._lock = threading.Lock()
        self._engine: llvm.ExecutionEngine | None = None

    def address(self, build: Callable[..., ir.Module], *arguments: object) -> int:
        """The address of build(target, *arguments)'s function."""
        key = (build, *arguments)
        found = self._addresses.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._addresses:
                self._addresses[key] = self._load(build, arguments)
            return self._addresses[key]

    def _load(self, build: Callable[..., ir.Module], arguments: tuple[object, ...]) -> int:
        identity = (
            _source_hash(),
            self.target.cpu,
            self.target.llvm_features,
            sorted(self.target.features),
            build.__module__,
            build.__name__,
            arguments,
        )
        key = hashlib.sha256(repr(identity).encode()).hexdigest()
        name = f"bitblas_{build.__name__}_{key[:16]}"
        path = cache_directory() / f"{key}.o"
        code = _read(path)
        if code is None:
            parsed, machine = optimize(build(self.target, *arguments), self.target, name)
            code = machine.emit_object(parsed)  # type: ignore[attr-defined]
            _write(path, code)
        if self._engine is None:
            empty = llvm.parse_assembly("")
            self._engine = llvm.create_mcjit_compiler(empty, _machine(self.target))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return self._engine.get_function_address(name)


def _read(path: Path) -> bytes | None:
    """The object code of a cache file; None where there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write a cache file in one step; a cache that cannot be written is only slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        pass


@cache
def compiler(target: Target) -> Compiler:
    return Compiler(target)
