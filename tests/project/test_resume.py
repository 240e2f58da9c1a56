"""A run that is killed at random points and started again ends in the same bits as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from places import EXAMPLES, SUPPORT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
KILLS, STEPS, EVERY = 10, 40, 4
NEVER = (0, 0)


def started(out, kill, tmp_path, *more):
    """The main job of a small model, killed after so many steps and seconds; after 0 steps: it is not."""
    path = os.pathsep.join(map(str, (EXAMPLES, SUPPORT / "support")))
    environment = os.environ | {
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    options = [
        "--steps",
        str(STEPS),
        "--checkpoint-every",
        str(EVERY),
        "--every",
        "3",
        "--out",
        str(out),
        *more,
    ]
    script = str(SUPPORT / "small_lm.py")
    command = [sys.executable, "-u", script, *map(str, kill), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def steps_of(folder):
    """The last line of every step, but for when it was written."""
    found = {}
    for line in (folder / "run.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "event" not in record:
            found[record["step"]] = {k: v for k, v in record.items() if k not in ("time", "timings")}
    return found


def arrays_of(folder):
    """Every array of the last checkpoint."""
    with ocp.CheckpointManager(
        (folder / "checkpoints").resolve(), item_names=("model", "objective")
    ) as manager:
        assert manager.latest_step() == STEPS
        args = ocp.args.Composite(model=ocp.args.StandardRestore(), objective=ocp.args.StandardRestore())
        found = manager.restore(STEPS, args=args)
    return jax.tree.leaves((found["model"], found["objective"]))


def test_killed_and_started_again_it_ends_in_the_same_bits(tmp_path):
    whole = started(tmp_path / "whole", NEVER, tmp_path)
    assert whole.returncode == 0, whole.stderr
    rng, killed, went_on = random.Random(0), 0, False
    while killed < KILLS:
        run = started(tmp_path / "killed", (rng.randint(1, 6), rng.uniform(0.0, 0.3)), tmp_path)
        assert run.returncode in (-signal.SIGKILL, 0), run.stderr
        if run.returncode == 0:
            break
        killed += 1
        went_on |= "going on after" in run.stdout
    last = started(tmp_path / "killed", NEVER, tmp_path)
    assert last.returncode == 0, last.stderr
    assert went_on
    assert killed == KILLS, f"it ended after {killed} kills"
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")
    pairs = zip(arrays_of(tmp_path / "killed"), arrays_of(tmp_path / "whole"), strict=True)
    for got, want in pairs:
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))

    other = started(tmp_path / "killed", NEVER, tmp_path, "--seed", "1")
    assert other.returncode != 0
    assert "has checkpoints of a run with --seed 0, not 1" in other.stderr
