"""Why an objective could not run: what JAX says of buffers and abstract arrays, in the caller's words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxreg.base.paths import leaf_paths
from jaxreg.base.traces import lean
from jaxreg.base.types import PyTree
from jaxreg.core.bind import check_argument
from jaxreg.core.plan import Leaves, Plan, who
from jaxreg.core.state import REMEDY

HERE = str(Path(__file__).parent)
COPY = "Give it a copy of its own: jax.tree.map(jnp.copy, params)"


def explain(
    error: Exception, plan: Plan, leaves: Leaves, arguments: tuple[Any, ...], traced: bool
) -> Exception | None:
    """An error that says more than this one, of the same kind, or None, and this one without our own frames.

    Args:
      error: what calling the objective raised.
      plan, leaves: the objective.
      arguments: x, batch, state and key.
      traced: it was called inside of somebody else's program, which may hold leaves that are no arrays.
    """
    lean(error, HERE)
    if isinstance(error, TypeError) and not traced:
        try:
            _check_arrays(plan, *arguments)
        except TypeError as better:
            return better.with_traceback(None)
    if isinstance(error, RuntimeError | ValueError) and ("deleted" in str(error) or "donated" in str(error)):
        for what in _deleted(plan, leaves, *arguments):
            found = RuntimeError(what) if isinstance(error, RuntimeError) else ValueError(what)
            found.__cause__ = error
            return found
    return None


def refuse_deleted(plan: Plan, leaves: Leaves) -> None:
    """Refuse to become a part of somebody else's program with arrays that are no more."""
    if not any(map(_is_gone, jax.tree.leaves(leaves))):
        return
    for what in _deleted(plan, leaves):
        raise RuntimeError(what)


def _check_arrays(plan: Plan, x: PyTree, batch: PyTree, state: PyTree, key: Any) -> None:
    """Refuse what no compiled program takes, and name it."""
    if _no_arrays(x):
        check_argument(plan, x)
    for path, leaf in _no_arrays(batch):
        raise TypeError(
            f"batch{_at(path)} is no array but {type(leaf).__name__}: a batch is arrays and numbers; "
            + (
                "pack datums first, with jaxreg.TokenBatch.pack(data)"
                if hasattr(leaf, "loss_fn_inputs")
                else "what a term needs besides, it holds itself (functools.partial, a frozen dataclass)"
            )
        )
    for path, leaf in _no_arrays(state):
        raise TypeError(f"state={_at(path)} is no array but {type(leaf).__name__}: {REMEDY}")
    for _, leaf in _no_arrays(key):
        raise TypeError(f"key= is a random key, jax.random.key(seed), got {type(leaf).__name__}")


def _deleted(plan: Plan, leaves: Leaves, *arguments: PyTree) -> Iterator[str]:
    """What is said of each array that is no more."""
    names, parts, arrays = [f"the {who(name)}" for name in plan.names], list(plan.parts), list(leaves.terms)
    if plan.model is not None:
        names, parts, arrays = [*names, "forward"], [*parts, plan.model], [*arrays, leaves.model]
    for whose, part, held in zip(names, parts, arrays, strict=True):
        for path in _gone(part.with_arrays(held)) if held else ():
            yield (
                f"{whose} holds an array{_at(path)} that was donated or deleted: another program was allowed "
                f"to overwrite it (donate_argnums=, donate_argnames=). {COPY}"
            )
    for name in (*_gone(leaves.constants), *_gone(leaves.held)):
        yield f"the weight of {who(name)} was donated or deleted: donate the params, not the objective"
    called = "x" if plan.model is None else "params", "batch", "state=", "key="
    for name, tree in zip(called, arguments, strict=False):
        for path in _gone(tree):
            yield (
                f"{name} holds an array{_at(path)} that was donated or deleted: a step that donates it "
                f"(donate_argnums=) gives a new one back; go on with that"
            )


def _gone(tree: PyTree) -> list[str]:
    return [path for path, leaf in _leaves(tree) if _is_gone(leaf)]


def _is_gone(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _no_arrays(tree: PyTree) -> list[tuple[str, Any]]:
    return [(path, leaf) for path, leaf in _leaves(tree) if not _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    try:
        jax.eval_shape(lambda leaf: None, leaf)
    except Exception:
        return False
    return True


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return list(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def _at(path: str) -> str:
    return f", at {path!r}," if path else ""
