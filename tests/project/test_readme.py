"""What the README shows runs, in order, and does what it says."""

import re
from pathlib import Path

import jax
from places import ROOT

import jaxreg as jr

README = ROOT / "README.md"


def test_the_readmes_python_runs_and_the_ablations_compile_once(caplog):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) == 7
    names = {}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    compiled = [r.message for r in caplog.records if "Compiling jit(loss_of)" in r.message]
    assert len(compiled) == 1, [r.message for r in caplog.records][:5]
    assert names["result"].output.base_loss.grad_norm > 0
    assert names["output"].regularizers["style"].grad_norm > 0
    run = jr.telemetry.read_run(Path(names["folder"]) / "run.jsonl")
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
