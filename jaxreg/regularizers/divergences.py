"""Terms on how far a model is from a reference's distribution."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.numbers import log_limit
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.divergences import FORWARD, REVERSE, SYMMETRIC, Kind, divergence
from jaxreg.terms.estimators import Gradient, check_gradient, estimated, off_policy
from jaxreg.terms.extremes import largest
from jaxreg.terms.inputs import INPUTS, Inputs, distributions, kind_of, read_folded, sampled
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, not_infinite, reduce_tokens
from jaxreg.terms.ratios import k3, mean_large, reduce_large
from jaxreg.terms.term import Source, read, term


@term
class KL:
    """Kullback–Leibler divergence to a reference, in nats; p is the model, q the reference.

    Of logits or logprobs [B, T, V] (or [B, V], of a classifier) and a reference of that shape it is exact,
    and so is its gradient: forward ``KL(p‖q) = Σ p·(log p − log q)``, reverse ``KL(q‖p)``, symmetric the mean
    of both.

    Of sampled-token logprobs [B, T] it is an estimator (Schulman 2020), with ``d = ref − lp``: ``k1 = −d``,
    ``k2 = ½d²``, ``k3 = exp(d) − d − 1``. On tokens drawn from the model k1 and k3 are unbiased for KL(p‖q).
    ``gradient`` says what is differentiated, and of what it is the gradient in expectation over such tokens:

    - ``"score"``: −d·∇lp with all three: of KL(p‖q).
    - ``"pathwise"``, k1: ∇lp: of nothing, it is 0 in expectation.
    - ``"pathwise"``, k2: −d·∇lp, the same as ``"score"``: of KL(p‖q), though the value is not.
    - ``"pathwise"``, k3: (1 − exp(d))·∇lp: of KL(q‖p), the other direction. It is what GRPO systems use.

    Args:
      reference: the reference's logprobs (or logits), of the shape of x: a name in the batch, an array, or a
        function of the batch. No gradient.
      direction: ``"forward"`` or ``"reverse"``; whole distributions only.
      symmetric: the mean of both directions; whole distributions only.
      estimator: ``"k1"``, ``"k2"`` or ``"k3"``; sampled tokens only.
      gradient: ``"score"`` or ``"pathwise"``; sampled tokens only. **None**: "score" for k1, "pathwise" for
        k2 and k3.
      sampler: the logprobs [B, T] of whatever drew the tokens, where that is not the model itself: a name in
        the batch, an array, or a function of the batch. The gradient is then weighted by p/s, so that the
        above holds for tokens drawn from s; the value is not.
      max_log_ratio: k3 is constant, without a gradient, where d is above it. **None**: 88 (709 in float64),
        the largest whose exponential there is. Other systems take 20.
      inputs: what x is: ``"logprobs"`` of sampled tokens [B, T], or ``"logits"`` [..., V]; with ``"logits"``
        and a reference of one number a token, the estimator of the sampled tokens' logprobs. **None**:
        logprobs for two axes, logits for more.
      targets: for that, the name of the integer array of sampled tokens.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` a token.

    Where only one of the two probabilities is 0 and the divergence is infinite the value is +inf (k1: −inf,
    where it is the model's), and that entry's gradient is 0, never NaN.

    Raises:
      ValueError: x of two axes that can be no logprobs of sampled tokens, and inputs does not say what it is
        (NaN, where the numbers are traced); shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"ref_logprobs": jnp.array([[-1.0, -2.0]])}
      >>> jr.regularizers.KL(estimator="k2")(jnp.array([[-1.0, -4.0]]), batch)[0].item()
      1.0
    """

    metric_kinds: ClassVar = Kinds("sum", max="max")
    reference: Source = "ref_logprobs"
    direction: Literal["forward", "reverse"] = "forward"
    symmetric: bool = False
    estimator: Literal["k1", "k2", "k3"] = "k3"
    gradient: Gradient | None = None
    sampler: Source | None = None
    max_log_ratio: float | None = None
    inputs: Inputs | None = None
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.direction, ("forward", "reverse"), "KL", "direction")
        check_choice(self.estimator, ("k1", "k2", "k3"), "KL", "estimator")
        if self.inputs is not None:
            check_choice(self.inputs, INPUTS, "KL", "inputs")
        check_choice(self.reduction, REDUCTIONS, "KL", "reduction")
        check_gradient(self.gradient, "KL")
        if self.max_log_ratio is not None and not 0 < self.max_log_ratio <= log_limit(jnp.float32):
            raise ValueError(f"KL: max_log_ratio is within 0 … 88, or None; got {self.max_log_ratio!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The divergence of x from the reference."""
        inputs = kind_of(x, self.inputs, "KL")
        if inputs == "logits":
            tokens, logits = distributions(batch, x, "KL")
            if read(self.reference, tokens, "KL", "the reference").shape != x.shape[:-1]:
                return self._exact(tokens, logits, x.shape)
        return self._sampled(x, batch, inputs)

    def _exact(
        self, tokens: TokenBatch, logits: Array, shape: tuple[int, ...]
    ) -> tuple[Array, dict[str, Array]]:
        if self.gradient is not None or self.sampler is not None:
            raise ValueError(
                f"KL: gradient and sampler are of sampled tokens, with a reference [B, T]; of whole "
                f"distributions {shape} the gradient is exact"
            )
        reference = read_folded(self.reference, tokens, shape, "KL", "the reference", trailing=1)
        kind = FORWARD if self.direction == "forward" else REVERSE
        kl = divergence(SYMMETRIC if self.symmetric else kind, logits, reference)
        return reduce_tokens(tokens, kl, self.reduction), {
            "mean": tokens.mean(kl),
            "max": largest(tokens, kl),
        }

    def _sampled(self, x: Array, batch: PyTree, inputs: Inputs) -> tuple[Array, dict[str, Array]]:
        tokens, logprobs = sampled(batch, x, "KL", inputs, self.targets)
        shape = x.shape if inputs == "logprobs" else x.shape[:-1]
        reference = read_folded(self.reference, tokens, shape, "KL", "the reference")
        off = off_policy(self.sampler, tokens, logprobs, shape, "KL")
        finite = not_infinite(logprobs) & not_infinite(reference)
        d = jnp.where(finite, reference, 0.0) - jnp.where(finite, logprobs, 0.0)
        value, slope = self._estimate(d)
        if self.gradient is None:
            gradient = "score" if self.estimator == "k1" else "pathwise"
        else:
            gradient = self.gradient
        if gradient == "score":
            value = estimated(value, jnp.where(finite, logprobs, 0.0), -d, off)
        elif off is not None:
            value = estimated(value, jnp.where(finite, logprobs, 0.0), slope, off)
        kl = jnp.where(finite, value, self._limit(logprobs, reference))
        return reduce_large(tokens, kl, self.reduction), {
            "mean": mean_large(tokens, kl),
            "max": largest(tokens, kl),
        }

    def _estimate(self, d: Array) -> tuple[Array, Array]:
        """The estimate a token, and its derivative with respect to lp."""
        if self.estimator == "k1":
            return -d, jnp.ones_like(d)
        if self.estimator == "k2":
            return 0.5 * jnp.square(d), -d
        limit = log_limit(d.dtype) if self.max_log_ratio is None else self.max_log_ratio
        return k3(d, limit), jnp.where(d > limit, 0.0, -jnp.expm1(jnp.minimum(d, limit)))

    def _limit(self, logprobs: Array, reference: Array) -> Array:
        """What the estimate is where a probability is 0."""
        limit = jnp.full_like(logprobs, jnp.inf)
        if self.estimator == "k1":
            limit = jnp.where(jnp.isneginf(reference), limit, -limit)
        return jnp.where(jnp.isneginf(logprobs) & jnp.isneginf(reference), 0.0, limit)


@term
class JS:
    """Jensen–Shannon divergence ``½KL(p‖m) + ½KL(q‖m)``, m = (p + q)/2, at most log 2 (Lin 1991).

    With β it is the generalized one of distillation (Agarwal et al. 2024, GKD), as TRL computes it:
    ``β·KL(q‖m) + (1 − β)·KL(p‖m)``, m = (1 − β)p + βq, with p the model (student) and q the reference
    (teacher); and at the ends what it tends to, divided by its own size: β = 0 is KL(q‖p), β = 1 is KL(p‖q).

    Args:
      reference: logits or logprobs of the shape of x: a name in the batch, an array, or a function of the
        batch. No gradient.
      beta: β within 0 … 1, **0.5**.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` a token, in nats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[[0.0, -jnp.inf]]])
      >>> value, _ = jr.regularizers.JS(reference=x[..., ::-1])(x, {})
      >>> round(value.item(), 4)  # log 2: nothing in common
      0.6931
    """

    metric_kinds: ClassVar = Kinds("sum", max="max")
    reference: Source = "ref_logprobs"
    beta: float = 0.5
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"JS: beta is within 0 … 1, got {self.beta!r}")
        check_choice(self.reduction, REDUCTIONS, "JS", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The divergence of x [..., V] from the reference."""
        tokens, logits = distributions(batch, x, "JS")
        reference = read_folded(self.reference, tokens, x.shape, "JS", "the reference", trailing=1)
        ends = {0: REVERSE, 1: FORWARD}
        js = divergence(ends.get(self.beta, Kind("js", self.beta)), logits, reference)  # type: ignore[call-overload]
        return reduce_tokens(tokens, js, self.reduction), {
            "mean": tokens.mean(js),
            "max": largest(tokens, js),
        }
