"""Studies on real data: one file per study; data, networks and the training loop are shared."""
