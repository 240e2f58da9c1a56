"""The caller's datums as one padded batch, and arrays of theirs as the datums that are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreg.base.arrays import to_numpy
from jaxreg.batch.buckets import coarse_length, coarse_rows
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.values import HIGHEST
from jaxreg.client import wire
from jaxreg.client.errors import Applied, Step
from jaxreg.client.several import in_groups


class Packed(NamedTuple):
    """A step's data. Datums are sent as they are, or with one datum a slot of their [T, K] targets.

    The cross-entropy is a sum over slots, so its gradient is the same both ways; K datums cost K forward and
    backward passes on the server, which then needs to know one target a token only.
    """

    data: list[Any]  # a list of ours: the caller may go on with theirs
    rows: list[dict[str, Any]]  # what the terms read of each datum, by name
    targets: list[np.ndarray]  # the tokens whose logprobs are wanted, [T] or [T, K] a datum
    batch: TokenBatch
    slots: list[int]  # how many datums each is sent as; 0: as it is

    def with_weights(self, weights: Sequence[np.ndarray]) -> list[Any]:
        """The datums as they are sent, with these weights of their targets, one array a datum."""
        sent = []
        for datum, own, targets, k in zip(self.data, weights, self.targets, self.slots, strict=True):
            if k:
                pairs = zip(_columns(targets, k), _columns(own, k), strict=True)
                sent += [wire.with_weights(datum, w, targets=t) for t, w in pairs]
            else:
                sent.append(wire.with_weights(datum, own))
        return sent

    def grouped(self, sent: Sequence[Any], requests: int) -> list[list[Any]]:
        """The datums as they are sent, in so many requests."""
        return in_groups(sent, [k or 1 for k in self.slots], requests)

    def logprobs_of(self, reply: Any, step: Step, applied: Applied) -> list[np.ndarray]:
        """What a reply says of the targets, one array of their shape a datum; or `BadReply`."""
        sent = [part for t, k in zip(self.targets, self.slots, strict=True) for part in _columns(t, k)]
        rest = iter(wire.logprobs_of(reply, sent, step, applied))
        return [np.stack([next(rest) for _ in range(k)], axis=-1) if k else next(rest) for k in self.slots]


def pack(
    data: Sequence[Any],
    side_data: Sequence[Mapping[str, Any]] | None = None,
    *,
    unrolled: bool = False,
    totals_of: Sequence[Any] | None = None,
    reweighted: Sequence[str] = (),
) -> Packed:
    """Read the datums and what is bound to them beside, and pad all to one batch.

    Args:
      data, side_data: the datums, and more arrays of each.
      unrolled: whether targets [T, K] are sent as K datums.
      totals_of: all datums of the batch that these are a part of.
      reweighted: the arrays that terms multiply the weights by.

    Raises:
      TypeError, ValueError: naming the datum and the key.
    """
    rows = wire.read(data, side_data)
    targets = [row[wire.TARGETS] for row in rows]
    slots = [t.shape[1] if unrolled and t.ndim == 2 else 0 for t in targets]
    # Of one of a few sizes: the model runs elsewhere, so padding is cheap here, and compiling is not.
    batch = TokenBatch.pack(rows, length_buckets=coarse_length, row_buckets=coarse_rows)
    if totals_of is not None:
        whole = TokenBatch.pack(wire.read(totals_of), length_buckets=coarse_length, row_buckets=coarse_rows)
        batch = batch.with_totals(whole.own_totals(reweighted))
    return Packed(list(data), rows, targets, batch, slots)


def given(logprobs: Sequence[Any], packed: Packed) -> list[np.ndarray]:
    """The caller's own logprobs, checked; a placeholder at a token that does not count becomes 0."""
    targets, counted = packed.targets, packed.batch.unpack(packed.batch.counted)
    if len(logprobs) != len(targets):
        raise ValueError(f"logprobs= has {len(logprobs)} arrays for {len(targets)} datums")
    arrays = []
    for i, (own, target, counts) in enumerate(zip(logprobs, targets, counted, strict=True)):
        array = to_numpy(own).astype(np.float32)
        if array.shape != target.shape:
            raise ValueError(
                f"logprobs=, datum {i}: has shape {array.shape}, but {wire.TARGETS!r} has {target.shape}"
            )
        wrong = ~np.isfinite(array) | (array > HIGHEST)
        if wrong[counts].any():
            raise ValueError(f"logprobs=, datum {i}: logprobs are finite and ≤ 0")
        arrays.append(np.where(wrong, np.float32(0), array))
    return arrays


def _columns(array: np.ndarray, k: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(array[:, j]) for j in range(k)] if k else [array]
