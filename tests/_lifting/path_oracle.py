"""Networks as explicit graphs of scalars, and their paths enumerated one by one."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Edge(NamedTuple):
    """An edge into a node: from another node (None: a path starts here), with a label."""

    source: int | None
    parameter: int | None
    constant: float


def count_paths(edges: list[list[Edge] | None], outputs: list[int]) -> int:
    """The number of paths; ``edges`` lists what enters each node, None for an input."""
    counts: list[int] = []
    for entering in edges:
        sources = [None] if entering is None else [edge.source for edge in entering]
        counts.append(sum(1 if source is None else counts[source] for source in sources))
    return sum(counts[node] for node in outputs)


def list_paths(edges: list[list[Edge] | None], outputs: list[int]) -> list[tuple[float, Counter]]:
    """Every path: its constant and how often each parameter is met."""
    found = []
    for node in outputs:
        pending: list[tuple[int | None, float, tuple[int, ...]]] = [(node, 1.0, ())]
        while pending:
            here, constant, met = pending.pop()
            if here is None or edges[here] is None:
                found.append((constant, Counter(met)))
                continue
            for edge in edges[here]:
                more = met if edge.parameter is None else (*met, edge.parameter)
                pending.append((edge.source, constant * edge.constant, more))
    return found


def brute_force(
    edges: list[list[Edge] | None], outputs: list[int], theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Φ and ∂Φ/∂θ, path by path."""
    paths = list_paths(edges, outputs)
    phi = np.array([c * math.prod(theta[i] ** k for i, k in met.items()) for c, met in paths])
    jacobian = np.zeros((len(paths), len(theta)))
    for row, (c, met) in zip(jacobian, paths, strict=True):
        for i, k in met.items():
            others = math.prod(theta[j] ** m for j, m in met.items() if j != i)
            row[i] = c * k * theta[i] ** (k - 1) * others
    return phi, jacobian


class Network:
    """A network of vectors, built layer by layer, as a JAX program and as a graph of scalars.

    Attributes:
      values: the parameters, flat.
      edges: for each node, what enters it; inputs have no edge and start a path.
    """

    def __init__(self, inputs: int, rng: np.random.Generator) -> None:
        self.rng, self.inputs = rng, inputs
        self.values: list[float] = []
        self.leaves: list[tuple[int, ...]] = []
        self.edges: list[list[Edge] | None] = [None] * inputs
        self.program: list[Any] = []
        self.vectors = [list(range(inputs))]

    def _parameter(self, shape: tuple[int, ...], zeros: float) -> np.ndarray:
        size = math.prod(shape)
        drawn = self.rng.normal(size=size) * (self.rng.random(size) >= zeros)
        start = len(self.values)
        self.values += drawn.tolist()
        self.leaves.append(shape)
        return np.arange(start, start + size).reshape(shape)

    def _vector(self, edges: list[list[Edge]], step: Any) -> None:
        self.vectors.append(list(range(len(self.edges), len(self.edges) + len(edges))))
        self.edges += edges
        self.program.append(step)

    def dense(self, source: int, width: int, bias: bool, zeros: float = 0.0) -> None:
        nodes = self.vectors[source]
        leaf = len(self.leaves)
        kernel = self._parameter((len(nodes), width), zeros)
        edges = [
            [Edge(n, int(kernel[i, j]), 1.0) for i, n in enumerate(nodes)] for j in range(width)
        ]
        if bias:
            for j, k in enumerate(self._parameter((width,), zeros)):
                edges[j].append(Edge(None, int(k), 1.0))
        self._vector(edges, ("dense", source, leaf, bias))

    def scale(self, source: int, frozen: bool) -> None:
        nodes, leaf = self.vectors[source], len(self.leaves)
        if frozen:
            factors = self.rng.normal(size=len(nodes))
            edges = [[Edge(n, None, f)] for n, f in zip(nodes, factors, strict=True)]
            self._vector(edges, ("frozen", source, factors))
        else:
            gains = self._parameter((len(nodes),), 0.0)
            edges = [[Edge(n, int(k), 1.0)] for n, k in zip(nodes, gains, strict=True)]
            self._vector(edges, ("scale", source, leaf))

    def again(self, source: int, leaf: int) -> None:
        """A square dense layer with weights that another layer has."""
        nodes = self.vectors[source]
        start = sum(math.prod(shape) for shape in self.leaves[:leaf])
        width = len(nodes)
        kernel = np.arange(start, start + width * width).reshape(width, width)
        edges = [
            [Edge(n, int(kernel[i, j]), 1.0) for i, n in enumerate(nodes)] for j in range(width)
        ]
        self._vector(edges, ("dense", source, leaf, False))

    def add(self, one: int, two: int, minus: bool) -> None:
        pairs = zip(self.vectors[one], self.vectors[two], strict=True)
        sign = -1.0 if minus else 1.0
        edges = [[Edge(a, None, 1.0), Edge(b, None, sign)] for a, b in pairs]
        self._vector(edges, ("sub" if minus else "add", one, two))

    def concatenate(self, one: int, two: int) -> None:
        nodes = self.vectors[one] + self.vectors[two]
        self._vector([[Edge(n, None, 1.0)] for n in nodes], ("concatenate", one, two))

    def pool(self, source: int, kind: str) -> None:
        nodes = self.vectors[source]
        constant = 0.5 if kind == "mean" else 1.0
        pairs = zip(nodes[::2], nodes[1::2], strict=True)
        edges = [[Edge(a, None, constant), Edge(b, None, constant)] for a, b in pairs]
        self._vector(edges, (kind, source))

    def relu(self, source: int) -> None:
        self._vector([[Edge(n, None, 1.0)] for n in self.vectors[source]], ("relu", source))

    def params(self) -> list[jax.Array]:
        ends = np.cumsum([math.prod(shape) for shape in self.leaves])
        parts = np.split(np.array(self.values), ends[:-1])
        return [jnp.asarray(p.reshape(s)) for p, s in zip(parts, self.leaves, strict=True)]

    def apply(self, params: list[jax.Array], x: jax.Array) -> jax.Array:
        vectors = [x]
        for name, source, *rest in self.program:
            v = vectors[source]
            match name:
                case "dense":
                    leaf, bias = rest
                    v = v @ params[leaf]
                    v = v + params[leaf + 1][None] if bias else v
                case "frozen":
                    v = v * jnp.asarray(rest[0])[None]
                case "scale":
                    v = v * params[rest[0]][None]
                case "add":
                    v = v + vectors[rest[0]]
                case "sub":
                    v = v - vectors[rest[0]]
                case "concatenate":
                    v = jnp.concatenate([v, vectors[rest[0]]], 1)
                case "max":
                    v = v.reshape(1, -1, 2).max(2)
                case "mean":
                    v = v.reshape(1, -1, 2).mean(2)
                case "relu":
                    v = jax.nn.relu(v)
            vectors.append(v)
        return vectors[-1]

    def brute_force(self) -> tuple[np.ndarray, np.ndarray]:
        """Φ and ∂Φ/∂θ, path by path."""
        return brute_force(self.edges, self.vectors[-1], np.array(self.values))
