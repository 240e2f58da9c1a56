"""Outputs and objectives as tables, for people: the same rows as text (repr) and as HTML (notebooks)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxreg.base.shown import called, number, readable
from jaxreg.core.aggregate import whose_gradients
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.spec import BASE

Rows = list[list[str]]
NORMS = ("grad_norm", "grad_norm_weighted")
TEXT = ("term", "on", "function", "metrics")  # the columns that hold no numbers


def output_rows(out: Any) -> Rows:
    """One row a term, the base loss first and the total last; columns that would be empty are left out."""
    rows = [["term", "value", "weight", "contribution", *NORMS, "coefficient", "metrics"]]
    base, coefficients = out.base_loss, getattr(out.aggregation, "coefficients", {})
    rows.append(_term_row("base loss", base, "", base.value, base.grad_norm, coefficients.get(BASE)))
    for name, term in _items(out.regularizers):
        of_term = (number(term.weight), term.contribution, term.grad_norm_weighted, coefficients.get(name))
        rows.append(_term_row(name, term, *of_term))
    rows.append(["total", "", "", number(out.loss_total), "", number(out.total_grad_norm), "", ""])
    kept = [i for i in range(len(rows[0])) if i < 4 or _is_filled(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def text_columns(rows: Rows) -> list[int]:
    """Which columns of a table are text."""
    return [i for i, head in enumerate(rows[0]) if head in TEXT]


def output_title(out: Any) -> str:
    """What an output holds besides its terms."""
    state = out.state if isinstance(out.state, Mapping) else {}
    has = [f"state for step {number(state['step'])}"] if "step" in state else []
    has += ["state of " + ", ".join(map(repr, state["terms"]))] if state.get("terms") else []
    has += ["aux"] if out.aux is not None else []
    if (age := readable(out.norms_age)) is not None and age.ndim == 0 and age > 0:
        has += [f"norms of {number(age)} step{'s' * (age > 1)} ago"]
    return "CustomLossOutput" + (f" (with {', '.join(has)})" if has else "")


def term_text(term: Any) -> str:
    """One term's output on a line, without what is None."""
    shown = {key: number(value) for key, value in vars(term).items() if key not in ("name", "custom")}
    fields = [f"{key}={text}" for key, text in shown.items() if getattr(term, key) is not None]
    name = [repr(term.name)] if hasattr(term, "name") else []
    custom = [f"custom={{{_metrics(term.custom)}}}"] if term.custom else []
    return f"{type(term).__name__}({', '.join([*name, *fields, *custom])})"


def objective_rows(plan: Plan, leaves: Leaves) -> Rows:
    """One row a term: its name, weight, place, and what it is."""
    fns = plan.fns(leaves)
    rows = [["term", "weight", "on", "function"], ["base loss", "", "outputs", called(fns[0])]]
    for name, place, fn in zip(plan.names[1:], plan.places[1:], fns[1:], strict=True):
        rows.append([name, weight_text(plan, leaves, name), place, called(fn)])
    return rows


def objective_rest(plan: Plan, leaves: Leaves) -> list[str]:
    """What an objective has besides terms: its model and its norms."""
    rest = []
    if plan.model is not None:
        rest.append(f"forward={called(plan.model.with_arrays(leaves.model))}")
    if plan.has_aux:
        rest.append("has_aux=True")
    if plan.norms is not None:
        rest.append(f"track_grad_norms={called(plan.norms)}")
    if plan.weighting is not None:
        rest.append(f"weighting={called(plan.rule(leaves))}")
    if plan.aggregator is not None:
        aggregator = plan.combiner(leaves)
        whose = whose_gradients(aggregator, plan.names, plan.on_params)
        rest.append(f"aggregator={called(aggregator)} ({whose})")
    return rest


def weight_text(plan: Plan, leaves: Leaves, name: str) -> str:
    """A term's weight: a number, several where vmap stacked them, or that it follows a schedule."""
    constant = number(leaves.constants[name])
    if name not in leaves.held:
        return constant
    mover = f"{constant}, moved" if name in plan.ruled else "schedule"
    held = readable(leaves.held[name])
    if held is None:  # traced: it may be either
        return f"{mover} or {constant}"
    return constant if held.all() else mover


def _term_row(name: str, term: Any, weight: str, contribution: Any, norm: Any, coefficient: Any) -> list[str]:
    return [
        name,
        number(term.value),
        weight,
        number(contribution),
        number(term.grad_norm),
        number(norm),
        number(coefficient),
        _metrics(term.custom),
    ]


def _metrics(custom: Any) -> str:
    return ", ".join(f"{name} {number(metric)}" for name, metric in _items(custom))


def _items(mapping: Any) -> Sequence[tuple[str, Any]]:
    return list(mapping.items()) if isinstance(mapping, Mapping) else []


def _is_filled(cells: Iterable[str]) -> bool:
    return any(cell not in ("", "–") for cell in cells)
