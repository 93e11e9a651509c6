"""Optimizer states under rescaling: which buffers travel with the parameters, and how.

A buffer of degree d is multiplied by the parameter's factor to the power d: −1 for gradients and
their averages, −2 for second moments, +1 for copies of the parameters. Degrees are measured: the
optimizer is run on small parameters w with gradients g, and again on c·w with g/c, c a power of
two for each entry.

From the top: what travels (``find_buffers``) and how (``transport``); where the buffers of a state
are; the verdict on each; the runs.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pathcond_jax._action.rescale import LogScales, rescale_buffers
from pathcond_jax._optax.matching import held
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import leaf_path
from pathcond_jax._spec.types import PyTree, SpecError

KeyPath = tuple[Any, ...]
Arrays = dict[KeyPath, np.ndarray]

_SHORT, _LONG = 8, 512
# Sizes of the entries of gradients: too small for clipping and large beside the constants that
# keep quotients finite; and far outside of that, to tell what a buffer mixes.
_USUAL, _TINY, _LARGE = 2.0**-10, 2.0**-40, 2.0**20


class Buffer(NamedTuple):
    """An array of an optimizer state that belongs to one parameter.

    Attributes:
      name: its place in the state without the parameter's path, as in ``"0/trace"``.
      leaf: position of the parameter in ``spec.leaves``.
      degree: the power of the parameter's factor that it is multiplied by.
    """

    name: str
    leaf: int
    degree: int


Buffers = Mapping[KeyPath, Buffer]


class _Found(NamedTuple):
    """A floating array of a state; ``leaf`` is None and ``fits`` false for one of no parameter."""

    name: str
    leaf: int | None
    path: KeyPath
    shape: tuple[int, ...]
    fits: bool


class _Refusal(NamedTuple):
    """Why a buffer has no degree, and the one that comes nearest."""

    reason: str
    nearest: int = 0


class _History(NamedTuple):
    """A buffer after init and after each step, from parameters w and from c·w."""

    base: np.ndarray
    scaled: np.ndarray
    log_factor: np.ndarray

    def from_step(self, first: int, last: int | None = None) -> "_History":
        """A part of the steps; the state after init is step 0."""
        return _History(self.base[first:last], self.scaled[first:last], self.log_factor)


def parameter_shapes(spec: ArchSpec) -> PyTree:
    """The parameter tree with a ``jax.ShapeDtypeStruct`` for each array."""
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in spec.leaves]
    return jax.tree.unflatten(spec.treedef, leaves)


def followed(
    inner: optax.GradientTransformation,
    spec: ArchSpec,
    degrees: Mapping[str, int] | None = None,
    probe_args: Mapping[str, Any] | None = None,
) -> Callable[[PyTree], Buffers]:
    """``find_buffers`` for whatever part of the spec's tree an optimizer holds, each measured once.

    Where all leaves are trained the optimizer is taken to hold the spec's tree, and measured at
    once, so that errors come early.

    Returns:
      A function of the parameters of the optimizer.
    """
    measured: dict[tuple[str, ...], Buffers] = {}

    def buffers_of(params: PyTree) -> Buffers:
        params = params.fast if isinstance(params, optax.LookaheadParams) else params
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        # Flax nnx has variables at init and arrays at update, under the same paths.
        names = tuple(leaf_path(key) for key, _ in flat)
        if names not in measured:
            structs = jax.tree.map(
                lambda p: jax.ShapeDtypeStruct(np.shape(p), jnp.result_type(p)), params
            )
            measured[names] = find_buffers(inner, spec, degrees, probe_args, structs)
        return measured[names]

    is_contents = not any(leaf.path.startswith("params/") for leaf in spec.leaves)
    if is_contents and all(leaf.trainable for leaf in spec.leaves):
        buffers_of(parameter_shapes(spec))
    return buffers_of


def find_buffers(
    inner: optax.GradientTransformation,
    spec: ArchSpec,
    degrees: Mapping[str, int] | None = None,
    probe_args: Mapping[str, Any] | None = None,
    params: PyTree = None,
) -> Buffers:
    """The buffers of an optimizer that follow rescaled parameters, with their degrees.

    Args:
      inner: the optimizer.
      spec: the architecture.
      degrees: degrees by buffer name, or by the end of one, that are not to be measured.
      probe_args: extra arguments of ``inner.update`` for the measurement.
      params: shapes of what the optimizer holds; None: the spec's tree.

    Returns:
      The buffers by key path in the state.

    Raises:
      SpecError: a buffer has no degree, or the measurement fails; the message names it.
    """
    params = parameter_shapes(spec) if params is None else params
    found = _find(inner, spec, params)
    given = _given_degrees(found, spec, degrees or {})
    asked = [buffer for buffer in found if buffer.path not in given]
    measured = _measure(inner, spec, params, asked, dict(probe_args or {})) if asked else {}
    refused = {b.name: m for b in asked if isinstance(m := measured[b.path], _Refusal)}
    if refused:
        listed = "; ".join(f"{name!r} {refusal.reason}" for name, refusal in refused.items())
        example = {name: refusal.nearest for name, refusal in refused.items()}
        raise SpecError(
            f"the optimizer's state cannot travel with the parameters: {listed}. Say what to do "
            'with state="reset" or state="keep", or give the powers of the scale that are to be '
            f"used all the same, 0 to leave a buffer alone: degrees={example}"
        )
    known = given | {path: m for path, m in measured.items() if isinstance(m, int)}
    return {
        b.path: Buffer(b.name, b.leaf, degree)
        for b in found
        if b.leaf is not None and (degree := known[b.path])
    }


def transport(state: PyTree, spec: ArchSpec, log_scales: LogScales, buffers: Buffers) -> PyTree:
    """The optimizer state that belongs to ``rescale(params, spec, log_scales)``.

    Raises:
      SpecError: a buffer is missing from the state.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    places = {_plain(path): position for position, (path, _) in enumerate(flat)}
    values = [value for _, value in flat]
    missing = [buffer.name for path, buffer in buffers.items() if path not in places]
    if missing:
        raise SpecError(
            f"the optimizer state has no {missing[0]!r}; was it made by another optimizer?"
        )
    moved = rescale_buffers(
        [(values[places[path]], b.leaf, b.degree) for path, b in buffers.items()], spec, log_scales
    )
    for path, value in zip(buffers, moved, strict=True):
        values[places[path]] = value
    return jax.tree.unflatten(treedef, values)


def _plain(path: KeyPath) -> KeyPath:
    """A key path without the step from a Flax nnx variable to its array."""
    last = path[-1] if len(path) > 1 else None
    is_array = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value"
    return path[:-1] if is_array else path


def _find(inner: optax.GradientTransformation, spec: ArchSpec, params: PyTree) -> list[_Found]:
    """The arrays of the state whose key path has that of a rescaled parameter in it, or of none."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    positions = held(spec, params, "params")
    keys = {_plain(key): k for (key, _), k in zip(flat, positions, strict=True)}
    found = []
    for key, value in jax.tree_util.tree_flatten_with_path(_state_shapes(inner, params))[0]:
        path, shape = _plain(key), tuple(value.shape)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            continue
        parts = [
            (stop - start, stop == len(path), start, path[start:stop])
            for start in range(len(path))
            for stop in range(start + 1, len(path) + 1)
            if path[start:stop] in keys
        ]
        if not parts:
            found.append(_Found(leaf_path(path), None, path, shape, False))
            continue
        _, last, start, part = max(parts, key=lambda part: part[:3])
        leaf = keys[part]
        if spec.leaves[leaf].path in spec.rescaled_paths:
            fits = last and shape == spec.leaves[leaf].shape
            name = leaf_path(path[:start]) if last else leaf_path(path)
            found.append(_Found(name, leaf, path, shape, fits))
    return found


def _state_shapes(inner: optax.GradientTransformation, params: PyTree) -> PyTree:
    with _lenient():
        return jax.eval_shape(inner.init, params)


def _given_degrees(
    found: list[_Found], spec: ArchSpec, degrees: Mapping[str, int]
) -> dict[KeyPath, int]:
    given: dict[KeyPath, int] = {}
    for key in sorted(degrees, key=len):
        degree = degrees[key]
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise SpecError(f"degrees[{key!r}] is {degree!r}; an integer is needed")
        named = [b for b in found if f"/{b.name}".endswith(f"/{key}")]
        if not named:
            names = ", ".join(sorted({repr(b.name) for b in found})) or "none"
            raise SpecError(f"degrees: no buffer {key!r}; the optimizer has {names}")
        for buffer in named:
            if degree and not buffer.fits:
                leaf = "a parameter" if buffer.leaf is None else spec.leaves[buffer.leaf].path
                raise SpecError(
                    f"degrees: {buffer.name!r} has not the shape of {leaf!r} and can only be "
                    "kept, with degree 0"
                )
            given[buffer.path] = degree
    return given


def _measure(
    inner: optax.GradientTransformation,
    spec: ArchSpec,
    params: PyTree,
    asked: list[_Found],
    extra: dict[str, Any],
) -> dict[KeyPath, int | _Refusal]:
    """A degree or the reason why there is none, for each buffer."""
    for num_steps in (_SHORT, _LONG):
        probe = _Probe(inner, spec, params, num_steps, extra)
        verdicts = {b.path: _verdict(b, probe) for b in asked}
        if None not in verdicts.values():
            break
    zero = _Refusal(f"is zero for {_LONG} steps")
    return {path: zero if verdict is None else verdict for path, verdict in verdicts.items()}


def _verdict(buffer: _Found, probe: "_Probe") -> int | _Refusal | None:
    """What is known of a buffer; None if it was zero throughout."""
    history = probe.history(buffer)
    if history is None:
        return _Refusal("does not exist for small parameters of the same structure")
    small = history.base.shape[1:]
    zero = not history.base.any() and not history.scaled.any()
    unmoved = np.allclose(history.base, history.scaled, rtol=1e-4, atol=0.0)
    if buffer.leaf is None:
        # Of scalars, zeros are settings rather than buffers that are yet to be filled.
        if zero and small:
            return None
        return 0 if unmoved else _Refusal("changes with the scale and belongs to no one parameter")
    if not buffer.fits:
        if small == buffer.shape and unmoved:
            return 0
        return _Refusal(f"has shape {buffer.shape}, which is not the parameter's")
    if zero:
        return None
    degree = _degree(history)
    if degree is not None:
        return degree
    # A copy of the parameters that updates move, such as an average of them.
    start = history.from_step(0, 1)
    still = probe.history(buffer, 0.0)
    if history.base[0].any() and _degree(start) == 1 and still is not None and _degree(still) == 1:
        return 1
    return _mixed(buffer, probe)


def _mixed(buffer: _Found, probe: "_Probe") -> _Refusal:
    """Why no power of the scale describes how a buffer follows the parameters."""
    tiny, large = (
        # Without the initial value, which may be what is of a fixed size.
        None if history is None else _degree(history.from_step(1))
        for history in (probe.history(buffer, size) for size in (_TINY, _LARGE))
    )
    if tiny is None or large is None or tiny == large:
        nearest = next((d for d in (large, tiny) if d is not None), 0)
        return _Refusal(
            "is not homogeneous: no power of the scale describes how it follows the parameters",
            nearest,
        )
    return _Refusal(
        f"is not homogeneous: it follows the power {tiny} of the scale where gradients are tiny "
        f"and {large} where they are large, since something of a fixed size is added to them",
        large,
    )


def _degree(history: _History) -> int | None:
    base, scaled, log_factor = np.broadcast_arrays(*history)
    seen = (base != 0) | (scaled != 0)
    base, scaled, log_factor = base[seen], scaled[seen], log_factor[seen]
    with np.errstate(all="ignore"):
        ratio = np.log2(scaled / base)
    if not seen.any() or not np.isfinite(ratio).all():
        return None
    degree = round(float(np.median(ratio / log_factor)))
    return degree if (abs(ratio - degree * log_factor) < 1e-4).all() else None


class _Probe:
    """Runs of an optimizer on stand-ins of the parameters, two entries along each axis.

    Args:
      inner: the optimizer.
      spec: the architecture.
      params: shapes of what the optimizer holds.
      num_steps: how many updates a run has.
      extra: extra arguments of ``inner.update``.
    """

    def __init__(
        self,
        inner: optax.GradientTransformation,
        spec: ArchSpec,
        params: PyTree,
        num_steps: int,
        extra: dict[str, Any],
    ) -> None:
        structs, self._treedef = jax.tree.flatten(params)
        drawn = _stand_ins(structs, num_steps)
        self._params, self._grads, self._factors = drawn
        self._place = {k: place for place, k in enumerate(held(spec, params, "params"))}
        self._inner, self._extra = optax.with_extra_args_support(inner), extra
        self._states = functools.cache(self._both)

    def history(self, buffer: _Found, size: float = _USUAL) -> _History | None:
        """What became of a buffer, with gradients of this size; None if it is not in the state."""
        base, scaled = self._states(size)
        if buffer.path not in base:
            return None
        log_factor = np.zeros(())
        if buffer.fits and buffer.leaf is not None:
            log_factor = np.log2(self._factors[self._place[buffer.leaf]].astype(np.float64))
        return _History(base[buffer.path], scaled[buffer.path], log_factor)

    @functools.cached_property
    def _compiled(self) -> Callable[[PyTree, PyTree], PyTree]:
        """All steps as one program."""
        shapes = [
            jax.tree.unflatten(
                self._treedef, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in part]
            )
            for part in (self._params, self._grads)
        ]
        # Some optimizers need a loss, and some, such as SAM, take no argument that is not theirs.
        errors = []
        for arguments in (_usual_arguments, lambda _: {}):
            run = jax.jit(functools.partial(_run, self._inner, arguments, self._extra))
            try:
                with _lenient():
                    # Compiled ahead, it gives concrete values also inside of a trace.
                    return run.lower(*shapes).compile()
            except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
                errors.append(error)
        raise SpecError(
            "the optimizer cannot be run on small parameters to measure how its state follows them "
            f'({type(errors[0]).__name__}: {errors[0]}). Use state="reset" or state="keep", give '
            "degrees= for every buffer, or probe_args= for the extra arguments of its update"
        ) from errors[0]

    def _both(self, size: float) -> tuple[Arrays, Arrays]:
        # Clipping by a global norm is not to be met in a network of many parameters either.
        total = sum(map(np.size, self._factors))
        size = min(size, 2.0**-4 / math.sqrt(total)) if size == _USUAL else size
        ones = [np.ones_like(f) for f in self._factors]
        return self._after(ones, size), self._after(self._factors, size)

    def _after(self, factors: list[np.ndarray], size: float) -> Arrays:
        tree = functools.partial(jax.tree.unflatten, self._treedef)
        params = tree([w * f for w, f in zip(self._params, factors, strict=True)])
        grads = tree(
            [(g * size / f).astype(g.dtype) for g, f in zip(self._grads, factors, strict=True)]
        )
        with _lenient():
            flat = jax.tree_util.tree_flatten_with_path(self._compiled(params, grads))[0]
        return {
            _plain(path): np.asarray(value, np.float64)
            for path, value in flat
            if jnp.issubdtype(value.dtype, jnp.floating)
        }


def _stand_ins(structs: list[Any], num_steps: int) -> tuple[list[np.ndarray], ...]:
    """Parameters and gradients of size 1 at each step, and a factor for each entry."""
    rng = np.random.default_rng(0)
    drawn: list[tuple[np.ndarray, ...]] = []
    for struct in structs:
        shape = tuple(min(n, 2) for n in struct.shape)
        if not jnp.issubdtype(struct.dtype, jnp.floating):
            zeros = np.zeros((num_steps, *shape), np.int32)
            drawn.append((zeros, zeros, np.ones(shape, np.int32)))
            continue
        dtype = compute_dtype(struct.dtype)
        # Of one sign in all steps: where averages cancel, their ratios are rounding errors.
        signs = rng.choice([-1.0, 1.0], (2, 1, *shape))
        params, grads = signs * rng.uniform(0.5, 2.0, (2, num_steps, *shape))
        factors = 2.0 ** rng.choice([-2, -1, 1, 2], shape)
        drawn.append(tuple(a.astype(dtype) for a in (params, grads, factors)))
    return tuple(map(list, zip(*drawn, strict=True)))


def _usual_arguments(params: PyTree) -> dict[str, Any]:
    """What an optimizer may ask for beside gradients and parameters."""

    # For scale_by_path: what a network would have in which every path has the norm 1.
    def gram(p: jax.Array) -> jax.Array:
        return 1 / jnp.square(p.astype(compute_dtype(p.dtype)))

    return {"value": jnp.ones(()), "gram_diagonal": jax.tree.map(gram, params)}


def _run(
    inner: optax.GradientTransformationExtraArgs,
    arguments: Callable[[PyTree], dict[str, Any]],
    extra: dict[str, Any],
    params: PyTree,
    grads: PyTree,
) -> PyTree:
    """The states after init and after each step, stacked."""
    state = inner.init(jax.tree.map(lambda a: a[0], params))
    looks_ahead = any(
        isinstance(part, optax.LookaheadState)
        for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.LookaheadState))
    )

    def step(state: PyTree, now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        w, g = now
        given = {**arguments(w), **extra}
        _, state = inner.update(
            g, state, optax.LookaheadParams(w, w) if looks_ahead else w, **given
        )
        return state, state

    _, states = lax.scan(step, state, (params, grads))
    return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), state, states)


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """The promotion that optimizers are written for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
