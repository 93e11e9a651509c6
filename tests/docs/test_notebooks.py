"""The notebooks run from top to bottom, and print what is stored in them."""

import os
import pathlib
import re
import runpy

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
# By notebook, how many pictures it draws.
PICTURES = {
    "01_quickstart": 3,
    "02_training_with_optax": 1,
    "03_tpu_colab": 0,
    "04_quantize_with_qwix": 0,
}
# Qwix belongs to the environment of real models, where test_qwix.py runs these cells too.
LEFT_OUT = "qwix"
# Durations, the devices, where the package comes from, and training at the edge of divergence,
# where rounding decides about the loss.
NOT_COMPARED = re.compile(r"\d ms\b|^\d+ × |^pathcond_jax:|^unlucky +training loss")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def printed(cell):
    lines = "".join(output.get("text", "") for output in cell.outputs).splitlines()
    return [line for line in lines if not NOT_COMPARED.search(line)]


def pictures(notebook):
    return sum("image/png" in o.get("data", {}) for c in code(notebook) for o in c.outputs)


def run(notebook):
    root = {"metadata": {"path": str(NOTEBOOKS.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=root).execute()


def assert_prints_what_is_stored(fresh, stored):
    """Words are equal, numbers close: rounding differs between machines."""
    found, wanted = printed(fresh), printed(stored)
    assert [NUMBER.sub("#", line) for line in found] == [NUMBER.sub("#", line) for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        numbers = [[float(n) for n in NUMBER.findall(line)] for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.2, abs=1e-5), other


def test_all_are_listed():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_outputs_are_stored(name):
    notebook = read(name)
    assert [cell.execution_count for cell in code(notebook)] == [
        number + 1 for number in range(len(code(notebook)))
    ]
    assert pictures(notebook) == PICTURES[name]
    assert any(printed(cell) for cell in code(notebook))
    assert not any(o.output_type == "error" for cell in code(notebook) for o in cell.outputs)


@pytest.mark.filterwarnings("default")
def test_a_run_stores_its_outputs_and_nothing_else(tmp_path):
    path = tmp_path / "small.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")])
    notebook.metadata = {"kernelspec": {"display_name": "any", "name": "python3"}}
    nbformat.write(notebook, path)
    runpy.run_path(str(NOTEBOOKS / "store.py"))["store"](path)
    stored = nbformat.read(path, as_version=4)
    assert printed(stored.cells[0]) == ["42"]
    assert stored.metadata == notebook.metadata
    assert stored.cells[0].metadata == {}


@pytest.mark.study
@pytest.mark.filterwarnings("default")  # The kernel is a process of its own; this is its client.
@pytest.mark.parametrize("name", PICTURES)
def test_a_fresh_run_prints_what_is_stored(name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "cpu")
    stored, fresh = read(name), read(name)
    for notebook in (stored, fresh):
        notebook.cells = [cell for cell in notebook.cells if LEFT_OUT not in tags(cell)]
    run(fresh)
    assert pictures(fresh) == PICTURES[name]
    for one, other in zip(code(fresh), code(stored), strict=True):
        assert_prints_what_is_stored(one, other)
