"""The main job, for a few steps: its files, its ablations, its mistakes."""

import json
import signal
import sys

import jax
import pytest
from places import EXAMPLES

import jaxreg as jr

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def train_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks
        import train_lm

        yield train_lm
    for name in ("train_lm", "text", "terminal"):
        sys.modules.pop(name, None)


def records(path):
    """A run's steps, without the notes between them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def test_a_short_run_and_an_ablation(train_lm, tmp_path, capsys):
    bits = train_lm.main(["--steps", "6", "--every", "5", "--out", str(tmp_path / "a")])
    assert bits["after"] < bits["before"] - 0.5
    lines = records(tmp_path / "a" / "run.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0]["regularizers"]["kl_bigram"]["weight"] == 0.5
    assert lines[-1]["regularizers"]["kl_bigram"]["weight"] == 0
    assert [line["norms_age"] for line in lines] == [0, 1, 2, 3, 4, 0]
    assert all(term["grad_norm"] > 0 for term in lines[5]["regularizers"].values())
    assert "kernel_l1" in lines[5]["cosines"]["base_loss"]
    assert (tmp_path / "a" / "terms.png").stat().st_size > 10_000
    assert (tmp_path / "a" / "report" / "report.html").stat().st_size > 10_000
    assert "kernel_l1" in capsys.readouterr().out

    options = ["--weighting", "kl_target", "--aggregator", "upgrad"]
    options += ["--without", "confidence", "--weight", "z_loss=0.002"]
    train_lm.main(["--steps", "4", "--out", str(tmp_path / "b"), *options])
    first, *_, last = records(tmp_path / "b" / "run.jsonl")
    assert first["regularizers"]["confidence"]["contribution"] == 0
    assert first["regularizers"]["z_loss"]["weight"] == pytest.approx(0.002)
    weights = [line["regularizers"]["kl_bigram"]["weight"] for line in (first, last)]
    assert weights[0] == pytest.approx(0.1)
    assert weights[1] != weights[0]
    assert last["aggregation"]["metrics"]["kkt_residual"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--without", "zloss"], "no term is named 'zloss'; did you mean 'z_loss'"),
        (["--weight", "zloss=1"], "no term is named 'zloss'; did you mean 'z_loss'"),
        (["--weight", "z_loss=-1"], "a weight is finite (in float32) and ≥ 0, got -1.0"),
        (["--weight", "z_loss"], "expected NAME=VALUE"),
        (["--weight", "z_loss=much"], "expected NAME=VALUE"),
        (["--steps", "0"], "argument --steps: a whole number from 1"),
        (["--steps", "many"], "argument --steps: a whole number from 1"),
        (["--seed", "-1"], "argument --seed: a whole number from 0"),
        (["--out", __file__], "argument --out: a folder is expected"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(train_lm, capsys, monkeypatch, arguments, want):
    monkeypatch.setattr(train_lm, "load_text", lambda: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        train_lm.main(arguments)
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert want in error


def test_what_is_missing_is_told_before_anything_runs(train_lm, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train_lm, "load_text", lambda: pytest.fail("it runs"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        train_lm.terminal.run(train_lm.main, ["--out", str(tmp_path)])
    assert ended.value.code == 1
    assert 'there is no module matplotlib: pip install "jaxreg[examples]"' in capsys.readouterr().err


def test_ctrl_c_ends_with_the_report_of_what_there_is(train_lm, tmp_path, capsys):
    def press(event):
        if event.name == "custom_loss.stop" and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended, jr.telemetry.attached(press):
        train_lm.terminal.run(train_lm.main, ["--steps", "500", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    steps = [line["step"] for line in records(tmp_path / "run.jsonl")]
    assert steps == list(range(4))  # one is under way while the one before is told
    assert (tmp_path / "terms.png").stat().st_size > 10_000
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    said = capsys.readouterr()
    assert "stopped after 4 of 500 steps" in said.out
    assert "held out after:" in said.out
    assert "Ctrl-C again" in said.err
    assert said.out.index("compiling nats ...") < said.out.index("compiling train_step ...")
