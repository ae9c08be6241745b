"""`python -m bitblas bench`: products side by side, or the chain of a model's products."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from typing import Any

from . import options as options_
from . import plot
from .chain import ChainRow, time_chain
from .measure import Suite, dense_dtype
from .options import dense_name
from .peers import PEERS, Peer
from .report import Report, environment, write_page
from .timing import MOST_COPIES, Timer, device_name, timer_for

PDL = "BITBLAS_PDL"  # 0 or 1, read by the kernels when they are imported

CHAIN_NOTE = (
    "Microseconds a layer; all layers in one graph (on a CPU: one after the other), each with "
    "weights of its own. The dense products are in the same chain. `read` is the sum of plain "
    "reads of the quantised weights. PDL: programmatic dependent launch."
)


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands of argparse."""
    options_.add_parser(commands).set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command with `options` (its `arguments`: as they were given); the exit status."""
    options_.complete(options)
    if options.chain:
        return _run_chain(options)
    try:
        configs = options_.configs_of(options)
    except ValueError as error:
        options.parser.error(str(error))
    peers = [] if options.no_peers else [peer for peer in PEERS if not peer.missing()]
    missing = [peer.name for peer in PEERS if peer.missing()]
    if missing and not options.no_peers:
        print(f"not installed, left out: {', '.join(missing)}")
    report = Report(options.out, options.name, dense_name(options))
    suite = Suite(_timer(options), report, peers, options.all_tiles, options.budget)
    try:
        suite.run(configs, options.m)
        if report.rows:
            _draw(options, suite)
    finally:  # an interrupted run keeps what it has
        report.close(_title(options), _about(options, suite, peers))
    print(f"\n{report.path('md')}")
    for failure in suite.failures:
        print(failure)
    return 1 if suite.failures else 0


def _timer(options: argparse.Namespace) -> Timer:
    return timer_for(options.device, 5 if options.quick else 21, options.thread_time)


def _title(options: argparse.Namespace) -> str:
    shapes = ", ".join(f"N = {n}, K = {k}" for n, k in options.shapes)
    return f"{'GPU' if options.device.type == 'cuda' else 'CPU'} products, {shapes}"


def _origin(options: argparse.Namespace, packages: list[str]) -> str:
    """Date, machine, versions and command."""
    made_with = environment(options.device, device_name(options.device), packages)
    return f"{made_with}. Command: `python -m bitblas {shlex.join(options.arguments)}`"


def _about(options: argparse.Namespace, suite: Suite, peers: list[Peer]) -> list[str]:
    how = "median of single calls" + (", CPU time of one thread" if options.thread_time else "")
    if options.device.type == "cuda":
        how = "median of CUDA-graph replays"
    about = [
        _origin(options, [peer.version() for peer in peers if peer.package]),
        f"Microseconds, {how}, cold weights (copies take turns: {suite.timer.cold_bytes >> 20} MiB "
        f"of them, {MOST_COPIES} at most), results checked against float64 before. `read` is a "
        "plain read of the packed weight with its scales and zero points.",
    ]
    if suite.notes:
        about.append("\n".join(f"- {note}" for note in suite.notes))
    if suite.failures:
        about.append("\n".join(f"- **{failure}**" for failure in suite.failures))
    return about


def _draw(options: argparse.Namespace, suite: Suite) -> None:
    """The picture of the run; a message where matplotlib is not installed."""
    if not plot.available():
        suite.note("no picture: matplotlib is not installed; pip install 'bitblas[bench]'")
        return
    report, dense = suite.report, dense_name(options)
    path, title = report.path("png"), f"{_title(options)}: {device_name(options.device)}"
    try:
        if options.sweep:
            plot.time_against_m(path, title, report.rows, dense)
        else:
            dtype = dense_dtype(report.rows[0].config.torch_A_dtype, options.device)
            roofs = plot.measured_roofs(suite.timer, dtype)
            plot.roofline(path, title, report.rows, roofs, dense)
    except Exception as error:  # the rows are what matters; they are written already
        suite.failures.append(f"FAILED picture: {type(error).__name__}: {error}")


def _run_chain(options: argparse.Namespace) -> int:
    """Print and write the chain's times; on a GPU without and with programmatic dependent launch,
    in a process each, unless the environment says which."""
    if options.device.type == "cuda" and PDL not in os.environ:
        rows, status = [], 0
        for value in ("0", "1"):
            lines, child_status = _chain_process(options, value)
            rows += [(value, ChainRow(**json.loads(line))) for line in lines]
            status = max(status, child_status)
    else:
        timed, status = _time_chains(options)
        rows = [(os.environ.get(PDL, ""), row) for row in timed]
    if not options.as_json:
        _write_chain(options, rows)
    return status


def _chain_process(options: argparse.Namespace, pdl: str) -> tuple[list[str], int]:
    """The rows, as JSON, of the same command in a process of its own, and its exit status."""
    child = subprocess.run(
        [sys.executable, "-m", "bitblas", *options.arguments, "--as-json"],
        env={**os.environ, PDL: pdl},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = child.stdout.splitlines()
    for line in lines:
        if not line.startswith("{"):
            print(line, flush=True)
    return [line for line in lines if line.startswith("{")], child.returncode


def _time_chains(options: argparse.Namespace) -> tuple[list[ChainRow], int]:
    timer, rows, status = _timer(options), [], 0
    stop_at = time.monotonic() + (options.budget or float("inf"))
    for w, m in ((w, m) for w in options.w for m in options.m):
        if time.monotonic() > stop_at:
            print(f"{w}, m={m} and what follows not started: budget spent", flush=True)
            break
        try:
            row = time_chain(
                options.chain,
                timer,
                w,
                m,
                A_dtype=options.a,
                group=options.group,
                zeros=options.zeros,
                layers=options.layers,
            )
        except Exception as error:
            print(f"FAILED {w}, m={m}: {type(error).__name__}: {error}", flush=True)
            status = 1
            continue
        if options.as_json:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        rows.append(row)
    return rows, status


def _write_chain(options: argparse.Namespace, rows: list[tuple[str, ChainRow]]) -> None:
    """Print the table and write it to `<name>.md`."""
    dense = dense_name(options)
    table = [
        f"| model | W | A | m | layers | PDL | us a layer | {dense} | read | {dense} / us | "
        "us / read | relative error |",
        "|---" * 12 + "|",
    ]
    for pdl, row in rows:
        times = [f"{us:.1f}" for us in (row.us, row.dense_us, row.read_us)]
        ratios = [f"{row.dense_us / row.us:.2f}", f"{row.us / row.read_us:.2f}"]
        cells = [row.model, row.w, row.a, row.m, row.layers, pdl, *times, *ratios]
        table.append("| " + " | ".join(map(str, [*cells, f"{row.rel_err:.1e}"])) + " |")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.md"
    title = f"Products of a layer of {options.chain}"
    write_page(path, title, [_origin(options, []), CHAIN_NOTE], table)
    print("\n".join([*table, "", str(path)]))
