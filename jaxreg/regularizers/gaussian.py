"""Terms on Gaussians, such as the posteriors of a variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import taken_totals
from jaxreg.terms.gaussians import gaussian_divergence
from jaxreg.terms.inputs import check_weights
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, real_values, reduce_tokens, refuse_part
from jaxreg.terms.ratios import mean_large, reduce_large, sum_large
from jaxreg.terms.term import Source, read, term
from jaxreg.terms.view import field

_ACTIVE = 0.01  # of Burda et al. 2016


@term
class GaussianKL:
    """KL divergence ``KL(N(μ, σ²) ‖ N(0, 1))`` of Gaussian posteriors to their prior, in nats.

    ``Σ ½(σ² + μ² − 1 − log σ²)`` over the dimensions (Kingma & Welling 2014), or, with another prior N(m,
    s²), ``Σ ½(σ²/s² + (μ − m)²/s² − 1 − log σ²/s²)``; and the mean over datums. It is what a variational
    autoencoder adds to its reconstruction loss, which then is summed over a datum's values, too.

    It reads the mean and ``log_var``, log σ², from the outputs: two fields of them, or a tuple ``(mean,
    log_var)``. ``jr.of`` says where else they are: ``jr.of("posterior", term)``, or, of a model that gives σ,
    ``jr.of(lambda out, batch: (out.mean, 2 * jnp.log(out.scale)), term)``.

    - One posterior a datum, [B, ...]: all axes but the first are its dimensions. The batch is a mapping
      (whose ``weights`` or ``mask`` [B], if there are any, say what counts), any other pytree, or None.
    - Beside a `TokenBatch`, or a mapping with ``weights`` or ``mask`` [B, T]: [B, D] is one a datum, and
      every datum with a token that counts does; [B, T, ...] is one a token, counted by the tokens' weights.

    Args:
      mean, log_var: the fields of the outputs, as paths (``"posterior/mean"``); a plain tuple or list of two
        has them in this order.
      prior_mean, prior_log_var: m and log s², **0**: numbers or arrays that broadcast to the mean, a name in
        the batch, or a function of the batch. No gradient.
      free_bits: λ in nats, **0**: a dimension whose KL, averaged over the batch, is below λ counts as λ,
        without a gradient (Kingma et al. 2016); on the edge it has all of its gradient.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``; of one posterior a datum both means
        are over datums.

    Metrics: ``nats``, the mean KL a datum (a token) without free bits; ``active_units``, the number of
    dimensions whose μ has a variance above 0.01 over the batch, and so says something of the datum (Burda et
    al. 2016).

    Where float32 cannot hold the number, as beyond log σ² = 88, value and gradient saturate with their sign.

    Raises:
      KeyError: outputs or a batch without such a field. TypeError: outputs that are an array.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> posterior = {"mean": jnp.array([[1.0, 0.0], [3.0, 0.0]]), "log_var": jnp.zeros((2, 2))}
      >>> value, metrics = jr.regularizers.GaussianKL()(posterior, None)
      >>> value.item(), metrics["active_units"].item()  # (½·1² + ½·3²)/2; the second μ is always 0
      (2.5, 1.0)
    """

    metric_kinds: ClassVar = Kinds("sum", active_units=None)
    mean: str = "mean"
    log_var: str = "log_var"
    prior_mean: Source = 0.0
    prior_log_var: Source = 0.0
    free_bits: float = 0.0
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        for name, path in (("mean", self.mean), ("log_var", self.log_var)):
            if not (isinstance(path, str) and path.strip("/")):
                raise TypeError(
                    f"GaussianKL: {name} is the path of a field of the outputs, got {path!r}; the outputs "
                    f"themselves hold the arrays"
                )
        if not (math.isfinite(self.free_bits) and self.free_bits >= 0):
            raise ValueError(f"GaussianKL: free_bits is a finite number of nats ≥ 0, got {self.free_bits!r}")
        check_choice(self.reduction, REDUCTIONS, "GaussianKL", "reduction")

    @property
    def additive(self) -> bool:
        """Whether the parts of a batch add up to the whole: without free bits."""
        return not self.free_bits

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The divergence of the posteriors in outputs x."""
        mean, log_var = self._posterior(x)
        rows = _rows(batch, mean.shape)
        prior_mean, prior_log_var = (
            self._prior(name, batch, rows, mean.shape) for name in ("prior_mean", "prior_log_var")
        )
        mean, log_var, prior_mean, prior_log_var = (
            real_values(rows, array.reshape(*rows.shape, -1), "GaussianKL")  # [B, T or 1, D]
            for array in (mean, log_var, prior_mean, prior_log_var)
        )
        kl = gaussian_divergence(mean - prior_mean, log_var, prior_log_var)
        each = jax.vmap(lambda v: reduce_large(rows, v, self.reduction), in_axes=-1)(kl)  # [D]
        if self.free_bits:
            refuse_part(
                rows, "GaussianKL", "free_bits are of means over the whole batch", "leave free_bits= out"
            )
            ones = jnp.ones(rows.shape, each.dtype)
            floor = self.free_bits * reduce_tokens(rows, ones, self.reduction)
            each = jnp.where(each < floor, floor, each)
        nats = sum_large(jax.vmap(lambda v: mean_large(rows, v), in_axes=-1)(kl))
        return sum_large(each), {"nats": nats, "active_units": _active_units(rows, mean)}

    def _posterior(self, x: PyTree) -> tuple[Array, Array]:
        if isinstance(x, tuple | list) and not hasattr(x, "_fields") and len(x) == 2:
            mean, log_var = x
        elif hasattr(x, "shape"):
            raise TypeError(
                f"GaussianKL: expected outputs with the fields {self.mean!r} and {self.log_var!r}, or (mean, "
                f"log_var); got an array {jnp.shape(x)}; take it apart with jaxreg.of(lambda x, batch: "
                f"(mean, log_var), term)"
            )
        else:
            mean, log_var = (field(x, path, "GaussianKL") for path in (self.mean, self.log_var))
        mean, log_var = jnp.asarray(mean), jnp.asarray(log_var)
        if mean.shape != log_var.shape or mean.ndim < 2:
            raise ValueError(
                f"GaussianKL: mean and log_var have one shape, [B, D] or with more axes; got {mean.shape} "
                f"and {log_var.shape}"
            )
        return mean, log_var

    def _prior(self, name: str, batch: PyTree, rows: TokenBatch, shape: tuple[int, ...]) -> Array:
        source = getattr(self, name)
        # A function sees the batch as it is: it may be no mapping.
        array = read(source(batch) if callable(source) else source, rows, "GaussianKL", name)
        try:
            return jnp.broadcast_to(array, shape)
        except ValueError:
            raise ValueError(
                f"GaussianKL: {name} has shape {array.shape}, which does not broadcast to the mean's {shape}"
            ) from None


def _rows(batch: PyTree, shape: tuple[int, ...]) -> TokenBatch:
    """What counts of posteriors of this shape: [B, T] where they are the tokens', else [B, 1]."""
    if not isinstance(batch, TokenBatch):
        arrays = dict(batch) if isinstance(batch, Mapping) else {}
        totals = taken_totals(arrays)
        given = {name: jnp.asarray(arrays.pop(name)) for name in ("mask", "weights") if name in arrays}
        of_tokens = any(array.ndim > 1 for array in given.values())
        if not of_tokens:
            _check_lead(given, shape[:1])
            given = {name: array[:, None] for name, array in given.items()}
        real = given.pop("mask", None if given else jnp.ones((shape[0], 1), bool))
        ids = {n: arrays.pop(n) for n in ("segment_ids", "lengths") if of_tokens and "segment_ids" in arrays}
        made = TokenBatch.from_arrays(mask=real, weights=given.get("weights"), **ids)
        batch = made.replace(arrays=arrays).of_whole(totals)
        if not of_tokens:
            return batch
    if batch.segments is None or len(shape) > 2:
        _check_lead({"mask": batch.mask}, shape[: min(2, len(shape) - 1)])
    else:  # one posterior a datum, of which a row may hold several
        _check_lead({"number of datums": batch.lengths}, shape[:1])
    check_weights(batch, batch.shape, "GaussianKL")
    if len(shape) > 2:
        return batch
    datums = TokenBatch.from_arrays(mask=batch.datums_counted[:, None])
    totals = None if batch.totals is None else batch.totals.of_datums()
    return datums.replace(arrays=batch.arrays, local=batch.local, totals=totals)


def _check_lead(arrays: Mapping[str, Array], lead: tuple[int, ...]) -> None:
    for name, array in arrays.items():
        if array.shape[: len(lead)] != lead:
            raise ValueError(
                f"GaussianKL: the batch's {name} has shape {array.shape}, but the mean begins with {lead}; "
                f"it is [B, D], one posterior a datum, or [B, T, ...], one a token; reshape a datum's own to "
                f"[B, D], in the model or with jaxreg.of(lambda x, batch: (mean, log_var), term)"
            )


def _active_units(rows: TokenBatch, mean: Array) -> Array:
    """How many of the last axis vary, of means [B, T, D]."""

    def variance(of_one: Array) -> Array:
        return rows.mean(jnp.square(of_one - rows.mean(of_one)))

    return jnp.sum(jax.vmap(variance, in_axes=-1)(mean) > _ACTIVE).astype(mean.dtype)
