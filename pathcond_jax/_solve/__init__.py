"""Solvers: from an objective over the log-scales to its minimum, with a certificate."""
