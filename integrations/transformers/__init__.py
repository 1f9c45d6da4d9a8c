"""Language models of transformers: what a Trainer trains is recorded, and its memory read as text.

Needs ``dualhook[transformers]``.
"""

from __future__ import annotations

from .callback import DualMemoryCallback
from .explaining import Explanation, explain
from .text import Passages

__all__ = ["DualMemoryCallback", "Explanation", "Passages", "explain"]
