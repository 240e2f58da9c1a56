"""The gradient of every term by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxreg.base.types import Array, PyTree
from jaxreg.core.notes import add_place
from jaxreg.core.passes import BoundTerm


def term_gradients(
    terms: Sequence[BoundTerm], outputs: PyTree, params: PyTree
) -> tuple[list[Array], list[Any], list[PyTree]]:
    """One vjp a term: values, extras, gradients. The terms share what they compute alike: XLA merges it."""
    values, extras, gradients = [], [], []
    for term in terms:
        try:
            (value, extra), gradient = jax.value_and_grad(term.fn, has_aux=True)(
                params if term.on_params else outputs
            )
        except Exception as error:
            add_place(error, f"the {term.whose} of the objective")  # its backward, where it says nothing yet
            raise
        values.append(value)
        extras.append(extra)
        gradients.append(gradient)
    return values, extras, gradients
