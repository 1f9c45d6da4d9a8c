"""Language models in the Hugging Face Trainer: a callback that records what they train on.

Needs ``dualhook[transformers]``.
"""

from __future__ import annotations

from .callback import DualMemoryCallback

__all__ = ["DualMemoryCallback"]
