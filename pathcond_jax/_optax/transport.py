"""Optimizer states under rescaling: which buffers travel with the parameters, and how.

A buffer of degree d is multiplied by the parameter's factor to the power d: −1 for gradients and
their averages, −2 for second moments, +1 for copies of the parameters. Degrees are measured: the
optimizer is run on small parameters w with gradients g, and again on c·w with g/c, c a power of
two for each entry.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pathcond_jax._action.rescale import LogScales, rescale_buffers
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import leaf_path
from pathcond_jax._spec.types import PyTree, SpecError

KeyPath = tuple[Any, ...]
Arrays = dict[KeyPath, np.ndarray]

_SHORT, _LONG = 8, 512
_PROBING = contextvars.ContextVar("probing", default=False)


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
    name: str
    leaf: int
    path: KeyPath
    shape: tuple[int, ...]
    fits: bool


class _History(NamedTuple):
    """A buffer after init and after each step, from parameters w and from c·w."""

    base: np.ndarray
    scaled: np.ndarray
    log_factor: np.ndarray


def probing() -> bool:
    """Whether an optimizer is being run on stand-ins of the parameters."""
    return _PROBING.get()


def parameter_shapes(spec: ArchSpec) -> PyTree:
    """The parameter tree with a ``jax.ShapeDtypeStruct`` for each array."""
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in spec.leaves]
    return jax.tree.unflatten(spec.treedef, leaves)


def find_buffers(
    inner: optax.GradientTransformation,
    spec: ArchSpec,
    degrees: Mapping[str, int] | None = None,
    probe_args: Mapping[str, Any] | None = None,
) -> Buffers:
    """The buffers of an optimizer that follow rescaled parameters, with their degrees.

    Args:
      inner: the optimizer.
      spec: the architecture.
      degrees: degrees by buffer name, or by the end of one, that are not to be measured.
      probe_args: extra arguments of ``inner.update`` for the measurement.

    Returns:
      The buffers by key path in the state.

    Raises:
      SpecError: a buffer has no degree, or the measurement fails; the message names it.
    """
    found = _find(inner, spec)
    given = _given_degrees(found, spec, degrees or {})
    asked = [buffer for buffer in found if buffer.path not in given]
    measured = _measure(inner, spec, asked, dict(probe_args or {})) if asked else {}
    failed = {b.name: m for b in asked if isinstance(m := measured[b.path], str)}
    if failed:
        listed = "; ".join(f"{name!r} {reason}" for name, reason in failed.items())
        fitting = [b.name for b in asked if b.fits and b.name in failed]
        example = f"{{{fitting[0]!r}: -1}}" if fitting else f"{{{next(iter(failed))!r}: 0}}"
        raise SpecError(
            f"the optimizer's state cannot travel with the parameters: {listed}. Say what to do "
            'with state="reset" or state="keep", or give the power of the scale that a buffer is '
            f"multiplied by, for instance degrees={example}"
        )
    known = given | {path: m for path, m in measured.items() if isinstance(m, int)}
    return {b.path: Buffer(b.name, b.leaf, degree) for b in found if (degree := known.get(b.path))}


def transport(state: PyTree, spec: ArchSpec, log_scales: LogScales, buffers: Buffers) -> PyTree:
    """The optimizer state that belongs to ``rescale(params, spec, log_scales)``.

    Raises:
      SpecError: a buffer is missing from the state.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    places = {path: position for position, (path, _) in enumerate(flat)}
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


def _find(inner: optax.GradientTransformation, spec: ArchSpec) -> list[_Found]:
    """Arrays of the state whose key path contains the path of a parameter that is rescaled."""
    structs = parameter_shapes(spec)
    keys = {path: k for k, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(structs)[0])}
    state = _state_shapes(inner, structs)
    found = []
    for path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            continue
        parts = [
            (stop - start, stop == len(path), start, path[start:stop])
            for start in range(len(path))
            for stop in range(start + 1, len(path) + 1)
            if path[start:stop] in keys
        ]
        if not parts:
            continue
        _, last, start, key = max(parts, key=lambda part: part[:3])
        leaf = keys[key]
        if spec.leaves[leaf].path in spec.rescaled_paths:
            fits = last and tuple(value.shape) == spec.leaves[leaf].shape
            name = leaf_path(path[:start]) if last else leaf_path(path)
            found.append(_Found(name, leaf, path, tuple(value.shape), fits))
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
                raise SpecError(
                    f"degrees: {buffer.name!r} has not the shape of "
                    f"{spec.leaves[buffer.leaf].path!r} and can only be kept, with degree 0"
                )
            given[buffer.path] = degree
    return given


def _measure(
    inner: optax.GradientTransformation, spec: ArchSpec, asked: list[_Found], extra: dict[str, Any]
) -> dict[KeyPath, int | str]:
    """A degree or the reason why there is none, for each buffer."""
    for num_steps in (_SHORT, _LONG):
        probe = _Probe(inner, spec, num_steps, extra)
        verdicts = {b.path: _verdict(b, probe) for b in asked}
        if None not in verdicts.values():
            break
    zero = f"is zero for {_LONG} steps"
    return {path: zero if verdict is None else verdict for path, verdict in verdicts.items()}


def _verdict(buffer: _Found, probe: "_Probe") -> int | str | None:
    """The degree; a string if there is none; None if the buffer was zero throughout."""
    history = probe.history(buffer)
    if history is None:
        return "does not exist for small parameters of the same structure"
    if not buffer.fits:
        small = history.base.shape[1:]
        if small == buffer.shape and np.array_equal(history.base, history.scaled):
            return 0
        return f"has shape {buffer.shape}, which is not the parameter's"
    if not history.base.any() and not history.scaled.any():
        return None
    degree = _degree(history)
    if degree is not None:
        return degree
    # A copy of the parameters that updates move, such as an average of them.
    start = _History(history.base[:1], history.scaled[:1], history.log_factor)
    still = probe.history(buffer, gradients=0.0)
    if history.base[0].any() and _degree(start) == 1 and still is not None and _degree(still) == 1:
        return 1
    return "is not homogeneous: no power of the scale describes how it follows the parameters"


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
    """Runs of an optimizer on stand-ins of the parameters, two entries along each axis."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        spec: ArchSpec,
        num_steps: int,
        extra: dict[str, Any],
    ) -> None:
        rng = np.random.default_rng(0)
        self._spec, self._runs = spec, dict[float, tuple[Arrays, Arrays]]()
        self._run = jax.jit(functools.partial(_run, optax.with_extra_args_support(inner), extra))
        self._compiled: Callable[..., Any] | None = None
        self._factors: list[np.ndarray] = []
        self._params: list[np.ndarray] = []
        self._grads: list[np.ndarray] = []
        # Large for the constants that keep quotients finite, and once more for clipping by a norm.
        sizes = np.resize([8.0, 250.0, 8000.0], num_steps)
        for leaf in spec.leaves:
            shape = tuple(min(n, 2) for n in leaf.shape)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                zeros = np.zeros((num_steps, *shape), np.int32)
                parts = (np.ones(shape, np.int32), zeros, zeros)
            else:
                dtype = compute_dtype(leaf.dtype)
                # Of one sign in all steps: where averages cancel, their ratios are rounding errors.
                signs = rng.choice([-1.0, 1.0], (2, 1, *shape))
                drawn = signs * rng.uniform(0.5, 2.0, (2, num_steps, *shape))
                drawn[1] *= sizes.reshape(-1, *[1] * len(shape))
                factor = 2.0 ** rng.choice([-2, -1, 1, 2], shape)
                parts = tuple(a.astype(dtype) for a in (factor, *drawn))
            for kept, part in zip((self._factors, self._params, self._grads), parts, strict=True):
                kept.append(part)

    def history(self, buffer: _Found, gradients: float = 1.0) -> _History | None:
        base, scaled = self._states(gradients)
        if buffer.path not in base:
            return None
        factor = self._factors[buffer.leaf]
        log_factor = np.log2(factor.astype(np.float64)) if buffer.fits else np.zeros(())
        return _History(base[buffer.path], scaled[buffer.path], log_factor)

    def _states(self, gradients: float) -> tuple[Arrays, Arrays]:
        if gradients not in self._runs:
            ones = [np.ones_like(f) for f in self._factors]
            self._runs[gradients] = (
                self._after(ones, gradients),
                self._after(self._factors, gradients),
            )
        return self._runs[gradients]

    def _after(self, factors: list[np.ndarray], gradients: float) -> Arrays:
        tree = functools.partial(jax.tree.unflatten, self._spec.treedef)
        params = [w * f for w, f in zip(self._params, factors, strict=True)]
        grads = [
            (g * gradients / f).astype(g.dtype) for g, f in zip(self._grads, factors, strict=True)
        ]
        try:
            with _lenient():
                # Compiled ahead, it gives concrete values also inside of a trace.
                if self._compiled is None:
                    self._compiled = self._run.lower(tree(params), tree(grads)).compile()
                flat = self._compiled(tree(params), tree(grads))
                return {
                    path: np.asarray(value, np.float64)
                    for path, value in jax.tree_util.tree_flatten_with_path(flat)[0]
                    if jnp.issubdtype(value.dtype, jnp.floating)
                }
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise SpecError(
                "the optimizer cannot be run on small parameters to measure how its state follows "
                f'them ({type(error).__name__}: {error}). Use state="reset" or state="keep", give '
                "degrees= for every buffer, or probe_args= for the extra arguments of its update"
            ) from error


def _run(
    inner: optax.GradientTransformationExtraArgs,
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
        w = optax.LookaheadParams(w, w) if looks_ahead else w
        _, state = inner.update(g, state, w, **extra)
        return state, state

    _, states = lax.scan(step, state, (params, grads))
    return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), state, states)


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """The promotion that optimizers are written for."""
    token = _PROBING.set(True)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        _PROBING.reset(token)
