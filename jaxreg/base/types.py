"""The names that annotations here are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
PyTree: TypeAlias = Any
TermFn: TypeAlias = Callable[..., Any]
Schedule: TypeAlias = Callable[[Any], Any]
Place: TypeAlias = Literal["outputs", "params"]
