"""A built-in term with its example, ready to be called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from library_cases import CASES, MASK, data, params

import jaxreg as jr

REDUCTIONS = ["token_mean", "token_sum", "datum_mean"]
CALLS = [(n, r) for n, case in CASES.items() for r in (REDUCTIONS if case.reduces else [""])]


@functools.cache
def value_and_grad(name, reduction):
    """``((value, metrics), gradient)`` of the term, one program for all numbers of one shape and dtype."""
    return jax.jit(jax.value_and_grad(prepared(name, reduction, np.float32)[1], has_aux=True))


def prepared(name, reduction, dtype=np.float64):
    case = CASES[name]
    term = case.make(reduction) if case.reduces else case.make()
    arrays = data()
    x = params() if case.x == "params" else arrays.pop(case.x)
    x = jax.tree.map(lambda a: jnp.asarray(a, dtype), x)
    weights = arrays.pop("weights")
    cast = {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in arrays.items()}
    batch = jr.TokenBatch.from_arrays(mask=MASK, weights=jnp.asarray(weights, dtype), **cast)
    if case.key:
        return case, (lambda x, b: term(x, b, key=jax.random.key(0))), x, batch
    return case, term, x, batch
