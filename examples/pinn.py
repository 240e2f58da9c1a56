"""A physics-informed network learns Burgers' equation; its weights balance the three gradients themselves.

The residual is the base loss, boundary and initial condition are terms, and
``jr.weighting.gradient_balance`` (Wang et al. 2023) moves their weights so that all pull equally hard. It
moves them now and then, as its authors do: from the first step on, it would balance a network that is 0
everywhere, where the equation holds and nothing pulls. It leaves a run, and a picture of the solution, its
error and the weights; half a minute on two cores.

    python examples/pinn.py
    python examples/pinn.py --fixed          # both weights stay at 1
    python -m jaxreg watch runs/pinn/run.jsonl
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import burgers
import jax
import numpy as np
import optax
import terminal

import jaxreg as jr

EVERY, HELD = 100, 500  # steps from one measurement to the next, and from one move of the weights to the next
TOLD = 50  # steps between two lines of the run's file


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, write ``run.jsonl`` and ``pinn.png``, and return the error against the exact solution."""
    parser = terminal.Parser(__doc__)
    parser.add_argument("--steps", type=terminal.steps, default=4000)
    parser.add_argument("--seed", type=terminal.seed, default=0)
    parser.add_argument("--out", type=terminal.folder, default=Path("runs/pinn"), help="where the files go")
    parser.add_argument("--fixed", action="store_true", help="fixed weights of 1")
    options = parser.parse_args(arguments)
    terminal.need("rich", "matplotlib")
    options.out.mkdir(parents=True, exist_ok=True)

    rule = None if options.fixed else jr.weighting.every(jr.weighting.gradient_balance(), HELD)
    norms = jr.GradNorms(gramian=True, every=EVERY)
    objective, points = burgers.compose(rule, norms), burgers.drawn(options.seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, options.steps, alpha=0.01))

    @functools.partial(jax.jit, static_argnames="count")
    def train(objective: jr.CompositeLoss, carry: Any, points: Any, count: int) -> tuple[Any, Any]:
        def step(carry: Any, _: Any) -> tuple[Any, jr.CustomLossOutput]:
            params, opt_state, state = carry
            (_, out), grads = objective.value_and_grad(params, points, state=state)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state, out.state), out

        carry, outs = jax.lax.scan(step, carry, length=count)
        return carry, jax.tree.map(lambda leaf: leaf[-1], outs)

    params = burgers.first_params(options.seed)
    carry = (params, optimizer.init(params), objective.init())
    before = float(burgers.error(params))
    log = terminal.new_run(options.out / "run.jsonl")
    done = 0
    with (
        terminal.stoppable() as stop,
        jr.telemetry.attached(terminal.tell_of_compiling),
        jr.telemetry.attached(jr.telemetry.JSONL(log)),
        jr.telemetry.LiveTable(options.steps),
    ):
        while done < options.steps and not stop:
            count = min(TOLD, options.steps - done)
            carry, out = train(objective, carry, points, count)
            done += count
            jr.telemetry.log(out, step=done - 1)
    after = float(burgers.error(carry[0]))
    picture = draw(carry[0], log, options.out / "pinn.png")
    print(f"a line every {TOLD} steps in {log}, the picture in {picture}")
    print(f"relative error before: {before:.3f}, after: {after:.3f}")
    return {"before": before, "after": after}


def draw(params: Any, log: Path, path: Path) -> Path:
    """The solution, its error, and the weights over the run."""
    from matplotlib.figure import Figure

    x, t = burgers.grid()
    found, want = np.asarray(burgers.solution(params, x, t)), burgers.exact(x, t)
    run = jr.telemetry.read_run(log)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    kinds = {
        "u of the network": (left, found, "RdBu_r", 1.0),
        "its error": (middle, found - want, "PuOr", None),
    }
    for title, (axes, values, colours, limit) in kinds.items():
        most = limit or float(np.abs(values).max())
        image = axes.pcolormesh(t, x, values.T, cmap=colours, vmin=-most, vmax=most, rasterized=True)
        figure.colorbar(image, ax=axes)
        axes.set(title=title, xlabel="t", ylabel="x")
    for name in run.terms:
        right.plot(run.steps, run.of(name, "weight"), label=name)
    right.set(title="weights", xlabel="step", yscale="log")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    terminal.run(main)
