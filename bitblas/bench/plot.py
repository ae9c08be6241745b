"""Pictures of a run: the roofline, and time against m. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .report import Row
from .timing import Timer

MARKERS = "os^vDP*X<>phd8"
DASHES = ("--", ":", "-.")


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def measured_roofs(timer: Timer, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a long read, and FLOP/s of a large dense product in `dtype`."""
    gpu = timer.device.type == "cuda"
    size = max(timer.cold_bytes, (512 if gpu else 64) << 20)
    n = 8192 if gpu else 2048
    A, B = (torch.randn(n, n, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(A)
    peak_us = timer.medians([timer.prepare([lambda: torch.mm(A, B, out=out)])])[0]
    return size / timer.read(size) * 1e6, 2.0 * n**3 / peak_us * 1e6


def _labels(
    rows: Sequence[Row], label: Callable[[Row], str] = lambda row: row.label
) -> list[tuple[str, list[Row]]]:
    """Rows by their labels, with the shape where there are several."""
    several = len({(row.config.N, row.config.K) for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = f" {row.config.N}x{row.config.K}" if several else ""
        groups.setdefault(label(row) + shape, []).append(row)
    return list(groups.items())


def _save(path: Path, title: str, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 7), layout="constrained")
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    figure.legend(loc="outside lower center", fontsize=8, ncols=4)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def roofline(
    path: Path, title: str, rows: Sequence[Row], roofs: tuple[float, float], dense: str
) -> None:
    """Achieved FLOP/s against FLOPs for each byte that must move; dense products in grey."""
    bandwidth, peak = roofs

    def draw(axes: Any) -> None:
        cases = {(row.config.N, row.config.K, row.m): row for row in rows}.values()
        xs = [row.flops / row.nbytes for row in rows]
        xs += [row.flops / row.dense_nbytes for row in cases]
        corners = [min(xs) / 2, peak / bandwidth, max(*xs, peak / bandwidth) * 2]
        axes.loglog(
            corners,
            [min(bandwidth * x, peak) * 1e-12 for x in corners],
            "k-",
            lw=1,
            label=f"read {bandwidth * 1e-9:.0f} GB/s, {dense} {peak * 1e-12:.3g} TFLOP/s",
        )
        axes.loglog(
            [row.flops / row.dense_nbytes for row in cases],
            [row.flops / row.dense_us * 1e-6 for row in cases],
            "x",
            color="grey",
            label=dense,
        )
        for i, (label, members) in enumerate(_labels(rows)):
            axes.loglog(
                [row.flops / row.nbytes for row in members],
                [row.flops / row.us * 1e-6 for row in members],
                MARKERS[i % len(MARKERS)],
                markersize=5,
                label=label,
            )
        axes.set_xlabel("FLOPs for each byte of weight, activations and result")
        axes.set_ylabel("TFLOP/s")

    _save(path, title, draw)


def time_against_m(path: Path, title: str, rows: Sequence[Row], dense: str) -> None:
    """Microseconds against m, a line for each format, the dense product dashed."""

    def draw(axes: Any) -> None:
        for i, (label, members) in enumerate(_labels(rows)):
            members = sorted(members, key=lambda row: row.m)
            axes.loglog(
                [row.m for row in members],
                [row.us for row in members],
                f"{MARKERS[i % len(MARKERS)]}-",
                markersize=3,
                lw=1,
                label=label,
            )
        for i, (label, members) in enumerate(_labels(rows, lambda row: dense)):
            times = {row.m: row.dense_us for row in members}
            points = sorted(times.items())
            axes.loglog(
                [m for m, _ in points], [us for _, us in points], DASHES[i % 3], c="k", label=label
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("m")
        axes.set_ylabel("us")

    _save(path, title, draw)
