"""A token of weight 0 is as if it were masked, and a datum of weight 0 as if it were not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from library_cases import CASES, MASK
from prepared import REDUCTIONS, prepared, value_and_grad

# Terms on tokens; those on pairs, on vectors and on lengths have their own files.
OTHERS = ("DPO", "SimPO", "Length", "Consistency", "GradientPenalty", "Orthogonality", "Repetition")
NAMES = [n for n, case in CASES.items() if case.x != "params" and not n.startswith(OTHERS)]


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_is_as_masked_and_a_weightless_datum_as_absent(name):
    reduction = REDUCTIONS[NAMES.index(name) % 3]
    _, _, x, batch = prepared(name, reduction, np.float32)
    term = value_and_grad(name, reduction)
    left_out = np.zeros_like(MASK)
    left_out[0, :2] = left_out[2, 3] = left_out[1] = True
    weights = jnp.where(left_out, 0.0, batch.weights)
    by_weight = batch.replace(weights=weights)
    by_mask = batch.replace(weights=weights, mask=batch.mask & ~left_out)
    rows = np.array([0, 2, 3, 4, 5])
    absent = jax.tree.map(lambda a: a[rows], by_weight)
    (value, metrics), slope = term(x, by_weight)
    assert not np.asarray(slope)[left_out].any()
    for other, at in ((by_mask, x), (absent, x[rows])):
        (same, same_metrics), _ = term(at, other)
        close(same, value)
        for key, metric in metrics.items():
            close(same_metrics[key], metric)
