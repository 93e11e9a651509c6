"""The floor plan: which package may import which, and who sees private names."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "pathcond_jax"

# What each room may import, itself aside: everything below it, and nothing beside or above it.
GROUND = {"_spec"}
PROGRAM = GROUND | {"_program"}
SOLVE = GROUND | {"_solve"}
BELOW = {
    "_version": set(),
    "linen": set(),
    "_spec": set(),
    "_program": GROUND,
    "_solve": GROUND,
    "_symmetry": PROGRAM,
    "_lifting": PROGRAM,
    "criteria": PROGRAM | SOLVE | {"_lifting"},
}
BELOW["_action"] = BELOW["criteria"] | {"criteria"}
for room in ("_optax", "quantization", "theory", "plotting"):
    BELOW[room] = BELOW["_action"] | {"_action"}
BELOW["_front"] = BELOW["theory"] | {"_symmetry", "_optax", "quantization", "theory"}
PUBLIC = {"", "criteria", "quantization", "theory", "plotting", "linen"}
BELOW["experiments"] = PUBLIC
BELOW["__main__"] = PUBLIC | {"experiments"}
BELOW["__init__"] = set(BELOW) - {"plotting", "linen", "experiments", "__main__", "__init__"}


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: pathlib.Path) -> set[str]:
    """The rooms a file imports; "" is the package itself, its public names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [node.module]
            if node.module == "pathcond_jax":
                modules = [f"pathcond_jax.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [module.split(".") for module in modules]
        names = {part[1] if part[1:] else "" for part in parts if part[0] == "pathcond_jax"}
        # What is no room is a public name of the package.
        found |= {name if name in BELOW else "" for name in names}
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    room = room_of(path)
    assert imported_rooms(path) - {room} <= BELOW[room]


def test_every_room_is_on_the_plan():
    assert {room_of(path) for path in SOURCES} == set(BELOW)


def test_one_file_imports_the_parts_of_jaxprs():
    code = "from jax.extend"
    readers = [
        p for p in SOURCES if any(s.startswith(code) for s in p.read_text("utf-8").split("\n"))
    ]
    assert [str(path.relative_to(PACKAGE)) for path in readers] == ["_program/primitives.py"]


def test_notebooks_and_benchmarks_use_public_names():
    root = PACKAGE.parent
    pages = [*root.glob("notebooks/*.ipynb"), *root.glob("benchmarks/*.py"), root / "README.md"]
    assert [page.name for page in pages if "pathcond_jax._" in page.read_text("utf-8")] == []
