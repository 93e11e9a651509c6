"""Results on disk: one JSON file for each finished run, so that an interruption loses none."""

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pathcond_jax.experiments.study import Result, Table, Task

# JSON has no word for these.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# The columns of a CSV file for the indices of an array.
AXES = "ijklmn"


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


def write_tables(path: Path, tables: Iterable[Table]) -> None:
    """Writes each line of the tables as one row; the column ``table`` has the title."""
    _write(
        path,
        [
            {"table": table.title, **dict(zip(map(_one_line, table.heads), row, strict=True))}
            for table in tables
            for row in table.rows
        ],
    )


def write_runs(path: Path, results: Iterable[Result]) -> None:
    """Writes all numbers of the runs, without nesting.

    A row for each run with its settings and its scalars, and one for each entry of its arrays: a
    curve is one row for each point. Arrays of one shape, side by side in ``values``, share their
    rows. The column ``part`` has the keys that lead to them, ``i``, ``j``, ``k``, ... the indices.
    """
    _write(path, [row for result in results for row in run_rows(result)])


def run_rows(result: Result) -> Iterator[dict[str, Any]]:
    """The rows of one run."""
    settings = {
        key: json.dumps(value) if isinstance(value, (list, dict)) else value
        for key, value in plain(result.settings).items()
    }
    scalars = {k: v for k, v in result.values.items() if not isinstance(v, (Mapping, list))}
    yield {"run": result.name, **settings, **_texts(scalars)}
    for part, mapping in _mappings(result.values, ()):
        shapes: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        for key, value in mapping.items():
            if isinstance(value, list):
                array = _array(value)
                shapes.setdefault(array.shape, {})[key] = array
            elif part and not isinstance(value, Mapping):
                shapes.setdefault((), {})[key] = _array(value)
        for shape, arrays in shapes.items():
            for index in np.ndindex(shape):
                entries = {key: array[index] for key, array in arrays.items()}
                axes = dict(zip(AXES, index, strict=False))
                yield {"run": result.name, "part": "/".join(part), **axes, **_texts(entries)}


def _mappings(
    mapping: Mapping[str, Any], part: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """A mapping and all those inside of it, with the keys that lead there."""
    yield part, mapping
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _mappings(value, (*part, key))


def _array(value: Any) -> np.ndarray:
    """Nested lists as an array; what is ragged, as an array of what can be stacked."""
    try:
        return np.array(value, dtype=object if isinstance(value, list) else None)
    except ValueError:
        ragged = np.empty(len(value), dtype=object)
        ragged[:] = value
        return ragged


def _texts(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to six digits, so that float32 is not written as if it were float64."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in scalars.items()}


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
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


def _version() -> str:
    try:
        return metadata.version("pathcond-jax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
