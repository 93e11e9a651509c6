"""Random programs: lists of steps, from which any can be dropped."""

import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fuzzing.operations import LAYERS, UNUSUAL

_INPUT_SHAPES = ((2, 3), (2, 4), (3, 3), (2, 3, 4), (2, 3, 2), (1, 3), (3,), (2, 2, 3, 2))
_MAX_SIZE, _MAX_NDIM, _MAX_PARAMETERS = 48, 4, 120
# Of what an integer input, a trip count or an index, is drawn.
_INTEGERS = (0, 1, 2)
# Families of many variants come more often; what makes a program slow to check, less.
_WEIGHTS = {
    **dict.fromkeys(("unary", "binary", "dense_of_function"), 4),
    **dict.fromkeys(("reduced", "gathered", "repeated", "scattered"), 3),
    **dict.fromkeys(("scattered_otherwise", "cumulative", "sorted_", "windowed", "selected"), 2),
    **dict.fromkeys(("contraction", "tied", "homogeneous_unary", "wrapped", "recurrent"), 2),
    **dict.fromkeys(("reference", "callback", "drawn", "named", "collective"), 0.7),
}
_FREQUENT = ("dense", "dense_relu", "dense_relu", "residual", "rectified", "bias", "scale")


class Step(NamedTuple):
    """An operation on earlier values; ``inner`` are steps that it wraps."""

    name: str
    back: tuple[int, int]
    seed: int
    inner: tuple["Step", ...] = ()

    def __str__(self):
        wrapped = f" [{', '.join(map(str, self.inner))}]" if self.inner else ""
        return f"{self.name}{self.back}#{self.seed}{wrapped}"


class Recipe(NamedTuple):
    """A whole program.

    Attributes:
      input_shape: of its first input.
      steps: what it does.
      share: every how many-th parameter is one that it already has; 0: none.
      outputs: how many of its last values it returns.
    """

    input_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    share: int
    outputs: int


def random_recipe(seed):
    """A program that is nearly rescalable: layers, and one to three unusual operations."""
    r = random.Random(seed)
    steps = [_layer(r, _FREQUENT[:3])]
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        steps += [_layer(r) for _ in range(r.choice([0, 0, 1, 2]))]
        steps.append(_unusual(r))
    steps += [_layer(r) for _ in range(r.choice([0, 1, 1, 2]))]
    if r.random() < 0.85:
        steps.append(_layer(r, ("dense",)))
    share = r.choice([0, 0, 0, 2, 3])
    return Recipe(r.choice(_INPUT_SHAPES), tuple(steps), share, 2 if r.random() < 0.15 else 1)


def _layer(r, names=None):
    names = names or (_FREQUENT if r.random() < 0.6 else sorted(LAYERS))
    return Step(r.choice(names), _back(r), r.randrange(1 << 30))


def _unusual(r):
    names = sorted(UNUSUAL)
    (name,) = r.choices(names, [_WEIGHTS.get(name, 1) for name in names])
    inner = ()
    if name == "wrapped":
        inner = tuple(
            _unusual(r) if r.random() < 0.4 else _layer(r) for _ in range(r.choice([1, 2]))
        )
        inner = tuple(step for step in inner if step.name != "wrapped") or (_layer(r),)
    return Step(name, _back(r), r.randrange(1 << 30), inner)


def _back(r):
    return (0 if r.random() < 0.85 else r.randrange(4), r.choice([1, 1, 0, 2, 3]))


class Program:
    """A recipe as a function ``program(params, x, n)``.

    Building it runs the steps once on shapes; those that do not apply, or that this version of JAX
    has not, are left out.

    Attributes:
      shapes: the shapes of its parameters by name.
      failed: the exceptions of steps, by the step's name.
    """

    def __init__(self, recipe):
        self.recipe = recipe
        self.shapes, self.failed = {}, {}
        self._names, self._left_out = {}, set()
        self._learning, self._asked = True, 0
        jax.eval_shape(self._run, {}, *self._abstract_inputs())
        self._learning = False
        self._closed = None
        self._settle()
        self._keep_used()

    @property
    def steps(self):
        """The names of the steps that apply, inner ones included."""
        return [step.name for path, step in self._numbered() if path not in self._left_out]

    def __call__(self, params, x, n):
        return self._run(params, x, n)

    def param(self, *shape):
        """A parameter of that shape; also of a name that it had before, if the recipe shares."""
        place, path = self._place, self._path
        self._place += 1
        names = self._names.setdefault(path, [])
        if self._learning and place == len(names):
            names.append(self._new_name(shape))
        name = names[place]
        if self._learning or name not in self.taken:
            return jnp.ones(shape)
        return self.taken[name]

    def inner(self, x, parameters=None):
        """The inner steps of a step that wraps some."""
        outside = self._path, self._place, self.taken
        self.taken = outside[2] if parameters is None else parameters
        (number,) = outside[0]
        values = [x]
        for k, step in enumerate(self.recipe.steps[number].inner):
            self._step((number, k), step, values)
        self._path, self._place, self.taken = outside
        return values[-1]

    def draw(self, rng, count):
        """Parameters, inputs and integers, ``count`` of each along a leading axis."""
        params = {
            name: rng.uniform(0.3, 1.5, (count, *shape)) * rng.choice([-1, 1], (count, *shape))
            for name, shape in self.shapes.items()
        }
        x = rng.normal(size=(count, *self.recipe.input_shape))
        return params, x, rng.choice(_INTEGERS, count).astype(np.int32)

    def abstract(self):
        """The shapes of its arguments."""
        params = {name: _abstract(shape) for name, shape in self.shapes.items()}
        return params, *self._abstract_inputs()

    def jaxpr(self):
        """Its closed jaxpr."""
        if self._closed is None:
            self._closed = jax.make_jaxpr(lambda *arguments: self(*arguments))(*self.abstract())
        return self._closed

    def _abstract_inputs(self):
        return _abstract(self.recipe.input_shape), jax.ShapeDtypeStruct((), np.int32)

    def _numbered(self):
        for number, step in enumerate(self.recipe.steps):
            yield (number,), step
            for k, inner in enumerate(step.inner):
                yield (number, k), inner

    def _run(self, params, x, n):
        self.taken, self.n = params, n
        values = [x]
        for number, step in enumerate(self.recipe.steps):
            self._step((number,), step, values)
        return values[-self.recipe.outputs :]

    def _step(self, path, step, values):
        if path in self._left_out:
            return
        self._path, self._place = path, 0
        x, y = (values[-1 - back % len(values)] for back in step.back)
        apply = (LAYERS | UNUSUAL)[step.name]
        if not self._learning:
            values.append(_as_value(apply(self, x, y, random.Random(step.seed))))
            return
        try:
            result = _as_value(apply(self, x, y, random.Random(step.seed)))
        except Exception as error:
            self.failed[step.name] = error
            result = None
        if result is None:
            self._left_out.add(path)
        else:
            values.append(result)

    def _settle(self):
        """Leaves out steps that fail now that their parameters are arguments."""
        for _ in self._numbered():
            try:
                self.jaxpr()
            except Exception as error:
                number = self._path[0]
                self.failed[self.recipe.steps[number].name] = error
                self._left_out.add((number,))
            else:
                return

    def _new_name(self, shape):
        self._asked += 1
        alike = [name for name, known in self.shapes.items() if known == shape]
        if alike and self.recipe.share and self._asked % self.recipe.share == 0:
            return alike[0]
        name = f"p{len(self.shapes):02d}"
        self.shapes[name] = shape
        return name

    def _keep_used(self):
        """Forgets parameters that an operation asked for and then did not use."""
        jaxpr = self.jaxpr().jaxpr
        used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        unused = [
            name
            for name, var in zip(sorted(self.shapes), jaxpr.invars, strict=False)
            if id(var) not in used
        ]
        for name in unused:
            del self.shapes[name]
        if unused:
            self._closed = None

    def fits(self):
        """Whether it has parameters, and few enough."""
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        return bool(sizes) and sum(sizes) <= _MAX_PARAMETERS


def _abstract(shape):
    return jax.ShapeDtypeStruct(tuple(shape), np.float64)


def _as_value(result):
    """A result as an array of floats, or None if it is none or too large."""
    if result is None or not hasattr(result, "dtype"):
        return None
    result = jnp.asarray(result)
    if not 0 < result.size <= _MAX_SIZE or result.ndim > _MAX_NDIM:
        return None
    if jnp.issubdtype(result.dtype, jnp.complexfloating):
        result = result.real
    return result if result.dtype == np.float64 else result.astype(np.float64)
