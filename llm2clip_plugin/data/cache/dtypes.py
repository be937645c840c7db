"""How the rows of an embedding cache are stored."""

VALUE_BYTES = {"float16": 2, "int8": 1}  # of one number of a stored row
CACHE_DTYPES = tuple(VALUE_BYTES)
