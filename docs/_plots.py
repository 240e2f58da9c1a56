"""Pictures of the terms that one variable tells the story of: x of one token, from -4 to 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import jaxreg as jr

L, R = jr.losses, jr.regularizers
REFERENCE = {"ref_logprobs": -1.0, "logprobs": -1.0, "advantages": 1.0}
PLOTTED: dict[str, list[tuple[str, Any]]] = {
    "ImportanceSampling": [("A = 1, s = −1", L.ImportanceSampling())],
    "PPO": [("A = 1, s = −1", L.PPO())],
    "CISPO": [("A = 1, s = −1", L.CISPO())],
    "DRO": [("A = 1, s = −1, β = 0.05", L.DRO()), ("β = 0.5", L.DRO(beta=0.5))],
    "KL": [(k, R.KL(estimator=k)) for k in ("k1", "k2", "k3")],
    "LogRatioL2": [("ref = −1", R.LogRatioL2())],
    "Focal": [(f"γ = {g:g}", R.Focal(gamma=g)) for g in (1.0, 2.0, 5.0)],
    "Unlikelihood": [("", R.Unlikelihood())],
    "L1": [("logprobs", R.L1()), ("probs", R.L1(target="probs"))],
    "L2": [("", R.L2()), ("clip = 1", R.L2(clip=1.0))],
    "ElasticNet": [(f"α = {a:g}", R.ElasticNet(alpha=a)) for a in (0.0, 0.5, 1.0)],
}


def draw(name: str, path: Path) -> None:
    """Value and gradient of a term as functions of one token's logprob."""
    import jax
    import jax.numpy as jnp
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    xs = jnp.linspace(-4.0, -0.02, 400)
    batch = {key: jnp.full((1, 1), value) for key, value in REFERENCE.items()}
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for label, term in PLOTTED[name]:

        def fn(x: Any, term: Any = term) -> Any:
            return term(x[None, None], batch)[0]

        for at, values in zip(axes, (jax.vmap(fn)(xs), jax.vmap(jax.grad(fn))(xs)), strict=True):
            at.plot(np.asarray(xs), np.asarray(values), lw=1.6, label=label)
    for at, title in zip(axes, ("value", "gradient"), strict=True):
        at.set_title(title, fontsize=9)
        at.set_xlabel("x, a token's logprob", fontsize=8)
        at.tick_params(labelsize=7)
        at.grid(alpha=0.25)
        at.spines[["top", "right"]].set_visible(False)
    if any(label for label, _ in PLOTTED[name]):
        axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLOTTED:
        if not (folder / f"{name}.png").exists():
            draw(name, folder / f"{name}.png")
