"""Results on disk: one JSON file for each finished run, so that an interruption loses none."""

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pathcond_jax.experiments.study import Result, Task

# JSON has no word for these.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass(frozen=True)
class Store:
    """The finished runs of one study, in a folder.

    Attributes:
      folder: where the JSON files lie; made when the first result is saved.
    """

    folder: Path

    def path(self, task: Task) -> Path:
        """The file of a task's result, named after its settings."""
        text = json.dumps(plain(task.settings), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def load(self, task: Task) -> Result | None:
        """The stored result of a task, or None if there is none that this version made."""
        try:
            record = json.loads(self.path(task).read_text(encoding="utf-8"))
            usable = record["settings"] == plain(task.settings) and record["version"] == _version()
            values = record["values"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None
        return Result(task.name, task.settings, restored(values)) if usable else None

    def save(self, task: Task, values: Mapping[str, Any], seconds: float) -> Result:
        """Stores a result, at once or not at all, and returns it as ``load`` would."""
        record = {
            "name": task.name,
            "settings": plain(task.settings),
            "values": plain(values),
            "seconds": round(seconds, 3),
            "version": _version(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        path = self.path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return Result(task.name, task.settings, restored(record["values"]))


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Writes settings and scalar values of each result as one row."""
    rows = [
        {"name": result.name, **_scalars(result.settings), **_scalars(result.values)}
        for result in results
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plain(value: Any) -> Any:
    """A value as strict JSON: arrays as lists, what is not finite as a word."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def restored(value: Any) -> Any:
    """The inverse of :func:`plain` for numbers, strings, lists and dicts."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _scalars(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plain(mapping).items() if not isinstance(v, (list, dict))}


def _version() -> str:
    try:
        return metadata.version("pathcond-jax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
