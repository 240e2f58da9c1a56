"""A term on a part of the outputs, or on something computed from them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from jaxreg.base.pytrees import register_fields
from jaxreg.base.shown import called, never_fails
from jaxreg.base.types import PyTree, TermFn

View: TypeAlias = str | Callable[[PyTree, PyTree], PyTree]


def of(view: View, term: TermFn) -> TermFn:
    """The term, given a part of what is differentiated: a base loss or regularizer like any other.

    Args:
      view: the path of a field of the outputs (a mapping, dataclass, named tuple, sequence, or any of them
        in one another): ``"logits"``, ``"heads/policy/logits"``, ``"layers/0"``. Or a function of
        ``(outputs, batch)``, hashable, such as one that takes the sampled tokens' logprobs of logits: terms
        that are given the same function share what it computes, as XLA merges what is computed twice.
      term: any term. What it asks for (``key``, ``state``) and says of itself stays so.

    Raises:
      KeyError: when it is called: the outputs have no such field; it lists those that there are.
      TypeError: view is neither a path nor a function.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(
      ...     jr.of("logits", jr.losses.CrossEntropy(inputs="logits")),
      ...     [dict(name="values", fn=jr.of("value", lambda x, batch: jnp.mean(x**2)), weight=0.5)])
      >>> outputs = {"logits": jnp.zeros((1, 2, 4)), "value": jnp.full((1, 2), 2.0)}
      >>> loss, out = objective(outputs, {"target_tokens": jnp.array([[1, 2]])})
      >>> out.regularizers["values"].value.item()
      4.0
    """
    if not (callable(view) or (isinstance(view, str) and view.strip("/"))):
        raise TypeError(f"of: a view is the path of a field or a function of (outputs, batch), got {view!r}")
    if not callable(term) or inspect.isclass(term):
        raise TypeError(f"of: it takes a view and a term, a function of (x, batch); got {term!r}")
    return _Of(view, term)


class _TermsSignature:
    """What asks a term for its arguments is told those of the term inside."""

    def __get__(self, made: _Of | None, kind: type) -> inspect.Signature | None:
        return None if made is None else inspect.signature(made.term)


@dataclasses.dataclass(frozen=True)
class _Of:
    view: View
    term: Any
    __signature__ = _TermsSignature()

    def __call__(self, x: PyTree, batch: PyTree = None, **asked: Any) -> Any:
        """The term of the view."""
        seen = (
            field(x, self.view, f"of({self.view!r})") if isinstance(self.view, str) else self.view(x, batch)
        )
        return self.term(seen, batch, **asked)

    def _shown(self) -> str:
        return f"of({called(self.view) if callable(self.view) else repr(self.view)}, {called(self.term)})"

    __repr__ = never_fails(_shown)

    def __getattr__(self, name: str) -> Any:
        """What it says of itself (``init``, ``rows_together``, ...) is what the term says."""
        if name.startswith("__") or name == "term":
            raise AttributeError(name)
        return getattr(self.term, name)


register_fields(_Of, ["term"], ["view"])


def field(tree: PyTree, path: str, who: str) -> PyTree:
    """The field of a mapping, dataclass, named tuple, sequence, or any of them in one another.

    Raises:
      KeyError: there is no such field; it lists those that there are.
    """
    for name in path.strip("/").split("/"):
        fields = _fields(tree)
        if name not in fields:
            there = sorted(fields) or "none"
            raise KeyError(f"{who}: {type(tree).__name__} has no field {name!r}; it has {there}")
        tree = fields[name]
    return tree


def _fields(tree: PyTree) -> dict[str, Any]:
    """By name or number; empty for an array."""
    if isinstance(tree, Mapping):
        return {str(key): value for key, value in tree.items()}
    if hasattr(tree, "_fields"):  # a named tuple
        return tree._asdict()
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return {str(i): value for i, value in enumerate(tree)}
    return dict(getattr(tree, "__dict__", {})) if not isinstance(tree, jax.Array) else {}
