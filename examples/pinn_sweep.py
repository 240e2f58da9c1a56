"""Sixteen settings of a physics-informed network, trained in one program, and which of them wins.

``jr.stack`` puts four weights of the boundary by four of the initial condition together, and ``jax.vmap``
trains them side by side on Burgers' equation; some minutes on two cores.

    python examples/pinn_sweep.py
    python examples/pinn_sweep.py --steps 500
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import burgers
import jax
import numpy as np
import optax
import terminal

import jaxreg as jr

WEIGHTS = (0.1, 1.0, 10.0, 100.0)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train all, write ``pinn_sweep.png``, and return the least error and the weights that gave it."""
    parser = terminal.Parser(__doc__)
    parser.add_argument("--steps", type=terminal.steps, default=1000)
    parser.add_argument("--seed", type=terminal.seed, default=0)
    parser.add_argument(
        "--out", type=terminal.folder, default=Path("runs/pinn_sweep"), help="where the picture goes"
    )
    options = parser.parse_args(arguments)
    terminal.need("matplotlib")
    options.out.mkdir(parents=True, exist_ok=True)

    settings = [{"boundary": b, "initial": i} for b, i in itertools.product(WEIGHTS, WEIGHTS)]
    objective = burgers.compose()
    objectives = jr.stack([objective.with_weights(setting) for setting in settings])
    params, points = burgers.first_params(options.seed), burgers.drawn(options.seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, options.steps, alpha=0.01))

    def trained(objective: jr.CompositeLoss) -> tuple[jax.Array, Any]:
        def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            (loss, _), grads = objective.value_and_grad(params, points)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        (found, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=options.steps)
        return burgers.error(found), losses

    print(f"{len(settings)} settings, {options.steps:,} steps each, in one program ...", flush=True)
    errors, losses = jax.jit(jax.vmap(trained))(objectives)
    errors, losses = np.asarray(errors), np.asarray(losses)
    best = int(np.nanargmin(errors))
    picture = draw(errors, losses, best, options.out / "pinn_sweep.png")
    for setting, error in zip(settings, errors, strict=True):
        names = "  ".join(f"{name} {weight:>5g}" for name, weight in setting.items())
        print(f"{names}  relative error {error:.3f}")
    print(f"the least error, {errors[best]:.3f}, has {settings[best]}; the picture is in {picture}")
    return {"error": float(errors[best]), **settings[best]}


def draw(errors: np.ndarray, losses: np.ndarray, best: int, path: Path) -> Path:
    """Every run's loss, and the errors as a map with a ring around the least."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, curve in enumerate(losses):
        look = {"color": "#4269d0", "linewidth": 2} if i == best else {"color": "#b0b0b0", "linewidth": 0.8}
        left.plot(curve, zorder=2 + (i == best), **look)
    left.set(title="Loss of every setting", xlabel="step", yscale="log")
    left.spines[["top", "right"]].set_visible(False)
    square = errors.reshape(len(WEIGHTS), len(WEIGHTS))
    image = right.imshow(square, cmap="viridis_r", origin="lower")
    figure.colorbar(image, ax=right, label="relative error")
    row, column = divmod(best, len(WEIGHTS))
    right.plot(column, row, "o", markersize=28, markerfacecolor="none", markeredgecolor="black")
    for (i, j), value in np.ndenumerate(square):
        ink = "white" if value > (square.min() + square.max()) / 2 else "black"
        right.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    names = [f"{w:g}" for w in WEIGHTS]
    right.set(title="Which weights win", xlabel="weight of initial", ylabel="weight of boundary")
    right.set_xticks(range(len(WEIGHTS)), names)
    right.set_yticks(range(len(WEIGHTS)), names)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    terminal.run(main)
