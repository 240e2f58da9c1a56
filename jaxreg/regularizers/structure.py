"""Terms on how values relate to one another: to a paired output, to other rows, to the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.numbers import magnitude, safe_root, squared, widened
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.segments import loose
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    datums_that_count,
    log_probabilities,
    plogp_ratio,
    real_values,
    reduce_tokens,
    refuse_part,
)
from jaxreg.terms.scale import directions, norms
from jaxreg.terms.term import Source, needs, read_like, term

METRICS = ("mse", "l1", "cosine", "kl")
MODES = ("soft", "hard", "spectral")


@term
class Consistency:
    """Distance between the outputs and a paired field (Sajjadi et al. 2016), such as an augmented view's.

    Args:
      reference: the paired outputs, of the shape of x: a name in the batch, an array, or a function of
        the batch. No gradient.
      metric: **"mse"**, ``(x − r)²``; ``"l1"``, ``|x − r|``; ``"cosine"``, 1 − cos of each datum's values
        that count, as one vector, at any scale (``reduction`` is then a mean or a sum over datums; 1,
        without a gradient, where one vector is 0); ``"kl"``, Σ p(log p − log q) over the last axis of
        [B, T, V].
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean distance a token (a datum, for ``"cosine"``).

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[1.0, 3.0]])
      >>> jr.regularizers.Consistency(reference=jnp.zeros((1, 2)))(x, {})[0].item()
      5.0
    """

    reference: Source = "paired"
    metric: Literal["mse", "l1", "cosine", "kl"] = "mse"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.metric, METRICS, "Consistency", "metric")
        check_choice(self.reduction, REDUCTIONS, "Consistency", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The distance of x [B, T] or [B, T, K] from its pair."""
        tokens = as_token_batch(batch, x, "Consistency")
        values = real_values(tokens, x, "Consistency")
        paired = read_like(self.reference, tokens, values.shape, "Consistency", "the paired field")
        if self.metric == "cosine":
            distance = _cosine_distance(tokens, values, paired)
        elif self.metric == "kl":
            needs(values, 3, "Consistency(metric='kl')", "whole distributions [B, T, V]")
            ratio = plogp_ratio(log_probabilities(values), log_probabilities(paired))
            distance = jnp.sum(ratio, axis=-1)
        else:
            gap = values - paired
            distance = jnp.square(gap) if self.metric == "mse" else jnp.abs(gap)
        return reduce_tokens(tokens, distance, self.reduction), {"mean": tokens.mean(distance)}


@term
class Orthogonality:
    """How far rows are from orthonormal (Brock et al. 2017; Bansal et al. 2018).

    With rows normalised, whatever their scale, and G = X Xᵀ: **"soft"** ``Σ_{i≠j} G²``; ``"hard"``
    ``‖G − I‖²``; ``"spectral"`` ``σ_max(G − I)``. A zero row counts as absent. Of x [N, D], the matrix
    itself; of x [B, T, D], each datum's tokens that count are a matrix, and the mean is taken over datums.

    Args:
      mode: see above.
      axis: **"rows"**, or ``"columns"``: X is transposed.

    Metrics: ``max_cosine``, the largest ``|G|`` off the diagonal.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.Orthogonality()(jnp.array([[1.0, 0.0], [1.0, 0.0]]), {})
      >>> value.item()
      2.0
    """

    metric_kinds: ClassVar = Kinds("sum", max_cosine="max")
    mode: Literal["soft", "hard", "spectral"] = "soft"
    axis: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        check_choice(self.mode, MODES, "Orthogonality", "mode")
        check_choice(self.axis, ("rows", "columns"), "Orthogonality", "axis")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [N, D] or [B, T, D]."""
        if jnp.ndim(x) == 2:
            why = "a matrix [N, D] has a Gram matrix of all of its rows"
            refuse_part(batch, "Orthogonality", why, "give one matrix a datum, [B, T, D]")
            value, largest = gram_distance(widened(x), self.mode, self.axis)
            return value, {"max_cosine": largest}
        x = needs(x, 3, "Orthogonality", "a matrix [N, D], or one a datum [B, T, D]")
        tokens = as_token_batch(batch, x, "Orthogonality")
        values = real_values(tokens, x, "Orthogonality")
        if tokens.segments is not None:
            values = loose(values, tokens.segments)
        per_datum, largest = jax.vmap(lambda m: gram_distance(m, self.mode, self.axis))(values)
        worst = jnp.max(jnp.where(datums_that_count(tokens), largest, 0.0), initial=0.0)
        return tokens.mean(per_datum), {"max_cosine": worst}


@term
class GradientPenalty:
    """Gradient penalty ``(‖∇f(x)‖₂ − t)²`` (Gulrajani et al. 2017), the mean over datums.

    Args:
      fn: f, a function ``fn(x, batch)`` to one number a datum [B] (or their sum); hashable.
      target: t, **1**.
      reference: None, the penalty at x; or where to interpolate to, of the shape of x: a name in the
        batch, an array, or a function of the batch. Then at εx + (1 − ε)·ref, with ε ~ U(0, 1) a datum
        from ``key``.

    f sees x where tokens count and 0 elsewhere, and the norm is over the tokens that count.

    Metrics: ``norm``, the mean of ‖∇f‖. At a zero gradient the norm's subgradient is 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxreg as jr
      >>> term = jr.regularizers.GradientPenalty(fn=lambda x, batch: jnp.sum(3 * x, axis=1))
      >>> round(term(jnp.ones((2, 1)), {}, key=jax.random.key(0))[0].item(), 4)
      4.0
    """

    fn: Callable[..., Array]
    target: float = 1.0
    reference: Source | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"GradientPenalty: fn is a function of (x, batch), got {type(self.fn).__name__}")
        if not (math.isfinite(self.target) and self.target >= 0):
            raise ValueError(f"GradientPenalty: target is a finite number ≥ 0, got {self.target!r}")

    def __call__(
        self, x: Array, batch: PyTree, *, key: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The penalty at x [B, T] or [B, T, K]."""
        tokens = as_token_batch(batch, x, "GradientPenalty")
        at = real_values(tokens, x, "GradientPenalty")
        if self.reference is not None:
            if key is None:
                raise ValueError("GradientPenalty: with a reference it needs key=, for ε")
            other = read_like(self.reference, tokens, at.shape, "GradientPenalty", "the reference")
            mix = tokens.spread(jax.random.uniform(key, (tokens.datums,), at.dtype))
            mix = mix.reshape(*mix.shape, *[1] * (at.ndim - 2))
            at = mix * at + (1 - mix) * other
        slope = jax.grad(lambda v: jnp.sum(self.fn(v, batch)))(at)
        norm = _lengths(tokens, real_values(tokens, slope, "GradientPenalty"))
        return tokens.mean(jnp.square(norm - self.target)), {"norm": tokens.mean(norm)}


def gram_distance(matrix: Array, mode: str, axis: str) -> tuple[Array, Array]:
    """How far the Gram matrix of the normalised rows is from 1, and its largest entry off the diagonal.

    Zero rows (padding) count as absent: they add nothing on or off the diagonal.
    """
    rows = matrix if axis == "rows" else matrix.T
    unit, zero = directions(rows)
    gram = jnp.matmul(unit, unit.conj().T, precision="highest")
    eye = jnp.eye(len(rows), dtype=unit.real.dtype)
    off = gram * (1 - eye)
    if mode == "soft":
        value = jnp.sum(squared(off))
    else:
        away = gram - eye * ~zero
        value = jnp.sum(squared(away)) if mode == "hard" else spectral_radius(away)
    return value, jnp.max(jnp.abs(off))


def spectral_radius(symmetric: Array) -> Array:
    """Largest |eigenvalue| of a Hermitian matrix; where two are as large, the gradient is of one of them."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(symmetric))
    at = jnp.argmax(jnp.abs(values))
    vector = vectors[:, at]
    # The derivative of a simple eigenvalue is v vᵀ: so it needs no derivative of eigh, which is NaN
    # where eigenvalues are equal, as they are at an orthonormal matrix.
    value = jnp.real(vector.conj() @ jnp.matmul(symmetric, vector, precision="highest"))
    return jnp.sign(jax.lax.stop_gradient(value)) * value


def _cosine_distance(tokens: TokenBatch, a: Array, b: Array) -> Array:
    """[B], 1 − cos of each datum's values [B, T, ...]; 1, without a gradient, where one of them is 0."""
    if tokens.segments is None:
        rows = (a.shape[0], -1)
        (u, no_u), (v, no_v) = directions(a.reshape(rows)), directions(b.reshape(rows))
        # Half the squared distance of unit vectors is 1 − cos, but exactly 0 where they are equal.
        return jnp.where((no_u | no_v)[:, 0], 1.0, 0.5 * jnp.sum(jnp.square(u - v), axis=1))
    (u, no_u), (v, no_v) = _directions(tokens, a), _directions(tokens, b)
    return jnp.where(no_u | no_v, 1.0, 0.5 * tokens.sum_by_datum(jnp.square(u - v)))


def _lengths(tokens: TokenBatch, values: Array) -> Array:
    """[B] or [N]: the length of each datum's values [B, T, ...], as one vector."""
    if tokens.segments is None:
        return norms(values.reshape(values.shape[0], -1))
    size = _sizes(tokens, values)
    return size * safe_root(tokens.sum_by_datum(squared(values / _on_tokens(tokens, size, values.ndim))))


def _directions(tokens: TokenBatch, values: Array) -> tuple[Array, Array]:
    """Each datum's values as a unit vector, in rows of several, and which are none since they are 0."""
    scaled = values / _on_tokens(tokens, _sizes(tokens, values), values.ndim)
    length = safe_root(tokens.sum_by_datum(squared(scaled)))
    zero = length == 0
    return scaled / _on_tokens(tokens, jnp.where(zero, 1.0, length), values.ndim), zero


def _sizes(tokens: TokenBatch, values: Array) -> Array:
    """[N]: the power of two next to each datum's largest number, as `magnitude` has it."""
    largest = tokens.largest_by_datum(jnp.abs(jax.lax.stop_gradient(values)))
    return magnitude(largest[:, None], axis=1)[:, 0]


def _on_tokens(tokens: TokenBatch, values: Array, ndim: int) -> Array:
    """One number a datum where its tokens are, for arrays of so many axes; 1 where none is."""
    spread = jnp.where(jnp.asarray(tokens.segment_ids) > 0, tokens.spread(values), 1.0)
    return spread.reshape(*spread.shape, *[1] * (ndim - 2))
