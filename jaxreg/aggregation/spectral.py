"""Coefficients from the Gramian's eigenvectors or its inverse: IMTL-G, ConFIG, Aligned-MTL."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreg.aggregation.aggregator import Aggregator, Combination, one_of, registered, static
from jaxreg.aggregation.parts import parts
from jaxreg.base.types import Array, PyTree

HIGHEST = jax.lax.Precision.HIGHEST


def pseudo_solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """``matrix⁺ · right`` of a symmetric matrix, and whether it has its full rank."""
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > _floor(values, matrix.dtype)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

    def solved(right: Array) -> Array:
        return jnp.matmul(
            vectors, inverse * jnp.matmul(vectors.T, right, precision=HIGHEST), precision=HIGHEST
        )

    found = solved(right)
    return found + solved(right - jnp.matmul(matrix, found, precision=HIGHEST)), jnp.all(kept)


@registered
class IMTLG(Aggregator):
    """The combination whose projections on all gradients are equal (Liu et al. 2021, IMTL-G).

    The coefficients, ``G⁺·√diag(G)`` over their sum, add up to 1 and may be negative; where the sum is 0, as
    for opposite gradients, they are 0.

    Cost: two eigendecompositions [K, K].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import IMTLG
      >>> [round(c, 3) for c in IMTLG()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [0.667, 0.333]
    """

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split = parts(gramian)
        largest = jnp.max(split.divisors * split.present)
        largest = jnp.where(largest > 0, largest, 1)
        wanted = split.present.astype(gramian.dtype)
        of_units, full = pseudo_solve(split.cosines, wanted)
        # Of gradients that depend on one another the paper's solution is the shortest, in the terms' own
        # scales.
        scaled = gramian / largest / largest
        lengths = split.lengths / largest
        dependent, _ = pseudo_solve(scaled, lengths)
        found = jnp.where(full, of_units * (largest / split.divisors) * wanted, dependent)
        # Divided by the largest first: a sum of what is 1e15 apart.
        size = jnp.max(jnp.abs(found))
        found = found / jnp.where(size > 0, size, 1)
        total = jnp.sum(found)
        nothing = jnp.abs(total) < 4 * len(found) * jnp.finfo(found.dtype).eps
        coefficients = jnp.where(nothing, 0, found / jnp.where(nothing, 1, total))
        along = jnp.matmul(split.cosines, coefficients * split.lengths / largest, precision=HIGHEST)
        return Combination(coefficients, {"residual": _spread(along, split.present)})


@registered
class ConFIG(Aggregator):
    """The direction with equal cosines to all gradients, as long as they reach along it (Liu et al. 2024).

    ``Uᵀ(UUᵀ)⁺·1`` of the unit gradients U, with the length ``Σᵢ gᵢ·direction``. For physics-informed
    networks.

    Cost: one eigendecomposition [K, K].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import ConFIG
      >>> [round(c, 3) for c in ConFIG()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [1.5, 0.75]
    """

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split = parts(gramian)
        wanted = split.present.astype(gramian.dtype)
        own, _ = pseudo_solve(split.cosines, wanted)
        own = own * wanted
        # ownᵀ·C·own, which is their sum as C·own is 1: so large coefficients of both signs round once only.
        square, eps = jnp.sum(own), jnp.finfo(own.dtype).eps
        rounding = jnp.maximum(8 * len(own) * eps * jnp.sum(jnp.abs(own)), 16 * eps)
        nothing = square <= rounding  # as of gradients that are opposite
        divisor = jnp.where(nothing, 1, jnp.sqrt(jnp.where(nothing, 1, square)))
        largest = jnp.max(split.lengths)
        largest = jnp.where(largest > 0, largest, 1)
        along = jnp.matmul(split.cosines, own, precision=HIGHEST)
        reach = jnp.sum(split.lengths / largest * along) / divisor
        coefficients = reach * (own / divisor) * (largest / split.divisors)
        coefficients = jnp.where(nothing, 0, coefficients)
        return Combination(coefficients, {"residual": _spread(along, split.present)})


@registered
class AlignedMTL(Aggregator):
    """Gradients replaced by the nearest ones that are orthogonal and of one length (Senushkin et al. 2023).

    ``B = √λ·V·Λ^(−½)·Vᵀ`` of the Gramian's eigenvalues Λ and vectors V; the coefficients are ``B·1``, the sum
    of the aligned gradients. Eigenvalues that are rounding next to the largest are left out, so in float32
    gradients more than a thousand times shorter than the longest are lost, and ``residual`` counts how many:
    give terms weights of one scale.

    Args:
      scale_mode: the common length's square λ: ``"min"`` of the eigenvalues, as in the paper, ``"median"``,
        or ``"rmse"``, their mean.

    Cost: one eigendecomposition [K, K].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import AlignedMTL
      >>> [round(c, 3) for c in AlignedMTL()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [1.0, 0.5]
    """

    scale_mode: Literal["min", "median", "rmse"] = static(default="min")

    def _check(self) -> None:
        one_of("AlignedMTL", "scale_mode", self.scale_mode, ("min", "median", "rmse"))

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        count, dtype = len(gramian), gramian.dtype
        trace = jnp.trace(gramian)
        values, vectors = jnp.linalg.eigh(gramian / jnp.where(trace > 0, trace, 1))
        kept = values > _floor(values, dtype)
        rank = jnp.sum(kept)
        # The eigenvalues rise, so those that are kept stand at the end; the lower of two in the middle.
        first = count - rank
        scale = {
            "min": values[jnp.minimum(first, count - 1)],
            "median": values[jnp.minimum(first + (rank - 1) // 2, count - 1)],
            "rmse": jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1),
        }[self.scale_mode]
        roots = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
        ones = jnp.ones(count, dtype)
        found = jnp.matmul(vectors, roots * jnp.matmul(vectors.T, ones, precision=HIGHEST), precision=HIGHEST)
        # The least that is kept has lost digits to the largest, and terms that are far shorter all of theirs.
        least = values[jnp.minimum(first, count - 1)]
        rounded = jnp.finfo(dtype).eps * jnp.max(values) / jnp.where(rank > 0, least, 1)
        split = parts(gramian)
        angles = jnp.linalg.eigvalsh(split.cosines)
        independent = jnp.sum(angles > _floor(angles, split.cosines.dtype)) - jnp.sum(~split.present)
        lost = jnp.maximum(independent - rank, 0).astype(dtype)
        residual = jnp.where(rank > 0, jnp.maximum(rounded, lost), 0)
        return Combination(jnp.where(rank > 0, found, ones), {"residual": residual})


def _floor(values: Array, dtype: Any) -> Array:
    """Eigenvalues up to here stand for 0: the Gramian was rounded before it came."""
    return jnp.max(jnp.abs(values)) * (4 * (len(values) + 2) * float(jnp.finfo(dtype).eps))


def _spread(along: Array, present: Array) -> Array:
    """How far numbers that ought to be equal are from it, relative to their size."""
    highest = jnp.max(jnp.where(present, along, -jnp.inf))
    lowest = jnp.min(jnp.where(present, along, jnp.inf))
    size = jnp.maximum(jnp.abs(highest), jnp.abs(lowest))
    return jnp.where(jnp.any(present) & (size > 0), (highest - lowest) / jnp.where(size > 0, size, 1), 0)
