"""Kernels compiled in processes of their own: `python -m bitblas.kernels.worker` is one of them.

A worker sees no GPU. It reads pickled (source, arch) pairs, compiles each into Triton's disk cache
and the index, and answers with None or the text of what went wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import IO, Any

from .compile import Source


def compile_all(
    sources: Sequence[Source], arch: int, workers: int, done: Callable[[], Any]
) -> None:
    """Compile every source for compute capability `arch` into the disk cache, in parallel.

    done: called after each one. Raises RuntimeError for the first that does not compile.
    """
    tasks: queue.SimpleQueue[Source] = queue.SimpleQueue()
    for source in sources:
        tasks.put(source)
    failures: list[BaseException] = []
    lock = threading.Lock()

    def serve() -> None:
        try:
            with _Worker() as worker:
                while not failures:
                    try:
                        source = tasks.get_nowait()
                    except queue.Empty:
                        return
                    worker.compile(source, arch)
                    with lock:
                        done()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(min(workers, len(sources)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interruption:
        failures.append(interruption)  # the others end after the kernel at hand
        raise
    if failures:
        raise failures[0]


class _Worker:
    """A worker process, seen from the one that hands out the work."""

    def __enter__(self) -> _Worker:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        return self

    def compile(self, source: Source, arch: int) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(_pickled((source, arch)))
            self._process.stdin.flush()
            failure = pickle.load(self._process.stdout)
        except (EOFError, OSError):
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")
            failure = f"the compiler's process ended with {self._process.wait()}\n{text[-4000:]}"
        if failure is not None:
            raise RuntimeError(f"{source.function.__name__} did not compile: {failure}")

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class _Pickler(pickle.Pickler):
    """Jitted functions go by their names."""

    def reducer_override(self, value: Any) -> Any:
        if hasattr(value, "cache_key") and hasattr(value, "fn"):
            return _named, (value.fn.__module__, value.fn.__qualname__)
        return NotImplemented


def _named(module: str, name: str) -> Any:
    return attrgetter(name)(importlib.import_module(module))


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _serve(tasks: IO[bytes], answers: IO[bytes]) -> None:
    while True:
        try:
            source, arch = pickle.load(tasks)
        except EOFError:
            return
        failure = None
        try:
            source.binary(arch)
        except Exception:
            failure = traceback.format_exc()
        answers.write(pickle.dumps(failure))
        answers.flush()


if __name__ == "__main__":
    # what compilers print must not get among the answers
    with os.fdopen(os.dup(1), "wb") as answers, contextlib.suppress(KeyboardInterrupt):
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, answers)
