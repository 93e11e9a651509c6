"""The packages rely on promotion, which the tests of the library forbid."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")
