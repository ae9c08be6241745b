"""Kernels in Triton's interpreter, which is chosen when triton is imported: in processes of their
own, which run the `main` of a test module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


def interpret_all(module: str, shards: int) -> dict[str, object]:
    """What `python module i` prints through print_results, for i in range(shards), at once."""
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parent), str(root), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, module, str(shard)], env=environment, stdout=subprocess.PIPE
        )
        for shard in range(shards)
    ]
    results: dict[str, object] = {}
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        results |= json.loads(output)
    return results


def print_results(cases: Mapping[str, Callable[[], object]]) -> None:
    """Run cases in the interpreter and print their results as JSON: what they return, or the text
    of an exception."""
    _patch()
    results: dict[str, object] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def _patch() -> None:
    from triton.runtime import interpreter

    # NumPy 2.4 refuses int() of one-element arrays, which Triton 3.6 uses for loop bounds.
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
    # Triton 3.9 refuses masks that came out of its own logic as integers.
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def load_with_boolean_mask(self, pointers, mask, *rest):
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return load(self, pointers, mask, *rest)

    builder.create_masked_load = load_with_boolean_mask
