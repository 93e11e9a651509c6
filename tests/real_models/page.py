"""Writes docs/real_models.md from the last measurements; ``--record`` accepts their neurons too.

The tests of this directory measure, and leave one file for each model in build/real_models.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
VERSIONS = (
    "jax", "flax", "equinox", "dm-haiku", "keras", "transformers", "equimo", "diffusers",
    "penzai", "esm2quinox", "flowjax", "foundax",
    "memax", "jax-resnet", "flaxmodels", "jax-models", "jraphx", "mamba2-jax", "mamba3-jax",
)  # fmt: skip
# Changes above it are the rounding of single precision.
SINGLE = 1e-11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write neurons.toml")
    options = parser.parse_args()
    files = sorted((ROOT / "build" / "real_models").glob("*.json"))
    rows = [json.loads(file.read_text("utf-8")) for file in files]
    page = (HERE / "page.md").read_text("utf-8")
    page = page.replace("VERSIONS", versions()).replace("TABLE", table(rows))
    page = page.replace("SUMMARY", summary(rows))
    (ROOT / "docs" / "real_models.md").write_text(page, encoding="utf-8")
    if options.record:
        (HERE / "neurons.toml").write_text("\n".join(map(recorded, rows)), encoding="utf-8")


def versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in VERSIONS]
    return f"Python {platform.python_version()}, {', '.join(found)}"


def summary(rows: list[dict]) -> str:
    small = [row for row in rows if row["dimension"]]
    complete = [row for row in small if row["live"] == row["dimension"]]
    found, all_of_them = (sum(row[key] for row in small) for key in ("live", "dimension"))
    exact = [row for row in rows if row["change"] < SINGLE]
    packages = {package(row) for row in rows}
    largest, of_all = (max(row["change"] for row in some) for some in (exact, rows))
    return (
        f"{len(rows)} models of {len(packages)} packages. The largest change is {largest:.1g} in "
        f"the {len(exact)} models that compute in double precision, and {of_all:.1g} in the "
        f"others. {len(complete)} of {len(small)} small models that have a scale are complete: "
        f"{found} of {all_of_them} dimensions are found in them."
    )


def package(row: dict) -> str:
    return row["name"].partition("/")[0]


def table(rows: list[dict]) -> str:
    lines = [
        "| package | model | parameters | neurons | of all scalings | change | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join(lines + [line(row) for row in rows])


def line(row: dict) -> str:
    share = "" if row["dimension"] is None else f"{row['live']} of {row['dimension']}"
    low = "" if row["change"] < SINGLE else " *"
    name = row["name"].partition("/")[2]
    return (
        f"| {package(row)} | {name} | {row['parameters']} | {row['neurons']} | {share} "
        f"| {row['change']:.0e}{low} | {row['seconds']:.2f} |"
    )


def recorded(row: dict) -> str:
    numbers = {"neurons": row["neurons"]}
    if row["dimension"] is not None:
        numbers |= {"live": row["live"], "dimension": row["dimension"]}
    entries = "".join(f"{key} = {number}\n" for key, number in numbers.items())
    return f'["{row["name"]}"]\n{entries}'


if __name__ == "__main__":
    main()
