"""The snippets of docs/training.md run as they are."""

import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "training.md"
SNIPPETS = re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_every_section_has_a_snippet():
    titles = ["At initialization", "While training", "On many devices"]
    assert [title for title, _ in SNIPPETS] == titles


@pytest.mark.parametrize(("title", "snippet"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_snippet(title, snippet):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, f"{PAGE.name}: {title}", "exec"), {"__name__": "snippet"})
