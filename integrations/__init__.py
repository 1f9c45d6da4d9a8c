"""Bridges to other libraries, one module each; a module imports its library, this package imports none."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["library"]


def library(module: str) -> Any:
    """Import what an integration of the library's name bridges to.

    Raises:
        ModuleNotFoundError: it is not installed; the extra that brings it is named.
    """
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"dualhook.integrations.{name} needs {name}: pip install 'dualhook[{name}]' ({error})", name=error.name
        ) from error
