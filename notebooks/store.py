"""Runs notebooks and stores what they print: python notebooks/store.py [NOTEBOOK ...]."""

import pathlib
import sys

import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent


def store(path: pathlib.Path) -> None:
    """Replaces the outputs of a notebook by those of a fresh run, and nothing else."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    root = {"metadata": {"path": str(HERE.parent)}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=root, record_timing=False
    ).execute()
    # What names this machine's interpreter.
    notebook.metadata = metadata
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(HERE.glob("*.ipynb")):
        store(pathlib.Path(name))
        print(f"stored {name}")
