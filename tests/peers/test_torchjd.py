"""Aggregators beside TorchJD's, which reads the same Gramians in float64, at the same regularisation."""

import jax
import numpy as np
import pytest
import torch
import torchjd.aggregation as theirs
from aggregator_cases import KINDS, gradients
from torchjd.linalg import QuadprogProjector

from jaxreg import aggregation as ours

EPS = 1e-4
SAME = {
    "upgrad": (
        ours.UPGrad(reg_eps=EPS, relative_to="trace"),
        lambda count: theirs.UPGrad(torch.ones(count).double(), QuadprogProjector(norm_eps=0.0, reg_eps=EPS)),
    ),
    "dualproj": (
        ours.DualProj(reg_eps=EPS, relative_to="trace"),
        lambda count: theirs.DualProj(
            torch.ones(count).double(), QuadprogProjector(norm_eps=0.0, reg_eps=EPS)
        ),
    ),
    "alignedmtl": (ours.AlignedMTL(), lambda count: theirs.AlignedMTL(torch.ones(count).double())),
    "imtlg": (ours.IMTLG(), lambda count: theirs.IMTLG()),
    "config": (ours.ConFIG(), lambda count: theirs.ConFIG()),
    "mean": (ours.Mean(), lambda count: theirs.Mean()),
    "sum": (ours.Sum(), lambda count: theirs.Sum()),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scaled"])
@pytest.mark.parametrize("name", SAME)
def test_the_direction_is_torchjds(name, kind):
    aggregator, other = SAME[name]
    if name in ("config", "imtlg", "alignedmtl") and kind in ("opposite", "parallel", "deficient"):
        pytest.skip("their float64 keeps directions that in a float32 Gramian are rounding")
    off = []
    for count in (1, 2, 3, 6, 12):
        rows = gradients(kind, count, 20, seed=1)
        rows = rows[np.linalg.norm(rows, axis=(1, 2)) > 0]
        if not len(rows):
            continue
        solve = jax.jit(jax.vmap(lambda gramian: aggregator.solve(gramian).coefficients))
        coefficients = solve(np.einsum("nkd,nld->nkl", rows, rows).astype(np.float32))
        got = np.einsum("nk,nkd->nd", np.asarray(coefficients, np.float64), rows)
        want = np.stack([other(count)(torch.from_numpy(row)).numpy() for row in rows])
        off.append(np.linalg.norm(got - want, axis=1) / np.linalg.norm(rows, axis=(1, 2)))
    off = np.concatenate(off)
    assert np.quantile(off, 0.95) <= 1e-5
    assert np.quantile(off, 0.99) <= 1e-4
