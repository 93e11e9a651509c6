"""The snippets of the README run as they are."""

import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parents[1] / "README.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
SNIPPETS = [
    pytest.param(snippet, id=f"{section.splitlines()[0]} {number}")
    for section in SECTIONS
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, PAGE.name, "exec"), {"__name__": "snippet"})


def test_every_section_that_needs_one_has_a_snippet():
    titles = {section.splitlines()[0] for section in SECTIONS if "```python" in section}
    assert titles >= {
        *("# pathcond_jax", "Your own model", "Other criteria"),
        *("At initialization", "While training", "On many devices"),
    }


def test_links_within_the_repository_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
