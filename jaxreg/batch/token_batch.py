"""Token data as arrays that every term can read: rectangular, masked and bucketed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base import html
from jaxreg.base.names import did_you_mean
from jaxreg.base.shown import columns, never_fails
from jaxreg.base.types import Array, ArrayLike
from jaxreg.batch.buckets import Buckets, bucket_function, close_length, close_rows
from jaxreg.batch.making import made, misfits, of_arrays
from jaxreg.batch.packing import check_rows, in_rows, pack_arrays
from jaxreg.batch.pairs import pair_numbers
from jaxreg.batch.parts import Parts
from jaxreg.batch.ragged import Places, gather, places, scatter
from jaxreg.batch.shown import batch_rows, batch_title
from jaxreg.batch.totals import Totals, taken_totals
from jaxreg.batch.values import refuse_probabilities

BY_FIELD = 'take a field of the outputs with jaxreg.of("logits", term)'
_OWN = ("mask", "weights")  # fields that are arrays of the mapping, too
_OF_SEGMENTS = ("segment_ids", "lengths")
_FIELDS = (*_OWN, "lengths", "present", "pairs", "segment_ids", "totals", "local")


@flax.struct.dataclass(eq=False)
class TokenBatch(Parts, Mapping[str, Array]):
    """A batch of B datums of up to T tokens: a pytree, and a mapping from name to array.

    Attributes:
      mask: bool [B, T], the real tokens, a prompt's among them. A padded row is masked whole. Tokens
        need not stand first: padding on the left and holes are as good.
      weights: [B, T] or [B, T, K], how much each token counts: the data's own ``weights``, or the
        mask. Always 0 where the mask is False.
      lengths: int [B], how many tokens each datum has, which is how many `unpack` gives back; 0 for a
        padded row.
      arrays: every other array by its name: [B, T], [B, T, K], or [B] for a scalar a datum.
      present: bool [B, T], the tokens that are the datum's own, where it came with a ``mask`` of its own,
        which takes tokens out of everything but leaves them the datum's; else None, and they are the
        mask's.
      pairs: int [B], where `pack_pairs` made the batch: k for the chosen and −k for the rejected answer
        of pair k, 0 for a padded row; else None. Losses on pairs refuse rows that it does not call pairs.
      segment_ids: int [B, T], where a row may hold several datums (``pack(..., rows="packed")``): each
        token's datum, from 1 on, and 0 where none stands. What is of datums, [B] elsewhere, has the shape
        [N] then: ``lengths``, ``pairs``, scalars a datum, and what `datum_sum` and `datum_means` give;
        `spread` puts it back on tokens. Else None.
      totals: where this is a part of a batch (`split`, `with_totals`, ``pack(..., totals_of=)``), the whole's
        `Totals`, which its means are divided by, so that the parts' values and gradients add up; else None.
      room: how many datums the numbers in segment_ids are of, N; static. None where that is not known.
      local: whether means inside `jax.shard_map` are each device's own on purpose; see `as_local`.

    Make one with `pack` (ragged data), `pack_pairs`, or `from_arrays` (rectangular arrays).

    The mapping holds ``mask`` and ``weights`` too, so ``{**batch, "extra": array}`` is the same data.

    **What counts.** A token whose weight is 0 is context, no part of the answer; a datum without a token
    of another weight is as if it were not there. The reductions count each token with ``weights``, or
    with the ``weights=`` given to them (``weights=batch.mask`` for every real token alike). They take [B]
    (one number a datum: those of datums that count, alike), [B, T], or [B, T, K], accumulate in float32,
    ignore whatever stands where the weight is 0, be it NaN, and send exactly no gradient there. With no
    weight at all they give 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.pack([
      ...     {"logprobs": [-1.0, -2.0, -3.0], "weights": [0.0, 1.0, 1.0], "reward": 1.0},
      ...     {"logprobs": [-4.0], "weights": [1.0], "reward": 0.5},
      ... ])
      >>> batch.mask.shape, batch["reward"].tolist()
      ((2, 8), [1.0, 0.5])
      >>> batch.mean(batch["logprobs"]).item(), batch.datum_mean(batch["logprobs"]).item()
      (-3.0, -3.25)
      >>> batch.unpack(batch["logprobs"])
      [array([-1., -2., -3.], dtype=float32), array([-4.], dtype=float32)]
    """

    mask: Array
    weights: Array
    lengths: Array
    arrays: dict[str, Array] = flax.struct.field(default_factory=dict)
    present: Array | None = None
    pairs: Array | None = None
    segment_ids: Array | None = None
    totals: Totals | None = None
    local: bool = flax.struct.field(pytree_node=False, default=False)
    room: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def pack(
        cls,
        data: Sequence[Any],
        *,
        length_buckets: Buckets = close_length,
        row_buckets: Buckets = close_rows,
        rows: Literal["loose", "packed"] = "loose",
        totals_of: Sequence[Any] | None = None,
    ) -> TokenBatch:
        """Pack ragged datums into one padded, masked batch of NumPy arrays.

        Args:
          data: mappings from name to an array of shape [T] or [T, K] or a scalar (T may differ from
            datum to datum), or objects with such a mapping as ``loss_fn_inputs``, like the Tinker
            API's datums. Two names have a meaning: ``weights`` ([T] or [T, K], a token's weight) and
            ``mask`` ([T], False takes a token out of everything, but it stays the datum's: `unpack`
            gives it back).
          length_buckets: sizes that T is padded to (increasing), or a function from the longest
            length to the padded one. Default: 8, 10, 12, 14, 16, then four sizes a doubling.
          row_buckets: the same for B. Default: the next even number up to 16, then eight sizes a
            doubling; always even, so that pairs stay pairs.
          rows: **"loose"**, a row a datum; ``"packed"``, several short ones in one row, as many as its length
            holds (that of the longest, as ``length_buckets`` has it). A model then has to keep them apart,
            by ``batch["segment_ids"]``.
          totals_of: all datums of the batch that this is a part of, where several requests or processes
            share it; the parts' values and gradients then add up to the whole's.

        Every size that is not seen before compiles a program, and every padded token is computed. With
        the defaults less than a fifth of the padded length (from 8 tokens on) and a ninth of the padded
        rows (from 8 rows on) is padding, and batches of one number of rows compile at most 29 programs
        for all lengths up to 1024, 4 more for each doubling; all numbers of rows up to 64 come to 24
        sizes. Say ``length_buckets=[512, 1024]`` for fewer.

        What a token of weight 0, or one that is masked, holds is not looked at: NaN, a positive logprob
        or another placeholder may stand there, and becomes 0.

        Raises:
          ValueError, TypeError: no data, a datum without tokens, arrays of unequal length within a
            datum, a key that is missing somewhere, NaN, a positive logprob, an array that is not
            numeric: with the datum and the key.
        """
        check_rows(rows)
        of_datums = row_buckets if rows == "loose" else close_rows  # packed, the rows are fewer
        packed = pack_arrays(
            data, bucket_function(length_buckets, "length"), bucket_function(of_datums, "row")
        )
        # NumPy arrays: whoever calls the compiled program decides where they go.
        batch = cls(*cast(Any, packed))
        if rows == "packed":
            batch = cls(**in_rows(packed, bucket_function(row_buckets, "row")))
        if totals_of is None:
            return batch
        return batch.with_totals(cls.pack(totals_of, length_buckets=int, row_buckets=int).own_totals())

    @classmethod
    def pack_pairs(
        cls,
        chosen: Sequence[Any],
        rejected: Sequence[Any],
        *,
        length_buckets: Buckets = close_length,
        row_buckets: Buckets = close_rows,
        rows: Literal["loose", "packed"] = "loose",
    ) -> TokenBatch:
        """Pack pairs of answers as the losses on pairs want them: rows alternate, chosen and rejected.

        The batch remembers which rows are pairs, so that `losses.DPO` and `losses.SimPO` refuse it once its
        rows were reordered, or some left out, such that they are pairs no more.

        Args:
          chosen, rejected: as many datums each, as `pack` takes them; the i-th of both are a pair.
          length_buckets, row_buckets, rows: as for `pack`; a packed row holds whole pairs.

        Raises:
          ValueError, TypeError: as `pack`; they differ in number; or of a pair only one answer has a
            token that counts.

        Example:
          >>> import jaxreg as jr
          >>> liked, disliked = [{"ref": [-1.0]}, {"ref": [-2.0]}], [{"ref": [-3.0]}, {"ref": [-4.0]}]
          >>> batch = jr.TokenBatch.pack_pairs(liked, disliked)
          >>> batch["ref"][:, 0].tolist(), batch.pairs.tolist()
          ([-1.0, -3.0, -2.0, -4.0], [1, -1, 2, -2])
        """
        if len(chosen) != len(rejected):
            raise ValueError(f"pack_pairs got {len(chosen)} chosen and {len(rejected)} rejected datums")
        data = [datum for pair in zip(chosen, rejected, strict=True) for datum in pair]
        check_rows(rows)
        of_datums = row_buckets if rows == "loose" else close_rows
        batch = cls.pack(data, length_buckets=length_buckets, row_buckets=of_datums)
        batch = batch.replace(pairs=pair_numbers(np.asarray(batch.counted), len(data)))
        if rows == "loose":
            return batch
        lengths, more = bucket_function(length_buckets, "length"), bucket_function(row_buckets, "row")
        return cls(**in_rows(batch, more, together=2, bucket_length=lengths), pairs=batch.pairs)

    @classmethod
    def from_arrays(
        cls,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        datums: int | None = None,
        totals: Totals | None = None,
        **arrays: ArrayLike,
    ) -> TokenBatch:
        """Make a batch of arrays that are rectangular already; works inside jit.

        Args:
          mask: bool [B, T], the real tokens; all by default. They may stand anywhere in their row. A row
            that is masked whole is padding, and `unpack` leaves it out.
          weights: [B, T] or [B, T, K]; the mask by default.
          segment_ids: [B, T], where rows hold several datums: their numbers from 1 on, 0 where none stands.
          datums: with segment_ids, for how many datums there is room, N. **None**: as many as an array of one
            number a datum [N] has, or as the largest number says, where it can be told.
          totals: the whole's, of a part of a batch; see `with_totals`.
          **arrays: [B, T, ...] or [B] (with segment_ids [N]) by name.

        Raises:
          ValueError: arrays that do not fit together; a positive number that counts in an array whose
            name says that it holds logprobs (of [B, T, V], which may be logits: no negative one beside it).

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> batch = jr.TokenBatch.from_arrays(tokens=jnp.zeros((2, 3), int))
          >>> batch.mask.shape, list(batch)
          ((2, 3), ['mask', 'weights', 'tokens'])
          >>> left = jr.TokenBatch.from_arrays(mask=jnp.array([[False, True, True]]))
          >>> left.lengths.tolist(), left.unpack(jnp.array([[7, 8, 9]]))
          ([2], [array([8, 9], dtype=int32)])
        """
        who = "TokenBatch.from_arrays"
        if segment_ids is not None and datums is None and "lengths" in arrays:  # from_arrays(**batch)
            datums = len(cast(Any, arrays.pop("lengths")))
        return cls(**of_arrays(mask, weights, segment_ids, datums, arrays, who)).of_whole(totals)

    def with_arrays(self, **arrays: ArrayLike) -> TokenBatch:
        """The batch with more arrays, or others of the same names; all else stays: mask, weights, pairs.

        Args:
          **arrays: [B, T, ...] or [B] (of packed rows [N]) by name. What comes as one array a datum, `repack`
            first.

        Raises:
          ValueError: an array that does not fit, as `from_arrays` says, or the name of a field.

        Example:
          >>> import jaxreg as jr
          >>> batch = jr.TokenBatch.pack([{"x": [1.0, 2.0]}, {"x": [3.0]}])
          >>> more = batch.with_arrays(ref=batch.repack([[-1.0, -2.0], [-3.0]]), reward=[1.0, 0.0])
          >>> list(more), more.lengths.tolist()
          (['mask', 'weights', 'x', 'ref', 'reward'], [2, 1])
        """
        if fields := sorted(arrays.keys() & {*_FIELDS}):
            raise ValueError(f"with_arrays: {fields[0]!r} is no array beside the others; say replace(...)")
        given = {name: jnp.asarray(array) for name, array in arrays.items()}
        if bad := misfits(given, self.shape, self.datums):
            of_datums = "[B]" if self.segment_ids is None else f"[N] = ({self.datums},)"
            raise ValueError(
                f"with_arrays: arrays are [B, T, ...] or {of_datums} with (B, T) = {self.shape}; got {bad}"
            )
        of_tokens = {n: a for n, a in given.items() if a.ndim > 1 or self.segment_ids is None}
        refuse_probabilities(of_tokens, self.mask, self.weights, "with_arrays")
        return self.replace(arrays={**self.arrays, **given})  # type: ignore[attr-defined, no-any-return]

    def as_local(self) -> TokenBatch:
        """The batch, whose means inside `jax.shard_map` (or `jax.pmap`) are meant to be the device's own.

        Without it they are an error there: unless every device has the same weight of tokens, the mean of
        the devices' means is not the mean of the whole batch. Sums need nothing of this, for they add up.
        """
        return self.replace(local=True, totals=None)

    def __getitem__(self, name: str) -> Array:
        if name in self.arrays:
            return self.arrays[name]
        if name in self._own():
            return cast(Array, getattr(self, name))
        hint = f"; say batch.{name}" if name in _FIELDS else ""
        near = did_you_mean(name, self.arrays)
        near = f"; {near.strip()}" if near else ""
        raise KeyError(f"the batch has no array {name!r}{hint}; it has {sorted(self.arrays)}{near}")

    if not TYPE_CHECKING:  # or every attribute would exist for a type checker

        def __getattr__(self, name: str) -> Any:
            arrays = vars(self).get("arrays")  # none while it is being unpickled
            hint = f"; say batch[{name!r}]" if isinstance(arrays, dict) and name in arrays else ""
            raise AttributeError(f"a TokenBatch has no attribute {name!r}{hint}", name=name, obj=self)

    def __iter__(self) -> Iterator[str]:
        yield from self._own()
        yield from self.arrays

    def __len__(self) -> int:
        return len(self._own()) + len(self.arrays)

    def _own(self) -> tuple[str, ...]:
        """The fields that are of the mapping, too, so that ``{**batch, ...}`` forgets nothing."""
        segments = () if self.segment_ids is None else _OF_SEGMENTS
        return (*_OWN, *segments, *(() if self.totals is None else ("totals",)))

    def __bool__(self) -> bool:
        return True  # with a mask alone, too

    @never_fails
    def __repr__(self) -> str:
        return f"{batch_title(self)}\n{columns(batch_rows(self), left=(0, 1, 2))}"

    @never_fails
    def _repr_html_(self) -> str:
        return html.table(batch_title(self), batch_rows(self), left=(0, 1, 2))

    def unpack(self, array: ArrayLike) -> list[np.ndarray]:
        """Back to one NumPy array a datum, without padding: [B, T, ...] -> [T, ...], [B] -> scalar.

        A datum's tokens are the real ones, wherever they stand, in their order; of a datum that came with
        a ``mask`` of its own, all that it came with (``present``). A padded row is left out.

        Raises:
          ValueError: the array's leading axes are not this batch's.
        """
        host = np.asarray(array)
        lead = (self.datums,) if host.ndim == 1 else self.shape
        if host.ndim == 0 or host.shape[:2] != lead:
            raise ValueError(
                f"unpack takes an array of shape [B, T, ...] or [B] with (B, T) = {self.shape}, got "
                f"{host.shape}"
                + ("" if self.segment_ids is None else f"; what is of datums has the shape ({self.datums},)")
            )
        return gather(host, self._places())

    def repack(self, arrays: Sequence[ArrayLike]) -> np.ndarray:
        """One array a datum, as `unpack` gives them, to [B, T, ...], or [B] of scalars; 0 elsewhere.

        Raises:
          ValueError: not one array a datum, or one that is not as long as its datum.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> batch = jr.TokenBatch.from_arrays(mask=jnp.array([[False, True, True]]))
          >>> batch.repack([[5, 6]]).tolist()
          [[0, 5, 6]]
        """
        return scatter([np.asarray(values) for values in arrays], self._places(), self.shape, self.datums)

    def _places(self) -> Places:
        own = np.asarray(self.mask if self.present is None else self.present)
        return places(own, None if self.segment_ids is None else np.asarray(self.segment_ids))


TokenBatch.replace = Parts.replace  # type: ignore[method-assign]  # flax sets its own, after the class body


def as_token_batch(batch: Any, like: Any, who: str) -> TokenBatch:
    """The batch itself, or one made of a plain mapping, whose tokens then are all real."""
    if not isinstance(like, jax.Array | np.ndarray):
        fields = f" with the fields {sorted(map(str, like))}" if isinstance(like, Mapping) else ""
        raise TypeError(
            f"{who}: expected an array [B, T, ...], got {type(like).__name__}{fields}; {BY_FIELD}"
        )
    if isinstance(batch, TokenBatch):
        return batch
    if batch is None or isinstance(batch, Mapping):
        if jnp.ndim(like) < 2:
            raise ValueError(f"{who}: expected token data of shape [B, T, ...], got {jnp.shape(like)}")
        arrays = dict(batch or {})
        totals = taken_totals(arrays)
        mask, weights = arrays.pop("mask", None), arrays.pop("weights", None)
        ids, lengths = arrays.pop("segment_ids", None), arrays.get("lengths")
        datums = None
        if (
            ids is not None and lengths is not None and jnp.ndim(lengths) == 1
        ):  # of a TokenBatch that was made a mapping
            datums = arrays.pop("lengths").shape[0]
        shape = jnp.shape(like if mask is None else mask)[:2]
        if len(shape) != 2 or (mask is not None and jnp.ndim(mask) != 2):
            raise ValueError(f"{who}: the batch's mask is [B, T], got shape {jnp.shape(mask)}")
        given = {name: jnp.asarray(array) for name, array in arrays.items()}
        return TokenBatch(**made(mask, weights, ids, datums, given, shape, who)).of_whole(totals)
    raise TypeError(
        f"{who}: it reads a TokenBatch or a mapping from name to array, got {type(batch).__name__}"
    )
