"""Writes the pages that are made from the code: the gallery of terms and the API reference.

A term's place is the gallery, under what its file says of all of its kind; every other public name has a
place in the API reference, whose index lists all of them. What is written stands in ``docs/gallery`` and
``docs/api`` and is no part of the repository.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS))

from _plots import PLOTTED  # noqa: E402
from public import MODULES, public_names  # noqa: E402

GALLERY = {
    "jaxreg.losses": (
        "Base losses",
        "What a model is trained for. One of them, or a function of your own, is the first argument of "
        "{py:func}`jaxreg.compose`.",
        ("likelihood", "policy", "gspo", "preference", "distillation"),
    ),
    "jaxreg.regularizers": (
        "Regularizers",
        "What is added to it, each with a name and a weight of its own. Those on parameters say so "
        "themselves; any other is on what the base loss is on. {py:func}`jaxreg.of` gives a term one field "
        "of the outputs.",
        (),  # in the order in which the room has them
    ),
}
SHAPES = (
    "Shapes: B datums, T tokens, K given tokens a place, V words. Unless a term says otherwise it counts "
    "tokens with the batch's `weights`, which default to its mask, and its value is a mean over them. An "
    "argument's default stands in the signature, and in **bold** where it is said what it does."
)
API = {
    "jaxreg": (
        "Objectives and batches",
        "The face of the package: `import jaxreg as jr`.",
        "jaxreg.core.spec",
    ),
    "jaxreg.client": (
        "Remote fine-tuning",
        "`jr.client`: the server runs the model, the loss is yours.",
        None,
    ),
    "jaxreg.client.payload": ("Payloads", "`jr.client.payload`: a request without any SDK.", None),
    "jaxreg.host": ("Host terms", "`jr.host`: terms that are no arrays.", None),
    "jaxreg.weighting": ("Weighting", "`jr.weighting`: rules that move weights.", "jaxreg.weighting.rule"),
    "jaxreg.aggregation": (
        "Aggregation",
        "`jr.aggregation`: what replaces the plain sum of gradients.",
        "jaxreg.aggregation.aggregator",
    ),
    "jaxreg.telemetry": (
        "Telemetry",
        "`jr.telemetry`: events, sinks, warnings, recordings, reports. The events are:",
        "jaxreg.base.events",
    ),
    "jaxreg.testing": (
        "Testing",
        "`jr.testing`: is this JAX right, and is this term, rule or aggregator?",
        None,
    ),
}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: Sphinx) -> None:
    # By a process of its own: Sphinx forks, which one that has computed with JAX must not.
    subprocess.run([sys.executable, str(DOCS / "_plots.py"), str(DOCS / "gallery" / "plots")], check=True)
    for module in GALLERY:
        _write(f"gallery/{module.rpartition('.')[2]}.md", gallery_page(module))
    for module in API:
        _write(f"api/{page_name(module)}.md", api_page(module))
    _write("api/index.md", index_page())


def gallery_page(module: str) -> str:
    """Terms by the files that they stand in, each under what the file says of all."""
    title, lead, order = GALLERY[module]
    files: dict[str, list[str]] = {f"{module}.{file}": [] for file in order}
    for name, term in public_names(module):
        files.setdefault(term.__module__, []).append(name)
    parts = [
        f"# {title}",
        lead,
        SHAPES,
        summary(module, [name for names in files.values() for name in names]),
    ]
    for file, names in files.items():
        heading = file.rpartition(".")[2].capitalize()
        parts += [f"## {heading}", rst((sys.modules[file].__doc__ or "").strip())]
        for name in names:
            parts += [f"### {name}", rst(f".. autoclass:: {module}.{name}\n   :no-index-entry:")]
            if name in PLOTTED:
                parts.append(f"![Value and gradient of {name} for one token](plots/{name}.png)")
    return "\n\n".join(filter(None, parts)) + "\n"


def api_page(module: str) -> str:
    title, lead, told = API[module]
    names = dict(public_names(module))
    parts = [f"# {title}", lead, rst((sys.modules[told].__doc__ or "").strip()) if told else ""]
    parts.append(summary(module, sorted(names, key=str.lower)))
    for name in sorted(names, key=str.lower):
        parts += [f"## {name}", rst(entry(module, name, names[name]))]
    return "\n\n".join(filter(None, parts)) + "\n"


def entry(module: str, name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f".. autoclass:: {module}.{name}\n   :members:"
    if inspect.isroutine(value):
        return f".. autofunction:: {module}.{name}"
    return f".. autodata:: {module}.{name}"


def index_page() -> str:
    """Every public name, on one page."""
    parts = ["# API reference", "Every public name, with its first sentence."]
    for module in MODULES:
        title = (GALLERY.get(module) or API[module])[0]
        parts += [f"## {title}", summary(module, sorted((n for n, _ in public_names(module)), key=str.lower))]
    pages = "\n".join(map(page_name, API))
    return "\n\n".join(parts) + f"\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def summary(module: str, names: list[str]) -> str:
    """A table: a name, and the first sentence of what it says of itself."""
    values = dict(public_names(module))
    rows = ["| name | what it is |", "| --- | --- |"]
    rows += [f"| {{py:obj}}`~{module}.{name}` | {first_sentence(values[name])} |" for name in names]
    return "\n".join(rows)


def first_sentence(value: Any) -> str:
    if isinstance(value, str):
        return "The version."
    paragraph = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return paragraph.replace("``", "`").replace("|", "\\|")


def page_name(module: str) -> str:
    return "core" if module == "jaxreg" else module.removeprefix("jaxreg.").replace(".", "_")


def rst(text: str) -> str:
    return f"````{{eval-rst}}\n{text}\n````" if text else ""


def _write(path: str, text: str) -> None:
    """Written only if it changed, so that Sphinx reads again what it must."""
    file = DOCS / path
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
