"""What comes out of a run: rows, written as they come, and a page that says how they were made."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from ..config import MatmulConfig
from ..operands import input_features
from ..version import __version__

COLUMNS = ("w", "a", "group", "n", "k", "m", "us", "cublas_us", "read_us", "rel_err", "kernel")


@dataclass(frozen=True)
class Row:
    """One kernel's time for one product, beside the dense product and the read of the weight."""

    config: MatmulConfig
    m: int
    us: float
    dense_us: float
    read_us: float
    rel_err: float
    kernel: str
    weight_bytes: int
    dense_weight_bytes: int
    is_peer: bool = False

    @property
    def w(self) -> str:
        return self.config.W_dtype + (" zeros" if self.config.with_zeros else "")

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.config.N * self.config.K

    @property
    def nbytes(self) -> float:
        """What a product must move at least: weight with extras, activations and result."""
        config = self.config
        activations = input_features(config) * config.torch_A_dtype.itemsize
        return self.weight_bytes + self.m * (
            activations + config.N * config.torch_out_dtype.itemsize
        )

    @property
    def dense_nbytes(self) -> float:
        """The same of the dense product."""
        return self.nbytes - self.weight_bytes + self.dense_weight_bytes

    @property
    def label(self) -> str:
        """What a picture calls it: the weight, and whose product it is."""
        return f"{self.kernel}: {self.w}" if self.is_peer else self.w

    def cells(self) -> dict[str, object]:
        """The values of the file's columns."""
        config = self.config
        return {
            "w": self.w,
            "a": config.A_dtype,
            "group": config.group_length,
            "n": config.N,
            "k": config.K,
            "m": self.m,
            "us": round(self.us, 2),
            "cublas_us": round(self.dense_us, 2),
            "read_us": round(self.read_us, 2),
            "rel_err": f"{self.rel_err:.1e}",
            "kernel": self.kernel,
        }


def environment(device: torch.device, device_name: str, peers: Sequence[str] = ()) -> str:
    """Date, machine and versions, in a line."""
    parts = [str(date.today()), device_name, f"bitblas {__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        import triton

        parts.append(f"Triton {triton.__version__}")
    else:
        import llvmlite

        parts.append(f"llvmlite {llvmlite.__version__}")
    return ", ".join([*parts, f"Python {platform.python_version()}", *peers])


class Report:
    """Rows on the screen and in `<name>.csv` at once; `<name>.md` when all is over."""

    WIDTHS = (17, 11, 5, 6, 6, 6, 10, 10, 9, 8, 6, 6)

    def __init__(self, folder: Path, name: str, dense: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.base = folder / name
        self.dense = dense  # what `cublas_us` is, in words
        self.rows: list[Row] = []
        self._file = self.path("csv").open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._file.flush()
        titles = ("W", "A", "group", "n", "k", "m", "us", "dense us", "read us", "error",
                  "dense/", "/read", "kernel")  # fmt: skip
        self._print(titles)

    def path(self, suffix: str) -> Path:
        return self.base.with_name(f"{self.base.name}.{suffix}")

    def _print(self, cells: Sequence[object]) -> None:
        padded = [str(cell).rjust(width) for cell, width in zip(cells, self.WIDTHS)]
        print(*padded, "", *cells[len(self.WIDTHS) :], flush=True)

    def add(self, row: Row) -> None:
        """Write and print a row."""
        self.rows.append(row)
        cells = row.cells()
        self._writer.writerow(cells)
        self._file.flush()
        *shown, kernel = cells.values()
        self._print([*shown, *_ratios(row), kernel])

    def close(self, title: str, about: Sequence[str]) -> None:
        """Write the page: a title, paragraphs, the table."""
        self._file.close()
        table = [
            f"| W | A | group | N | K | m | kernel | us | {self.dense} us | read us | "
            f"{self.dense} / us | us / read | relative error |",
            "|---" * 13 + "|",
        ]
        for row in self.rows:
            *first, us, dense_us, read_us, error, kernel = row.cells().values()
            cells = [*first, kernel, us, dense_us, read_us, *_ratios(row), error]
            table.append("| " + " | ".join(map(str, cells)) + " |")
        write_page(self.path("md"), title, about, table)


def write_page(path: Path, title: str, about: Sequence[str], table: Sequence[str]) -> None:
    """A Markdown page of a title, paragraphs and a table."""
    blocks = [f"# {title}", *about, "\n".join(table)]
    path.write_text("\n\n".join(blocks) + "\n")


def _ratios(row: Row) -> tuple[str, str]:
    """How often as fast as the dense product; how many times the read of the weight."""
    return f"{row.dense_us / row.us:.2f}", f"{row.us / row.read_us:.2f}"
