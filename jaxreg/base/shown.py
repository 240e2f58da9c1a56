"""Values as short text, for reprs: numbers where they are there to read, else dtypes and shapes.

Nothing here raises, and nothing reads what does not exist: a tracer, a `jax.ShapeDtypeStruct`, an array that
was donated or that lives on another host is shown by its dtype and shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

FEW = 3  # numbers that are shown one by one
LONGEST = 60  # characters of a value that is none of ours


def never_fails(text: Callable[[Any], str]) -> Callable[[Any], str]:
    """A ``__repr__`` or ``_repr_html_`` of a pytree, which may hold anything while JAX works on it."""

    @functools.wraps(text)
    def safe(self: Any) -> str:
        try:
            return text(self)
        except Exception:
            return f"&lt;{type(self).__name__}&gt;" if "html" in text.__name__ else f"<{type(self).__name__}>"

    return safe


def described(leaf: Any) -> str:
    """A leaf's dtype and shape.

    Example:
      >>> import numpy as np
      >>> described(np.zeros((4, 128), np.float32)), described(1.0)
      ('float32[4, 128]', 'float[]')
    """
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(getattr(leaf, 'shape', ()))}"


def readable(leaf: Any) -> np.ndarray | None:
    """The numbers of a leaf as NumPy has them, or None where there are none to read."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    if isinstance(leaf, jax.Array) and (leaf.is_deleted() or not leaf.is_fully_addressable):
        return None
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
        return None
    try:
        array = np.asarray(leaf)
        return array if array.dtype.kind in "biuf" else array.astype(np.float64, casting="safe")  # bfloat16
    except Exception:  # random keys, complex numbers, whatever else has no order
        return None


def number(leaf: Any) -> str:
    """A leaf as a number; a few one by one; of more the lowest, the highest and the shape.

    Example:
      >>> import numpy as np
      >>> number(0.123456), number(np.array([1.0, 2.0])), number(np.arange(100) / 4), number(None)
      ('0.1235', '[1, 2]', '0 … 24.75 [100]', '–')
    """
    if leaf is None:
        return "–"
    array = readable(leaf)
    if array is None:
        gone = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
        return described(leaf) + (" (deleted)" if gone else "")
    if array.ndim == 0:
        return f"{float(array):.4g}"
    if array.size <= FEW:
        return f"[{', '.join(f'{float(a):.4g}' for a in array.ravel())}]"
    return f"{span(array)} {list(array.shape)}"


def span(array: np.ndarray) -> str:
    """The lowest and the highest number of an array, or the one that they all are; nothing of none."""
    if not array.size:
        return ""
    low, high = (f"{float(edge):.4g}" for edge in (array.min(), array.max()))
    return low if low == high else f"{low} … {high}"


def called(value: Any) -> str:
    """What a function, a term, or what a term holds is called.

    Functions go by their names, dataclasses by the fields that differ from the default, and pytrees of
    arrays by how many there are.

    Example:
      >>> import functools, jaxreg as jr
      >>> called(jr.regularizers.KL(reference="ref")), called(functools.partial(sum, start=2))
      ("KL(reference='ref')", 'partial(sum, start=2)')
    """
    own = getattr(type(value), "_shown", None)
    try:
        return own(value) if own else _called(value)
    except Exception:
        return type(value).__name__


def _called(value: Any) -> str:
    if isinstance(value, functools.partial):
        arguments = (called(value.func), *map(called, value.args), *_named(value.keywords))
        return f"partial({', '.join(arguments)})"
    if name := getattr(value, "__qualname__", None):
        code = getattr(value, "__code__", None)
        if code and name.endswith("<lambda>"):
            return f"<lambda> at {Path(code.co_filename).name}:{code.co_firstlineno}"
        return str(name).rpartition("<locals>.")[2]
    if dataclasses.is_dataclass(value):
        return fields_of(value)
    if hasattr(value, "shape"):
        return number(value) if value.shape == () and readable(value) is not None else described(value)
    leaves = jax.tree.leaves(value)
    if any(hasattr(leaf, "shape") for leaf in leaves):
        kind = "" if isinstance(value, dict | list | tuple) else f" in {type(value).__name__}"
        return f"{len(leaves)} {'array' if len(leaves) == 1 else 'arrays'}{kind}"
    if cast(Any, type(value)).__repr__ is object.__repr__:
        return type(value).__name__
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def fields_of(made: Any) -> str:
    """A dataclass, by the fields that differ from their defaults: ``KL(reference='ref')``."""
    changed = {
        field.name: getattr(made, field.name)
        for field in dataclasses.fields(made)
        if not _is_default(getattr(made, field.name), field)
    }
    return f"{type(made).__name__}({', '.join(_named(changed))})"


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return False
    return value is field.default or (type(value) is type(field.default) and bool(value == field.default))


def _named(values: Mapping[str, Any]) -> Iterable[str]:
    return (f"{name}={called(value)}" for name, value in values.items())


def columns(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), indent: str = "  ") -> str:
    """Rows of cells as lines of aligned text, numbers to the right and the columns in ``left`` to the left.

    Example:
      >>> print(columns([["term", "value"], ["l1", "0.25"]]))
        term  value
        l1     0.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)
