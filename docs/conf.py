"""How Sphinx builds these pages: Markdown by MyST, the reference from docstrings, every link checked."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

import dualhook
from dualhook.arguments import ARGUMENTS, parser

project = "dualhook"
author = "The dualhook authors"
version = release = dualhook.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dualhook {release}"
html_show_sphinx = html_copy_source = False
highlight_language = "none"
myst_heading_anchors = 3

autodoc_mock_imports = ["quanda", "dattri", "ray"]  # large, and not needed to read what bridges to them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

# Every name that a page refers to has to be on one, but for those of other packages (to look them up would need a
# network) and for types that signatures name and nobody has to make.
PACKAGES = "torch|numpy|np|nn|pd|pandas|matplotlib|transformers|concurrent|collections|os|pathlib"
TYPES = "BatchScope|Damage|History|Path|Positions|Summary|T|Target|Tensor|TrainingText|Transitions|WeightsEnum"
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"({PACKAGES})\..*"), ("py:class", rf"(.*\.)?({TYPES})")]

NAPOLEON = Config(napoleon_use_rtype=False)


class Help(SphinxDirective):
    """``{help} COMMAND``: what the command line prints for ``dualhook COMMAND --help``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        made = parser(dict.fromkeys(ARGUMENTS, _nothing))
        (commands,) = (action for action in made._actions if isinstance(action.choices, dict))
        assert commands.choices is not None
        text = commands.choices[self.arguments[0]].format_help()
        return [nodes.literal_block(text, text, language="none")]


def convert(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Google's sections as Sphinx's fields; a property is no attribute whose type stands before the first colon."""
    what = "method" if what in ("attribute", "property") else what
    lines[:] = GoogleDocstring(lines, NAPOLEON, app, what, name, documented, options).lines()


def _nothing(options: Any) -> int:
    return 0


def setup(app: Sphinx) -> None:
    """Make both known."""
    app.add_directive("help", Help)
    app.connect("autodoc-process-docstring", convert)
