"""Front doors: Flax nnx modules, init functions, the report."""
