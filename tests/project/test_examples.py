"""The main job, for a few steps: its files, its ablations, its mistakes."""

import json
import sys

import jax
import pytest
from places import EXAMPLES

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def train_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks
        import train_lm

        yield train_lm
    for name in ("train_lm", "text"):
        sys.modules.pop(name, None)


def records(path):
    """A run's steps, without the notes between them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def test_a_short_run_and_an_ablation(train_lm, tmp_path, capsys):
    bits = train_lm.main(["--steps", "6", "--out", str(tmp_path / "a")])
    assert bits["after"] < bits["before"] - 0.5
    lines = records(tmp_path / "a" / "run.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0]["regularizers"]["kl_bigram"]["weight"] == 0.5
    assert lines[-1]["regularizers"]["kl_bigram"]["weight"] == 0
    assert all(term["grad_norm"] > 0 for term in lines[1]["regularizers"].values())
    assert (tmp_path / "a" / "terms.png").stat().st_size > 10_000
    assert (tmp_path / "a" / "report" / "report.html").stat().st_size > 10_000
    assert "kernel_l1" in capsys.readouterr().out

    options = ["--without", "kl_bigram", "--weight", "z_loss=0.5"]
    train_lm.main(["--steps", "2", "--out", str(tmp_path / "b"), *options])
    line = records(tmp_path / "b" / "run.jsonl")[0]
    assert line["regularizers"]["kl_bigram"]["contribution"] == 0
    assert line["regularizers"]["z_loss"]["weight"] == 0.5


def test_a_wrong_name_is_told_before_anything_runs(train_lm, tmp_path, capsys):
    with pytest.raises(KeyError, match="did you mean 'z_loss'"):
        train_lm.main(["--steps", "2", "--out", str(tmp_path), "--without", "zloss"])
    with pytest.raises(SystemExit):
        train_lm.main(["--weight", "z_loss"])
    assert "expected NAME=VALUE" in capsys.readouterr().err
