"""Path lifting: from a program to its path norms, Gram diagonal and Gram matrix."""
