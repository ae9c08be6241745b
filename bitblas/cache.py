"""Operators in memory, and what tuning found for them on disk.

A database entry is one JSON file: a config and the kernel choices measured for it. Entries lie
under DATABASE/VERSION/DEVICE/TOOLCHAIN/, are written to a temporary file and moved into place, and
carry a checksum; one that cannot be read is skipped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch

from .config import MatmulConfig
from .log import logger
from .utils.target_detector import resolve_target
from .version import __version__

if TYPE_CHECKING:
    from .matmul import Matmul

Choices = dict[int, dict[str, Any]]  # rows of A -> the fields of the kernel's Tile

_database_path: Path | None = None
_choices: dict[tuple[str, str], Choices] = {}  # (problem key, device) -> choices known so far
_generation = 0


def generation() -> int:
    """Another number whenever recorded choices have changed: what was prepared from them is old."""
    return _generation


def choices_changed() -> None:
    """To be called after a change of any recorded choice."""
    global _generation
    _generation += 1


def get_database_path() -> str:
    """Where entries are read and written: what set_database_path said, else the environment
    variable BITBLAS_DATABASE_PATH, else the user's cache directory."""
    if _database_path is not None:
        return str(_database_path)
    default = Path(platformdirs.user_cache_dir("bitblas")) / "database"
    return os.environ.get("BITBLAS_DATABASE_PATH") or str(default)


def set_database_path(path: str | os.PathLike[str]) -> None:
    """Use `path` for every later read and write; it is created when first written."""
    global _database_path
    _database_path = Path(path).expanduser().absolute()
    _choices.clear()
    choices_changed()


@cache
def device_name(device: torch.device | str) -> str:
    """What a GPU calls itself, else "cpu"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _target_device(target: str | None) -> str:
    resolved = resolve_target(target)
    if not resolved.is_gpu:
        return "cpu"
    return device_name("cuda") if torch.cuda.is_available() else resolved.arch


def _toolchain(device: str) -> str:
    package = "llvmlite" if device == "cpu" else "triton"
    try:
        return f"{package}-{metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package}-none"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)


def _folder(root: str | os.PathLike[str], device: str) -> Path:
    return Path(root) / __version__ / _slug(device) / _slug(_toolchain(device))


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_entry(folder: Path, config: MatmulConfig, choices: Choices) -> Path:
    """Write one entry atomically; many processes may write at once, the last one wins."""
    body = {
        "operator": "matmul",
        "config": json.loads(config.key),
        "choices": {str(m): choice for m, choice in sorted(choices.items())},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_digest(config.problem_key)}-{_digest(config.key)}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"checksum": _checksum(body), **body}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def read_entry(path: Path) -> tuple[MatmulConfig, Choices] | None:
    """The config and choices of an entry; None, with a warning, where it is missing its sense."""
    try:
        entry = json.loads(path.read_bytes())
        checksum = entry.pop("checksum")
        if checksum != _checksum(entry):
            raise ValueError("its checksum does not match")
        choices = {int(m): dict(choice) for m, choice in entry["choices"].items()}
        return MatmulConfig.from_key(json.dumps(entry["config"])), choices
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        logger.warning("skipped the corrupt database entry %s: %s", path, error)
        return None


@cache
def _shipped(device: str) -> dict[str, Choices]:
    """The choices that come with the library, by problem key (benchmarks/ship_choices.py)."""
    path = Path(__file__).parent / "shipped" / f"{device.replace(' ', '_')}.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())
    return {key: {int(m): tile for m, tile in one.items()} for key, one in entries.items()}


def recorded_choices(config: MatmulConfig, device: str) -> Choices:
    """The kernel choices known for a config on a device: of this process or the database, before
    those that come with the library."""
    key = (config.problem_key, device)
    if key not in _choices:
        known = dict(_shipped(device).get(config.problem_key, {}))
        folder = _folder(get_database_path(), device)
        for path in sorted(folder.glob(f"{_digest(config.problem_key)}-*.json")):
            if entry := read_entry(path):
                known.update(entry[1])
        _choices[key] = known
    return _choices[key]


class OperatorCache:
    """Operators by config, with the database behind them."""

    def __init__(self) -> None:
        self._operators: dict[MatmulConfig, Matmul] = {}

    def add(self, config: MatmulConfig, op_inst: Matmul) -> None:
        """Keep an operator; one with an equal config is replaced."""
        self._operators[config] = op_inst

    def get(self, config: MatmulConfig) -> Matmul | None:
        """The operator of an equal config, or None."""
        return self._operators.get(config)

    def exists(self, config: MatmulConfig) -> bool:
        return config in self._operators

    def clear(self) -> None:
        """Forget the operators of this process; the database stays."""
        self._operators.clear()

    def size(self) -> int:
        return len(self._operators)

    def __iter__(self) -> Iterator[MatmulConfig]:
        return iter(self._operators)

    def save_into_database(
        self, database_path: str | os.PathLike[str] | None = None, target: str | None = None
    ) -> None:
        """Write every operator's config and recorded choices; default: get_database_path()."""
        device = _target_device(target)
        folder = _folder(database_path or get_database_path(), device)
        for config in self._operators:
            write_entry(folder, config, recorded_choices(config, device))

    def load_from_database(
        self, database_path: str | os.PathLike[str] | None = None, target: str | None = None
    ) -> None:
        """Add an operator for every entry of this version, device and toolchain.

        Entries that cannot be read are skipped with a warning; a folder that does not exist holds
        none.
        """
        from .matmul import Matmul

        device = _target_device(target)
        for path in sorted(_folder(database_path or get_database_path(), device).glob("*.json")):
            entry = read_entry(path)
            if entry is None:
                continue
            config, choices = entry
            _choices.setdefault((config.problem_key, device), {}).update(choices)
            choices_changed()
            if not self.exists(config):
                self.add(config, Matmul(config, target=target, enable_tuning=False))


global_operator_cache = OperatorCache()


def load_global_ops_cache(
    database_path: str | os.PathLike[str] | None = None, target: str | None = None
) -> OperatorCache:
    """The process-wide cache, with the operators of the database in it."""
    global_operator_cache.load_from_database(database_path, target)
    return global_operator_cache
