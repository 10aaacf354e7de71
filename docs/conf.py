from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from sphinx.application import Sphinx

project = "persample"
author = "The persample developers"
copyright = author
release = version = version_of("persample")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings quote code in single backticks, as Markdown does: a link where the name is known here, else plain code.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

html_theme = "furo"
html_title = "persample"
html_show_sourcelink = False


def mark_code_blocks(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Mark indented blocks after a paragraph as code, which Markdown takes for granted and reST marks by `::`."""
    marked: list[str] = []
    paragraph_ended, indented = False, False
    for line in lines:
        is_indented = line.startswith("    ")
        if is_indented and paragraph_ended and not indented:
            marked += ["::", ""]
        marked.append(line)
        if line:
            indented = is_indented
        paragraph_ended = not line
    lines[:] = marked


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", mark_code_blocks, priority=400)  # before napoleon
