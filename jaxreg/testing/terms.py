"""Does a term keep the contract that the built-in ones keep?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import PyTree, TermFn
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.core.spec import check_term as check_signature
from jaxreg.core.spec import requested_arguments
from jaxreg.testing import checks_packed, checks_parts, checks_ranges, checks_tokens, checks_values
from jaxreg.testing.subject import Subject


class TermCheckError(AssertionError):
    """A term breaks the contract; the message names every property that failed, and where."""


def check_term(
    fn: TermFn,
    x: PyTree,
    batch: PyTree = None,
    *,
    rows_together: int = 1,
    gradients: bool = True,
    weights: bool = True,
    layout: bool = True,
    log_ratios: bool = True,
    scales: bool | None = None,
    additive: bool = False,
    seed: int = 0,
) -> None:
    """Check a term of your own as the built-in ones are checked.

    On the example given: the value is a finite scalar, and so are the metrics; they are the same under
    ``jit`` and ``vmap``; the gradient agrees with numerical differences in float64. Where the batch is a
    `TokenBatch` and x has its shape: padding gets exactly no gradient, and whatever stands there, wherever
    and however much of it there is, changes nothing; nor do tokens and datums of weight 0, nor the order of
    the datums; and where x and an array of the batch differ by ±100 all stays finite. Where rows hold
    several datums (``pack(rows="packed")``), they give what a row a datum gives. Of any other x: at
    1e-18 and 1e18 times x value and gradient are right wherever float32 can hold them.

    Args:
      fn: the term, ``fn(x, batch)``, as for `RegularizerSpec`.
      x: an example of what it is a function of, where it is differentiable. For token data let
        the mask have some False, or the padding is not tested.
      batch: what it reads besides.
      rows_together: how many rows in a row belong together: 2 for a term on pairs.
      gradients: False leaves out the comparison with numerical differences, for a surrogate whose
        gradient is not that of its value (stop_gradient inside).
      weights: False, for a term that counts every real token on purpose, leaves out what weights of 0 do.
      layout: False, for a term that reads the positions of tokens, leaves out padding on the left and
        between tokens.
      log_ratios: False, for a term that may overflow, leaves out differences of ±100 between x and the arrays
        of the batch that have its shape and dtype.
      scales: whether x is tried at 1e-18 and 1e18 times what it is. **None**: unless it is token data, which
        logprobs are. False for a term with a scale of its own (a threshold, a clip).
      additive: True also checks that the parts of the batch add up to the whole, which the term says by its
        attribute ``additive``, or its spec does: value, gradient, and metrics by their ``metric_kinds``.
      seed: of the random directions and permutations.

    Raises:
      TermCheckError: naming all properties that failed, and where.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.from_arrays(mask=jnp.array([[True, True], [True, False]]))
      >>> x = jnp.array([[-1.0, -2.0], [-0.5, -0.3]])
      >>> jr.testing.check_term(jr.regularizers.L2(), x, batch)
      >>> jr.testing.check_term(lambda x, batch: jnp.mean(x**2), x, batch)
      Traceback (most recent call last):
      ...
      jaxreg.testing.terms.TermCheckError: the term does not keep the contract:
      - no gradient into padding: it is not 0 at [1, 1]...
      ...
    """
    check_signature(fn, "the term")
    x = jax.tree.map(jnp.asarray, x)
    extra: dict[str, Any] = {}
    if "key" in requested_arguments(fn):
        extra["key"] = jax.random.key(seed)
    if "state" in requested_arguments(fn):
        extra["state"] = fn.init()  # type: ignore[attr-defined]
    if "params" in requested_arguments(fn):
        extra["params"] = x
    term = Subject(fn, x, batch, extra, np.random.default_rng(seed), rows_together)
    of_tokens = isinstance(batch, TokenBatch) and isinstance(x, jax.Array) and x.shape[:2] == batch.shape

    problems = list(checks_values.finite_numbers(term))
    if not problems and of_tokens and batch.segments is not None:
        apart = checks_packed.with_loose_rows(term, batch.segments)
        problems += checks_packed.packed_rows(term, apart, batch.segments)
        term = apart
    if not problems:  # without finite numbers the rest says nothing
        problems += checks_values.transformations(term)
        if gradients:
            problems += checks_values.numerical_gradient(term)
        if of_tokens:
            problems += checks_tokens.padding(term)
            problems += checks_tokens.order(term)
        if of_tokens and layout:
            problems += checks_tokens.layout(term)
        if of_tokens and weights:
            problems += checks_tokens.weightless_tokens(term)
            problems += checks_tokens.weightless_datums(term)
        if of_tokens and log_ratios:
            problems += checks_ranges.log_ratios(term)
        if additive:
            problems += checks_parts.parts(term, of_tokens)
        if scales or (scales is None and not of_tokens):
            problems += checks_ranges.scales(term)
    if problems:
        raise TermCheckError("the term does not keep the contract:\n" + "\n".join(f"- {p}" for p in problems))
