"""The request that a gradient goes out in, for programs without an SDK.

Two forms of the same thing: plain dicts and lists with the API's field names, ready for ``json.dumps``, and
a compact one, msgpack with raw little-endian arrays. Each is the exact inverse of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.base import msgpack as _msgpack
from jaxreg.base.arrays import to_numpy
from jaxreg.base.msgpack import DecodeError
from jaxreg.client import wire

TENSOR_KEYS = {"data", "dtype", "shape"}
DTYPES = ("float32", "int64")
MAX_BYTES = 1 << 26  # As lists of Python numbers it takes 9 times as much.
INPUT = "forward_backward_input"


def request(
    data: Sequence[Any],
    gradients: Sequence[Any],
    *,
    model_id: str,
    seq_id: int | None = None,
) -> dict[str, Any]:
    """The forward-backward request of d(loss)/d(logprobs), JSON-ready.

    Args:
      data: datums with ``model_input`` (token ids, or an SDK's ``ModelInput``) and ``loss_fn_inputs``,
        of which ``target_tokens`` is sent.
      gradients: d(loss)/d(logprobs), one array a datum, of ``target_tokens``' shape; sent as
        ``weights = −gradient`` of the linear cross-entropy.
      model_id: which model.
      seq_id: the request's number in its order, for servers that want one.

    Returns:
      The body of ``POST /api/v1/forward_backward``: arrays as ``{"data": [...], "dtype": "float32" or
      "int64", "shape": [...]}``.

    Raises:
      TypeError, ValueError: naming the datum: no targets, another shape, a gradient that is not finite.

    Example:
      >>> import jaxreg as jr
      >>> datum = jr.client.Datum([5, 6], {"target_tokens": [6, 7]})
      >>> body = jr.client.payload.request([datum], [[0.5, -1.0]], model_id="model-0")
      >>> body["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"]
      {'data': [-0.5, 1.0], 'dtype': 'float32', 'shape': [2]}
      >>> jr.client.payload.decode(jr.client.payload.encode(body)) == body
      True
    """
    rows = wire.read(data)
    if len(gradients) != len(rows):
        raise ValueError(f"{len(gradients)} gradients for {len(rows)} datums")
    items = []
    for i, (datum, row, given) in enumerate(zip(data, rows, gradients, strict=True)):
        targets, gradient = row[wire.TARGETS], to_numpy(given).astype(np.float32)
        if gradient.shape != targets.shape:
            raise ValueError(
                f"datum {i}: the gradient has shape {gradient.shape}, but {wire.TARGETS!r} has "
                f"{targets.shape}"
            )
        if not np.isfinite(gradient).all():
            raise ValueError(f"datum {i}: the gradient is not finite, and would poison the remote model")
        inputs = {wire.TARGETS: _tensor(targets.astype(np.int64)), wire.WEIGHTS: _tensor(-gradient)}
        items.append({"model_input": {"chunks": _chunks(datum, i)}, "loss_fn_inputs": inputs})
    return {
        "forward_backward_input": {"data": items, "loss_fn": "cross_entropy", "loss_fn_config": None},
        "model_id": model_id,
        "seq_id": seq_id,
    }


def encode(body: Mapping[str, Any]) -> bytes:
    """A request in its compact form: token ids and tensors as raw bytes, a few bytes a number.

    Raises:
      TypeError, ValueError: something in it is no plain value, or a number that its dtype does not hold.

    Example:
      >>> import jaxreg as jr
      >>> datum = jr.client.Datum([1, 2], {"target_tokens": [2, 3]})
      >>> body = jr.client.payload.request([datum], [[-0.5, 0.5]], model_id="model-0")
      >>> jr.client.payload.decode(jr.client.payload.encode(body)) == body
      True
    """
    compact = _compact(body, "")
    if not isinstance(compact, dict) or not isinstance(compact.get(INPUT), dict):
        raise ValueError(f"a request is a dict with {INPUT!r}")
    return _msgpack.encode(compact)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The request that `encode` made the bytes of. Safe with bytes from strangers: bounded, nothing runs.

    Raises:
      DecodeError: truncated, too large or too deep, another dtype, or no request at all.

    Example:
      >>> import jaxreg as jr
      >>> jr.client.payload.decode(b"junk")
      Traceback (most recent call last):
      ...
      jaxreg.base.msgpack.DecodeError: ...
    """
    tree = _msgpack.decode(data, max_bytes=max_bytes, max_depth=16, dtypes=DTYPES)
    if not isinstance(tree, dict) or not isinstance(tree.get(INPUT), dict):
        raise DecodeError(f"a request is a dict with {INPUT!r}, got {type(tree).__name__}")
    return _plain(tree, "")


def _chunks(datum: Any, i: int) -> list[dict[str, Any]]:
    given = wire.field(datum, "model_input")
    chunks = getattr(given, "chunks", None)
    if chunks is None:
        return [{"type": "encoded_text", "tokens": wire.tokens_of(datum, i).tolist()}]
    plain = []
    for chunk in chunks:
        if hasattr(chunk, "tokens"):
            plain.append({"type": "encoded_text", "tokens": [int(token) for token in chunk.tokens]})
        elif callable(getattr(chunk, "model_dump", None)):
            plain.append(chunk.model_dump(mode="json"))
        else:
            raise TypeError(f"datum {i}: a chunk of type {type(chunk).__name__} has no JSON form")
    return plain


def _tensor(array: np.ndarray) -> dict[str, Any]:
    return {"data": array.ravel().tolist(), "dtype": str(array.dtype), "shape": list(array.shape)}


def _compact(value: Any, key: str) -> Any:
    """Tensors, and lists of token ids, to arrays; everything else as it is."""
    if isinstance(value, Mapping):
        if set(value) == TENSOR_KEYS:
            return _exact(value["data"], value["dtype"], value["shape"])
        return {name: _compact(item, name) for name, item in value.items()}
    if isinstance(value, list):
        if key == "tokens":
            return _exact(value, "int64", [len(value)])
        return [_compact(item, "") for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key or 'an item'} is {value}, which JSON does not have")
    return value


def _exact(numbers: Any, dtype: Any, shape: Any) -> np.ndarray:
    if dtype not in DTYPES:
        raise TypeError(f"a tensor's dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = int if dtype == "int64" else float
    if not isinstance(numbers, list) or any(type(number) is not kind for number in numbers):
        raise TypeError(f"the data of a tensor of dtype {dtype} is a list of {kind.__name__}s")
    if not isinstance(shape, list) or math.prod(shape) != len(numbers):
        raise ValueError(f"a tensor of shape {shape} does not hold {len(numbers)} numbers")
    wide = np.asarray(numbers, np.float64 if kind is float else np.int64)
    array = wide.astype(dtype)
    if not np.isfinite(wide).all() or not np.array_equal(array, wide):
        raise ValueError(f"a tensor of dtype {dtype} with a number that {dtype} does not hold, or no number")
    return array.reshape(shape)


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, np.ndarray):
        if not np.isfinite(value).all():
            raise DecodeError("a tensor with a number that is not finite")
        if key == "tokens":
            if value.dtype != np.int64 or value.ndim != 1:
                raise DecodeError("token ids are a list of int64")
            return value.tolist()
        return _tensor(value)
    if isinstance(value, dict):
        return {name: _plain(item, name) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise DecodeError("a number that is not finite")
    return [_plain(item, "") for item in value] if isinstance(value, list) else value
