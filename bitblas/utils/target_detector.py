"""What the operators run on: a GPU architecture or the CPU."""

from __future__ import annotations

import re
import sys

import torch


class Target(str):
    """A target string, "cuda -arch=sm_90" or "cpu", with its parts."""

    @property
    def arch(self) -> str:
        """ "sm_90" or the like; "cpu" without a GPU."""
        match = re.search(r"-arch=(\w+)", self)
        return match.group(1) if match else str(self)

    @property
    def is_gpu(self) -> bool:
        return self.startswith("cuda")


def auto_detect_nvidia_target(gpu_id: int = 0) -> Target:
    """ "cuda -arch=sm_XY" from the compute capability that the CUDA runtime reports, else "cpu".

    A gpu_id that the process does not see means its first GPU: callers pass ids out of
    CUDA_VISIBLE_DEVICES, which count the machine's GPUs. ValueError for a negative one.
    """
    if gpu_id < 0:
        raise ValueError(f"gpu_id: got {gpu_id}, expected 0 or more")
    if not torch.cuda.is_available():
        return Target("cpu")
    if gpu_id >= torch.cuda.device_count():
        gpu_id = 0
    major, minor = torch.cuda.get_device_capability(gpu_id)
    return Target(f"cuda -arch=sm_{major}{minor}")


_detect = auto_detect_nvidia_target  # also where a caller replaced the public name


def resolve_target(target: str | None) -> Target:
    """A caller's target ("cpu", "cuda", "cuda -arch=sm_90", "nvidia/..."), or the detected one.

    auto_detect_nvidia_target is looked up when called, because callers replace it in one of the
    modules that export it.
    """
    detect = _detect
    for name in ("bitblas", "bitblas.utils", "bitblas.utils.target_detector"):
        exported = getattr(sys.modules.get(name), "auto_detect_nvidia_target", _detect)
        if exported is not _detect:
            detect = exported
    if target is None:
        target = detect()
    if not isinstance(target, str):
        target = str(target)  # a target object of another library prints as its string
    if target in ("cpu", "llvm"):
        return Target("cpu")
    if re.fullmatch(r"cuda( -arch=sm_\d+a?)?", target):
        return Target(target)
    if target.startswith(("nvidia/", "cuda ")):  # device tags of BitBLAS 0.1
        return _detect()
    raise ValueError(f"target: got {target!r}, expected None, 'cpu', 'cuda' or 'cuda -arch=sm_XY'")
