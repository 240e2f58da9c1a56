"""Writes docs/library.md, and its plots, from the docstrings.

python docs/build.py           # write both
python docs/build.py --check   # fail if the page is not what the docstrings say
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import jaxreg as jr

HERE = Path(__file__).parent
PAGE = HERE / "library.md"
CHAPTERS: list[tuple[str, ModuleType]] = [
    ("Base losses", jr.losses),
    ("Regularizers", jr.regularizers),
]
L, R = jr.losses, jr.regularizers
REFERENCE = {"ref_logprobs": -1.0, "logprobs": -1.0, "advantages": 1.0}
# Terms that one variable tells the story of: x of one token, from -4 to 0 unless it says so.
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


def page() -> str:
    """The whole page."""
    parts = [
        "# Every term",
        "Made from the docstrings by `docs/build.py`; edit those, not this. Shapes: B datums, T tokens, K "
        "given tokens a place, V words. Unless a term says otherwise it counts tokens with the batch's "
        "`weights`, which default to its mask.",
    ]
    for title, module in CHAPTERS:
        terms = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in terms)
        parts += [f"## {title}", links + "."]
        for name, term in terms.items():
            parts += [f"### {name}", *_sections(inspect.getdoc(term) or "")]
            if name in PLOTTED:
                parts.append(f"![Value and gradient of {name} for one token](plots/{name}.png)")
    return "\n\n".join(parts) + "\n"


def _sections(doc: str) -> list[str]:
    """A docstring as Markdown: its example as code, its arguments as they stand."""
    text, _, example = doc.partition("Example:\n")
    text, _, arguments = text.partition("Args:\n")
    parts = [text.strip().replace("``", "`")]
    if arguments:
        block, *rest = arguments.split("\n\n")
        items = []
        for line in inspect.cleandoc(block).splitlines():
            if line.startswith(" "):
                items[-1] += " " + line.strip()
            else:
                items.append(line)
        names = (item.partition(": ") for item in items)
        parts.append("\n".join(f"- `{n}`: {what}".replace("``", "`") for n, _, what in names))
        parts += [part.strip().replace("``", "`") for part in rest if part.strip()]
    if example:
        parts.append(f"```pycon\n{inspect.cleandoc(example)}\n```")
    return parts


def draw(name: str, variants: list[tuple[str, Any]], path: Path) -> None:
    """Value and gradient of a term as functions of one token's logprob."""
    import jax
    import jax.numpy as jnp
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    xs = jnp.linspace(-4.0, -0.02, 400)
    batch = {key: jnp.full((1, 1), value) for key, value in REFERENCE.items()}
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.2), layout="constrained")
    for label, term in variants:

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
    if any(label for label, _ in variants):
        axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        missing = [name for name in PLOTTED if not (HERE / "plots" / f"{name}.png").exists()]
        if PAGE.read_text() != text or missing:
            print(f"{PAGE.name} is not what the docstrings say {missing}: run python docs/build.py")
            return 1
        return 0
    PAGE.write_text(text)
    (HERE / "plots").mkdir(exist_ok=True)
    for name, variants in PLOTTED.items():
        draw(name, variants, HERE / "plots" / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
