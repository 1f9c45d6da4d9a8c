"""Recording language models of transformers, and reading their memory as text; needs ``dualhook[transformers]``."""

from __future__ import annotations

from dualhook.integrations.transformers.explaining import Explanation, explain
from dualhook.integrations.transformers.text import Passages

__all__ = ["Explanation", "Passages", "explain"]
