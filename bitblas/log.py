"""The logger "bitblas" and its level. Nothing is ever written to stdout."""

from __future__ import annotations

import logging

logger = logging.getLogger("bitblas")
logger.addHandler(logging.NullHandler())


def set_log_level(level: str | int) -> None:
    """Log to stderr from `level` up: a name in any case, or a number; unknown means INFO."""
    if isinstance(level, str):
        number = logging.getLevelName(level.upper())
        level = number if isinstance(number, int) else logging.INFO
    logger.setLevel(level)
    if not any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        handler = logging.StreamHandler()  # stderr
        handler.setFormatter(logging.Formatter("%(asctime)s [%(name)s:%(levelname)s] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # not a second time through the root logger
