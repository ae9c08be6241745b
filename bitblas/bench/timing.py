"""Cold medians: calls rotate over copies of their weight that the last cache cannot hold together.

On a GPU each variant's calls are captured in one CUDA graph. On the CPU each call is timed by a
clock. Either way variants take turns, round by round, so that the load and the clock rates of a
moment meet all of them alike.
"""

from __future__ import annotations

import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]

MOST_COPIES = 512
GRAPH_MS = 2.0  # a graph is at least this long, so that starting it costs nothing in comparison
MOST_GRAPH_CALLS = 1024
WARM_UP_MS = 60.0  # a GPU that has idled takes some time to raise its clocks


class Timer(ABC):
    """Times calls on one device. `rounds`: measurements of each variant, at most."""

    cold_bytes: int  # four times the last cache
    rounds: int

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self._reads: dict[int, float] = {}

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes calls must rotate over to find them cold."""
        return max(2, min(MOST_COPIES, -(-self.cold_bytes // size)))

    @abstractmethod
    def prepare(self, calls: Sequence[Call]) -> Any:
        """Run the calls once and make them ready for `medians`; raises what the calls raise."""

    @abstractmethod
    def run(self, variant: Any) -> None:
        """What is timed of a prepared variant, once more, so that its result can be looked at."""

    @abstractmethod
    def medians(self, variants: Sequence[Any]) -> list[float]:
        """Median microseconds of one call of each prepared variant; they take turns."""

    @abstractmethod
    def _time_read(self, size: int) -> float:
        """Microseconds of reading `size` cold bytes and nothing else."""

    def read(self, size: int) -> float:
        """Microseconds that a plain read of `size` cold bytes takes; measured once a size."""
        if size not in self._reads:
            self._reads[size] = self._time_read(size)
        return self._reads[size]


@dataclass
class Graph:
    """A graph of `count` calls. It holds addresses only: `calls` keeps the operands alive."""

    graph: torch.cuda.CUDAGraph
    count: int
    calls: Sequence[Call]


class GpuTimer(Timer):
    """CUDA-graph replays, timed by events."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        super().__init__(device, rounds)
        torch.cuda.set_device(device)
        self._properties = torch.cuda.get_device_properties(device)
        self.cold_bytes = 4 * self._properties.L2_cache_size

    def prepare(self, calls: Sequence[Call]) -> Graph:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = self._capture(calls)
        graph.replay()
        milliseconds = max(self._replay(graph), 1e-3)
        repeats = min(int(GRAPH_MS / milliseconds) + 1, MOST_GRAPH_CALLS // len(calls))
        if repeats > 1:
            graph = self._capture(list(calls) * repeats)
        return Graph(graph, len(calls) * max(repeats, 1), calls)

    def run(self, variant: Graph) -> None:
        variant.graph.replay()

    @staticmethod
    def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    @staticmethod
    def _events(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        return start, end

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = self._events(graph)
        end.synchronize()
        return start.elapsed_time(end)

    def medians(self, variants: Sequence[Graph]) -> list[float]:
        stop = time.perf_counter() + WARM_UP_MS / 1e3
        while True:  # clocks up, first touches done
            for one in variants:
                one.graph.replay()
            torch.cuda.synchronize()
            if time.perf_counter() > stop:
                break
        # No waiting in between: a graph then starts right after the one before. Who is the first
        # changes from round to round, should clocks still rise.
        count = len(variants)
        turns = [
            {
                i % count: self._events(variants[i % count].graph)
                for i in range(first, first + count)
            }
            for first in range(self.rounds)
        ]
        torch.cuda.synchronize()
        times = [
            [start.elapsed_time(end) for _, (start, end) in sorted(turn.items())] for turn in turns
        ]
        return [
            statistics.median(column) * 1e3 / one.count
            for one, column in zip(variants, zip(*times))
        ]

    def _time_read(self, size: int) -> float:
        from . import kernels

        block = kernels.READ_BLOCK * max(kernels.READ_UNROLLS)
        length = -(-size // 4 // block) * block
        shape = (self.copies(4 * length), length)
        source = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=self.device)
        programs = 4 * self._properties.multi_processor_count
        sums = torch.empty(programs, dtype=torch.int32, device=self.device)
        variants = [
            self.prepare([partial(kernels.read, words, sums, unroll) for words in source])
            for unroll in kernels.READ_UNROLLS
        ]
        return min(self.medians(variants))


class CpuTimer(Timer):
    """A clock around every call. `thread_time`: one thread, and its own CPU time, which is what
    can be compared on a machine that others load."""

    SLOW = 0.5  # seconds that a variant may take in all, once it has had three rounds

    def __init__(self, device: torch.device, rounds: int, thread_time: bool = False) -> None:
        super().__init__(device, rounds)
        self.cold_bytes = 4 * last_cache_bytes()
        self._clock = time.thread_time if thread_time else time.perf_counter
        if thread_time:
            torch.set_num_threads(1)

    def prepare(self, calls: Sequence[Call]) -> Iterator[Call]:
        calls[-1]()
        return cycle(calls)

    def run(self, variant: Iterator[Call]) -> None:
        next(variant)()

    def medians(self, variants: Sequence[Iterator[Call]]) -> list[float]:
        times: list[list[float]] = [[] for _ in variants]
        for turn in range(self.rounds):
            if turn >= 3 and max(map(sum, times)) > self.SLOW:
                break
            for variant, taken in zip(variants, times):
                call = next(variant)
                start = self._clock()
                call()
                taken.append(self._clock() - start)
        return [statistics.median(taken) * 1e6 for taken in times]

    def _time_read(self, size: int) -> float:
        source = torch.ones((self.copies(size), max(size // 4, 1)))
        return self.medians([self.prepare([words.sum for words in source])])[0]


def last_cache_bytes() -> int:
    """The size of the first core's largest cache, within 1 and 256 MiB; 32 MiB where unknown."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (20 if text[-1] == "M" else 10))
    return min(max(sizes, default=32 << 20), 256 << 20)


def timer_for(device: torch.device, rounds: int, thread_time: bool = False) -> Timer:
    """The timer of a device."""
    if device.type == "cuda":
        return GpuTimer(device, rounds)
    return CpuTimer(device, rounds, thread_time)


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's name, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = os.uname().machine
    return f"{model}, {torch.get_num_threads()} threads"
