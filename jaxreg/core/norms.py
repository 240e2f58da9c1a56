"""Which gradients' norms to report."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxreg.base.paths import PathFilter
from jaxreg.base.types import Place


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
      gramian: also report ``out.gramian``, the inner products of the terms' weighted gradients in the same
        space, from which ``out.cosines()`` and ``out.conflicts()`` are read. No further pass.
      absolutes: also report the largest and the mean magnitude of every term's gradient
        (``grad_abs_max``, ``grad_abs_mean``), which `jaxreg.weighting.lr_annealing` reads.
      every: measure at every n-th step only, by a conditional inside the one program. In between the output
        carries the last numbers, ``out.norms_age`` says how many steps old they are, and rules that need them
        wait. Carry ``state=objective.init()``, then ``state=out.state``.
      chunk_size: pull back so many terms at a time through the model, not all at once: for a model whose
        gradients of all terms do not fit into memory. 1 also is for a ``forward`` whose backward cannot be
        vmapped. With a Gramian all terms' gradients are held, whatever the chunk.

    A finite gradient has a finite norm, right in all its digits, wherever float32 can hold it (entries below
    1.2e-38 may count as 0); of complex numbers, the norm is of their magnitudes.

    A term's gradient has the dtype of what it is differentiated with respect to. Where that is float16,
    scale a term that may leave its range, not its weight: the unweighted gradient has to fit.

    Example:
      >>> import jaxreg as jr
      >>> jr.GradNorms(wrt="params", params="head")
      GradNorms(wrt='params', params='head')
    """

    wrt: Literal["outputs", "params"] | None = None
    per_datum: bool = False
    params: PathFilter | None = None
    gramian: bool = False
    absolutes: bool = False
    every: int = 1
    chunk_size: int | None = None

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
        _check_count(self.every, "every", "the number of steps from one measurement to the next")
        if self.chunk_size is not None:
            _check_count(self.chunk_size, "chunk_size", "the number of terms that are pulled back at once")
            if self.wrt == "outputs":
                raise ValueError(
                    "GradNorms: chunk_size parts the pullback through the model, which norms of the outputs' "
                    "gradient do not need; use wrt='params'"
                )
        if self.per_datum and self.every > 1:
            raise ValueError(
                "GradNorms: norms a datum belong to the step's own batch and are not carried over to the "
                "next; leave every= or per_datum= out"
            )

    def __repr__(self) -> str:
        default = type(self)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        said = [f"{name}={value!r}" for name, value in fields.items() if value != getattr(default, name)]
        return f"{default.__name__}({', '.join(said)})"

    def space(self, forward: object) -> Place:
        """Which gradients the norms are of, in an objective with this forward (or None)."""
        return "outputs" if forward is None or self.wrt == "outputs" else "params"

    def check_fits(self, forward: object) -> None:
        """Refuse norms that an objective with this forward (or None) does not have."""
        if forward is None and self.chunk_size is not None:
            raise ValueError(
                "GradNorms: chunk_size parts the pullback through the model, and there is none: give compose "
                "forward=apply_fn, or leave chunk_size= out"
            )
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


def _check_count(count: object, name: str, meaning: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"GradNorms: {name} is {meaning}, a whole number; got {count!r}")
    if count < 1:
        raise ValueError(f"GradNorms: {name} is {meaning}, at least 1; got {count}")
