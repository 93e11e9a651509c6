"""Programs: a jaxpr as a flat graph, where operations come from, JAX's primitives by name."""
