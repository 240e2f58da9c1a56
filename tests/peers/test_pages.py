"""What the page for PyTorch's users shows beside ours runs in PyTorch, and gives the same numbers."""

import re

import numpy as np
import pytest
from helpers import close
from places import ROOT

torch = pytest.importorskip("torch")
PAGE = ROOT / "docs" / "coming_from" / "pytorch.md"
BLOCK = re.compile(r"^```\{(code-cell|code-block)\}[^\n]*\n(?::[^\n]*\n\n?)*(.*?)^```", re.M | re.S)


def test_both_sides_of_the_pytorch_page_give_the_same_numbers():
    pytest.importorskip("torchjd")
    blocks = BLOCK.findall(PAGE.read_text())
    ours, theirs, compared = {}, {}, []
    for kind, code in blocks:
        names = ours if kind == "code-cell" else theirs
        exec(compile(code, PAGE.name, "exec"), names)
        if kind == "code-cell" and not theirs:  # what both begin with
            theirs = {name: array for name, array in ours.items() if isinstance(array, np.ndarray)}
        if kind == "code-block":
            compared.append(theirs.copy())
    first, second, third, fourth = compared
    close(first["gradient"], ours["grads"]["w"], rtol=1e-5, atol=1e-6)
    assert list(second["norms"]) == list(ours["norms"])
    close(list(second["norms"].values()), list(ours["norms"].values()))
    close(third["last"], ours["last"], rtol=1e-4)
    close(fourth["gram"], ours["gram"])
