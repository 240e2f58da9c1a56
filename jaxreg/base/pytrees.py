"""Frozen dataclasses that are pytrees, and whose structures tell one class from another.

The structures of two classes registered by `jax.tree_util.register_dataclass` compare as equal where their
fields do (jax 0.10.1 and 0.11.0), though their hashes differ; a jitted function then sometimes takes one for
the other and runs the wrong program. Registered by functions of their own they compare by class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def registered_dataclass(kind: type[T]) -> type[T]:
    """Register a dataclass whose fields are leaves, but for those with ``metadata={"static": True}``."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    static = [field.name for field in fields if field.metadata.get("static")]
    register_fields(kind, [field.name for field in fields if field.name not in static], static)
    return kind


def register_fields(kind: type, children: Sequence[str], static: Sequence[str]) -> None:
    """Register a class of these children and static fields, which together are all that it has."""

    def children_of(made: Any) -> tuple[Any, ...]:
        return tuple(getattr(made, name) for name in children)

    def static_of(made: Any) -> tuple[Any, ...]:
        return tuple(getattr(made, name) for name in static)

    def flatten(made: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return children_of(made), static_of(made)

    def flatten_with_keys(made: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        keys = map(jax.tree_util.GetAttrKey, children)
        return tuple(zip(keys, children_of(made), strict=True)), static_of(made)

    def unflatten(choices: tuple[Any, ...], leaves: Any) -> Any:
        made: Any = object.__new__(kind)  # without its checks: leaves may be anything while JAX works on them
        for names, values in ((static, choices), (children, leaves)):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(made, name, value)
        return made

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
