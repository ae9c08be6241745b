"""Which calls may be repeated as they were prepared, past checks and dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from .torch_ops import Optional

MOST_CALLS = 1024  # kinds of operands whose call an operator keeps

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing


def plain_eager() -> bool:
    """Whether nothing is there that wants to see the registered operator."""
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def kind_of(operands: tuple[Optional, ...]) -> Any:
    """All that the checks of a call look at; None for what only they can tell apart."""
    kind: list[Any] = []
    try:
        for x in operands:
            if x is None:
                kind.append(None)
            else:
                kind += type(x), x.shape, x.dtype, x.device, x.is_contiguous(), x.requires_grad
        return tuple(kind)
    except Exception:  # not a tensor, or one without strides: the checks say which
        return None


def unknown(operands: tuple[Optional, ...]) -> None:
    """The call of operands that were not met before: none yet."""
