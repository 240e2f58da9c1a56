"""The main job: a small byte-level transformer learns English prose, and shows what every term did.

The text is the language reference that comes with Python (``pydoc_data.topics``), so nothing is
downloaded. One base loss and six regularizers, on the outputs and on the params, one of them on a
schedule; every tenth step the exact norms of every term's gradient in parameter space, and the cosines
between them; some minutes on two cores.

    python examples/train_lm.py
    python examples/train_lm.py --without kl_bigram              # ablations
    python examples/train_lm.py --weight z_loss=0.01 --steps 200
    python examples/train_lm.py --weighting kl_target            # a weight that keeps the KL at 0.2
    python examples/train_lm.py --aggregator upgrad              # steps that make no term worse
    python examples/train_lm.py --checkpoint-every 50            # killed and started again, it goes on
    python -m jaxreg watch runs/train_lm/run.jsonl               # from another terminal
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import terminal
from checkpoints import Checkpoints
from flax import nnx
from text import bigram_table, bits_per_byte_of_table, load_text

import jaxreg as jr

VOCABULARY, LENGTH, BATCH, WIDTH, HEADS, LAYERS = 256, 128, 8, 128, 4, 3
# Nats a byte between the model and the bigram table, with --weighting kl_target: below what it settles at
# without the term, or no weight would reach it.
KL_TARGET = 0.2


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Bytes [B, T] to logits [B, T, 256]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.bytes = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.bytes(tokens) + self.places(jnp.arange(LENGTH))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def kernel_l1(params: Any, batch: jr.TokenBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A term of our own: the mean size of the weights, and how many of them are nearly zero."""
    kernels = [p for p in jax.tree.leaves(params) if p.ndim >= 2]
    size = sum(p.size for p in kernels)
    small = sum(jnp.sum(jnp.abs(p) < 1e-3) for p in kernels)
    return sum(jnp.sum(jnp.abs(p)) for p in kernels) / size, {"near_zero": small / size}


def build_objective(forward: Any, start: Any, options: argparse.Namespace) -> jr.CompositeLoss:
    """One base loss, four terms on the logits, two on the params."""
    leave = max(1, options.steps // 3)
    fade = optax.join_schedules(
        [optax.linear_schedule(0.5, 0.0, leave), optax.constant_schedule(0.0)], [leave]
    )
    # A bigram table teaches the frequent pairs, then leaves the stage; or it stays, at a stated distance.
    weight, rule = fade, None
    if options.weighting == "kl_target":
        weight, rule = 0.1, jr.weighting.adaptive_kl("kl_bigram", target=KL_TARGET)
    return jr.compose(
        jr.losses.CrossEntropy(inputs="logits", reduction="token_mean"),
        [
            jr.RegularizerSpec(name="kl_bigram", fn=jr.regularizers.KL(reference="bigram"), weight=weight),
            jr.RegularizerSpec(name="confidence", fn=jr.regularizers.Entropy(mode="maximize"), weight=0.01),
            jr.RegularizerSpec(name="z_loss", fn=jr.regularizers.ZLoss(), weight=1e-3),
            jr.RegularizerSpec(
                name="l2_logits", fn=jr.regularizers.L2(clip=20.0, reduction="token_mean"), weight=1e-3
            ),
            jr.RegularizerSpec(
                name="l2_sp", fn=jr.regularizers.L2SP(reference=start), weight=2e-5, on="params"
            ),
            jr.RegularizerSpec(name="kernel_l1", fn=kernel_l1, weight=0.05, on="params"),
        ],
        forward=forward,
        track_grad_norms=jr.GradNorms(wrt="params", gramian=True, every=options.every),
        weighting=rule,
        aggregator=jr.aggregation.UPGrad() if options.aggregator == "upgrad" else None,
    )


def windows(text: jax.Array, table: jax.Array, starts: jax.Array) -> jr.TokenBatch:
    """A batch of windows of the text, and what the bigram table thinks of each next byte."""
    at = starts[:, None] + jnp.arange(LENGTH + 1)[None]
    chosen = text[at].astype(jnp.int32)
    tokens = chosen[:, :-1]
    return jr.TokenBatch.from_arrays(tokens=tokens, target_tokens=chosen[:, 1:], bigram=table[tokens])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, write ``run.jsonl``, ``terms.png`` and a report, and return the held-out bits per byte."""
    options = parse(arguments)
    text, held_out = load_text()
    print(f"{len(text):,} bytes to learn, {len(held_out):,} held out; building the model ...", flush=True)
    table = jnp.asarray(bigram_table(text))
    model = Transformer(nnx.Rngs(options.seed))
    graph, params = nnx.split(model, nnx.Param)

    def forward(params: Any, batch: jr.TokenBatch) -> jax.Array:
        return nnx.merge(graph, params)(batch["tokens"])

    start = jax.tree.map(jnp.copy, params)
    objective = weighted(build_objective(forward, start, options), options)
    warm_up = optax.warmup_cosine_decay_schedule(0.0, 3e-3, options.steps // 10, options.steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warm_up, b2=0.98))
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def train_step(
        objective: jr.CompositeLoss,
        params: Any,
        opt_state: Any,
        state: Any,
        text: jax.Array,
        starts: jax.Array,
    ) -> tuple[Any, Any, jr.CustomLossOutput]:
        batch = windows(text, table, starts)
        (_, out), grads = objective.value_and_grad(params, batch, state=state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, out

    @jax.jit
    def nats(params: Any, text: jax.Array, starts: jax.Array) -> jax.Array:
        batch = windows(text, table, starts)
        loss, _ = jr.compose(
            jr.losses.CrossEntropy(inputs="logits", reduction="token_mean"), forward=forward
        )(params, batch)
        return loss

    def bits_per_byte(params: Any) -> float:
        starts = np.arange(0, len(held_out) - LENGTH - 1, LENGTH)
        rows = np.resize(starts, (len(starts) // BATCH, BATCH))
        return float(np.mean([nats(params, held_out, row) for row in rows]) / np.log(2))

    with jr.telemetry.attached(terminal.tell_of_compiling):
        before = bits_per_byte(params)
    table_bits = bits_per_byte_of_table(held_out, text)
    print(f"held out before: {before:.3f} bits a byte; the bigram table alone: {table_bits:.3f}")

    checkpoints, first, (params, opt_state), state = begun(options, (params, opt_state), objective)
    rng, began = drawing(options.seed, first, len(text)), time.perf_counter()
    log = options.out / "run.jsonl" if first else terminal.new_run(options.out / "run.jsonl")
    last, done = None, None
    with (
        terminal.stoppable() as stop,
        jr.telemetry.attached(jr.telemetry.JSONL(log)),
        jr.telemetry.LiveTable(options.steps),
    ):
        for step in stop.range(options.steps, first):
            starts = drawn(rng, len(text))
            params, opt_state, out = train_step(objective, params, opt_state, state, text, starts)
            state = out.state
            if last is not None:  # one step behind, so that the host never waits for the device
                jr.telemetry.log(last, step=step - 1)
            last, done = out, step
            if checkpoints and (step + 1) % options.checkpoint_every == 0:
                jr.telemetry.log(last, step=step)  # what the checkpoint is of is on record before it is
                last = None
                checkpoints.save(step + 1, (params, opt_state), state)
        if last is not None:
            jr.telemetry.log(last, step=done)
    if done is None:
        return {"before": before}

    seconds = time.perf_counter() - began
    show(log, options)
    after = bits_per_byte(params)
    print(f"held out after:  {after:.3f} bits a byte, in {seconds:.0f} s of training")
    return {"before": before, "after": after}


def drawn(rng: np.random.Generator, size: int) -> np.ndarray:
    """Where the windows of a step begin."""
    return rng.integers(0, size - LENGTH - 1, BATCH)


def drawing(seed: int, first: int, size: int) -> np.random.Generator:
    """Random numbers, those of the steps before the first one drawn."""
    rng = np.random.default_rng(seed)
    for _ in range(first):
        drawn(rng, size)
    return rng


def begun(
    options: argparse.Namespace, model: Any, objective: jr.CompositeLoss
) -> tuple[Checkpoints | None, int, Any, Any]:
    """The run's checkpoints, and what it begins with: steps behind it, params and optimizer, state."""
    if not options.checkpoint_every:
        return None, 0, model, objective.init()
    about = {name: getattr(options, name) for name in ("steps", "seed")}
    checkpoints = Checkpoints(options.out / "checkpoints", about)
    if (first := checkpoints.latest) is None:
        return checkpoints, 0, model, objective.init()
    print(f"going on after {first} of {options.steps} steps")
    return checkpoints, first, *checkpoints.restore(model, objective)


def show(log: Path, options: argparse.Namespace) -> None:
    """The picture and the report of the run."""
    picture = jr.telemetry.plot(log, options.out / "terms.png")
    page = jr.telemetry.report(log, out=options.out / "report")
    print(f"a line a step in {log}, the picture in {picture}, the report in {page}", flush=True)


def weighted(objective: jr.CompositeLoss, options: argparse.Namespace) -> jr.CompositeLoss:
    """With the weights of the command line: the same compiled program."""
    return objective.without(*options.without).with_weights(dict(options.weight))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked before anything takes time."""
    parser = terminal.Parser(__doc__)
    parser.add_argument("--steps", type=terminal.steps, default=700)
    parser.add_argument("--seed", type=terminal.seed, default=0)
    parser.add_argument(
        "--out", type=terminal.folder, default=Path("runs/train_lm"), help="where the files go"
    )
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="switch a term off")
    parser.add_argument("--weight", action="append", default=[], metavar="NAME=VALUE", type=assignment)
    parser.add_argument(
        "--weighting",
        choices=["schedule", "kl_target"],
        default="schedule",
        help="what moves kl_bigram's weight",
    )
    parser.add_argument(
        "--aggregator", choices=["sum", "upgrad"], default="sum", help="how the terms' gradients are combined"
    )
    parser.add_argument(
        "--every", type=terminal.steps, default=10, metavar="N", help="measure the norms every N-th step"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=terminal.steps,
        metavar="N",
        help="keep what there is every N steps, and go on",
    )
    options = parser.parse_args(arguments)
    try:
        weighted(build_objective(lambda params, batch: params, {}, options), options)
    except (KeyError, ValueError) as error:  # no term of that name, or no weight
        parser.error(str(error.args[0]))
    terminal.need("rich", "matplotlib")  # not found missing after the training
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        assert equals
        return name, float(value)
    except (AssertionError, ValueError):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a number, got {text!r}") from None


if __name__ == "__main__":
    terminal.run(main)
