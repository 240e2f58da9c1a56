"""PyTorch's contestants in a process of their own, which waits at a pipe between its turns.

It is started with ``python -m benchmarks.contestants.torch_worker CASE ARRAYS.npz [upgrad]`` and says at
once, as JSON on one line, which contestants it has. Then it reads a JSON list a line and answers with a line:

- ``["run", name]``: the seconds of one call, measured here;
- ``["answer", name, path]``: writes what the contestant computes to path (.npz) and answers null,
  or what error it raised.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.measure.answers import Answer, save
from benchmarks.measure.timing import timed_turn


class Worker:
    """The driver's end of the pipe: a context manager.

    Attributes:
      names: the contestants that it has.
      skipped: reasons by name for those that cannot take part.
      versions: of Python, torch and torchjd there.
    """

    names: list[str]
    skipped: dict[str, str]
    versions: dict[str, str]

    def __init__(self, python: str, case: str, arrays: dict[str, np.ndarray], upgrad: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "arrays.npz"
        save(str(path), arrays)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.contestants.torch_worker", case, str(path)] + ["upgrad"] * upgrad,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        self.names, self.skipped, self.versions = (
            hello["names"],
            hello["skipped"],
            hello["versions"],
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # It ends at the end of its input.
        self._process.wait()
        self._folder.cleanup()

    @property
    def process(self) -> int:
        """Its process's number."""
        return self._process.pid

    def run(self, name: str) -> float:
        """Seconds of one call."""
        return float(self._ask("run", name))

    def answer(self, name: str) -> Answer:
        """What the contestant computes; RuntimeError, if it raises."""
        path = Path(self._folder.name) / "answer.npz"
        if error := self._ask("answer", name, str(path)):
            raise RuntimeError(error)
        with np.load(path) as arrays:
            return dict(arrays)

    def _ask(self, *request: str) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the PyTorch worker ended; its own message stands above")
        return json.loads(line)


def has_torch() -> bool:
    """Whether this interpreter can import torch."""
    return importlib.util.find_spec("torch") is not None


def _main(case: str, path: str, upgrad: str = "") -> None:
    import torch

    from benchmarks.contestants import in_torch, torch_upgrad

    torch.set_num_threads(os.cpu_count() or 1)
    with np.load(path) as arrays:
        steps, skipped = (torch_upgrad if upgrad else in_torch).contestants(case, arrays)
    versions = {"Python": sys.version.split()[0], "torch": torch.__version__}
    if importlib.util.find_spec("torchjd"):
        versions["torchjd"] = importlib.metadata.version("torchjd")
    print(json.dumps({"names": list(steps), "skipped": skipped, "versions": versions}), flush=True)
    for line in sys.stdin:
        request, name, *rest = json.loads(line)
        if request == "run":
            print(json.dumps(timed_turn(steps[name])), flush=True)
            continue
        try:
            save(rest[0], {k: v.numpy() for k, v in steps[name]().items()})
            print(json.dumps(None), flush=True)
        except (RuntimeError, ValueError) as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
