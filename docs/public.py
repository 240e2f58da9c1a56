"""The public names, and a listing of them with their signatures that a test compares.

python docs/public.py           # write docs/public.txt
python docs/public.py --check   # fail if it is not what the package has
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LISTING = Path(__file__).with_name("public.txt")
MODULES = (
    "jaxreg",
    "jaxreg.losses",
    "jaxreg.regularizers",
    "jaxreg.client",
    "jaxreg.client.payload",
    "jaxreg.host",
    "jaxreg.weighting",
    "jaxreg.aggregation",
    "jaxreg.telemetry",
    "jaxreg.testing",
)


def public_names(module: str) -> Iterator[tuple[str, Any]]:
    """What a room's entrance imports ``as`` itself, or what a file has without an underscore."""
    found = importlib.import_module(module)
    tree = ast.parse(Path(found.__file__).read_text())
    if found.__file__.endswith("__init__.py"):
        imports = (alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
        names = [alias.asname for alias in imports if alias.asname == alias.name]
    else:
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [node.name for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    for name in names:
        value = getattr(found, name)
        if not inspect.ismodule(value):
            yield name, value


def listing() -> str:
    """One line a name, with its signature; a class's public methods below it."""
    lines = []
    for module in MODULES:
        for name, value in sorted(public_names(module)):
            lines.append(f"{module}.{name}{signature(value)}")
            lines += [f"    .{line}" for line in members(value)]
    return "\n".join(lines) + "\n"


def members(value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        return
    for name, member in sorted(vars(value).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield f"{name}{signature(member.__func__)}"
        elif isinstance(member, property):
            yield name
        elif inspect.isfunction(member):
            yield f"{name}{signature(member)}"


def signature(value: Any) -> str:
    if not callable(value):
        return ""
    try:
        found = inspect.signature(value)
    except ValueError:
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def main() -> int:
    text = listing()
    if "--check" not in sys.argv:
        LISTING.write_text(text)
        return 0
    if LISTING.read_text() == text:
        return 0
    print(f"{LISTING.name} is not what the package offers: run python docs/public.py and look at its diff")
    return 1


if __name__ == "__main__":
    sys.exit(main())
