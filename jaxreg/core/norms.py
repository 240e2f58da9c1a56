"""Which gradients' norms to report."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxreg.base.paths import PathFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradNorms:
    """Which gradients the norms are of.

    Args:
      wrt: ``None``, the argument that is differentiated; ``"outputs"``, what ``forward`` produced
        (cheap: one small vjp a term); ``"params"``, exactly in parameter space (one wide pullback).
        Without ``forward`` there is only ``x``, so None and ``"outputs"`` are the same.
      per_datum: also report a norm for every datum: [B], over all axes but the leading one of the
        outputs. Of the outputs' gradient only, and at no extra pass.
      params: only the parameters whose path matches count: a shell pattern (``"*/kernel"``), a
        leading part of the path (``"head"``), a sequence of them, or a function of the path. The rest
        of the pullback is then never computed for the single terms. Hashable.

    A finite gradient has a finite norm, right in all its digits, wherever float32 can hold it (entries below
    1.2e-38 may count as 0); of complex numbers, the norm is of their magnitudes.

    A term's gradient has the dtype of what it is differentiated with respect to. Where that is float16,
    scale a term that may leave its range, not its weight: the unweighted gradient has to fit.

    Example:
      >>> import jaxreg as jr
      >>> jr.GradNorms(wrt="params", params="head")
      GradNorms(wrt='params', per_datum=False, params='head')
    """

    wrt: Literal["outputs", "params"] | None = None
    per_datum: bool = False
    params: PathFilter | None = None

    def __post_init__(self) -> None:
        if self.wrt not in (None, "outputs", "params"):
            raise ValueError(f"GradNorms: wrt is 'outputs', 'params' or None, got {self.wrt!r}")
        if isinstance(self.params, list):
            object.__setattr__(self, "params", tuple(self.params))
        if self.params is not None and self.wrt == "outputs":
            raise ValueError("GradNorms: a filter on params needs wrt='params', not wrt='outputs'")
        if self.per_datum and self.wrt == "params":
            raise ValueError(
                "GradNorms: per_datum norms are of the outputs' gradient, since a parameter belongs "
                "to no datum; use wrt='outputs'"
            )

    def check_fits(self, forward: object) -> None:
        """Refuse norms that an objective with this forward (or None) does not have."""
        if forward is None and (self.wrt == "params" or self.params is not None):
            raise ValueError(
                "GradNorms of params needs to know the model: give compose forward=apply_fn; without "
                "it all norms are of d(value)/d(x), which is track_grad_norms=True"
            )
        if forward is not None and self.per_datum and self.wrt is None:
            raise ValueError(
                "GradNorms: with forward the norms are of the params' gradient, which no datum owns; "
                "for norms a datum say GradNorms(wrt='outputs', per_datum=True)"
            )


def as_grad_norms(track: bool | GradNorms) -> GradNorms | None:
    """What ``track_grad_norms=`` stands for; None where no norms are wanted."""
    if isinstance(track, GradNorms):
        return track
    if not isinstance(track, bool):
        raise TypeError(f"track_grad_norms is a bool or a GradNorms, got {type(track).__name__}")
    return GradNorms() if track else None
