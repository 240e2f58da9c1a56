"""An error in an objective keeps its type, says where it happened and what helps, without our own frames."""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr

X = jnp.arange(3.0)


def base(x, batch):
    return jnp.sum(x)


def told(error):
    return "\n".join(error.value.__notes__)


def branching(x, batch):
    return jnp.sum(x) if jnp.sum(x) > 0 else -jnp.sum(x)


def looking(x, batch):
    return jnp.sum(x) * float(x[0])


def numpy(x, batch):
    return jnp.sum(np.abs(x))


def choosing(x, batch):
    return jnp.sum(x[x > 0])


def indexing(x, batch):
    return x[0] * [1.0, 2.0][jnp.argmax(x)]


CALLS = [
    lambda objective, x, batch=None: objective(x, batch),
    lambda objective, x, batch=None: objective.value_and_grad(x, batch),
    lambda objective, x, batch=None: jax.jit(objective)(x, batch),
    lambda objective, x, batch=None: objective.eval_shape(x, batch),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("fn", "kind", "remedy"),
    [
        (branching, jax.errors.TracerBoolConversionError, "jnp.where"),
        (looking, jax.errors.ConcretizationTypeError, r"float\(\)"),
        (numpy, jax.errors.TracerArrayConversionError, "jnp for np"),
        (choosing, jax.errors.NonConcreteBooleanIndexError, r"jnp.where\(mask"),
        (indexing, jax.errors.TracerIntegerConversionError, "jnp.take"),
    ],
)
def test_python_that_looks_at_traced_numbers(fn, kind, remedy, norms, call):
    roles = {
        "the term 't' of the objective": jr.compose(
            base, [dict(name="t", fn=fn, weight=1.0)], track_grad_norms=norms
        ),
        "the base loss of the objective": jr.compose(fn, track_grad_norms=norms),
        r"forward\(params, batch\)": jr.compose(base, forward=fn, track_grad_norms=norms),
    }
    for where, objective in roles.items():
        with pytest.raises(kind, match=f"This happened in {where}.*{remedy}"):
            call(objective, X)


class Own(Exception):
    def __init__(self, code, text):  # one that cannot be made again of its message
        super().__init__(text)
        self.code = code


def test_any_exception_stays_itself():
    def fails(x, batch):
        raise Own(7, "no luck")

    for objective in (jr.compose(fails), jr.compose(base, forward=fails)):
        with pytest.raises(Own, match="no luck") as error:
            objective.value_and_grad(X)
        assert error.value.code == 7


def test_the_backward_of_a_term_and_of_the_model():
    @jax.custom_vjp
    def odd(x):
        return x

    def backward(_, cotangent):
        raise Own(1, "backward")

    odd.defvjp(lambda x: (x, None), backward)
    term = dict(name="t", fn=lambda x, batch: jnp.sum(odd(x)), weight=1.0)
    with pytest.raises(Own, match="This happened in the term 't' of the objective"):
        jr.compose(base, [term], track_grad_norms=True).value_and_grad(X)
    with pytest.raises(Own, match="This happened in the backward of forward"):
        jr.compose(
            base, forward=lambda p, batch: odd(p), track_grad_norms=jr.GradNorms(wrt="outputs")
        ).value_and_grad(X)


def test_the_first_state_of_a_term():
    class Stateful:
        def init(self):
            raise Own(1, "init")

        def __call__(self, x, batch, *, state):
            return jnp.sum(x), {}, state

    with pytest.raises(Own, match=r"This happened in init\(\) of the term 't'"):
        jr.compose(base, [dict(name="t", fn=Stateful(), weight=1.0)]).init()


def test_a_note_is_made_once():
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        jr.compose(branching, track_grad_norms=True).value_and_grad(X)
    assert told(error).count("This happened in") == 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("norms", [False, True])
def test_our_own_frames_are_left_out(call, norms):
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        call(jr.compose(base, [dict(name="t", fn=branching, weight=1.0)], track_grad_norms=norms), X)
    frames = traceback.extract_tb(error.value.__traceback__)
    assert frames[-1].name == "branching"
    ours = [frame for frame in frames if Path(frame.filename).parent == Path(jr.core.__file__).parent]
    assert len(ours) <= 2  # the call, and what runs it


def test_jaxs_own_setting_shows_them():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(jax.errors.TracerBoolConversionError) as error:
            jr.compose(branching).value_and_grad(X)
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert "call_term" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]


def test_an_error_of_ours_shows_where_it_is_raised():
    with pytest.raises(TypeError, match="is a return missing") as error:
        jr.compose(lambda x, batch: None)(X)
    assert traceback.extract_tb(error.value.__traceback__)[-1].name == "_checked_value"


@pytest.mark.parametrize(
    ("fn", "batch", "error", "message"),
    [
        (lambda x, batch: jnp.sum(batch["a"] * x), None, TypeError, "batch is None: give the objective one"),
        (lambda x, batch: batch.mean(x), {"a": X}, AttributeError, r"is a dict.*from_arrays\(\*\*batch\)"),
        (lambda x, batch: jnp.sum(batch["b"]), {"a": X}, KeyError, r"batch has \['a'\]"),
        (
            lambda x, batch: batch.ref,
            jr.TokenBatch.from_arrays(ref=jnp.ones((1, 2))),
            AttributeError,
            r"batch\['ref'\]",
        ),
    ],
)
def test_a_batch_that_is_none_or_of_another_kind(fn, batch, error, message):
    with pytest.raises(error, match=message):
        jr.compose(fn)(X, batch)


def test_forward_with_its_arguments_swapped():
    with pytest.raises(
        ValueError, match=r"forward: it is called with \(params, batch\), but takes \(batch, params\)"
    ):
        jr.compose(base, forward=lambda batch, params: params)
    with pytest.raises(ValueError, match=r"term 't': it is called with \(x, batch\), but takes \(batch, x\)"):
        jr.compose(base, [dict(name="t", fn=lambda batch, x: x, weight=1.0)])
    objective = jr.compose(base, forward=lambda b, p: b["features"] @ p["w"])
    with pytest.raises(
        KeyError,
        match=r"This happened in forward\(params, batch\). params has \['w'\]. batch has \['features'\]",
    ):
        objective.value_and_grad({"w": X}, {"features": X})


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("float32",), {}, "x is no array but str"),
        ((base,), {}, "x is no array but function"),
        (({"w": X, "act": jnp.tanh},), {}, "x, at 'act', is no array but .*nnx.split, equinox.partition"),
        ((X, {"a": [X, "text"]}), {}, "batch, at 'a/1', is no array but str.*it holds itself"),
        ((X, [jr.client.Datum([1], {"target_tokens": [2]})]), {}, r"batch, at '0',.*TokenBatch.pack\(data\)"),
        ((X,), {"state": "s"}, r"state= is no array but str: pass state=objective.init\(\)"),
        ((X,), {"key": "k"}, r"key= is a random key, jax.random.key\(seed\), got str"),
    ],
)
def test_what_is_no_array(arguments, keywords, message):
    objective = jr.compose(base)
    for call in (objective, objective.value_and_grad, objective.eval_shape):
        with pytest.raises(TypeError, match=message):
            call(*arguments, **keywords)


def test_a_module_given_whole():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    objective = jr.compose(base, forward=lambda params, batch: params(batch), track_grad_norms=True)
    for call in (objective, objective.value_and_grad):
        with pytest.raises(TypeError, match="params, at 'activation', is no array but .*equinox.partition"):
            call(model, X)


def test_strings_beside_traced_arrays_are_somebody_elses():
    def named(x, batch):
        if batch["name"] != "a":
            raise TypeError("of its own")
        return jnp.sum(x)

    objective = jr.compose(named)
    assert float(jax.jit(lambda x: objective(x, {"name": "a"})[0])(X)) == 3
    with pytest.raises(TypeError, match="of its own"):
        jax.jit(lambda x: objective(x, {"name": "b"})[0])(X)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (0, TypeError, r"'t': key= is one random key, jax.random.key\(seed\); got int32\[\]"),
        (X, TypeError, r"got float32\[3\]"),
        (jax.random.split(jax.random.key(0), 3), ValueError, r"got key<fry>\[3\]; take one of them"),
        (jax.random.split(jax.random.PRNGKey(0), 3), ValueError, r"got uint32\[3, 2\]; take one of them"),
    ],
)
def test_what_is_no_key(key, error, message):
    noisy = dict(name="t", fn=lambda x, batch, *, key: jnp.sum(x) + jax.random.normal(key), weight=1.0)
    with pytest.raises(error, match=message):
        jr.compose(base, [noisy])(X, key=key)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
def test_both_kinds_of_keys_are_taken(key):
    noisy = dict(name="t", fn=lambda x, batch, *, key: jnp.sum(x) + jax.random.normal(key), weight=1.0)
    assert jnp.isfinite(jr.compose(base, [noisy])(X, key=key)[0])


@pytest.mark.parametrize(
    ("state", "got"),
    [(3, r"int32\[\]"), ({"steps": 1}, r"dict with the keys \['steps'\]"), ((X, X), "tuple")],
)
def test_what_is_no_state(state, got):
    scheduled = jr.compose(base, [dict(name="t", fn=base, weight=optax.constant_schedule(1.0))])
    with pytest.raises(ValueError, match=rf"'t': its weight is a schedule.*; got {got}"):
        scheduled(X, state=state)


@pytest.mark.parametrize(("state", "got"), [(3, r"int32\[\]"), (X, r"float32\[3\]"), ((X, X), "tuple")])
def test_what_is_no_state_though_nothing_needs_one(state, got):
    objective = jr.compose(base)
    for call in (objective, objective.value_and_grad, jax.jit(lambda x, state: objective(x, state=state))):
        with pytest.raises(TypeError, match=rf"state= is what objective.init\(\) gives: .*; got {got}"):
            call(X, state=state)
    for empty in (None, {}, ()):
        assert objective(X, state=empty)[1].state == {}


def donated():
    """An objective whose reference a later program was given to overwrite."""
    start = {"w": jnp.ones(3)}
    term = dict(name="sp", fn=jr.regularizers.L2SP(reference=start), weight=0.1)
    objective = jr.compose(base, [term], forward=lambda params, batch: params["w"], track_grad_norms=True)
    jax.tree.map(lambda leaf: leaf.delete(), start)  # what donation does, on every backend
    return objective


@pytest.mark.parametrize(
    "call",
    [
        lambda objective, x: objective(x),
        lambda objective, x: objective.value_and_grad(x),
        lambda objective, x: jax.value_and_grad(lambda x: objective(x)[0])(x),
        lambda objective, x: jax.jit(lambda x: objective.value_and_grad(x))(x),
    ],
)
@pytest.mark.filterwarnings("ignore:norms are tracked")
def test_a_term_that_holds_donated_params(call):
    with pytest.raises(
        RuntimeError,
        match="the term 'sp' holds an array, at 'reference/w', that was donated.*jnp.copy, params",
    ):
        call(donated(), {"w": jnp.ones(3)})


def test_donated_params_and_batches():
    gone = jnp.ones(3)
    gone.delete()
    objective = jr.compose(base)
    with pytest.raises(
        RuntimeError, match="x holds an array that was donated or deleted.*gives a new one back"
    ):
        objective(gone)
    with pytest.raises(RuntimeError, match="batch holds an array, at 'a', that was donated"):
        jr.compose(lambda x, batch: jnp.sum(x * batch["a"]))(X, {"a": gone})


def test_wrong_ways_to_name_terms():
    objective = jr.compose(base, [dict(name="t", fn=base, weight=1.0)])
    for wrong in ([("t", 0.5)], 0.5, "t"):
        with pytest.raises(TypeError, match="with_weights takes a mapping from names to weights"):
            objective.with_weights(wrong)
    for call in (objective.without, objective.only):
        with pytest.raises(TypeError, match=r"strings, one an argument.*got \['t'\]"):
            call(["t"])


def test_wrong_ways_to_give_regularizers():
    spec = jr.RegularizerSpec(name="t", fn=base, weight=1.0)
    host = jr.host.HostRegularizer("h", lambda data: 1.0, weight=1.0)
    for one in (spec, host):
        with pytest.raises(TypeError, match="put this one term into a list"):
            jr.compose(base, one)
    with pytest.raises(TypeError, match="got dict; give its values, each of which says its own name"):
        jr.compose(base, {"t": spec})
    with pytest.raises(TypeError, match="a sequence of RegularizerSpecs, got str"):
        jr.compose(base, "kl")
    assert jr.compose(base, (spec for _ in range(1))).names == ("t",)
