"""The ground: what a spec is, trees of leaves, numbers of extended range, sharded arrays."""
