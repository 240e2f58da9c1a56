"""Frozen dataclasses that are pytrees of their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def registered_dataclass(kind: type[T]) -> type[T]:
    """Register a dataclass whose fields are leaves, but for those with ``metadata={"static": True}``.

    By functions of its own: the structures of two classes registered by `jax.tree_util.register_dataclass`
    compare as equal where their fields do (jax 0.10.1 and 0.11.0), and a jitted function may then take one
    for the other.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    numbers = tuple(field.name for field in fields if field.name not in static)

    def flatten(made: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(made, name)) for name in numbers)
        return leaves, tuple(getattr(made, name) for name in static)

    def unflatten(choices: tuple[Any, ...], leaves: Any) -> T:
        made = object.__new__(kind)  # without its checks: leaves may be anything while JAX works on them
        for names, values in ((static, choices), (numbers, leaves)):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(made, name, value)
        return made

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)
    return kind
