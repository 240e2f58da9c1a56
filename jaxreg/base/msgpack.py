"""Trees of plain values and NumPy arrays as msgpack, safe to decode from strangers.

Arrays are raw little-endian bytes behind a header. Decoding builds nothing but dicts, lists, strings,
numbers, booleans, None and arrays of the dtypes that are allowed, within bounds on size and depth; it
never executes anything. (`flax.serialization` reads arrays of any dtype and shape that a header claims, in a
tree of any size and depth: right for one's own files, not for what a stranger sends. msgpack's own limits,
used below, know nothing of depth, of items in all, or of what is in an extension.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import msgpack
import numpy as np

ARRAY = 1  # the one extension type
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
MAX_BYTES = 1 << 30
MAX_DEPTH = 32
MAX_NDIM = 8
MAX_ITEMS = 1 << 16  # of a list or dict: msgpack makes room for as many as a list's header claims
MAX_ITEMS_IN_ALL = 1 << 20  # A list of a byte takes 60 or more.
_PLAIN = (str, int, float, bool, type(None))


class DecodeError(ValueError):
    """Bytes that are no message of ours, or one beyond the bounds."""


def encode(tree: Any, *, max_depth: int = MAX_DEPTH) -> bytes:
    """A tree of dicts (with string keys), lists, plain values and arrays as bytes."""
    _check(tree, DTYPES, max_depth)
    _Count(ValueError).of(tree)
    return msgpack.packb(tree, default=_encode_array, use_bin_type=True, strict_types=True)


def decode(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    dtypes: Collection[str] = DTYPES,
) -> Any:
    """The tree that `encode` made the bytes of.

    Raises:
      DecodeError: the bytes are truncated, no msgpack, larger or deeper than allowed, or hold anything
        but plain values and arrays of the allowed dtypes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"decode takes bytes, got {type(data).__name__}")
    size = memoryview(data).nbytes
    if size > max_bytes:
        raise DecodeError(f"{size} bytes are more than the {max_bytes} that are allowed (max_bytes=)")

    count = _Count(DecodeError)

    def array(code: int, raw: bytes) -> np.ndarray:
        if code != ARRAY:
            raise DecodeError(f"unknown extension type {code}")
        return _decode_array(raw, dtypes)

    try:
        tree = msgpack.unpackb(
            data,
            ext_hook=array,
            list_hook=count.list,
            object_pairs_hook=count.dict,
            raw=False,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=size,
        )
    except DecodeError:
        raise
    except (
        ValueError,
        TypeError,
        RecursionError,
        OverflowError,
        msgpack.UnpackException,
    ) as error:
        raise DecodeError(f"no message of jaxreg's: {type(error).__name__}: {error}") from None
    try:
        _check(tree, dtypes, max_depth)
    except (TypeError, ValueError) as error:
        raise DecodeError(str(error)) from None
    return tree


class _Count:
    """Lists and dicts so far, and what is in them; too many are an error."""

    def __init__(self, error: type[ValueError]) -> None:
        self._items, self._error = 0, error

    def list(self, items: list[Any]) -> list[Any]:
        self._add(len(items))
        return items

    def dict(self, pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
        self._add(len(pairs))
        return dict(pairs)

    def of(self, tree: Any) -> None:
        if type(tree) in (dict, list):
            self._add(len(tree))
            for item in tree.values() if type(tree) is dict else tree:
                self.of(item)

    def _add(self, items: int) -> None:
        self._items += 1 + items
        if self._items > MAX_ITEMS_IN_ALL:
            raise self._error(f"more than {MAX_ITEMS_IN_ALL} items; make arrays of numbers")


def _encode_array(value: Any) -> msgpack.ExtType:
    array = np.asarray(value)
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    header = msgpack.packb([str(array.dtype), list(array.shape)])
    return msgpack.ExtType(ARRAY, len(header).to_bytes(2, "little") + header + little.tobytes())


def _decode_array(raw: bytes, dtypes: Collection[str]) -> np.ndarray:
    if len(raw) < 2:
        raise DecodeError("an array without a header")
    end = 2 + int.from_bytes(raw[:2], "little")
    try:
        header = msgpack.unpackb(raw[2:end], strict_map_key=True, max_array_len=MAX_NDIM, max_map_len=0)
        dtype, shape = header
    except (ValueError, TypeError, msgpack.UnpackException):
        raise DecodeError("an array with a broken header") from None
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise DecodeError(f"an array of dtype {dtype!r}; allowed are {', '.join(dtypes)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise DecodeError(f"an array of shape {shape!r}")
    kind = np.dtype(dtype).newbyteorder("<")
    if math.prod(shape) * kind.itemsize != len(raw) - end:
        raise DecodeError(f"an array of shape {shape} and {len(raw) - end} bytes of {dtype}")
    if dtype == "bool" and (np.frombuffer(raw, np.uint8, offset=end) > 1).any():
        raise DecodeError("a boolean that is neither 0 nor 1")
    # A copy in the machine's own byte order: writable, and aligned.
    return np.frombuffer(raw, kind, offset=end).reshape(shape).astype(np.dtype(dtype))


def _check(tree: Any, dtypes: Collection[str], depth: int) -> None:
    if isinstance(tree, np.ndarray):
        if str(tree.dtype) not in dtypes:
            raise TypeError(f"an array of dtype {tree.dtype}; allowed are {', '.join(dtypes)}")
        if tree.ndim > MAX_NDIM:
            raise ValueError(f"an array of {tree.ndim} axes; {MAX_NDIM} are allowed")
        return
    if type(tree) in _PLAIN:
        return
    if depth <= 0:
        raise ValueError("a tree that is nested deeper than allowed (max_depth=)")
    if type(tree) in (dict, list) and len(tree) > MAX_ITEMS:
        raise ValueError(f"a {type(tree).__name__} of {len(tree)} items; make it an array")
    if type(tree) is dict:
        for key, value in tree.items():
            if type(key) is not str:
                raise TypeError(f"a key that is no string: {key!r}")
            _check(value, dtypes, depth - 1)
    elif type(tree) is list:
        for value in tree:
            _check(value, dtypes, depth - 1)
    else:
        raise TypeError(f"a value of type {type(tree).__name__}")
