"""Networks of triangle waves: error, linear pieces, and what conditioning keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond


def network(params):
    """The function of a scalar, and the spec."""
    spec = pathcond.chain_spec(params, list(params))
    return lambda x: spec.apply_fn(params, x[None, None])[0, 0], spec


def random_peaks(depth, seed):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 0.8, depth))


def composed(peaks, s0, slope, x):
    """The same function, from its definition."""
    wave, total, factor = x, slope * x, s0
    peaks = np.append(peaks, 0.5)
    for i in range(len(peaks) - 1):
        a = peaks[i]
        wave = np.where(wave <= a, wave / a, 1 - (wave - a) / (1 - a))
        total = total + factor * wave
        factor = factor * (1 - peaks[i + 1]) * peaks[min(i + 2, len(peaks) - 1)]
    return total


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_halves_approximate_the_parabola(depth):
    params = pathcond.triangle_mlp(jnp.full(depth, 0.5))
    x = jnp.linspace(0, 1, 2 ** (depth + 2) + 1)
    values = jax.vmap(network(params)[0])(x)
    # Every number is a dyadic fraction: exact in float32.
    assert float(jnp.abs(values - (x - x * x)).max()) == 4.0 ** -(depth + 1)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_network_is_the_sum_of_composed_triangles(x64, depth):
    peaks, x = random_peaks(depth, depth), np.linspace(0, 1, 301)
    params = pathcond.triangle_mlp(peaks, 0.2, 0.7)
    values = jax.vmap(network(params)[0])(jnp.asarray(x))
    np.testing.assert_allclose(values, composed(np.asarray(peaks), 0.2, 0.7, x), atol=1e-13)


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_random_peaks_give_exponentially_many_pieces(x64, depth):
    function, _ = network(pathcond.triangle_mlp(random_peaks(depth, depth)))
    assert pathcond.count_linear_pieces_1d(function, 0, 1) == 2**depth


def test_conditioning_keeps_all_pieces(x64):
    depth = 6
    params = pathcond.triangle_mlp(random_peaks(depth, 2))
    function, spec = network(params)
    assert pathcond.count_linear_pieces_1d(function, 0, 1) == 2**depth
    conditioned, solution = pathcond.condition(params, spec)
    assert max(float(jnp.abs(z).max()) for z in solution.log_scales) > 1
    after, _ = network(conditioned)
    assert pathcond.count_linear_pieces_1d(after, 0, 1) == 2**depth
    x = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(jax.vmap(after)(x), jax.vmap(function)(x), atol=1e-12)


def test_the_last_wave_has_as_many_monotone_pieces(x64):
    for depth in (2, 4, 6):
        peaks = random_peaks(depth, depth)

        def wave(x, peaks=peaks):
            for a in peaks:
                x = jnp.minimum(x / a, (1 - x) / (1 - a))
            return x

        assert pathcond.count_linear_pieces_1d(wave, 0, 1) == 2**depth
        grid = np.linspace(0, 1, 2**18 + 1)
        rises = np.sign(np.diff(np.asarray(jax.vmap(wave)(jnp.asarray(grid)))))
        assert 1 + (np.diff(rises) != 0).sum() == 2**depth


def test_peaks_can_be_trained(x64):
    x = jnp.linspace(0.0, 1.0, 33)[:, None]
    apply_fn = network(pathcond.triangle_mlp(jnp.full(3, 0.5)))[1].apply_fn
    total = jax.jit(lambda peaks: apply_fn(pathcond.triangle_mlp(peaks), x).sum())
    peaks, h = jnp.array([0.3, 0.6, 0.45]), 1e-6
    slope = jax.grad(total)(peaks)
    for k in range(3):
        above, below = (float(total(peaks.at[k].add(side))) for side in (h, -h))
        assert float(slope[k]) == pytest.approx((above - below) / (2 * h), rel=1e-6)


@pytest.mark.parametrize(
    ("kinks", "expected"),
    [((), 1), ((0.5,), 2), ((0.25, 0.5, 0.75), 4), ((0.3, 0.3001, 0.300100001), 4), ((1e-7,), 2)],
)
def test_pieces_are_counted_where_they_are(x64, kinks, expected):
    def function(x):
        return 2.0 * x + sum((jnp.abs(x - k) for k in kinks), jnp.zeros(()))

    assert pathcond.count_linear_pieces_1d(function, 0, 1) == expected


def test_curves_have_no_count():
    with pytest.raises(ValueError, match="not piecewise linear"):
        pathcond.count_linear_pieces_1d(jnp.sin, 0, 6)
