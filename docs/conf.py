"""The documentation site: MyST pages, API pages from the docstrings."""

import re

import subquad

project = "subquad"
author = "The subquad authors"
release = version = subquad.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"subquad {release}"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Two classes may share an attribute's name; a word that could mean either stays a plain word.
suppress_warnings = ["ref.python"]

autosummary_generate = True
# Only what a module defines: what it passes on stands on the page of its home.
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Hugging Face's own docstrings are not ours to render.
autodoc_inherit_docstrings = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # a field list: a property of the same name is not described twice
napoleon_custom_sections = [("Class attributes", "Attributes")]

_SECTION = re.compile(r"(Args|Attributes|Class attributes|Returns|Raises|Yields|Notes?|Examples?):")
_CODE = re.compile(r"(``.*?``|`[^`]*`(?:__?)?|:[a-z:]+:`[^`]*`)")


def _plain(line: str) -> str:
    """``line`` with the characters escaped that reStructuredText would take for markup."""
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _readable(app, what, name, obj, options, lines: list[str]) -> None:
    """Show an indented paragraph of a docstring as code, and take ``*`` and ``|`` as they stand.

    The docstrings are written to be read in a terminal: formulas and examples are indented.
    """
    out: list[str] = []
    text, gap, block = "", True, None  # the last line of text, a blank one since, a block's indent
    for line in lines:
        if line.strip():
            if block is not None and _indent(line) < block:
                block = None
            deeper = gap and _indent(line) > _indent(text) and not _SECTION.match(text.strip())
            if block is None and deeper:
                block = _indent(line)
                out += [" " * _indent(text) + "::", ""]
            if block is None:
                text = line
        out.append(line if block is not None else _plain(line))
        gap = not line.strip()
    lines[:] = out


def setup(app) -> None:
    # Before napoleon, which then sees escaped text in its sections.
    app.connect("autodoc-process-docstring", _readable, priority=100)
