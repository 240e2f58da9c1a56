"""Numbers that data must not hold where they count, and the complaint that names datum and key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array
from jaxreg.batch.counting import counted

HIGHEST = 1e-3  # A logprob is ≤ 0, but for rounding.
ENDINGS = ("logprobs", "logprob", "log_probs", "log_prob", "logps", "logp")


def is_logprobs(name: str) -> bool:
    """Whether an array's name says that it holds log-probabilities."""
    return name.endswith(ENDINGS)


def cleaned(array: np.ndarray, counts: np.ndarray | None, name: str) -> np.ndarray:
    """The array, with 0 where what a token that does not count holds would be refused at one that does.

    Args:
      array: [B], [B, T] or [B, T, K].
      counts: which of its numbers count, broadcastable to it; None: all.
      name: its key.

    Raises:
      ValueError: NaN, a positive logprob, or an integer too large for JAX, at a token that counts.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        numbers = array if array.dtype.kind == "f" else array.astype(np.float32)
        wrong = np.isnan(numbers)
        if is_logprobs(name):
            wrong |= numbers > HIGHEST
    elif array.dtype.kind in "iu":
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
        wrong = (array < limits.min) | (array > limits.max)
    else:
        return array
    if not wrong.any():
        return array
    refused = wrong if counts is None else wrong & counts
    if refused.any():
        _complain(array, refused, name)
    return np.where(wrong, np.zeros((), array.dtype), array)


def _complain(array: np.ndarray, refused: np.ndarray, name: str) -> None:
    i, *at = np.argwhere(refused)[0].tolist()
    if array.dtype.kind in "iu":
        widest = jax.dtypes.canonicalize_dtype(array.dtype)
        raise ValueError(f"datum {i}, {name!r}: holds integers outside of {widest}, the widest JAX has now")
    row, where = array[i].astype(np.float64), refused[i]
    if np.isnan(row[where]).any():
        at = np.argwhere(where & np.isnan(row))[0].tolist()
        raise ValueError(f"datum {i}, {name!r}: NaN at {at if at else 'its only value'}")
    raise ValueError(f"datum {i}, {name!r}: {_not_logprobs('it', float(row[where].max()))}")


def refuse_probabilities(arrays: Mapping[str, Array], mask: Array, weights: Array, who: str) -> None:
    """Refuse what cannot be logprobs under a name that says so, where numbers can be told.

    Of one number a token a positive one is refused. Arrays [B, T, V] may be logits, which are normalised
    before they are used; they are refused if no number is negative, as probabilities' are.

    Raises:
      ValueError: naming the array. Traced arrays pass.
    """
    for name, array in arrays.items():
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        if not (is_logprobs(name) and floats and array.size) or isinstance(array, jax.core.Tracer):
            continue
        held = jnp.where(counted(mask, weights, array.shape), array, jnp.zeros((), array.dtype))
        highest = jnp.max(held)
        if isinstance(highest, jax.core.Tracer) or not float(highest) > HIGHEST:
            continue
        if array.ndim <= 2 or float(jnp.min(held)) >= 0:
            raise ValueError(f"{who}: {name!r}: {_not_logprobs('it', float(highest))}")


def refuse_positive(values: Array, who: str, what: str) -> None:
    """Refuse logprobs of which one is positive. Only numbers can be told from one another: a tracer passes.

    Raises:
      ValueError: saying how large it is.
    """
    if not isinstance(values, jax.core.Tracer) and values.size and float(jnp.max(values)) > HIGHEST:
        raise ValueError(f"{who}: {_not_logprobs(what, float(jnp.max(values)))}")


def _not_logprobs(what: str, number: Any) -> str:
    return (
        f"logprobs are ≤ 0, but {what} holds {number:.4g}; if these are probabilities, take their logarithm; "
        f"if logits, say inputs='logits'"
    )
