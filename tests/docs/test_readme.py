"""The snippets of the README run as they are."""

import functools
import pathlib
import re

import jax
import pytest

from pathcond_jax.experiments import demo, reproduce

PAGE = pathlib.Path(__file__).parents[2] / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", TEXT, flags=re.M)
SNIPPETS = [
    pytest.param(snippet, id=f"{section.splitlines()[0]} {number}")
    for section in SECTIONS
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S))
]


@functools.cache
def names_after(snippet):
    """What the snippet defines."""
    names = {"__name__": "snippet"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, PAGE.name, "exec"), names)
    return names


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet):
    names_after(snippet)


def test_every_section_that_needs_one_has_a_snippet():
    titles = {section.splitlines()[0] for section in SECTIONS if "```python" in section}
    assert titles >= {
        *("# pathcond_jax", "Your own model", "Other criteria"),
        *("At initialization", "While training", "On many devices"),
    }


def test_the_first_example_prints_the_spec_that_is_shown():
    assert str(names_after(SNIPPETS[0].values[0])["spec"]) in TEXT


def test_what_the_page_points_at_exists():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
    assert f"docs/{demo.PICTURE}" in links
    makefile = (PAGE.parent / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.M)) == set(reproduce.STUDIES)
