"""The model, run once, and its pullback: of one cotangent, of all terms' at once, or of a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.base.types import Array, PyTree
from jaxreg.core.notes import add_place
from jaxreg.core.passes import Forward

T = TypeVar("T")


class Model(NamedTuple):
    """A forward pass that was run."""

    outputs: PyTree
    aux: PyTree
    pull: Callable[[PyTree], PyTree]  # from the outputs' cotangent to the params' gradient


def run_forward(forward: Forward | None, x: PyTree) -> Model:
    """The model's outputs; x itself where there is no model."""
    if forward is None:
        return Model(x, None, lambda cotangent: cotangent)
    outputs, pull, aux = jax.vjp(forward, x, has_aux=True)

    def pulled(cotangent: PyTree) -> PyTree:
        try:
            return pull(cotangent)[0]
        except Exception as error:
            add_place(error, "the backward of forward")
            raise

    return Model(outputs, aux, pulled)


def pull_rows(pull: Callable[[PyTree], PyTree], rows: PyTree, chunk_size: int | None) -> PyTree:
    """The pullback of every cotangent of a stack [K, ...], at once or ``chunk_size`` at a time."""
    if chunk_size is None:
        return _at_once(pull, rows)
    count = _count(rows)
    _, pulled = scan_chunks(lambda carry, chunk: (carry, chunk), None, pull, rows, chunk_size)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], pulled)


def scan_chunks(
    body: Callable[..., tuple[T, PyTree]],
    first: T,
    pull: Callable[[PyTree], PyTree],
    rows: PyTree,
    chunk_size: int,
    *alongside: Array,
) -> tuple[T, PyTree]:
    """``body(carry, pulled chunk, *chunks alongside)`` over a stack, whose last chunk zeros fill up."""
    chunk_size = min(chunk_size, _count(rows))
    missing = -_count(rows) % chunk_size

    def parted(leaf: Array) -> Array:
        filled = jnp.concatenate([leaf, jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)])
        return filled.reshape(-1, chunk_size, *leaf.shape[1:])

    def step(carry: T, chunk: tuple[PyTree, ...]) -> tuple[T, PyTree]:
        cotangents, *others = chunk
        if chunk_size > 1:
            pulled = _at_once(pull, cotangents)
        else:  # as it is, for a backward that cannot be vmapped
            one = pull(jax.tree.map(lambda leaf: leaf[0], cotangents))
            pulled = jax.tree.map(lambda leaf: leaf[None], one)
        return body(carry, pulled, *others)

    return lax.scan(step, first, jax.tree.map(parted, (rows, *alongside)))


def in_order(stacks: Sequence[PyTree], indices: Sequence[int]) -> list[Array]:
    """The leaves of stacks of trees, put together along their first axis; the k-th becomes ``indices[k]``."""
    rank = jnp.argsort(jnp.asarray(indices))
    leaves = [jax.tree.leaves(stack) for stack in stacks]
    together = [jnp.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*leaves, strict=True)]
    return together if list(indices) == sorted(indices) else [leaf[rank] for leaf in together]


def _count(rows: PyTree) -> int:
    return int(jax.tree.leaves(rows)[0].shape[0])


def _at_once(pull: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    try:
        return jax.vmap(pull)(rows)
    except Exception as error:
        error.add_note(
            "This happened where the norms of the params' gradient vmap the backward of forward over the "
            "terms. If forward's backward cannot be vmapped, use track_grad_norms=GradNorms(wrt='outputs'), "
            "the norms of the outputs' gradient, which runs it once and plain, or GradNorms(chunk_size=1), "
            "which pulls one term back after the other; or let it be vmapped: a jax.pure_callback in it "
            "takes vmap_method='sequential'."
        )
        raise
