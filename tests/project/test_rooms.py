"""The folders of jaxreg are rooms on floors: each says what it may import, and imports nothing else."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import jaxreg as jr

HOUSE = Path(jr.__file__).parent
ROOMS = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
FILES = {
    ".".join(("jaxreg", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
}
FACE = ["__init__.py", "__main__.py", "earlier.py"]  # what stands above all rooms


def imported(path):
    """The modules of ours that a file imports: inside functions, and for types alone, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) or {node.module}
    return found & FILES.keys()


def entrance(room):
    """What a room says of itself, on one line."""
    return " ".join(ast.get_docstring(ast.parse((HOUSE / room / "__init__.py").read_text())).split())


def may_import(room):
    return set(re.findall(r"``(\w+)``", re.search(r"Imports (.*?)\. Read first", entrance(room)).group(1)))


def test_nothing_stands_outside_the_rooms_but_the_face():
    assert sorted(path.name for path in HOUSE.glob("*.py")) == FACE


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says_and_nothing_else(room):
    used = {
        name.split(".")[1] for path in (HOUSE / room).rglob("*.py") for name in imported(path) if "." in name
    }
    used -= {room}
    assert used == may_import(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_which_file_to_read_first(room):
    first = re.findall(r"`(\w+\.py)`", entrance(room).partition("Read first")[2])
    assert first
    assert all((HOUSE / room / name).is_file() for name in first)


def test_the_rooms_stand_on_floors():
    floors = graphlib.TopologicalSorter({room: may_import(room) for room in ROOMS})
    order = list(floors.static_order())  # raises a CycleError that shows the circle
    assert order[0] == "base"
    assert may_import("core") == {"base", "batch"}  # no sink, no screen, not even a term


def test_no_file_imports_itself_by_way_of_others():
    imports = {module: imported(path) - {module} for module, path in FILES.items()}
    list(graphlib.TopologicalSorter(imports).static_order())


def test_no_file_is_long():
    lines = {path.relative_to(HOUSE): len(path.read_text().splitlines()) for path in HOUSE.rglob("*.py")}
    assert {path: n for path, n in lines.items() if n > 400} == {}
