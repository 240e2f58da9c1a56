"""Where a batch is one device's part of a whole, its own means are not the whole's."""

from __future__ import annotations

import jax


def refuse_own_mean(what: str) -> None:
    """Refuse a mean that would be of one device's tokens, inside `jax.shard_map` or `jax.pmap`.

    Raises:
      ValueError: somebody's axes are manual here; with the remedy.
    """
    axes = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    if axes:
        raise ValueError(
            f"{what} inside shard_map over {', '.join(map(repr, axes))} is of this device's own tokens, and "
            f"the mean of such means is not the whole batch's. Compute the objective outside of shard_map: "
            f"under jit it is of the whole batch, however its arrays are sharded. Or let the batch know the "
            f"whole, batch.with_totals(axis_name={axes[0]!r}): what the devices have then adds up (psum). "
            f"Where each device's own is meant, say so: batch.as_local()"
        )
