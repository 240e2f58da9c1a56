"""Gradients corrected pair by pair, in random order: PCGrad, and GradVac."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, registered
from jaxreg.aggregation.parts import length_of, parts
from jaxreg.base.types import Array, PyTree


def orders(key: Array, count: int) -> Array:
    """[K, K]: for every gradient, the order in which it meets all of them."""
    return jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(key, count))


@registered
class PCGrad(Aggregator):
    """Every gradient loses what conflicts with each of the others, met in random order (Yu et al. 2020).

    The corrected gradients are added up: the plain sum, where none conflict.

    Cost: K² dot products of K numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxreg.aggregation import PCGrad
      >>> PCGrad()(jnp.array([[1.0, -0.5], [-0.5, 1.0]]), key=jax.random.key(0)).tolist()
      [1.5, 1.5]
    """

    needs_key: ClassVar[bool] = True

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        assert key is not None
        split, count = parts(gramian), len(gramian)

        def corrected(i: Array, order: Array) -> Array:
            def meet(k: int, own: Array) -> Array:
                j = order[k]
                along = split.cosines[j] @ own
                return own.at[j].add(jnp.where((j != i) & (along < 0) & split.present[j], -along, 0))

            return lax.fori_loop(0, count, meet, jax.nn.one_hot(i, count, dtype=gramian.dtype))

        rows = jax.vmap(corrected)(jnp.arange(count), orders(key, count))
        return Combination(jnp.sum(rows * (split.divisors[:, None] / split.divisors[None, :]), axis=0), {})


@registered
class GradVac(Aggregator):
    """Gradients turned towards one another until their cosines reach those that were usual (Wang et al.
    2021).

    For every ordered pair a moving average of the cosine is its target; below it, so much of the other
    gradient is added as brings the cosine there. With targets of 0 at first.

    Args:
      beta: how fast the targets follow, from 0 (never: it corrects as PCGrad does) to 1; the paper takes
        0.01.

    Its state is ``{"targets": [K, K]}``.

    Cost: K² dot products of K numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxreg.aggregation import GradVac
      >>> aggregator, gramian = GradVac(), jnp.array([[1.0, -0.5], [-0.5, 1.0]])
      >>> first = aggregator.solve(gramian, key=jax.random.key(0), state=aggregator.init(2))
      >>> first.coefficients.tolist(), [round(t, 4) for t in first.state["targets"][0].tolist()]
      ([1.5, 1.5], [0.0, -0.005])
    """

    beta: float = 0.01

    needs_key: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    def _check(self) -> None:
        in_range("GradVac", "beta", self.beta, 0.0, 1.0)

    def init(self, count: int) -> PyTree:
        """Targets of 0."""
        return {"targets": jnp.zeros((count, count), jnp.result_type(float))}

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        assert key is not None
        split, count = parts(gramian), len(gramian)

        def corrected(i: Array, order: Array, targets: Array) -> tuple[Array, Array]:
            def meet(k: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                own, targets = carry
                j = order[k]
                length = length_of(split.cosines, own)
                cosine = jnp.clip(split.cosines[j] @ own / jnp.where(length > 0, length, 1), -1, 1)
                target = targets[j]
                sine, wanted = (jnp.sqrt(jnp.maximum(1 - c * c, 0)) for c in (cosine, target))
                more = length * (target * sine - cosine * wanted) / jnp.where(wanted > 0, wanted, 1)
                meets = (j != i) & split.present[j] & split.present[i]
                own = own.at[j].add(jnp.where(meets & (cosine < target) & (wanted > 0), more, 0))
                moved = (1 - self.beta) * target + self.beta * cosine
                return own, targets.at[j].set(jnp.where(meets, moved, target))

            first = jax.nn.one_hot(i, count, dtype=gramian.dtype), targets.astype(gramian.dtype)
            return lax.fori_loop(0, count, meet, first)

        rows, targets = jax.vmap(corrected)(jnp.arange(count), orders(key, count), state["targets"])
        coefficients = jnp.sum(rows * (split.divisors[:, None] / split.divisors[None, :]), axis=0)
        return Combination(coefficients, {}, {"targets": targets.astype(state["targets"].dtype)})
