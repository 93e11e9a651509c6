"""Batch normalization folded into the layer before it."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._program.graph import Graph
from pathcond_jax._spec.trees import describe_leaves
from pathcond_jax._spec.types import Leaf, PyTree, SpecError
from pathcond_jax.quantization._affine import (
    Chain,
    Known,
    coefficients,
    find_chains,
    known_values,
    with_values,
)
from pathcond_jax.quantization._retrace import once_per_shape, shapes_of, traced


class FoldingWarning(UserWarning):
    """A normalization could not be folded into the layer before it."""


def fold_batch_norm(
    apply_fn: Callable[..., Any], variables: PyTree, *inputs: PyTree
) -> tuple[Callable[..., Any], PyTree]:
    """The same network without its batch normalizations, which go into the layers before them.

    In inference, batch normalization multiplies and shifts each channel by numbers that do not
    depend on the input. Where the program shows that it follows a dense layer or a convolution
    whose outputs nothing else reads, ``γ (W x + b − mean) / √(var + ε) + β`` becomes ``W' x + b'``:
    the kernel is multiplied in place, and the new bias lies where β was, or else where another
    parameter of the normalization or the layer was. What is folded is found in the program, not by
    names of layers, so any library's networks do. Fold before conditioning and quantizing: scales
    that the normalization undoes are then part of the weights.

    Args:
      apply_fn: ``apply_fn(variables, *inputs)`` in inference mode.
      variables: parameters and running statistics, such as Flax's ``{"params", "batch_stats"}``.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``; their shapes may differ later.

    Returns:
      The folded apply function, and its parameters, the tree of the variables with new values, and
      without the leaves that are not needed any more. The function can be traced, and is the same
      up to rounding.

    Warns:
      FoldingWarning: some normalization stays as it is; it is named with its line.

    Raises:
      SpecError: the variables have no array to train.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> def apply_fn(variables, x):
      ...     params, mean = variables["params"], variables["batch_stats"]["mean"]
      ...     return jax.nn.relu((x @ params["w"] - mean[None]) * params["scale"][None])
      >>> params = {"w": jnp.ones((2, 3)), "scale": 2.0 * jnp.ones(3)}
      >>> variables = {"params": params, "batch_stats": {"mean": jnp.ones(3)}}
      >>> folded, params = pathcond.quantization.fold_batch_norm(
      ...     apply_fn, variables, jnp.ones((1, 2)))
      >>> sorted(params["params"]), params["params"]["w"][0].tolist()
      (['scale', 'w'], [2.0, 2.0, 2.0])
      >>> folded(params, jnp.ones((4, 2)))[0].tolist()
      [2.0, 2.0, 2.0]

    References:
      Jacob et al., *Quantization and training of neural networks for efficient
      integer-arithmetic-only inference*, CVPR 2018.
    """
    leaves, treedef = describe_leaves(variables)
    shapes = shapes_of(variables)
    plan_for = once_per_shape(lambda inputs: _plan(apply_fn, shapes, inputs, leaves))
    plan = plan_for(inputs)
    _warn_of_rest(plan, leaves)
    values = jax.jit(lambda leaves: _folded(plan, leaves))(jax.tree.leaves(variables))
    kept = [value if k in plan.kept else None for k, value in enumerate(values)]
    params = _without_empty(jax.tree.unflatten(treedef, kept))

    def folded_apply(params: PyTree, *inputs: PyTree) -> Any:
        return _run(plan_for(inputs), jax.tree.leaves(params), jax.tree.leaves(inputs))

    return folded_apply, params


class Fold(NamedTuple):
    """A chain that is folded, and the input of the graph that its bias takes the place of."""

    chain: Chain
    bias: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A folded program.

    Attributes:
      graph: the program as it was.
      known: what it computes from the variables alone.
      folds: what is folded.
      live: positions of the nodes that are still run.
      kept: positions of the leaves that are still read.
      out_tree: the structure of its outputs.
    """

    graph: Graph
    known: Known
    folds: tuple[Fold, ...]
    live: frozenset[int]
    kept: tuple[int, ...]
    out_tree: Any


def _plan(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    inputs: Sequence[PyTree],
    leaves: Sequence[Leaf],
) -> Plan:
    graph, out_tree = traced(apply_fn, variables, inputs)
    numbers = graph.inputs[: len(leaves)]
    known = known_values(graph, numbers)
    states = {k for k, leaf in zip(numbers, leaves, strict=True) if not leaf.trainable}
    chains = [chain for chain in find_chains(graph, known) if states & _read(graph, chain, known)]
    trained = {k for k, leaf in zip(numbers, leaves, strict=True) if leaf.trainable}
    folds = _with_biases(graph, chains, known, trained)
    live, alive = _live(graph, folds)
    kept = tuple(k for k, number in enumerate(numbers) if number in alive)
    return Plan(graph, known, folds, live, kept, out_tree)


def _read(graph: Graph, chain: Chain, known: Known) -> frozenset[int]:
    """The inputs of the graph that the steps of a chain are computed from."""
    others = [graph.nodes[s.node].inputs[1 - s.operand] for s in chain.steps]
    return frozenset().union(*(known.reads[number] for number in others))


def _with_biases(
    graph: Graph, chains: Sequence[Chain], known: Known, trained: set[int]
) -> tuple[Fold, ...]:
    """The chains some parameter of which is free to become the bias: nothing else reads it."""
    folds = []
    used = _live(graph, [Fold(chain, -1) for chain in chains])[1]
    reads = [_read(graph, chain, known) for chain in chains]
    for k, chain in enumerate(chains):
        elsewhere = frozenset().union(used, *reads[:k], *reads[k + 1 :])
        # A trained one, so that it stays a parameter; the last that is added is β.
        order = [
            number
            for step in reversed(chain.steps)
            for number in known.reads[graph.nodes[step.node].inputs[1 - step.operand]]
            if number not in elsewhere and graph.avals[number].size == chain.channels
        ]
        free = [n for n in order if n in trained] + [n for n in order if n not in trained]
        if free:
            folds.append(Fold(chain, free[0]))
    return tuple(folds)


def _live(graph: Graph, folds: Sequence[Fold]) -> tuple[frozenset[int], set[int]]:
    """The positions of nodes that a folded program still runs, and the values it reads."""
    passed = {step.node: step.operand for fold in folds for step in fold.chain.steps}
    alive, live = {*graph.outputs, *(fold.bias for fold in folds)}, set()
    for position, node in reversed(list(enumerate(graph.nodes))):
        if node.effect or alive.intersection(node.outputs):
            live.add(position)
            inputs = node.inputs
            alive.update([inputs[passed[position]]] if position in passed else inputs)
    return frozenset(live), alive


def _folded(plan: Plan, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The variables, kernels and biases of folded layers replaced."""
    graph, found = plan.graph, list(leaves)
    numbers = graph.inputs[: len(leaves)]
    values = with_values(graph, plan.known, dict(zip(numbers, leaves, strict=True)))
    for chain, bias in plan.folds:
        factor, term = coefficients(graph, chain, values)
        kernel, place = numbers.index(chain.kernel), numbers.index(bias)
        shape = [1] * found[kernel].ndim
        shape[chain.kernel_axis] = chain.channels
        found[kernel] = found[kernel] * factor.reshape(shape).astype(found[kernel].dtype)
        found[place] = term.reshape(found[place].shape).astype(found[place].dtype)
    return found


def _run(plan: Plan, leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """The folded program: steps of chains pass their operand on, the last one adds the bias."""
    graph = plan.graph
    if len(leaves) != len(plan.kept):
        raise SpecError(f"{len(leaves)} parameters given, the folded network has {len(plan.kept)}")
    values = {graph.inputs[k]: leaf for k, leaf in zip(plan.kept, leaves, strict=True)}
    values |= zip(graph.inputs[len(graph.inputs) - len(inputs) :], inputs, strict=True)
    passed = {step.node: step for fold in plan.folds for step in fold.chain.steps}
    biases = {fold.chain.steps[-1].node: fold.bias for fold in plan.folds}

    def read(number: int) -> Any:
        return values[number] if number in values else graph.constants[number]

    for position, node in enumerate(graph.nodes):
        if position not in plan.live:
            continue
        if position in passed:
            step = passed[position]
            result = read(node.inputs[step.operand])
            if position in biases:
                result = result + _broadcast(read(biases[position]), result, step.axis)
            values[node.outputs[0]] = result
            continue
        results = node.primitive.bind(*map(read, node.inputs), **node.params)
        results = results if node.primitive.multiple_results else [results]
        values.update(zip(node.outputs, results, strict=True))
    return jax.tree.unflatten(plan.out_tree, [read(number) for number in graph.outputs])


def _broadcast(bias: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    shape = [1] * like.ndim
    shape[axis] = like.shape[axis]
    return jnp.asarray(bias).reshape(shape).astype(like.dtype)


def _warn_of_rest(plan: Plan, leaves: Sequence[Leaf]) -> None:
    """Names the statistics that stay, and what reads them."""
    graph, reads = plan.graph, plan.known.reads
    states = {graph.inputs[k]: leaves[k].path for k in plan.kept if not leaves[k].trainable}
    told: dict[str, list[str]] = {}
    for position in sorted(plan.live):
        node = graph.nodes[position]
        if all(number in reads for number in node.inputs):
            continue
        for number in frozenset().union(*(reads.get(k, frozenset()) for k in node.inputs)):
            if number in states:
                where = f"{node.operation}{f' at {node.source}' if node.source else ''}"
                told.setdefault(where, []).append(states.pop(number))
    if told:
        rest = "; ".join(f"{', '.join(sorted(paths))}: {where}" for where, paths in told.items())
        warnings.warn(
            f"not folded, as no dense layer or convolution that nothing else reads comes before "
            f"it, or the network is not in inference mode: {rest}",
            FoldingWarning,
            stacklevel=3,
        )


def _without_empty(tree: PyTree) -> PyTree:
    """A tree whose dictionaries have lost the keys under which there is no array."""
    if type(tree) is not dict:
        return tree
    return {key: _without_empty(value) for key, value in tree.items() if jax.tree.leaves(value)}
