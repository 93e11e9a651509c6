"""Inside optax: conditioning every k updates, states that move along, Path-SGD."""
