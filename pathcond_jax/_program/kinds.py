"""Primitives for which no analysis has a rule, by what they do."""

ELEMENTWISE = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "ceil"),
    *("cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor"),
    *("igamma", "igamma_grad_a", "igammac", "lgamma", "log", "log1p", "log2", "logistic"),
    *("nextafter", "one_minus_square", "polygamma", "polynomial", "regularized_incomplete_beta"),
    *("round", "sin", "sinh", "tan", "tanh", "zeta"),
)
FACTORIZATIONS = (
    *("cholesky", "custom_linear_solve", "eig", "eigh", "hessenberg", "householder_product", "lu"),
    *("qr", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
)
BITS = (
    *("and", "bitcast_convert_type", "clz", "iota", "not", "or", "population_count"),
    *("reduce_and", "reduce_or", "reduce_xor", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "xor"),
)
RANDOM = (
    *("random_bits", "random_fold_in", "random_gamma", "random_seed", "random_split"),
    *("rng_bit_generator", "rng_uniform", "threefry2x32"),
)
COLLECTIVES = (
    *("all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum"),
    *("ragged_all_to_all", "xla_pmap"),
)
EFFECTS = ("after_all", "create_token", "empty2", "get", "swap")
PRODUCTS = ("cumlogsumexp", "cumprod", "reduce_prod", "scatter-mul")
INNER_PROGRAMS = ("custom_lin", "reduce", "reduce_window")
DERIVATIVES = ("select_and_gather_add", "select_and_scatter", "select_and_scatter_add")

# Why neither scales nor paths pass, whatever the analysis.
OPAQUE = {
    "it factorizes a matrix, which mixes all entries": FACTORIZATIONS,
    "it works on integers or bits": BITS,
    "it draws random numbers": RANDOM,
    "other devices take part": COLLECTIVES,
    "it is there for its effects": EFFECTS,
    "it multiplies entries of one value with each other": PRODUCTS,
    "it runs a program that its caller gives": INNER_PROGRAMS,
    "it occurs in derivatives only": DERIVATIVES,
}

# What a user can do about an operation that is not followed, by its name.
WITHOUT_RULE = {
    "shard_map": (
        "is not entered: it runs on the part of each device. Trace the function without it (under "
        "jax.vmap with its axis_name, where devices speak with each other) and use that spec"
    ),
}
