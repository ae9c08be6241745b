"""Target detection."""

from .target_detector import Target, auto_detect_nvidia_target

__all__ = ["Target", "auto_detect_nvidia_target"]
