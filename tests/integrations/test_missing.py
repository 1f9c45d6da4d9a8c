"""Integrations whose library is not there say what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["quanda", "dattri", "ray"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, name):
    for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"dualhook.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install 'dualhook\[{name}\]'"):
        importlib.import_module(f"dualhook.integrations.{name}")
