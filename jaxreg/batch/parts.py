"""A batch that is a part of a whole: how it is made, and what it may not forget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array
from jaxreg.batch.counting import token_weights
from jaxreg.batch.reductions import Reductions
from jaxreg.batch.segments import Segments, summed
from jaxreg.batch.splitting import cut, repeated, rows_a_part, unstacked
from jaxreg.batch.totals import EqualParts, Totals, over_devices, refuse_less, totals_of

if TYPE_CHECKING:
    from typing import Self  # 3.11


class Parts(Reductions):
    """What a `TokenBatch` is taken apart by, and knows of the whole then."""

    arrays: dict[str, Array]
    pairs: Array | None

    def own_totals(self, reweighted: Iterable[str] = ()) -> Totals:
        """What this batch has, for its parts to be divided by; see `with_totals`.

        Args:
          reweighted: names of arrays [B, T] or [B] that terms multiply the weights by (`reweighted`).
        """
        names = list(reweighted)
        if self.segments is None:
            return totals_of(self.mask, self.weights, self.arrays, names)
        arrays = {n: self.spread(a) if jnp.ndim(a) == 1 else a for n, a in self.arrays.items() if n in names}
        return totals_of(self.mask, self.weights, arrays, names, self.segments)

    def with_totals(
        self, totals: Totals | None = None, *, axis_name: Any = None, reweighted: Iterable[str] = ()
    ) -> Self:
        """The batch as a part of a whole, which its means are then divided by.

        Args:
          totals: the whole's: ``whole.own_totals()``.
          axis_name: inside `jax.shard_map`, the mesh axis (or axes) that the whole's rows are spread over:
            the totals are then the sum over its devices, one collective of a few numbers.
          reweighted: with ``axis_name``, names of arrays that terms multiply the weights by.

        Raises:
          ValueError: totals of another batch, which has less than this part; an axis that is not bound.

        Example:
          >>> import jax, jax.numpy as jnp, jaxreg as jr
          >>> from jax.sharding import PartitionSpec as P
          >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
          >>> def mean(batch):
          ...     part = batch.with_totals(axis_name="data")
          ...     return jax.lax.psum(part.mean(part["x"]), "data")
          >>> batch = jr.TokenBatch.from_arrays(x=jnp.array([[1.0, 3.0]]))
          >>> jax.shard_map(mean, mesh=mesh, in_specs=P("data"), out_specs=P())(batch).item()
          2.0
        """
        if (totals is None) == (axis_name is None):
            raise TypeError("with_totals takes totals (of the whole batch), or axis_name, inside shard_map")
        if totals is None:
            totals = over_devices(self.own_totals(reweighted), axis_name)
        elif not isinstance(totals, Totals):
            raise TypeError(
                f"with_totals takes what whole.own_totals() gives, got {type(totals).__name__}"
                + ("; of a batch, say batch.own_totals()" if isinstance(totals, Parts) else "")
            )
        else:
            refuse_less(self.own_totals(), totals, "with_totals")
        return self.replace(totals=totals, local=False)

    def of_whole(self, totals: Totals | EqualParts | None) -> Self:
        """The batch as a part, as far as what it was made of says that it is one."""
        if totals is None:
            return self
        if isinstance(totals, EqualParts):
            totals = totals.of(self.own_totals())
        return self.with_totals(totals)

    def split(
        self, n: int, *, rows_together: int | None = None, reweighted: Iterable[str] = ()
    ) -> list[Self]:
        """The batch in n parts of as many rows, in order, whose values and gradients add up to the whole's.

        Where n does not divide the rows, the last parts are filled up with padding; nothing is dropped.

        Args:
          n: how many parts.
          rows_together: how many rows in a row stay in one part. **None**: 2 where `pack_pairs` made the
            batch, else 1.
          reweighted: names of arrays that terms multiply the weights by, such as the ``candidates`` of
            `regularizers.Unlikelihood`.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> batch = jr.TokenBatch.pack([{"x": [1.0, 1.0, 1.0]}, {"x": [5.0]}])
          >>> parts = batch.split(2)
          >>> [part.mean(part["x"]).item() for part in parts], batch.mean(batch["x"]).item()
          ([0.75, 1.25], 2.0)
        """
        return unstacked(self.stacked_parts(n, rows_together=rows_together, reweighted=reweighted), int(n))

    def stacked_parts(
        self, n: int, *, rows_together: int | None = None, reweighted: Iterable[str] = ()
    ) -> Self:
        """`split`, as one batch whose every array has a leading axis [n], for `jax.lax.scan`."""
        rows = self.shape[0]
        loose_pairs = self.pairs is not None and self.segments is None
        together = rows_together or (2 if loose_pairs else 1)
        if self.segments is not None:
            check_together(self, rows_together or (1 if self.pairs is None else 2), n)
            together = 1  # what belongs together stands in one row
        each = rows_a_part(rows, n, together, "split")
        totals = self.own_totals(reweighted) if self.totals is None else self.totals
        whole = self.replace(totals=None)
        parts: Self = (
            cut(whole, rows, int(n), each, "split") if self.segments is None else _cut(whole, n, each)
        )
        totals = totals.replace(parts=totals.parts * int(n))  # type: ignore[attr-defined]
        return parts.replace(totals=repeated(totals, int(n)), local=False)

    def reweighted(self, name: str) -> Self:
        """The batch with its weights times an array that it holds, [B, T] or [B], by its name.

        Of a part of a batch: with the whole's totals under these weights, which `split` was told to find.

        Example:
          >>> import jaxreg as jr
          >>> batch = jr.TokenBatch.pack([{"x": [1.0, 3.0], "wanted": [0.0, 1.0]}])
          >>> batch.reweighted("wanted").mean(batch["x"]).item()
          3.0
        """
        factor = jnp.asarray(cast(Any, self)[name])
        if self.segments is not None and factor.ndim == 1:
            factor = self.spread(factor)
        factor = factor.reshape(factor.shape + (1,) * (jnp.ndim(self.weights) - factor.ndim))
        factor = jnp.where(self.weights != 0, factor, jnp.zeros((), factor.dtype))  # whatever stands there
        totals = None if self.totals is None else self.totals.under(name)
        return self.replace(weights=token_weights(self.weights * factor, self.mask), totals=totals)

    def replace(self, **changes: Any) -> Self:
        """The batch with other fields.

        Raises:
          ValueError: another mask or other weights, of a part that knows the whole's totals.
        """
        if self.totals is not None and changes.keys() & {"mask", "weights"} and "totals" not in changes:
            raise ValueError(
                "replace: this batch is a part of one and knows the whole's totals, which are of its mask "
                "and weights: replace those before it is taken apart, or take batch.reweighted(name), its "
                "weights times an array that it holds; where all sums stay what they are, say "
                "totals=batch.totals"
            )
        return dataclasses.replace(cast(Any, self), **changes)


def _cut(batch: Any, n: int, each: int) -> Any:
    """Rows of several datums in n parts; each keeps what is of datums, [N], though they be elsewhere."""
    of_datums = {name: array for name, array in batch.arrays.items() if jnp.ndim(array) == 1}
    of_tokens = {name: array for name, array in batch.arrays.items() if jnp.ndim(array) > 1}
    fields = {name: getattr(batch, name) for name in ("mask", "weights", "segment_ids", "present")}
    fields, of_tokens = cut((fields, of_tokens), batch.shape[0], n, each, "split")
    own = fields["mask"] if fields["present"] is None else fields["present"]
    lengths = jax.vmap(lambda ids, own: summed(own.astype(jnp.int32), Segments(ids, batch.datums)))
    shared = repeated({"arrays": of_datums, "pairs": batch.pairs}, n)
    return batch.replace(
        **fields,
        arrays=shared["arrays"] | of_tokens,
        pairs=shared["pairs"],
        lengths=lengths(jnp.asarray(fields["segment_ids"]), jnp.asarray(own)),
    )


def check_together(batch: Any, together: int, n: int) -> None:
    """Refuse n parts that would hold one datum of a group and not the others, where numbers can be told.

    Args:
      batch: a batch whose rows hold several datums; of any other, rows stay together by themselves.
      together: how many datums in a row belong together: 2 for pairs.
      n: how many parts.
    """
    if together == 1 or batch.segment_ids is None or isinstance(batch.segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(batch.segment_ids)
    each = -(-len(ids) // n)
    part = np.full(batch.datums + 1, -1)
    part[ids] = (np.arange(len(ids)) // each)[:, None]
    groups = part[1:][: batch.datums // together * together].reshape(-1, together)
    for i, group in enumerate(groups):
        if len(places := {int(at) for at in group if at >= 0}) > 1:
            raise ValueError(
                f"split: datums {i * together} to {(i + 1) * together - 1} belong together and would be "
                f"parted, into the parts {sorted(places)}: pack what belongs together into one row "
                f"(pack_pairs(rows='packed')), or split into fewer"
            )
