"""The regularizers' outputs by name: an ordered dict that knows what a wrong name may have meant."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.serialization
import jax

from jaxreg.base.names import did_you_mean

V = TypeVar("V")


class Regularizers(OrderedDict[str, V]):
    """Name -> `RegularizerOutput`, or another record of a term: an `OrderedDict`, a pytree as that is.

    Flax serializes it as a dict.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> l1 = dict(name="l1_sparsity", fn=lambda x, batch: jnp.sum(jnp.abs(x)), weight=1.0)
      >>> _, out = jr.compose(lambda x, batch: jnp.sum(x), [l1])(jnp.ones(3))
      >>> out.regularizers["l1"]
      Traceback (most recent call last):
      KeyError: "no term is named 'l1'; did you mean 'l1_sparsity'? the terms are ['l1_sparsity']"
    """

    def __missing__(self, name: str) -> V:
        raise KeyError(f"no term is named {name!r}; {did_you_mean(name, self)}the terms are {list(self)}")


def _flatten_with_keys(terms: Regularizers[Any]) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(name), term) for name, term in terms.items()], tuple(terms)


def _flatten(terms: Regularizers[Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return tuple(terms.values()), tuple(terms)


def _unflatten(names: tuple[str, ...], terms: Any) -> Regularizers[Any]:
    return Regularizers(zip(names, terms, strict=True))


def _state(terms: Regularizers[Any]) -> dict[str, Any]:
    return {name: flax.serialization.to_state_dict(term) for name, term in terms.items()}


def _restored(terms: Regularizers[Any], state: Mapping[str, Any]) -> Regularizers[Any]:
    if list(terms) != list(state):
        raise ValueError(
            f"the bytes are of an output of the terms {list(state)}, but this one has {list(terms)}"
        )
    return Regularizers(
        (name, flax.serialization.from_state_dict(term, state[name], name=name))
        for name, term in terms.items()
    )


jax.tree_util.register_pytree_with_keys(Regularizers, _flatten_with_keys, _unflatten, _flatten)
flax.serialization.register_serialization_state(Regularizers, _state, _restored)
