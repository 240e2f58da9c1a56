"""One contract for every built-in term: its formula, and every property that a term has."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from library_cases import CASES, MASK, data
from prepared import CALLS, REDUCTIONS, prepared, value_and_grad

import jaxreg as jr


def reduced(values, how, weights):
    """The named reduction of [B], [B, T] or [B, T, K], in NumPy."""
    if values.ndim == 1:  # one number a datum
        real = values[MASK.any(1)]
        return real.sum() if how == "token_sum" else real.mean()
    weights = np.broadcast_to((weights * MASK).reshape(*MASK.shape, *[1] * (values.ndim - 2)), values.shape)
    if how == "token_sum":
        return (values * weights).sum()
    if how == "token_mean":
        return (values * weights).sum() / weights.sum()
    rows = [(v, w) for v, w in zip(values, weights, strict=True) if w.sum()]
    return np.mean([(v * w).sum() / w.sum() for v, w in rows])


@pytest.mark.parametrize(("name", "reduction"), CALLS)
def test_value_and_gradient_are_the_formulas(name, reduction, x64):
    case, term, x, batch = prepared(name, reduction)
    numbers = data()
    # Compiled of one reduction; of the others eagerly, which many terms share.
    other = reduction in REDUCTIONS[1:]
    call = jax.value_and_grad(term, has_aux=True) if other else value_and_grad(name, reduction)
    (value, metrics), gradient = call(x, batch)

    def oracle(at, formula=case.oracle, **frozen):
        result = formula(at, numbers, **frozen) if case.x != "params" else formula(at, None)
        return reduced(result, reduction, numbers["weights"]) if case.reduces else result

    plain = jax.tree.map(np.asarray, x)
    close(value, oracle(plain), rtol=case.rtol, atol=1e-12)
    chex.assert_tree_all_finite(metrics)

    def differentiated(at):
        if case.surrogate is None:
            return oracle(at)
        result = case.surrogate(at, numbers, plain)
        return reduced(result, reduction, numbers["weights"])

    leaves, treedef = jax.tree.flatten(plain)
    for i, leaf in enumerate(leaves):
        got = np.asarray(jax.tree.leaves(gradient)[i])
        for index in [*np.ndindex(leaf.shape)][:: max(1, leaf.size // 20)]:
            step = np.zeros_like(leaf)
            step[index] = 1e-5
            # Central differences at two steps, extrapolated: truncation 1e-18, rounding 1e-10.
            slopes = [
                (
                    differentiated(treedef.unflatten([*leaves[:i], leaf + s * step, *leaves[i + 1 :]]))
                    - differentiated(treedef.unflatten([*leaves[:i], leaf - s * step, *leaves[i + 1 :]]))
                )
                / (2e-5 * s)
                for s in (1.0, 2.0)
            ]
            close(got[index], (4 * slopes[0] - slopes[1]) / 3, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_contract(name):
    case, term, x, batch = prepared(name, "token_mean", np.float32)
    # Its own float32 noise would drown numerical differences; check_term takes them in float64.
    jr.testing.check_term(
        term,
        x,
        None if case.x == "params" else batch,
        rows_together=2 if case.pairs else 1,
        gradients=case.surrogate is None,
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_equal_arguments_make_equal_terms_and_one_program(name):
    case = CASES[name]
    one, two = (case.make("token_mean") if case.reduces else case.make() for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != jr.regularizers.Length(target=99.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.anything = 1
    _, treedef = jax.tree.flatten(one)
    assert treedef == jax.tree.structure(two)


@pytest.mark.parametrize("name", sorted(n for n, c in CASES.items() if c.x != "params"))
def test_bfloat16_is_accumulated_in_float32(name):
    _, term, x, batch = prepared(name, "token_mean", jnp.bfloat16)
    value, _ = term(x, batch)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)


@pytest.mark.parametrize("name", sorted(n for n, c in CASES.items() if c.x != "params"))
def test_an_empty_batch_gives_zero(name):
    _, term, x, batch = prepared(name, "token_mean", np.float32)
    batch = batch.replace(
        mask=jnp.zeros_like(batch.mask),
        weights=jnp.zeros_like(batch.weights),
        lengths=jnp.zeros_like(batch.lengths),
    )
    (value, metrics), gradient = value_and_grad(name, "token_mean")(x, batch)
    assert float(value) == 0
    assert not np.asarray(gradient).any()
    assert not any(np.isnan(m) for m in metrics.values())


LOGPROBS = sorted(n for n, c in CASES.items() if c.x in ("lp", "top", "logits"))


@pytest.mark.parametrize("where", ["x", "reference", "both"])
@pytest.mark.parametrize("name", LOGPROBS)
def test_minus_infinity_never_makes_a_nan(name, where):
    if (
        "rthogonality" in name
        or name == "GradientPenalty"
        or (name.startswith("Consistency") and name[-2:] != "kl")
    ):
        pytest.skip("a term on vectors, which are finite")
    case, term, x, batch = prepared(name, "token_mean", np.float32)
    at = (0, 1, 2) if x.ndim == 3 else (0, 1)
    if where in ("x", "both"):
        x = x.at[at].set(-jnp.inf)
    if where in ("reference", "both"):
        names = {"lp": ("ref", "sampler"), "top": ("teacher",), "logits": ("ref_logits",)}[case.x]
        arrays = batch.arrays | {n: batch.arrays[n].at[at].set(-jnp.inf) for n in names}
        batch = batch.replace(arrays=arrays)
    (value, metrics), gradient = value_and_grad(name, "token_mean")(x, batch)
    assert not np.isnan(value)
    assert not np.isnan(np.asarray(gradient)).any()
    assert not any(np.isnan(m) for m in metrics.values())


@pytest.mark.parametrize("where", ["x", "reference"])
@pytest.mark.parametrize("name", LOGPROBS)
def test_nan_is_never_hidden(name, where):
    """A model that has diverged must not report a clean loss."""
    case, term, x, batch = prepared(name, "token_mean", np.float32)
    if where == "x":
        x = jnp.full_like(x, jnp.nan)
    else:
        fields = [getattr(term, f, None) for f in ("reference", "sampler")]
        names = [field for field in fields if isinstance(field, str)]
        if not names:
            pytest.skip("it reads no reference")
        arrays = {n: jnp.full_like(batch.arrays[n], jnp.nan) for n in names}
        batch = batch.replace(arrays=batch.arrays | arrays)
    (value, _), _ = value_and_grad(name, "token_mean")(x, batch)
    assert np.isnan(value)


def test_every_term_is_in_the_contract():
    def public(module):
        return {n for n, c in vars(module).items() if inspect.isclass(c) and not n.startswith("_")}

    covered = {name.split(",")[0].split(" ")[0] for name in CASES}
    assert public(jr.losses) | public(jr.regularizers) == covered
