"""The pages: their snippets run, what they point at exists, and every public name is on them."""

import importlib
import inspect
import pathlib
import re

import jax
import pytest

import pathcond_jax
from pathcond_jax.experiments import reproduce

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Its snippets are parts of a reader's program; test_front_doors_page.py has the reader.
PARTS = DOCS / "front_doors.md"
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem} {number}")
    for page in PAGES
    if page != PARTS
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    )
]
# Modules of public names: those that list them, and those whose own functions and classes they are.
MODULES = ("", ".criteria", ".quantization", ".theory", ".plotting", ".linen")


def public_names(module):
    listed = getattr(module, "__all__", None)
    own = [name for name, value in vars(module).items() if is_own(value, module.__name__)]
    return {name for name in listed or own if not name.startswith("_")}


def is_own(value, module):
    kind = inspect.isfunction(value) or inspect.isclass(value)
    return kind and value.__module__ == module


def documented():
    """What the directives of the API pages show, by name; that of a module shows all its names."""
    found = re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text("utf-8") for p in PAGES), re.M)
    assert len(found) == len(set(found)), "a name is documented twice"
    shown = {}
    for name in found:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        whole = inspect.ismodule(value)
        names = public_names(value) if whole else {attribute}
        shown |= {name: getattr(value, name) if whole else value for name in names}
    return shown


@pytest.fixture(autouse=True)
def keras_settings(monkeypatch, tmp_path):
    """Keras asks for its backend and writes its settings when it is imported."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, "docs", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module):
    package = importlib.import_module(f"pathcond_jax{module}")
    shown = documented()
    for name in public_names(package):
        value = getattr(package, name)
        if not inspect.ismodule(value):
            assert shown.get(name) is value, f"::: pathcond_jax{module}.{name} is on no page"
            assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert "Example:" in inspect.getdoc(value), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_what_a_page_points_at_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for command in re.findall(r"\bmake ([a-z][a-z-]*)\b", "".join(re.findall(r"`[^`]+`", text))):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text("utf-8"), re.M), command


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_every_study_has_its_command_and_result():
    table = re.findall(
        r"^\| `(\w+)` \| .+ \| `pathcond reproduce (\w+)[^`]*` \| .+ \|$",
        (DOCS / "reproduce.md").read_text("utf-8"),
        re.M,
    )
    assert all(name == command for name, command in table)
    assert {name for name, _ in table} == set(reproduce.STUDIES)


def test_the_site_is_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)$", text, re.M)[1] == pathcond_jax.__version__


@pytest.mark.parametrize("module", MODULES)
def test_what_is_returned_is_not_taken_for_a_type(module):
    # In front of a colon, the pages take the text of the first line for the type.
    package = importlib.import_module(f"pathcond_jax{module}")
    for name in public_names(package):
        text = inspect.getdoc(getattr(package, name)) or ""
        returned = text.partition("Returns:\n")[2].partition("\n")[0]
        assert not re.search(r":( |$)", returned), f"{name}: {returned}"
