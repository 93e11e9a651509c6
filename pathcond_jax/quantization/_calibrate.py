"""Calibration: ranges, moments and sensitivities on data, by replaying the user's program."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from pathcond_jax._program.graph import Node
from pathcond_jax._program.replay import Place, replay
from pathcond_jax._spec.arrays import compute_dtype, is_traced, widened
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._program import Batch, Program, numbered, program
from pathcond_jax.quantization._sites import Site, along_channels, channel_scales, meetings
from pathcond_jax.quantization._statistics import Channels, Statistics


class Sums(NamedTuple):
    """What one batch adds: sums over its examples, and extremes.

    Attributes:
      minima: per site, (channels,).
      maxima: per site, (channels,).
      first: per site, sums over the entries of each channel.
      second: per site, sums of their squares.
      counts: per site, how many entries a channel has.
      activations: per site, sums of squared derivatives.
      weights: per leaf, sums of squared derivatives.
      power: the sum of squared outputs.
      examples: how many there are.
    """

    minima: list[jax.Array]
    maxima: list[jax.Array]
    first: list[jax.Array]
    second: list[jax.Array]
    counts: list[jax.Array]
    activations: list[jax.Array]
    weights: list[jax.Array]
    power: jax.Array
    examples: jax.Array


def calibrate(
    apply_fn: Callable[..., Any],
    params: PyTree,
    spec: ArchSpec,
    batches: Iterable[Batch],
    *,
    draws: int = 32,
    seed: int = 0,
) -> Statistics:
    """Ranges and moments of activations, and how much the outputs depend on every number.

    The program is run on each batch with hooks where kernels read activations. Squared derivatives
    are those of random combinations of all outputs of a batch, with signs ±1: their mean is the
    sum over outputs and examples. A batch with no more outputs than ``draws`` is differentiated
    output by output, exactly. A few dozen examples are enough for weights; for activations take a
    few hundred, in batches: what exceeds their range on another example is clipped.

    Args:
      apply_fn: the network, ``apply_fn(params, *inputs)``; of a network in training mode the
        inference form is calibrated.
      params: the parameters, those that are to be quantized.
      spec: the spec of the network and these parameters.
      batches: each an array, or a tuple of the inputs after the parameters; the first axis of
        inputs counts examples.
      draws: of random combinations per batch.
      seed: of the random signs.

    Returns:
      The statistics, in float32 at least.

    Raises:
      SpecError: ``params`` do not fit the spec, there is no batch, or one is not finite or all
        zeros; or no kernel of the network multiplies activations.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import calibrate
      >>> params = {"a": {"w": jnp.array([[1.0, -1.0]])}, "b": {"w": jnp.array([[2.0], [3.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> statistics = calibrate(spec.apply_fn, params, spec, [jnp.array([[1.0], [-2.0]])])
      >>> statistics.channels[1].maximum.tolist(), statistics["a"].tolist()
      ([1.0, 2.0], [1.0, 2.0])
      >>> statistics.sensitivity["b"]["w"].tolist()
      [[0.5], [2.0]]
    """
    leaves = match_leaves(spec, params)
    total: Sums | None = None
    sites: tuple[Site, ...] = ()
    for number, inputs in numbered(batches):
        traced = program(apply_fn, spec, inputs)
        _check_sites(traced)
        found = _sums(
            traced, spec, draws, leaves, jax.tree.leaves(inputs), jax.random.key(seed + number)
        )
        total = found if total is None else _together(total, found)
        sites = sites or traced.sites
    assert total is not None
    statistics = _statistics(total, spec, sites)
    _check_finite(statistics)
    return jax.tree.map(_on_automatic_axes, statistics)


def _on_automatic_axes(value: jax.Array) -> jax.Array:
    """The array where it is, on a mesh whose axes the compiler may use.

    Criteria keep statistics, and solvers run on automatic axes.
    """
    if is_traced(value) or not isinstance(value.sharding, NamedSharding):
        return value
    mesh, spec = value.sharding.mesh, value.sharding.spec
    axes = Mesh(mesh.devices, mesh.axis_names)
    return jax.device_put(value, NamedSharding(axes, spec))


def _check_sites(traced: Program) -> None:
    if not traced.sites:
        raise SpecError(
            "nothing to calibrate: in this network no matrix product or convolution multiplies "
            "activations with a trainable kernel as it is, or reshaped"
        )


def _check_finite(statistics: Statistics) -> None:
    for site, channels in zip(statistics.sites, statistics.channels, strict=True):
        largest = channels.largest
        if not is_traced(largest) and not bool(jnp.isfinite(largest).all()):
            raise SpecError(
                f"the activations that {site.path!r} reads are NaN or infinite on these batches"
            )


def _sums(
    traced: Program, spec: ArchSpec, draws: int, leaves: Sequence[Any], inputs: Any, key: jax.Array
) -> Sums:
    """Everything that one batch tells.

    The draws are a loop here, of one compiled program: on CPU, XLA computes the derivatives of a
    convolution by its kernel some hundred times as slowly within a loop of its own. One program at
    a time: with several under way, devices that share the threads of a CPU may wait for each other
    forever.
    """
    found = jax.block_until_ready(_observed_sums(traced, spec, leaves, inputs))
    squares = found.weights, found.activations
    for draw in range(min(draws, _num_outputs(traced))):
        squares = jax.block_until_ready(
            _squares_added(traced, spec, draws, leaves, inputs, key, np.int32(draw), squares)
        )
    return found._replace(weights=squares[0], activations=squares[1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observed_sums(traced: Program, spec: ArchSpec, leaves: Sequence[Any], inputs: Any) -> Sums:
    """What one run tells, and zeros for squared derivatives."""
    outputs, reads = _outputs_and_reads(traced, spec, leaves, inputs, _trained(spec, leaves), {})

    def each(reduce: Any) -> list[jax.Array]:
        return [_by_channel(site, reads[site.place], reduce) for site in traced.sites]

    powers = [jnp.square(widened(x)).sum() for x in outputs]
    first = each(lambda x: x.sum(1))
    return Sums(
        each(lambda x: x.min(1)),
        each(lambda x: x.max(1)),
        first,
        each(_sum_of_squares),
        each(lambda x: jnp.full(x.shape[:1], x.shape[1], x.dtype)),
        [jnp.zeros_like(x) for x in first],
        [jnp.zeros(leaf.shape, compute_dtype(leaf.dtype)) for leaf in spec.leaves],
        jnp.stack(powers).sum(),
        jnp.asarray(float(_num_examples(inputs))),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _squares_added(
    traced: Program,
    spec: ArchSpec,
    draws: int,
    leaves: Sequence[Any],
    inputs: Any,
    key: jax.Array,
    draw: jax.Array,
    squares: tuple[list[jax.Array], list[jax.Array]],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Adds the squared derivatives of one combination of outputs by leaves and by channels."""
    run = functools.partial(_outputs_and_reads, traced, spec, leaves, inputs)
    weights = _trained(spec, leaves)
    shapes = jax.eval_shape(lambda weights: run(weights, {})[1], weights)
    moves = {place: jnp.zeros(x.shape, x.dtype) for place, x in shapes.items()}
    outputs, pull, reads = jax.vjp(run, weights, moves, has_aux=True)
    cotangent, count = _cotangent(outputs, draws, key, draw)
    by_weight, by_move = pull(cotangent)
    gradients = iter(by_weight)
    by_leaf, by_site = squares
    by_leaf = [
        total + jnp.square(widened(next(gradients))) / count if leaf.trainable else total
        for total, leaf in zip(by_leaf, spec.leaves, strict=True)
    ]
    # Every grid contains 0: what is 0, as half of what leaves a ReLU, has no error.
    rounded = {place: jnp.where(x != 0, by_move[place], 0) for place, x in reads.items()}
    by_site = [
        total + _by_channel(site, rounded[site.place], _sum_of_squares) / count
        for total, site in zip(by_site, traced.sites, strict=True)
    ]
    return by_leaf, by_site


def _trained(spec: ArchSpec, leaves: Sequence[Any]) -> list[jax.Array]:
    return [
        jnp.asarray(value)
        for value, leaf in zip(leaves, spec.leaves, strict=True)
        if leaf.trainable
    ]


def _outputs_and_reads(
    traced: Program,
    spec: ArchSpec,
    leaves: Sequence[Any],
    inputs: Sequence[Any],
    weights: Sequence[Any],
    moves: dict[Place, Any],
) -> tuple[list[Any], dict[Place, Any]]:
    """The floating outputs, and the activations that sites read, which ``moves`` are added to."""
    trained = iter(weights)
    values = [
        next(trained) if leaf.trainable else value
        for value, leaf in zip(leaves, spec.leaves, strict=True)
    ]
    hook = functools.partial(_observed, {site.place: site for site in traced.sites})
    found = replay(traced.graph, [*values, *inputs], hook, moves)
    floats = [x for x in found.outputs if jnp.issubdtype(x.dtype, jnp.floating)]
    return floats, found.records


def _observed(
    by_place: dict[Place, Site], place: Place, node: Node, operands: Sequence[Any], move: Any
) -> tuple[Sequence[Any], Any]:
    """Records the activations that a site reads, moved by zeros to differentiate by them."""
    del node
    site = by_place.get(place)
    if site is None:
        return operands, None
    moved = list(operands)
    if move is not None:
        moved[1 - site.kernel] = moved[1 - site.kernel] + move
    return moved, lax.stop_gradient(operands[1 - site.kernel])


def _cotangent(
    outputs: list[jax.Array], draws: int, key: jax.Array, draw: jax.Array
) -> tuple[list[jax.Array], float]:
    """One cotangent of the outputs, and by how much its square is to be divided."""
    size = sum(x.size for x in outputs)
    if size <= draws:
        flat, count = jax.nn.one_hot(draw, size), 1.0
    else:
        flat, count = jax.random.rademacher(key, (draws, size), jnp.float32)[draw], float(draws)
    ends = np.cumsum([x.size for x in outputs])[:-1]
    parts = jnp.split(flat, ends)
    return [
        part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, outputs, strict=True)
    ], count


def _num_outputs(traced: Program) -> int:
    """How many floating numbers a network puts out."""
    shapes = [traced.graph.avals[output] for output in traced.graph.outputs]
    return sum(x.size for x in shapes if jnp.issubdtype(x.dtype, jnp.floating))


def _by_channel(
    site: Site, values: jax.Array, reduce: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """What ``reduce`` makes of each channel, (channels,), those of all steps of loops."""
    loops = len(site.place) - 1
    steps = widened(values).reshape(-1, *values.shape[loops:])
    return jax.vmap(lambda x: reduce(along_channels(site, x)))(steps).reshape(-1)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.square(x).sum(1)


def _num_examples(inputs: Sequence[Any]) -> int:
    return next((jnp.shape(x)[0] for x in inputs if jnp.ndim(x)), 1)


def _together(one: Sums, two: Sums) -> Sums:
    added = jax.tree.map(jnp.add, one, two)
    return added._replace(
        minima=jax.tree.map(jnp.minimum, one.minima, two.minima),
        maxima=jax.tree.map(jnp.maximum, one.maxima, two.maxima),
    )


def _statistics(total: Sums, spec: ArchSpec, sites: tuple[Site, ...]) -> Statistics:
    count = total.examples
    channels = tuple(
        Channels(low, high, first / entries, second / entries, squares / count)
        for low, high, first, second, entries, squares in zip(*total[:6], strict=True)
    )
    sensitivity = jax.tree.unflatten(spec.treedef, [square / count for square in total.weights])
    return Statistics(
        sites,
        channels,
        sensitivity,
        _largest(spec, sites, channels),
        total.power / count,
        count,
        _unread(spec, sites),
        tuple(dict.fromkeys(site.path for site in sites if meetings(site, spec) is None)),
    )


def _unread(spec: ArchSpec, sites: tuple[Site, ...]) -> tuple[str, ...]:
    read = {site.path for site in sites}
    # Biases and scales of one axis are rounded by no engine.
    return tuple(
        leaf.path
        for leaf in spec.leaves
        if leaf.trainable and len(leaf.shape) > 1 and leaf.path not in read
    )


def _largest(
    spec: ArchSpec, sites: tuple[Site, ...], channels: tuple[Channels, ...]
) -> dict[str, jax.Array]:
    """The largest absolute activation of each neuron, by group."""
    found = jnp.zeros(spec.num_neurons)
    for site, read in zip(sites, channels, strict=True):
        # A channel that several neurons scale says nothing about one of them.
        scales = channel_scales(site, spec)
        owners = sum((m.neurons >= 0).astype(int) for m in scales)
        for meeting in scales:
            alone = (meeting.neurons >= 0) & (owners == 1)
            places = np.where(alone, meeting.neurons, spec.num_neurons)
            found = found.at[places].max(read.largest.astype(found.dtype), mode="drop")
    starts = np.cumsum([0, *(group.size for group in spec.groups)])
    return {
        group.name: found[start : start + group.size]
        for group, start in zip(spec.groups, starts, strict=False)
    }
