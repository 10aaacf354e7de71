from __future__ import annotations

import re
from importlib.metadata import version as version_of
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

project = "persample"
author = "The persample developers"
copyright = author
release = version = version_of("persample")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings quote code in single backticks, as Markdown does: a link where the name is known here, else plain code.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = [name for name in ("lightning", "transformers", "laplace") if find_spec(name) is None]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

# The gallery is the folder `examples`. What needs further packages or a download is shown, but not run by the build.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"(?<!lightning_module)(?<!hugging_face_trainer)(?<!bayesian_lora)(?<!out_of_distribution)"
    r"\.py$",
    "within_subsection_order": "ExampleTitleSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "write_computation_times": False,
    "abort_on_example_error": True,
}

html_theme = "furo"
html_title = "persample"
html_show_sourcelink = False

# The pages are complete without a network: MathJax comes from a package, as one file without fonts of its own.
html_static_path = ["_static", str(files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js")]
mathjax_path = "tex-svg.js"
html_css_files = ["custom.css"]


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


_LOADS = re.compile(r'<(?:script|img|link\b[^>]*rel="(?:stylesheet|preload)")[^>]*(?:src|href)="(?:https?:)?//[^"]+')


def refuse_the_network(app: Sphinx, exception: Exception | None) -> None:
    """Fail the build if a page loads a script, a style sheet or a picture from elsewhere."""
    if exception is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if found := _LOADS.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page.name} loads from the network: {found[0]}")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", refuse_the_network)
    app.connect("autodoc-process-docstring", mark_code_blocks, priority=400)  # before napoleon
