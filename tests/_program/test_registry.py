"""The registry: every primitive has its entry, every parameter is declared, no name is lost."""

import collections
import os
import subprocess
import sys

import jax
import pytest
from examples import EXAMPLES, WITHOUT_EXAMPLE

import pathcond_jax as pathcond
from pathcond_jax.__main__ import main
from pathcond_jax._lifting.interpreter import RULES as LIFTING
from pathcond_jax._program import primitives
from pathcond_jax._symmetry.values import RULES as SYMMETRY

TABLES = pytest.mark.parametrize("table", [SYMMETRY, LIFTING], ids=lambda table: table.analysis)


def equations(program):
    """All equations of a program, and of the programs inside."""
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if primitives.holds_program(inner):
                    yield from equations(inner)


@pytest.fixture(scope="module")
def parameters():
    """For each primitive, the parameters with which it occurs in the examples."""
    found = collections.defaultdict(list)
    for function, arguments in EXAMPLES.values():
        for eqn in equations(jax.make_jaxpr(function)(*arguments)):
            found[eqn.primitive].append(eqn.params)
    return found


@TABLES
def test_names_that_do_not_resolve_are_known_to_be_absent(table):
    assert table.unresolved <= set(primitives.ABSENT)


@TABLES
def test_every_primitive_of_jax_has_an_entry(table):
    """Fails when a new JAX brings a primitive: give it a rule, or a reason to have none."""
    known = {*table, *table.without, *primitives.calls()}
    assert {name for name, p in primitives.exported().items() if p not in known} == set()
    assert not set(table) & set(table.without)


@TABLES
def test_every_parameter_that_jax_gives_is_declared(table, parameters):
    """Fails when a new JAX brings a parameter: see whether the rule holds for all its values."""
    objections = {
        primitive.name: rule.objection(params)
        for primitive in table
        for params in parameters[primitive]
        if (rule := table.get(primitive)).objection(params)
    }
    assert objections == {}
    assert [p.name for p in table if not parameters[p] and p.name not in WITHOUT_EXAMPLE] == []


def test_unknown_parameters_unusual_values_and_programs_are_objected_to():
    rule = SYMMETRY.get(primitives.find("reshape"))
    usual = {"new_sizes": (2,), "dimensions": None, "sharding": None}
    assert rule.objection(usual) == ""
    assert "'fill'" in rule.objection({**usual, "fill": 1.0})

    program = jax.make_jaxpr(lambda x, y: x + y)(1.0, 1.0)
    added = SYMMETRY.get(primitives.find("scatter-add"))
    assert added.objection({"update_jaxpr": program}) == ""
    product = jax.make_jaxpr(lambda x, y: x * y)(1.0, 1.0)
    assert "unusual 'update_jaxpr'" in added.objection({"update_jaxpr": product})


def test_the_table_of_operations_has_every_primitive():
    shown = pathcond.operations()
    names = {row.name for row in shown.rows}
    assert names >= set(primitives.exported()) - {p.name for p in primitives.calls()}
    by_name = {row.name: row for row in shown.rows}
    assert by_name["dot_general"].symmetry == by_name["dot_general"].lifting == "rule"
    assert by_name["tanh"].symmetry == "no power of a positive scale comes out of it"
    assert by_name["sort"].symmetry == "rule"
    assert by_name["sort"].lifting != "rule"
    assert len(str(shown).splitlines()) >= len(shown.rows)


def test_the_command_prints_the_table(capsys):
    assert main(["operations"]) == 0
    assert capsys.readouterr().out.rstrip() == str(pathcond.operations())


def test_importing_starts_no_backend():
    """Else ``jax.distributed.initialize`` could not be called after it."""
    subprocess.run(
        [sys.executable, "-c", "import pathcond_jax"],
        env={**os.environ, "JAX_PLATFORMS": "none_such"},
        check=True,
    )


def test_a_name_that_jax_does_not_have():
    assert primitives.find("no such primitive") is None
