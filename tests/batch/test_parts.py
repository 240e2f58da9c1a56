"""The parts of a batch add up to the whole: every built-in term, whatever the mask and the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from library_cases import CASES
from prepared import REDUCTIONS, prepared

import jaxreg as jr
from jaxreg.base.kinds import KINDS
from jaxreg.core.part_metrics import merged, whole_metrics

B, T = 6, 5


def whole_and_parts(take, term, x, batch, n, together):
    """Value, metrics and gradient of the whole, and of n parts added up."""
    whole = take(x, batch)
    reweighted = getattr(term, "reweighted", ())
    parts = batch.with_arrays(own_x=x).split(n, rows_together=together, reweighted=reweighted)
    found = [take(part["own_x"], part) for part in parts]
    kinds = getattr(term, "metric_kinds", {})
    metrics = {}
    for name in whole[0][1]:
        if kinds.get(name) in KINDS:
            own = [metrics_of[name] for (_, metrics_of), _ in found]
            metrics[name] = own[0]
            for more in own[1:]:
                metrics[name] = merged(metrics[name], more, kinds.get(name))
    gradient = np.concatenate([np.asarray(g) for _, g in found])[: len(x)]
    return whole, (sum(value for (value, _), _ in found), whole_metrics(metrics, kinds)), gradient


def same(got, want, rtol, atol):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=rtol, atol=atol)


def random_batch(rng, batch, pairs):
    """The same arrays under another mask and other weights: ragged, with holes, negative, with empty rows."""
    mask = rng.random((B, T)) < 0.7
    weights = rng.choice([0.0, -0.5, 0.3, 1.0, 2.0], (B, T))
    if rng.random() < 0.5:
        mask[rng.integers(B)] = False
    if pairs:  # both answers of a pair count, or none
        some = (mask & (weights != 0)).any(1).reshape(-1, 2).all(1).repeat(2)
        mask &= some[:, None]
    if rng.random() < 0.2:
        mask[:] = False
    dtype = batch.weights.dtype
    return jr.TokenBatch.from_arrays(
        mask=jnp.asarray(mask), weights=jnp.asarray(weights, dtype), **batch.arrays
    )


def is_additive(name):
    case = CASES[name]
    return case.x != "params" and (case.make("token_mean") if case.reduces else case.make()).additive is True


ADDITIVE = [name for name in CASES if is_additive(name) and not CASES[name].key]
# Of one class, the first case, and those that reduce in a way of their own.
OWN_WAY = {"L2, number", "Consistency, cosine", "Entropy, temperature", "CrossEntropy of logits"}
KINDS_OF = [name.partition(",")[0].partition(" of ")[0] for name in ADDITIVE]
ADDITIVE = [n for i, n in enumerate(ADDITIVE) if n in OWN_WAY or KINDS_OF[i] not in KINDS_OF[:i]]
REDUCED = [name for name in ADDITIVE if CASES[name].reduces]
# Every term in float64 with one of its reductions, which they all share, and a few with all in float32.
SOME = [(name, REDUCTIONS[i % 3], True) for i, name in enumerate(REDUCED)]
SOME += [(name, "", True) for name in ADDITIVE if name not in REDUCED]
SOME += [("CrossEntropy", "token_mean", False), ("PPO", "datum_mean", False), ("DPO", "", False)]


@pytest.mark.parametrize(("name", "reduction", "x64"), SOME)
def test_the_parts_of_every_term_add_up(name, reduction, x64):
    case = CASES[name]
    dtype, rtol, atol = (np.float64, 1e-10, 1e-12) if x64 else (np.float32, 1e-5, 2e-6)
    with jax.enable_x64(x64):
        _, fn, x, batch = prepared(name, reduction, dtype)
        take = jax.jit(jax.value_and_grad(fn, has_aux=True))
        for seed in range(4):
            rng = np.random.default_rng(seed)
            mine = batch if seed == 0 else random_batch(rng, batch, case.pairs)
            together = 2 if case.pairs else 1
            whole, (value, metrics), gradient = whole_and_parts(take, fn, x, mine, 3, together)
            (want, wanted), slope = whole
            scale = float(np.abs(np.asarray(slope)).max() + 1e-30)
            same(value, want, rtol, atol * max(1, abs(float(want))))
            same(gradient / scale, np.asarray(slope) / scale, rtol, atol)
            assert metrics.keys() <= wanted.keys()
            assert wanted.keys() - metrics.keys() <= {"active_units"}
            for key, metric in metrics.items():
                close_enough = (rtol, atol) if metric.dtype == dtype else (1e-5, 2e-6)
                same(metric, wanted[key], close_enough[0], close_enough[1] * max(1, abs(float(wanted[key]))))


def test_what_does_not_add_up_is_refused_by_name():
    batch = jr.TokenBatch.from_arrays(mask=jnp.ones((2, 3), bool))
    part, _ = batch.split(2)
    with pytest.raises(ValueError, match=r"L2: center='mean' is the mean of the whole batch.*give center="):
        jr.regularizers.L2(center="mean")(jnp.zeros((1, 3)), part)
    with pytest.raises(ValueError, match=r"GaussianKL: free_bits are of means.*leave free_bits= out"):
        jr.regularizers.GaussianKL(free_bits=0.1)((jnp.zeros((1, 3, 2)),) * 2, part)
    with pytest.raises(ValueError, match=r"Orthogonality: a matrix \[N, D\].*one matrix a datum"):
        jr.regularizers.Orthogonality()(jnp.zeros((1, 3)), part)
    with pytest.raises(KeyError, match=r"weights times 'w': name the array where the whole is taken apart"):
        jr.regularizers.Unlikelihood(candidates="w")(-jnp.ones((1, 3)), part.with_arrays(w=jnp.ones((1, 3))))
    with pytest.raises(ValueError, match="only of candidates that are an array of the batch, by its name"):
        jr.regularizers.Unlikelihood(candidates=jnp.ones((1, 3)))(-jnp.ones((1, 3)), part)


class TestParts:
    batch = jr.TokenBatch.pack(
        [{"x": [1.0, 1.0, 1.0]}, {"x": [5.0]}, {"x": [2.0, 7.0]}], row_buckets=[4], length_buckets=[4]
    )

    def test_rows_are_filled_up_and_none_is_dropped(self):
        parts = self.batch.split(3)
        assert [part.shape for part in parts] == [(2, 4)] * 3
        assert sum(int(part.mask.sum()) for part in parts) == 6
        assert {int(part.totals.tokens) for part in parts} == {6}
        (stacked,) = {part.shape for part in jax.tree.map(lambda a: a, parts)}
        assert stacked == (2, 4)

    def test_pairs_stay_together(self):
        pair = [{"x": [1.0]}, {"x": [2.0]}, {"x": [3.0]}]
        parts = jr.TokenBatch.pack_pairs(pair, pair).split(2)
        assert [part.pairs.tolist() for part in parts] == [[1, -1, 2, -2], [3, -3, 0, 0]]
        odd = jr.TokenBatch.from_arrays(mask=jnp.ones((3, 2), bool))
        with pytest.raises(ValueError, match="belong together in groups of 2 .* but there are 3 rows"):
            odd.split(2, rows_together=2)

    def test_a_part_of_a_part_is_a_part_of_the_whole(self):
        inner = [part for half in self.batch.split(2) for part in half.split(2)]
        total = sum(part.mean(part["x"]) for part in inner)
        np.testing.assert_allclose(total, self.batch.mean(self.batch["x"]), rtol=1e-6)

    def test_several_requests_know_one_whole(self):
        data = [{"x": [1.0, 2.0], "weights": [0.0, 3.0]}, {"x": [4.0]}, {"x": [5.0, 6.0, 9.0]}]
        data = [{"weights": np.ones(len(d["x"])), **d} for d in data]
        parts = [jr.TokenBatch.pack(own, totals_of=data) for own in (data[:1], data[1:])]
        whole = jr.TokenBatch.pack(data)
        for reduce in (jr.TokenBatch.mean, jr.TokenBatch.datum_mean):
            total = sum(reduce(part, part["x"]) for part in parts)
            np.testing.assert_allclose(total, reduce(whole, whole["x"]), rtol=1e-6)
        with pytest.raises(ValueError, match="totals are of another batch: the part has 6 tokens"):
            jr.TokenBatch.pack(data, totals_of=data[:1])

    def test_a_mapping_made_of_a_part_is_the_part(self):
        part = self.batch.split(2)[0]
        term = jr.regularizers.L1()
        assert term(part["x"], {**part, "more": part["x"]})[0] == term(part["x"], part)[0]
        assert jr.TokenBatch.from_arrays(**part).mean(part["x"]) == part.mean(part["x"])

    def test_other_weights_do_not_keep_the_totals(self):
        part = self.batch.split(2)[0]
        with pytest.raises(ValueError, match=r"knows the whole's totals.*reweighted\(name\)"):
            part.replace(weights=2 * part.weights)
        with pytest.raises(ValueError, match="the sum of these weights over the whole is not known"):
            part.mean(part["x"], weights=part["x"])
        assert part.replace(weights=part.weights, totals=part.totals).totals is part.totals
        assert part.as_local().mean(part["x"]) == pytest.approx(2.0)

    def test_numbers_of_parts_are_whole_numbers(self):
        with pytest.raises(TypeError, match="the number of parts is a whole number, got 2.5"):
            self.batch.split(2.5)
        with pytest.raises(ValueError, match="at least 1, got 0"):
            self.batch.split(0)
        with pytest.raises(KeyError, match="no array 'w' to weight by"):
            self.batch.split(2, reweighted=("w",))
        with pytest.raises(TypeError, match=r"got TokenBatch; of a batch, say batch\.own_totals\(\)"):
            self.batch.with_totals(self.batch)
        with pytest.raises(TypeError, match="or axis_name, inside shard_map"):
            self.batch.with_totals()
