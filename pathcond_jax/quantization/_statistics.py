"""What calibration finds out about a network."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from pathcond_jax._spec.types import PyTree
from pathcond_jax.quantization._sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The activations that one kernel reads, channel by channel.

    Attributes:
      minimum: (channels,), the smallest value.
      maximum: (channels,), the largest value.
      mean: (channels,).
      second_moment: (channels,), the mean of squares.
      sensitivity: (channels,), the sum over the entries of a channel of the squared derivatives of
        the outputs, summed over outputs, averaged over examples.
    """

    minimum: jax.Array
    maximum: jax.Array
    mean: jax.Array
    second_moment: jax.Array
    sensitivity: jax.Array

    @property
    def largest(self) -> jax.Array:
        """(channels,), the largest absolute value."""
        return jnp.maximum(jnp.abs(self.minimum), jnp.abs(self.maximum))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Statistics(Mapping[str, jax.Array]):
    """What :func:`calibrate` found: a pytree, and a mapping for ``criteria.activation``.

    As a mapping it takes the name of a neuron group to the largest absolute activation of each of
    its neurons, (group.size,), 0 where no kernel reads the neuron.

    Attributes:
      sites: where kernels read activations.
      channels: the activations there, one entry per site.
      sensitivity: F, a tree like the parameters: the squared derivatives of the outputs, summed
        over outputs, averaged over examples; 0 where nothing is trained.
      largest: what the mapping holds.
      output_power: the sum of the squared outputs, averaged over examples.
      num_examples: how many there were.
      unread: the paths of trained leaves of two axes or more that are no kernel of a site, such as
        those used within a conditional or a while loop: no scheme rounds them.
      unfollowed: the paths of kernels whose neurons lie neither along their inputs nor along their
        outputs: they are rounded, and the criterion leaves their noise out.
    """

    sites: tuple[Site, ...] = dataclasses.field(metadata={"static": True})
    channels: tuple[Channels, ...]
    sensitivity: PyTree
    largest: dict[str, jax.Array]
    output_power: jax.Array
    num_examples: jax.Array
    unread: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    unfollowed: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __getitem__(self, name: str) -> jax.Array:
        return self.largest[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.largest)

    def __len__(self) -> int:
        return len(self.largest)

    def __str__(self) -> str:
        lines = {
            f"{len(self.sites)} kernels read activations": [site.path for site in self.sites],
            "no kernel, not rounded": self.unread,
            "rounded, but not in the criterion": self.unfollowed,
        }
        return "\n".join(f"{what}: {', '.join(paths)}" for what, paths in lines.items() if paths)

    __repr__ = __str__
