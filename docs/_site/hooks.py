"""What the site adds to MkDocs: formulas as MathML, which browsers draw without a script.

Nothing that a page needs comes from elsewhere, so that the site can be read without a network.
"""

import html
import re
from typing import Any

import griffe
import latex2mathml.converter

# What pymdownx.arithmatex leaves: \(inline\) and \[display\].
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Browsers set names of functions close to what stands beside them, as if to be multiplied.
FUNCTION = re.compile(r"<m([io])>(?:log|exp|min|max)</m\1>")
DISPLAY = {"span": "inline", "div": "block"}
# The docstrings say Example:, which is a section to doctest and an admonition to griffe.
EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|mod):(?=`)")
# Material's offline plugin takes from there what is in this folder.
SHIM = "https://unpkg.com/iframe-worker/shim"


def mathml(found: re.Match[str]) -> str:
    """A formula of the page as MathML."""
    formula = html.unescape(found[2])
    converted = latex2mathml.converter.convert(formula, display=DISPLAY[found[1]])
    return FUNCTION.sub(r'<mspace width="0.17em"/>\g<0><mspace width="0.17em"/>', converted)


def on_page_content(page_html: str, **_: Any) -> str:
    """MkDocs calls it with each page after Markdown."""
    return FORMULA.sub(mathml, page_html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """MkDocs calls it with each finished page."""
    return output.replace(SHIM, "../" * page.url.count("/") + "_site/iframe-worker.js")


class Docstrings(griffe.Extension):
    """Lets examples of docstrings be shown as code, and references without their role."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls it with each function, class and module."""
        if obj.docstring:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub("", text)
