"""Objectives that 0.1.0 pickled still open: its modules' names, and terms that have more arguments by now."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import jax

from jaxreg import regularizers
from jaxreg.core import norms, objective, output, plan, spec
from jaxreg.terms.term import HOLD_ARRAYS


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
    """A built-in term of its old arguments, by name; new ones stand behind them, at their defaults."""
    kind, static = treedef.node_data()
    if not kind.__module__.startswith(("jaxreg.losses.", "jaxreg.regularizers.")):
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    term, rest = object.__new__(kind), iter(leaves)
    held = (
        jax.tree.unflatten(child, [next(rest) for _ in range(child.num_leaves)])
        for child in treedef.children()
    )
    for some, values in (
        ([name for name in names if name in HOLD_ARRAYS], held),
        ([name for name in names if name not in HOLD_ARRAYS], static),
    ):
        for name, value in zip(some, values, strict=False):
            object.__setattr__(term, name, value)
    return term


def known_by_its_earlier_name(module: types.ModuleType) -> None:
    """Let pickle find a module where 0.1.0 had it."""
    sys.modules[f"jaxreg.{module.__name__.rpartition('.')[2]}"] = module


# Where 0.1.0 had terms that have moved since.
for _module, _names in {
    regularizers.parameters: ("GroupLasso", "NuclearNorm", "SpectralNorm", "WeightOrthogonality"),
    regularizers.structure: ("Length", "Repetition"),
}.items():
    for _name in _names:
        setattr(_module, _name, getattr(regularizers, _name))
for _module in (norms, objective, output, plan):
    known_by_its_earlier_name(_module)
_spec = types.ModuleType("jaxreg.core.spec")
_spec.__dict__.update(vars(spec), StaticPart=StaticPart)
known_by_its_earlier_name(_spec)
