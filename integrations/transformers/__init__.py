"""Recording language models of transformers, and reading their memory as text; needs ``dualhook[transformers]``."""

from __future__ import annotations

from dualhook.integrations.transformers.callback import DualMemoryCallback
from dualhook.integrations.transformers.explaining import Explanation, explain
from dualhook.integrations.transformers.text import Passages

__all__ = ["DualMemoryCallback", "Explanation", "Passages", "explain"]
