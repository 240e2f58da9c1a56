"""Between the API's datums and arrays: what is read, what is sent, what must come back."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.base.arrays import array_of, to_numpy
from jaxreg.client.errors import Applied, BadReply, Step

TARGETS, WEIGHTS, LOGPROBS = "target_tokens", "weights", "logprobs"


def field(datum: Any, name: str) -> Any:
    """A field of a datum, which may be an object or a mapping; None where it has none."""
    value = getattr(datum, name, None)
    return datum.get(name) if value is None and isinstance(datum, Mapping) else value


def inputs_of(datum: Any, i: int) -> Mapping[str, Any]:
    """A datum's ``loss_fn_inputs``, which always have ``target_tokens``."""
    inputs = field(datum, "loss_fn_inputs")
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"datum {i}: expected an object with model_input and loss_fn_inputs (tinker.types.Datum, "
            f"jaxreg.client.Datum), got {type(datum).__name__}"
        )
    if TARGETS not in inputs:
        raise ValueError(
            f"datum {i}: loss_fn_inputs has no {TARGETS!r}, the tokens whose logprobs are wanted; it has "
            f"{sorted(inputs)}"
        )
    return inputs


def read(data: Sequence[Any], side_data: Sequence[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every datum's arrays for the terms: what it carries, and what is bound to it beside.

    Raises:
      TypeError, ValueError: naming the datum and the key.
    """
    if isinstance(data, Mapping | str) or not isinstance(data, Sequence):
        hint = "" if field(data, "loss_fn_inputs") is None else "; put this one into a list"
        raise TypeError(f"data is a sequence of datums, got {type(data).__name__}{hint}")
    if not data:
        raise ValueError("there is no data; a step takes one datum or more")
    if side_data is not None and len(side_data) != len(data):
        raise ValueError(f"side_data has {len(side_data)} mappings for {len(data)} datums")
    rows = []
    for i, datum in enumerate(data):
        row = dict(inputs_of(datum, i))
        side = side_data[i] if side_data else {}
        if twice := row.keys() & side.keys():
            raise ValueError(f"datum {i}: {sorted(twice)} are in its loss_fn_inputs and in side_data")
        row |= side
        targets = row[TARGETS] = array_of(row[TARGETS], TARGETS, i)
        if targets.dtype.kind not in "iu":
            raise TypeError(f"datum {i}: {TARGETS!r} are token ids, whole numbers, got {targets.dtype}")
        if targets.ndim not in (1, 2):
            raise ValueError(f"datum {i}: {TARGETS!r} has shape {targets.shape}; expected [T] or [T, K]")
        if WEIGHTS in row:
            row[WEIGHTS] = array_of(row[WEIGHTS], WEIGHTS, i)
        if WEIGHTS in row and row[WEIGHTS].shape not in (targets.shape, targets.shape[:1]):
            raise ValueError(
                f"datum {i}: {WEIGHTS!r} has shape {row[WEIGHTS].shape}, but {TARGETS!r} has {targets.shape}"
            )
        rows.append(row)
    return rows


def tokens_of(datum: Any, i: int) -> np.ndarray:
    """A datum's ``model_input`` as token ids [T], whole numbers.

    Raises:
      TypeError, ValueError: it is something else; it says what.
    """
    given = field(datum, "model_input")
    what = f"datum {i}: model_input is a list of token ids, whole numbers [T], or an SDK's ModelInput; got"
    if given is None or isinstance(given, str | bytes | Mapping):
        raise TypeError(f"{what} {type(given).__name__}")
    tokens = array_of(
        given.to_ints() if callable(getattr(given, "to_ints", None)) else given, "model_input", i
    )
    if tokens.ndim != 1:
        raise ValueError(f"{what} shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{what} {tokens.dtype}" + (": say .astype(int)" if tokens.dtype.kind == "f" else ""))
    return tokens


def own_weights(row: Mapping[str, Any]) -> np.ndarray:
    """The datum's own weights, of its targets' shape, for a forward request; zeros where it has none."""
    shape = row[TARGETS].shape
    weights = row.get(WEIGHTS)
    if weights is None:
        return np.zeros(shape, np.float32)
    return weights if weights.shape == shape else np.repeat(weights[:, None], shape[1], axis=1)


def with_weights(datum: Any, weights: np.ndarray, *, targets: np.ndarray | None = None) -> Any:
    """The datum as the server's linear cross-entropy takes it: targets and weights, nothing of ours.

    Everything else of the datum (its model input, its provenance) stays as it is, and so do the targets
    where no others are given.
    """
    inputs = {TARGETS: targets, WEIGHTS: np.ascontiguousarray(weights, np.float32)}
    if targets is None:
        inputs[TARGETS] = field(datum, "loss_fn_inputs")[TARGETS]
    kind: Any = type(datum)
    if others := _other_fields(kind):
        return kind(loss_fn_inputs=inputs, **{name: getattr(datum, name) for name in others})
    if isinstance(datum, Mapping):
        return {**datum, "loss_fn_inputs": inputs}
    if callable(getattr(datum, "model_copy", None)):  # pydantic, which would not convert what it copies
        fields = {name: getattr(datum, name) for name in type(datum).model_fields}
        return type(datum)(**{**fields, "loss_fn_inputs": inputs})
    other = copy.copy(datum)
    other.loss_fn_inputs = inputs
    return other


@functools.cache
def _other_fields(kind: Any) -> tuple[str, ...]:
    """A dataclass's arguments but for loss_fn_inputs: `dataclasses.replace`, at a quarter of its time."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return tuple(field.name for field in fields if field.init and field.name != "loss_fn_inputs")


def first_nonfinite(arrays: Sequence[np.ndarray]) -> tuple[int, list[int], float] | None:
    """The first number that is not finite: which array, where in it, and what it is."""
    if np.isfinite(np.concatenate([array.ravel() for array in arrays])).all():
        return None
    i = next(i for i, array in enumerate(arrays) if not np.isfinite(array).all())
    at = np.argwhere(~np.isfinite(arrays[i]))[0].tolist()
    return i, at, float(arrays[i][tuple(at)])


def logprobs_of(
    reply: Any, targets: Sequence[np.ndarray], step: Step, applied: Applied, *, finite: bool = True
) -> list[np.ndarray]:
    """One float32 array a datum, of its targets' shape.

    Raises:
      BadReply: the reply does not fit the data, or (if finite) holds NaN or −inf.
    """

    def bad(what: str) -> BadReply:
        return BadReply(what, step=step, gradient_applied=applied)

    outputs = getattr(reply, "loss_fn_outputs", None)
    if not isinstance(outputs, Sequence):
        raise bad(f"the reply has no loss_fn_outputs, but is a {type(reply).__name__}")
    if len(outputs) != len(targets):
        raise bad(f"the server answered with {len(outputs)} outputs for {len(targets)} datums")
    arrays = []
    for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        if not isinstance(output, Mapping) or LOGPROBS not in output:
            raise bad(f"output {i} has no {LOGPROBS!r}")
        try:
            array = to_numpy(output[LOGPROBS]).astype(np.float32, copy=False)
        except (TypeError, ValueError) as error:
            raise bad(f"output {i}: {LOGPROBS!r} is no array of numbers ({error})") from None
        if array.size != target.size or (array.ndim > 1 and array.shape != target.shape):
            raise bad(
                f"output {i}: {LOGPROBS!r} has shape {array.shape}, but datum {i} has {TARGETS!r} of shape "
                f"{target.shape} (a wrong length, or the outputs came in another order)"
            )
        arrays.append(array if array.shape == target.shape else array.reshape(target.shape))
    if finite and (found := first_nonfinite(arrays)):
        i, at, number = found
        raise bad(f"output {i}: a logprob is {number} at {at}")
    return arrays
