"""Objectives inside other libraries' trainers: each ends where plain optax does with the loss by hand."""

import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import close

import jaxreg as jr

FEATURES, HIDDEN, CLASSES, STEPS = 5, 8, 4, 12
LENGTHS = (6, 4, 5, 3)
Z, DECAY = 0.01, 0.003
TX = optax.adam(0.03)


def objective(forward=None, **options):
    """Cross-entropy of logits, a term on them, and one on the params."""
    return jr.compose(
        jr.losses.CrossEntropy(inputs="logits"),
        [
            dict(name="z_loss", fn=jr.regularizers.ZLoss(), weight=Z),
            dict(name="decay", fn=jr.regularizers.WeightL2(), weight=DECAY),
        ],
        forward=forward,
        **options,
    )


def network(params, batch):
    hidden = jnp.tanh(batch["features"] @ params["body"]["kernel"] + params["body"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def with_norms(objective, x, batch):
    """The objective for somebody else's value_and_grad: its loss and gradient, with norms in the report."""
    (loss, out), grads = objective.value_and_grad(jax.lax.stop_gradient(x), batch)
    pull = optax.tree.vdot(grads, x)
    return loss + (pull - jax.lax.stop_gradient(pull)), out


@pytest.fixture(autouse=True)
def _ranks():
    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks
        yield


@pytest.fixture
def params(rng):
    """What every framework starts with."""

    def layer(n, m):
        kernel = rng.normal(size=(n, m)) / np.sqrt(n)
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(m)}

    return {"body": layer(FEATURES, HIDDEN), "head": layer(HIDDEN, CLASSES)}


@pytest.fixture
def batches(rng):
    def batch():
        mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
        features = rng.normal(size=(*mask.shape, FEATURES)).astype(np.float32)
        targets = rng.integers(0, CLASSES, mask.shape)
        return jr.TokenBatch.from_arrays(mask=mask, features=features, target_tokens=targets)

    return [batch() for _ in range(STEPS)]


def by_hand(params, batch):
    """The same loss without jaxreg."""
    logits = network(params, batch)
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["target_tokens"])
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    token_means = jnp.sum((nll + Z * z) * batch.mask) / sum(LENGTHS)
    return token_means + DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.fixture
def wanted(params, batches):
    """Losses and last parameters of plain optax."""
    opt_state, losses = TX.init(params), []
    step = jax.jit(jax.value_and_grad(by_hand))
    for batch in batches:
        loss, grads = step(params, batch)
        updates, opt_state = TX.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses, params


def compare(losses, params, wanted):
    want_losses, want_params = wanted
    close(losses, want_losses, rtol=1e-4)
    chex.assert_trees_all_close(params, want_params, rtol=1e-3, atol=1e-4)
    assert np.isfinite(want_losses).all()


class Model(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
        nnx.update(self, params)

    def __call__(self, x):
        return self.head(nnx.tanh(self.body(x)))


def nnx_params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("norms", [False, True])
def test_nnx(params, batches, wanted, norms):
    model = Model(params)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    graph, _ = nnx.split(model, nnx.Param)
    loss_of = objective(
        lambda params, batch: nnx.merge(graph, params)(batch["features"]), track_grad_norms=norms
    )

    @nnx.jit
    def train_step(model, optimizer, loss_of, batch):
        def loss_fn(model):
            x = nnx.state(model, nnx.Param)
            return with_norms(loss_of, x, batch) if norms else loss_of(x, batch)

        (loss, out), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss, out

    losses = []
    for batch in batches:
        loss, out = train_step(model, optimizer, loss_of, batch)
        losses.append(float(loss))
    compare(losses, nnx_params(model), wanted)
    assert (out.total_grad_norm is not None) == norms


def test_nnx_where_the_loss_calls_the_model(params, batches, wanted):
    """The objective gets logits and params as one x, and each term its part."""
    model = Model(params)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    loss_of = jr.compose(
        jr.of("logits", jr.losses.CrossEntropy(inputs="logits")),
        [
            dict(name="z_loss", fn=jr.of("logits", jr.regularizers.ZLoss()), weight=Z),
            dict(name="decay", fn=jr.of("params", jr.regularizers.WeightL2()), weight=DECAY),
        ],
    )

    def loss_fn(model, batch):
        return loss_of({"logits": model(batch["features"]), "params": nnx.state(model, nnx.Param)}, batch)

    @nnx.jit
    def train_step(model, optimizer, batch):
        (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer, batch)) for batch in batches]
    compare(losses, nnx_params(model), wanted)


def test_equinox(params, batches, wanted):
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        body: dict
        head: dict
        name: str = "a static leaf"

        def __call__(self, batch):
            return network({"body": self.body, "head": self.head}, batch)

    model = Network(**params)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    loss_of, opt_state = objective(lambda params, batch: eqx.combine(params, static)(batch)), TX.init(arrays)

    @eqx.filter_jit
    def train_step(model, opt_state, loss_of, batch):
        def loss_fn(model):
            return loss_of(eqx.filter(model, eqx.is_inexact_array), batch)

        (loss, _), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        updates, opt_state = TX.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for batch in batches:
        model, opt_state, loss = train_step(model, opt_state, loss_of, batch)
        losses.append(float(loss))
    compare(losses, {"body": model.body, "head": model.head}, wanted)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(HIDDEN, name="body")(x)))


def test_train_state(params, batches, wanted):
    model = Linen()
    state = TrainState.create(apply_fn=model.apply, params=params, tx=TX)
    loss_of = objective(lambda params, batch: model.apply({"params": params}, batch["features"]))

    @jax.jit
    def train_step(state, loss_of, batch):
        (loss, _), grads = loss_of.value_and_grad(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for batch in batches:
        state, loss = train_step(state, loss_of, batch)
        losses.append(float(loss))
    compare(losses, state.params, wanted)


def test_multi_steps(params, batches, wanted):
    """Each batch in two halves of equally many tokens: their mean gradient is the batch's."""
    tx = optax.MultiSteps(TX, every_k_schedule=2)
    opt_state, loss_of, losses = tx.init(params), objective(network), []

    @jax.jit
    def train_step(params, opt_state, part):
        (loss, _), grads = loss_of.value_and_grad(params, part)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    assert sum(LENGTHS[0::3]) == sum(LENGTHS[1:3])
    for batch in batches:
        halves = []
        for rows in (np.array([0, 3]), np.array([1, 2])):
            part = jax.tree.map(operator.itemgetter(rows), batch)
            params, opt_state, loss = train_step(params, opt_state, part)
            halves.append(float(loss))
        losses.append(halves)
    compare(np.mean(losses, axis=1), params, wanted)


def tunix_trainer(model, tx, objective):
    """A trainer of an NNX model whose steps tell what every term did."""
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    class Trainer(PeftTrainer):
        def _post_process_train_step(self, aux):
            jr.telemetry.log(aux, step=self.train_steps)

    trainer = Trainer(model, tx, TrainingConfig(eval_every_n_steps=1000))
    trainer.with_gen_model_input_fn(lambda batch: {"batch": batch})
    trainer.with_loss_fn(lambda model, batch: objective(nnx.state(model, nnx.Param), batch), has_aux=True)
    return trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix looks up what JAX renamed
def test_tunix(params, batches, wanted, tmp_path):
    pytest.importorskip("tunix.sft.peft_trainer")
    model = Model(params)
    graph, _ = nnx.split(model, nnx.Param)
    loss_of = objective(lambda params, batch: nnx.merge(graph, params)(batch["features"]))

    trainer = tunix_trainer(model, TX, loss_of)
    with jr.telemetry.attached(jr.telemetry.JSONL(tmp_path / "run.jsonl")):
        trainer.train(batches)
    losses = jr.telemetry.read_run(tmp_path / "run.jsonl").series("loss/total")
    compare(losses, nnx_params(model), wanted)
