"""The L2 norm of arrays of any scale, in one pass over them.

The square of a number above 1e19 is infinite in float32, and of one below 1e-19 it has lost digits or is 0.
What is measured here is right for every finite array: the norm is finite wherever float32 can hold it, and
has all its digits. (Numbers below 1.2e-38, which many devices take for 0, may count as 0.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array


def l2_norm(leaves: Sequence[Array], *, keep_leading: bool = False) -> Array:
    """``√Σ|g|²`` over all leaves: a scalar, or [N] where the leaves are [N, ...].

    It reads every leaf once, in float32 (float64 if one is float64), and is real for complex leaves. Its
    derivative is ``g / ‖g‖``, and 0 at 0. A leaf with NaN or ∞ in it makes it NaN or ∞.
    """
    return _norm(keep_leading, real_parts(leaves))


def sum_of_squares(leaves: Sequence[Array]) -> Array:
    """``Σ|g|²`` over all leaves, to which squares too small for float32 add up, too; derivative ``2·g``."""
    return _square(real_parts(leaves))


def absolutes(leaves: Sequence[Array], *, keep_leading: bool = False) -> tuple[Array, Array]:
    """``max|g|`` and ``mean|g|`` over all leaves: scalars, or [N] where the leaves are [N, ...]."""
    dtype = jnp.finfo(accumulation_dtype(jnp.result_type(*leaves))).dtype
    largest, total, count = jnp.zeros((), dtype), jnp.zeros((), dtype), 0
    for leaf in leaves:
        size = jnp.abs(leaf).astype(dtype)
        size = size.reshape(*leaf.shape[: int(keep_leading)], -1)
        largest = jnp.maximum(largest, jnp.max(size, axis=-1, initial=0))
        # Divided first, so that a sum of large numbers does not overflow.
        here = size.shape[-1]
        total = total * (count / max(count + here, 1)) + jnp.sum(size / max(count + here, 1), axis=-1)
        count += here
    return largest, total


@jax.custom_jvp
def _square(parts: tuple[Array, ...]) -> Array:
    return jnp.square(_norm(False, parts))


@_square.defjvp
def _square_jvp(primals: tuple[tuple[Array, ...]], tangents: tuple[tuple[Array, ...]]) -> tuple[Array, Array]:
    slopes = [jnp.sum(2 * p * t) for p, t in zip(primals[0], tangents[0], strict=True)]
    return _square(primals[0]), sum(slopes[1:], start=slopes[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(keep_leading: bool, parts: tuple[Array, ...]) -> Array:
    if parts[0].dtype == jnp.float64:
        return _in_three_ranges(keep_leading, parts)
    # XLA for CPUs makes a pass of every reduction, but adds in float64 as fast as it reads; a TPU has no
    # float64 of a wider range, and makes one pass of reductions over the same array.
    return lax.platform_dependent(
        parts,
        cpu=functools.partial(_in_float64, keep_leading),
        default=functools.partial(_in_three_ranges, keep_leading),
    )


@_norm.defjvp
def _norm_jvp(
    keep_leading: bool, primals: tuple[tuple[Array, ...]], tangents: tuple[tuple[Array, ...]]
) -> tuple[Array, Array]:
    norm = _norm(keep_leading, primals[0])
    # XLA may multiply by 1 / norm, which is 0 to it where the norm is above 1e38.
    down = jnp.where(norm > 1e30, jnp.asarray(2.0**-32, norm.dtype), jnp.ones_like(norm))
    divisor = jnp.where(norm == 0, jnp.ones_like(norm), norm * down)
    slope = jnp.zeros_like(norm)
    for part, tangent in zip(primals[0], tangents[0], strict=True):
        factor, per = (a.reshape(a.shape + (1,) * (part.ndim - a.ndim)) for a in (down, divisor))
        slope = slope + _sum(part * factor / per * tangent, keep_leading)
    return norm, slope


def _in_float64(keep_leading: bool, parts: tuple[Array, ...]) -> Array:
    """The squares of all float32 numbers are float64 numbers."""
    with jax.enable_x64(True):
        squares = jnp.zeros((), jnp.float64)
        for part in parts:
            wide = lax.convert_element_type(part, jnp.float64)
            squares = squares + _sum(wide * wide, keep_leading)
        return lax.convert_element_type(jnp.sqrt(squares), parts[0].dtype)


def _in_three_ranges(keep_leading: bool, parts: tuple[Array, ...]) -> Array:
    """Three sums, of the squares of g, of g·2⁻ᵏ and of g·2ᵏ, of which one fits (after Blue 1978).

    With k = 80 in float32 (640 in float64) the first is right between 2⁻⁶⁰ and 2¹²⁰: what it has lost to
    underflow is below its last digit, up to 2⁴⁰ numbers. Above and below, the others are.
    """
    limit = jnp.finfo(parts[0].dtype).maxexp  # 128
    shift = 5 * limit // 8

    def scaled(part: Array, up: Array) -> Array:
        # Of a broadcast number XLA takes (g·2ᵏ)² for g²·2²ᵏ, which may be 0·∞; not through a maximum.
        return jnp.maximum(jnp.abs(part) * up, 0)

    def root(exponent: int) -> tuple[Array, Array]:
        up, down = (jnp.asarray(2.0**e, parts[0].dtype) for e in (exponent, -exponent))
        total = sum(_sum(jnp.square(scaled(part, up)), keep_leading) for part in parts)
        return jnp.asarray(total), jnp.sqrt(jnp.asarray(total)) * down

    (squares, plain), (_, large), (_, small) = root(0), root(-shift), root(shift)
    low, high = 2.0 ** (-15 * limit // 32), 2.0 ** (15 * limit // 16)
    # A NaN in g is in all three; it compares as false and stays.
    return jnp.where(squares < low, small, jnp.where(squares > high, large, plain))


def _sum(values: Array, keep_leading: bool) -> Array:
    if values.ndim > 1 + keep_leading:
        values = jnp.sum(values, axis=-1)  # By rows first: CPUs share rows out to their cores.
    return jnp.sum(values, axis=tuple(range(int(keep_leading), values.ndim)))


def real_parts(leaves: Sequence[Array]) -> tuple[Array, ...]:
    """The leaves as real arrays of one accumulation dtype, complex ones as two."""
    wide = jnp.finfo(accumulation_dtype(jnp.result_type(*leaves))).dtype
    split = [(jnp.real(a), jnp.imag(a)) if jnp.iscomplexobj(a) else (jnp.asarray(a),) for a in leaves]
    return tuple(part.astype(wide) for parts in split for part in parts)
