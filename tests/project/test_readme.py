"""What the README shows runs, in order, and does what it says."""

import re
from pathlib import Path

import jax
from places import ROOT

import jaxreg as jr

README = (ROOT / "README.md").read_text()


def test_the_readmes_python_runs_and_the_ablations_compile_once(caplog):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 4
    names = {}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    compiled = [r.message for r in caplog.records if "Compiling jit(train_step)" in r.message]
    assert len(compiled) == 1, [r.message for r in caplog.records][:5]
    assert names["result"].output.regularizers["kl"].grad_norm > 0
    run = jr.telemetry.read_run(Path(names["folder"]) / "run.jsonl")
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 200


def test_the_readmes_figures_are_the_benchmarks():
    figures = re.findall(r"\| ([\d.]+) [×m]", README)
    measured = (ROOT / "benchmarks" / "results" / "0.11.0.md").read_text()
    assert len(figures) == 11
    assert [figure for figure in figures if f"| {figure} |" not in measured] == []
