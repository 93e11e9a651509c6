"""The README: its snippet runs, it points at what exists, and it is short."""

import functools
import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
START = (PAGE.parent / "docs" / "get_started.md").read_text(encoding="utf-8")


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


def test_the_first_example_is_the_one_whose_spec_is_shown():
    (first,) = SNIPPETS
    assert first in START
    assert str(names_after(first)["spec"]) in START


def test_what_the_page_points_at_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
    makefile = (PAGE.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.M)
    assert {"demo", "test", "docs"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.M), command


def test_it_is_read_in_a_minute():
    assert len(TEXT.split()) <= 900
