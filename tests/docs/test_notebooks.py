"""The notebooks run from top to bottom, with small settings."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
SMALL = {
    "01_quickstart": "WIDTHS = (12, 6)\nEPOCHS = 2\nSEEDS = 2",
    "02_training_with_optax": "WIDTHS = (12, 6)\nSTEPS = 20\nEVERY = 10",
    "03_tpu_colab": "WIDTH = 16\nDEPTH = 2\nREPEATS = 2",
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_all_are_listed():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_no_output_is_committed(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # The kernel is a process of its own; this is its client.
@pytest.mark.parametrize("name", SMALL)
def test_runs(name, monkeypatch):
    notebook = read(name)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += f"\n{SMALL[name]}"
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "cpu")
    root = {"metadata": {"path": str(NOTEBOOKS.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=root).execute()
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in str(o)]
    assert "score" in text or "training step" in text
    assert len(pictures) == {"01_quickstart": 3, "02_training_with_optax": 1}.get(name, 0)
