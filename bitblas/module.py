"""Linear and its helpers under the module name that callers of BitBLAS 0.1 import."""

from .gptq import unpack_qweight, unpack_qzeros, unpack_qzeros_v2
from .linear import BITBLAS_DATABASE_PATH, Linear

__all__ = ["BITBLAS_DATABASE_PATH", "Linear", "unpack_qweight", "unpack_qzeros", "unpack_qzeros_v2"]
