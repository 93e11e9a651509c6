"""What calibration finds out about a network."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from pathcond_jax._action.rescale import rescale
from pathcond_jax._solve.solution import Solution
from pathcond_jax._spec.log_scales import LogScales, concatenated
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree
from pathcond_jax.quantization._sites import Site, channel_scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The activations that one kernel reads, channel by channel.

    Attributes:
      minimum: (channels,), the smallest value.
      maximum: (channels,), the largest value.
      mean: (channels,).
      second_moment: (channels,), the mean of squares.
      sensitivity: (channels,), the sum over the entries of a channel, but for zeros, which every
        grid contains, of the squared derivatives of the outputs, summed over outputs, averaged over
        examples.
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

    def rescaled(self, spec: ArchSpec, log_scales: LogScales | Solution) -> "Statistics":
        """The statistics of another representative of the same function, without its data.

        What a kernel reads takes the scales of the neurons behind it, and derivatives shrink by
        them. A calibration of the rescaled parameters on the same examples finds the same.

        Args:
          spec: of the parameters that were calibrated.
          log_scales: of the representative, as seen from these parameters, or a solution.

        Returns:
          The statistics of ``rescale(params, spec, log_scales)``.

        Raises:
          SpecError: the log-scales do not fit the spec.

        Example:
          >>> import jax.numpy as jnp
          >>> import pathcond_jax as pathcond
          >>> from pathcond_jax.quantization import calibrate
          >>> params = {"a": {"w": jnp.array([[1.0, 2.0]])}, "b": {"w": jnp.array([[2.0], [3.0]])}}
          >>> spec = pathcond.chain_spec(params, ["a", "b"])
          >>> statistics = calibrate(spec.apply_fn, params, spec, [jnp.array([[1.0], [2.0]])])
          >>> twice = statistics.rescaled(spec, (jnp.log(jnp.array([2.0, 1.0])),))
          >>> [read.maximum.tolist() for read in (statistics.channels[1], twice.channels[1])]
          [[2.0, 4.0], [4.0, 4.0]]
        """
        parts = log_scales.log_scales if isinstance(log_scales, Solution) else log_scales
        # First: it checks the log-scales.
        sensitivity = rescale(self.sensitivity, spec, parts, power=-2)
        z = concatenated(parts, jnp.float32)
        return dataclasses.replace(
            self,
            channels=tuple(
                _scaled(read, jnp.exp(_of_channels(site, spec, z)))
                for site, read in zip(self.sites, self.channels, strict=True)
            ),
            sensitivity=sensitivity,
            largest={
                group.name: self.largest[group.name] * jnp.exp(part)
                for group, part in zip(spec.groups, parts, strict=True)
            },
        )

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


def _of_channels(site: Site, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """The log-scales of the activations that a site reads, (channels,)."""
    extended = jnp.append(z, 0.0)
    found = jnp.zeros(site.num_channels)
    for meeting in channel_scales(site, spec):
        found += meeting.entry * extended[meeting.neurons]
    return found


def _scaled(read: Channels, scale: jax.Array) -> Channels:
    return Channels(
        read.minimum * scale,
        read.maximum * scale,
        read.mean * scale,
        read.second_moment * scale**2,
        read.sensitivity / scale**2,
    )
