"""The snippets of the docs that are whole programs run as they are."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ("extending.md", "large_models.md")
SNIPPETS = [
    pytest.param(snippet, id=f"{name} {number}")
    for name in PAGES
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text("utf-8"), re.M | re.S)
    )
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, "docs", "exec"), {"__name__": "snippet"})
