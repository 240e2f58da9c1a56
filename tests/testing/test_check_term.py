"""check_term finds each fault in a term of one's own, names it and its remedy, and lets right terms pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

B, T = 4, 5
MASK = np.arange(T) < np.array([5, 3, 4, 2])[:, None]


def example():
    rng = np.random.default_rng(3)
    x = jnp.asarray(-rng.uniform(0.1, 3, (B, T)), jnp.float32)
    batch = jr.TokenBatch.from_arrays(
        mask=MASK,
        weights=MASK * rng.uniform(0.5, 2, (B, T)).astype(np.float32),
        ref=jnp.asarray(-rng.uniform(0.1, 3, (B, T)), jnp.float32),
        advantages=jnp.asarray(rng.normal(size=(B, T)), jnp.float32),
    )
    return x, batch


def bounded(d):
    return jnp.exp(jnp.clip(d, -30.0, 30.0))


def gap(x, b):
    return b.where(x) - b.where(b["ref"])


GOOD = {
    "a mean": lambda x, b: b.mean(b.where(x) ** 2),
    "a sum": lambda x, b: b.sum(jnp.abs(x)),
    "a mean of datums": lambda x, b: (b.datum_mean(b.where(x) ** 3), {"rms": jnp.sqrt(b.mean(x**2))}),
    "a bounded ratio": lambda x, b: b.mean(bounded(gap(x, b)) * b["advantages"]),
    "a distance": lambda x, b: b.mean(gap(x, b) ** 2),
    "an offset": lambda x, b: b.mean(jnp.maximum(0.0, -1.0 - b.where(x))),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_right_term_passes(name):
    jr.testing.check_term(GOOD[name], *example())


def in_a_row(x, b):
    """How much neighbours differ, by position."""
    both = b.mask[:, 1:] & b.mask[:, :-1]
    return jnp.sum(jnp.where(both, (x[:, 1:] - x[:, :-1]) ** 2, 0.0))


def first_tokens(x, b):
    """Reads the first two places, wherever the tokens are."""
    early = b.mask & (b.weights != 0) & (jnp.arange(b.shape[1]) < 2)[None]
    return jnp.sum(jnp.where(early, x, 0.0) ** 2)


def by_length(x, b):
    """Counts the places up to the last token, not the tokens."""
    last = jnp.max(jnp.where(b.mask & (b.weights != 0), jnp.arange(1, b.shape[1] + 1), 0), axis=1)
    return jnp.sum(b.datum_sum(x) / jnp.maximum(last, 1))


def by_row(x, b):
    """A mean over the rows of the mask, some of which have no weight."""
    return jnp.sum(b.datum_means(b.where(x) ** 2)) / jnp.maximum(jnp.sum(jnp.any(b.mask, axis=1)), 1)


def by_lengths(x, b):
    """A mean over the datums that have a length, some of which have no weight."""
    return jnp.sum(b.datum_means(b.where(x) ** 2)) / jnp.maximum(jnp.sum(b.lengths > 0), 1)


def hidden_branch(x, b):
    d = gap(x, b)
    return b.mean(jnp.where(jnp.abs(d) < 20, jnp.exp(d), 1.0))


def metric_only(x, b):
    return b.mean(x), {"kl": b.mean(jnp.expm1(b["ref"] - x))}


def mask_metric(x, b):
    return b.mean(x), {"lowest": jnp.min(jnp.where(b.mask, x, 0.0))}


BAD = {
    "weights ignored": (
        lambda x, b: jnp.sum(b.where(x) ** 2),
        r"a token of weight 0 is no part of the answer: its gradient.*batch\.weights",
        {"weights": False},
    ),
    "weights ignored in a metric": (
        mask_metric,
        r"a token of weight 0 .* the metric 'lowest'.*batch\.weights",
        {"weights": False},
    ),
    "datums of weight 0 in the denominator, by their lengths": (
        by_lengths,
        r"a datum of weight 0 is as if it were not there.*batch\.datum_mean",
        {"weights": False},
    ),
    "datums of weight 0 in the denominator": (
        by_row,
        r"a datum of weight 0 is as if it were not there.*batch\.datum_mean",
        {"weights": False},
    ),
    "a ratio overflows": (
        lambda x, b: b.mean(jnp.exp(gap(x, b))),
        r"log-ratio of ±100.*'ref'.*the value is inf.*jnp\.clip",
        {"log_ratios": False},
    ),
    "a branch that is not taken overflows": (
        hidden_branch,
        r"log-ratio of ±100.*the gradient is not finite.*jnp\.where",
        {"log_ratios": False},
    ),
    "a metric overflows": (metric_only, r"log-ratio of ±100.*the metric 'kl' is inf", {"log_ratios": False}),
    "reads positions": (
        first_tokens,
        r"where padding stands changes nothing: with it on the left.*batch\.mask",
        {"layout": False},
    ),
    "counts places": (
        by_length,
        r"where padding stands changes nothing.*batch\.mask",
        {"layout": False},
    ),
    "breaks at holes": (
        lambda x, b: in_a_row(jnp.where(b.weights != 0, x, 0.0), b),
        r"with it between the tokens",
        {"layout": False, "weights": False},
    ),
    "padding": (lambda x, b: jnp.mean(x**2), "no gradient into padding", None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_found_and_can_be_allowed(name):
    fn, message, allowed = BAD[name]
    with pytest.raises(jr.testing.TermCheckError, match=message):
        jr.testing.check_term(fn, *example())
    if allowed:
        jr.testing.check_term(fn, *example(), **allowed)


def params():
    rng = np.random.default_rng(4)
    return {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}


def quotient(w):
    return jnp.max(jnp.abs(w)) / jnp.sum(jnp.abs(w))


BAD_AT_SCALE = {
    "a derivative that squares": lambda p, b: quotient(p["w"]),  # that of a / b has 1 / b² in it
    "a floor under a norm": lambda p, b: jnp.sqrt(jnp.sum(p["w"] ** 2) + 1e-12),
    "squares of squares": lambda p, b: jnp.sqrt(jnp.sqrt(jnp.sum(p["w"] ** 4))),
    "a floored direction": lambda p, b: jnp.sum(
        p["w"]
        / jnp.maximum(jnp.linalg.norm(p["w"], axis=0, keepdims=True), 1e-8)
        * jnp.arange(12.0).reshape(3, 4)
    ),
}


@pytest.mark.parametrize("name", BAD_AT_SCALE)
def test_a_fault_at_small_or_large_scales_is_found_and_can_be_allowed(name):
    with pytest.raises(jr.testing.TermCheckError, match=r"scales of 1e-18 and 1e18.*max\|x\|"):
        jr.testing.check_term(BAD_AT_SCALE[name], params())
    jr.testing.check_term(BAD_AT_SCALE[name], params(), scales=False)


def huber(p, b):
    size = jnp.abs(p["w"])
    return jnp.sum(jnp.where(size < 10.0, 0.5 * size**2, 10.0 * (size - 5.0)))


GOOD_AT_SCALE = {
    "degree 1": lambda p, b: jnp.sum(jnp.abs(p["w"])),
    "degree 2": lambda p, b: jnp.sum(p["w"] ** 2),
    "degree 3, beyond float32": lambda p, b: jnp.sum(p["w"] ** 3),
    "degree 0": lambda p, b: quotient(p["w"] / jax.lax.stop_gradient(jnp.max(jnp.abs(p["w"])))),
    "no degree": lambda p, b: jnp.sum(jnp.log1p(jnp.abs(p["w"]))),
    "a distance": lambda p, b: jnp.sum((p["w"] - 1.0) ** 2),
    "huber": huber,
    "bounded": lambda p, b: jnp.sum(jnp.tanh(p["w"])),
    "periodic": lambda p, b: jnp.sum(jnp.cos(p["w"])),
}


@pytest.mark.parametrize("name", GOOD_AT_SCALE)
def test_a_right_term_passes_at_every_scale(name):
    jr.testing.check_term(GOOD_AT_SCALE[name], params())


def test_outputs_are_tried_at_scales_where_asked():
    def norms(x, b):
        """The norm of each datum's values, floored."""
        counted = jnp.where(b.mask & (b.weights != 0), x, 0.0)
        norm = jnp.sqrt(jnp.sum(counted**2, axis=1) + 1e-10)
        return jnp.sum(jnp.where(jnp.any(b.weights != 0, axis=1), norm, 0.0))

    jr.testing.check_term(norms, *example())
    with pytest.raises(jr.testing.TermCheckError, match="scales of 1e-18"):
        jr.testing.check_term(norms, *example(), scales=True)


def test_complex_parameters():
    x = {"w": params()["w"] + 1j * params()["w"][::-1]}
    jr.testing.check_term(jr.regularizers.WeightL2(), x)
    with pytest.raises(jr.testing.TermCheckError, match="gradient: along a random direction of x at 'w'"):
        jr.testing.check_term(lambda p, b: jnp.sum(jnp.abs(p["w"] + jax.lax.stop_gradient(p["w"]))), x)


def test_pairs_lose_their_weight_together():
    def margin(x, b):
        """Of pairs of rows, those that have weight."""
        score = b.datum_sum(x).reshape(-1, 2)
        some = jnp.any((b.mask & (b.weights != 0)).reshape(len(score), -1), axis=1)
        each = jax.nn.softplus(score[:, 1] - score[:, 0])
        return jnp.sum(jnp.where(some, each, 0.0)) / jnp.maximum(jnp.sum(some), 1)

    jr.testing.check_term(margin, *example(), rows_together=2)
