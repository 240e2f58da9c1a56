"""Terms on how values relate to one another: to a paired output, to other rows, to the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import magnitude, safe_root, squared, widened
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import as_token_batch
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    log_probabilities,
    logprob_values,
    not_infinite,
    plogp_ratio,
    real_values,
    reduce_tokens,
)
from jaxreg.terms.term import Source, needs, read, read_like, term

METRICS = ("mse", "l1", "cosine", "kl")
MODES = ("soft", "hard", "spectral")


@term
class Consistency:
    """Distance between the outputs and a paired field (Sajjadi et al. 2016), such as an augmented view's.

    Args:
      reference: the paired outputs, of the shape of x: a name in the batch, an array, or a function of
        the batch. No gradient.
      metric: **"mse"**, ``(x − r)²``; ``"l1"``, ``|x − r|``; ``"cosine"``, 1 − cos of each datum's values
        as one vector (``reduction`` is then a mean or a sum over datums); ``"kl"``, Σ p(log p − log q) over
        the last axis of [B, T, V].
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

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
        by_mask = self.metric == "cosine"  # of the whole datum
        values = real_values(tokens, x, "Consistency", by_mask=by_mask)
        paired = read_like(
            self.reference, tokens, values.shape, "Consistency", "the paired field", by_mask=by_mask
        )
        if self.metric == "cosine":
            rows = (values.shape[0], -1)
            distance = 1 - _cosine(values.reshape(rows), paired.reshape(rows))
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

    With rows normalised and G = X Xᵀ: **"soft"** ``Σ_{i≠j} G²``; ``"hard"``
    ``‖G − I‖²``; ``"spectral"`` ``σ_max(G − I)``. Of x [N, D], the matrix itself; of x [B, T, D], each
    datum's real tokens are a matrix, and the mean is taken over datums.

    Args:
      mode: see above.
      axis: **"rows"**, or ``"columns"``: X is transposed.

    Metrics: ``max_cosine``, the largest |G| off the diagonal.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.Orthogonality()(jnp.array([[1.0, 0.0], [1.0, 0.0]]), {})
      >>> value.item()
      2.0
    """

    mode: Literal["soft", "hard", "spectral"] = "soft"
    axis: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        check_choice(self.mode, MODES, "Orthogonality", "mode")
        check_choice(self.axis, ("rows", "columns"), "Orthogonality", "axis")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [N, D] or [B, T, D]."""
        if jnp.ndim(x) == 2:
            value, largest = gram_distance(widened(x), self.mode, self.axis)
            return value, {"max_cosine": largest}
        x = needs(x, 3, "Orthogonality", "a matrix [N, D], or one a datum [B, T, D]")
        tokens = as_token_batch(batch, x, "Orthogonality")
        values = real_values(tokens, x, "Orthogonality", by_mask=True)
        per_datum, largest = jax.vmap(lambda m: gram_distance(m, self.mode, self.axis))(values)
        return tokens.mean(per_datum), {"max_cosine": jnp.max(jnp.where(tokens.lengths > 0, largest, 0.0))}


@term
class GradientPenalty:
    """Gradient penalty ``(‖∇f(x)‖₂ − t)²`` (Gulrajani et al. 2017), the mean over datums.

    Args:
      fn: f, a function ``fn(x, batch)`` to one number a datum [B] (or their sum); hashable.
      target: t, **1**.
      reference: None, the penalty at x; or where to interpolate to, of the shape of x: a name in the
        batch, an array, or a function of the batch. Then at εx + (1 − ε)·ref, with ε ~ U(0, 1) a datum
        from ``key``.

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
        at = real_values(tokens, x, "GradientPenalty", by_mask=True)
        if self.reference is not None:
            if key is None:
                raise ValueError("GradientPenalty: with a reference it needs key=, for ε")
            other = read_like(
                self.reference, tokens, at.shape, "GradientPenalty", "the reference", by_mask=True
            )
            mix = jax.random.uniform(key, (at.shape[0],) + (1,) * (at.ndim - 1), at.dtype)
            at = mix * at + (1 - mix) * other
        slope = jax.grad(lambda v: jnp.sum(self.fn(v, batch)))(at)
        square = jnp.sum(jnp.square(tokens.where(slope)).reshape(at.shape[0], -1), axis=1)
        norm = safe_root(square)
        return tokens.mean(jnp.square(norm - self.target)), {"norm": tokens.mean(norm)}


@term
class Repetition:
    """Token-level unlikelihood of what was said before (Welleck et al. 2020).

    ``Σ −log(1 − p(c))`` over the distinct tokens c of the last ``window`` places, the target itself left out.

    Args:
      tokens: the tokens [B, T] that x predicts: a name in the batch.
      window: how many places back, **32**.
      floor: 1 − p is kept above it, **1e-6**; there is no gradient beyond.
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mass``, the mean probability of repeating one of them.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"target_tokens": jnp.array([[0, 1]])}
      >>> value, _ = jr.regularizers.Repetition()(jnp.zeros((1, 2, 2)), batch)
      >>> round(value.item(), 4)  # half of log 2: one place in two could repeat
      0.3466
    """

    tokens: str = "target_tokens"
    window: int = 32
    floor: float = 1e-6
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"Repetition: window is a whole number ≥ 1, got {self.window!r}")
        if not 0 < self.floor < 1:
            raise ValueError(f"Repetition: floor is within 0 … 1, got {self.floor!r}")
        check_choice(self.reduction, REDUCTIONS, "Repetition", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of logits x [B, T, V]."""
        x = needs(x, 3, "Repetition", "logits or logprobs [B, T, V]")
        tokens = as_token_batch(batch, x, "Repetition")
        log_p = log_probabilities(real_values(tokens, x, "Repetition"))
        said = read(self.tokens, tokens, "Repetition", "the tokens")
        if said.shape != tokens.shape:
            raise ValueError(f"Repetition: {self.tokens!r} has shape {said.shape}, but x has {x.shape}")
        said = jnp.where(tokens.mask, said, -1)  # one_hot of −1 is 0 everywhere
        one_hot = jax.nn.one_hot(said, x.shape[-1], dtype=log_p.dtype)
        before = jnp.cumsum(one_hot, axis=1) - one_hot
        before = before - jnp.pad(before, ((0, 0), (self.window, 0), (0, 0)))[:, : x.shape[1]]
        seen = (before > 0.5) & (one_hot < 0.5)
        p = jnp.exp(log_p)
        each = jnp.where(seen, -jnp.log(jnp.maximum(1 - p, self.floor)), 0.0)
        mass = jnp.sum(jnp.where(seen, p, 0.0), axis=-1)
        loss = reduce_tokens(tokens, jnp.sum(each, axis=-1), self.reduction)
        return loss, {"mass": tokens.mean(mass)}


@term
class Length:
    """Expected-length penalty on sampled answers, as a score-function surrogate (Williams 1992).

    ``mean over datums of (max(n − target, 0) / target) · Σ lp``, n the number of real tokens: its
    gradient is the estimate of that of the expected relative excess; its value is no length.

    Args:
      target: the length, in tokens, up to which nothing is penalised.

    Metrics: ``length``, the mean n; ``excess``, the mean relative excess.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, metrics = jr.regularizers.Length(target=2)(jnp.full((1, 4), -0.5), {})
      >>> value.item(), metrics["excess"].item()
      (-2.0, 1.0)
    """

    target: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(f"Length: target is a positive number of tokens, got {self.target!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The surrogate of sampled-token logprobs x [B, T]."""
        x = needs(x, 2, "Length", "sampled-token logprobs [B, T]")
        tokens = as_token_batch(batch, x, "Length")
        logprobs = logprob_values(tokens, x, "Length", by_mask=True)
        logprobs = jnp.where(not_infinite(logprobs), logprobs, 0.0)
        length = jnp.sum(tokens.mask, axis=1).astype(logprobs.dtype)
        excess = jnp.maximum(length - self.target, 0.0) / self.target
        score = jnp.sum(logprobs, axis=1)
        return tokens.mean(excess * score), {"length": tokens.mean(length), "excess": tokens.mean(excess)}


def gram_distance(matrix: Array, mode: str, axis: str) -> tuple[Array, Array]:
    """How far the Gram matrix of the normalised rows is from 1, and its largest entry off the diagonal.

    Zero rows (padding) count as absent: they add nothing on or off the diagonal.
    """
    rows = matrix if axis == "rows" else matrix.T
    scaled = rows / magnitude(rows, axis=1)  # its squares neither overflow nor vanish
    square = jnp.sum(squared(scaled), axis=1, keepdims=True)
    unit = scaled / jnp.sqrt(jnp.where(square == 0, jnp.ones_like(square), square))
    gram = jnp.matmul(unit, unit.conj().T, precision="highest")
    eye = jnp.eye(len(rows), dtype=square.dtype)
    off = gram * (1 - eye)
    if mode == "soft":
        value = jnp.sum(squared(off))
    else:
        away = gram - eye * (square > 0)
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


def _cosine(a: Array, b: Array) -> Array:
    """[B] of rows [B, N]; 0 where one of them is 0."""
    lengths = safe_root(jnp.sum(a * a, axis=1)) * safe_root(jnp.sum(b * b, axis=1))
    return jnp.sum(a * b, axis=1) / jnp.maximum(lengths, 1e-8)
