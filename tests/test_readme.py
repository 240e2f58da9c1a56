"""What the README shows runs, in order, and does what it says."""

import re
from pathlib import Path

import jax

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_python_runs_and_the_ablations_compile_once(caplog):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) == 7
    names = {}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    compiled = [r.message for r in caplog.records if "Compiling jit(loss_of)" in r.message]
    assert len(compiled) == 1, [r.message for r in caplog.records][:5]
    assert names["out"].base_loss.grad_norm > 0
