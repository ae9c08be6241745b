"""Mixed-precision matrix multiplication: C = A · W^T with weights of 1 to 8 bits."""

from . import base, cache, module, ops, quantization, testing, utils
from .attention import FlashAtten, FlashAttenConfig
from .cache import global_operator_cache, load_global_ops_cache
from .config import MatmulConfig, MatmulConfigWithSplitK
from .dense import allow_dense_copies
from .linear import Linear
from .log import set_log_level
from .matmul import Matmul, MatmulWithSplitK
from .precompile import warmup
from .quantization import quantize_activation
from .utils import auto_detect_nvidia_target
from .version import __version__

__all__ = [
    "FlashAtten",
    "FlashAttenConfig",
    "Linear",
    "Matmul",
    "MatmulConfig",
    "MatmulConfigWithSplitK",
    "MatmulWithSplitK",
    "__version__",
    "allow_dense_copies",
    "auto_detect_nvidia_target",
    "base",
    "cache",
    "global_operator_cache",
    "load_global_ops_cache",
    "module",
    "ops",
    "quantization",
    "quantize_activation",
    "set_log_level",
    "testing",
    "utils",
    "warmup",
]
