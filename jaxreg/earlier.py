"""Objectives that 0.1.0 pickled still open: its modules' names, and terms that have more arguments by now."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import jax

from jaxreg import losses, regularizers
from jaxreg.core import norms, objective, output, plan, spec
from jaxreg.terms.term import HOLD_ARRAYS

# The arguments that terms have got since.
SINCE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("CISPO", "DRO", "GSPO", "ImportanceSampling", "Focal", "Unlikelihood"), ("inputs", "targets")
    ),
    "DPO": ("loss_type", "label_smoothing", "average_tokens", "inputs", "targets"),
    "SimPO": ("inputs", "targets"),
    **dict.fromkeys(("KLTopK", "ReverseKLTopK"), ("tail",)),
    "PPO": ("inputs", "targets", "dual_clip"),
    "Entropy": ("sampler", "inputs", "gradient"),
    **dict.fromkeys(("GroupLasso", "NuclearNorm", "SpectralNorm", "WeightOrthogonality"), ("layers",)),
    "JS": ("beta",),
    "KL": ("sampler", "gradient", "max_log_ratio", "inputs", "targets"),
    "LogRatioL2": ("sampler", "gradient", "inputs", "targets"),
    "Repetition": ("context",),
}


class StaticPart(spec.StaticPart):
    """What 0.1.0 pickled of a callable: its tree's structure, which fits no term that has more arguments."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = spec.StaticPart(**state)
        if made.treedef is not None and (fn := _whole(made.treedef, made.others)) is not None:
            made = spec.split_arrays(fn, "an objective of 0.1.0")[0]
        for field in dataclasses.fields(made):
            object.__setattr__(self, field.name, getattr(made, field.name))
        object.__setattr__(self, "__class__", spec.StaticPart)


def _whole(treedef: Any, leaves: tuple[Any, ...]) -> Any:
    """A built-in term of its old arguments, by name; newer ones are at their defaults."""
    kind, static = treedef.node_data()
    if not kind.__module__.startswith(("jaxreg.losses.", "jaxreg.regularizers.")):
        return None
    since = SINCE.get(kind.__name__, ())
    names = [field.name for field in dataclasses.fields(kind) if field.name not in since]
    term, rest = object.__new__(kind), iter(leaves)
    held = (
        jax.tree.unflatten(child, [next(rest) for _ in range(child.num_leaves)])
        for child in treedef.children()
    )
    for some, values in (
        ([name for name in names if name in HOLD_ARRAYS], held),
        ([name for name in names if name not in HOLD_ARRAYS], static),
    ):
        for name, value in zip(some, values, strict=True):
            object.__setattr__(term, name, value)
    return term


def known_by_its_earlier_name(module: types.ModuleType) -> None:
    """Let pickle find a module where 0.1.0 had it."""
    sys.modules[f"jaxreg.{module.__name__.rpartition('.')[2]}"] = module


# Where 0.1.0 had terms that have moved since.
for _module, _names in {
    losses.policy: ("GSPO",),
    regularizers.distributions: ("JS", "KL", "ConfidencePenalty", "Entropy"),
    regularizers.pointwise: ("Focal", "LogRatioL2", "Unlikelihood"),
    regularizers.parameters: ("GroupLasso", "NuclearNorm", "SpectralNorm", "WeightOrthogonality"),
    regularizers.structure: ("Length", "Repetition"),
}.items():
    for _name in _names:
        setattr(_module, _name, getattr(losses, _name, None) or getattr(regularizers, _name))
for _module in (norms, objective, output, plan):
    known_by_its_earlier_name(_module)
_spec = types.ModuleType("jaxreg.core.spec")
_spec.__dict__.update(vars(spec), StaticPart=StaticPart)
known_by_its_earlier_name(_spec)
