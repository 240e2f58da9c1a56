"""The remote recipes on the embedded trainer: each lowers its loss, and shows its terms."""

import importlib
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from places import EXAMPLES

import jaxreg as jr

RECIPES = {
    "remote_finetune": {"kl", "focal"},
    "remote_open_character": {"chosen_nll", "log_ratio"},
    "remote_preferences": {"kl", "focal"},
    "remote_distillation": set(),
    "remote_answers": set(),
}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lowers_its_loss(name, recipe, capsys):
    results = recipe(name).main(["--steps", "8"])
    losses = [
        float(result.output.loss_total) for result in results[:8]
    ]  # the first stage, where there are two
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(losses))
    assert set(results[0].output.regularizers) == RECIPES[name]
    assert all(result.drift.max < 1e-4 for result in results)
    assert "step   0  loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*RECIPES, "remote_facts"])
@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--steps", "0"], "argument --steps: a whole number from 1"),
        (["--learning-rate", "nan"], "argument --learning-rate: a number above 0"),
        (["--base-url", "localhost"], "argument --base-url: http://... or https://... is expected"),
    ],
)
def test_a_wrong_argument_is_one_line(name, arguments, want, recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe(name).main(arguments)
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert want in error


def program(recipe, name, *arguments):
    """Run it as a program; its exit status."""
    module = recipe(name)
    with pytest.raises(SystemExit) as ended:
        recipe("terminal").run(module.main, list(arguments))
    return ended.value.code


def test_a_server_without_the_sdk_is_one_line(recipe, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    assert program(recipe, "remote_answers", "--base-url", "http://localhost:1") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith('--base-url needs the Tinker SDK: pip install "jaxreg[tinker]"')


def test_a_file_that_is_no_run_is_left_as_it_is(recipe, capsys, tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("Chapter 1")
    assert program(recipe, "remote_facts", "--log", str(path)) == 1
    assert "no run's file; it is left as it is" in capsys.readouterr().err
    assert path.read_text() == "Chapter 1"
    assert program(recipe, "remote_facts", "--log", str(tmp_path)) == 1
    assert "Is a directory" in capsys.readouterr().err


def ctrl_c(times):
    """A handler that presses it at the third step."""

    def press(event):
        if event.name == "custom_loss.stop" and event.step == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return press


@pytest.mark.parametrize("name", ["remote_open_character", "remote_facts"])
def test_ctrl_c_ends_with_what_there_is(name, recipe, capsys, tmp_path):
    module = recipe(name)
    arguments = ["--steps", "40"] + (["--log", str(tmp_path / "run.jsonl")] if name == "remote_facts" else [])
    stepping = recipe("remote").jr.client.forward_backward_custom
    count = itertools.count()

    def numbered(*given, **more):
        return stepping(*given, **{"step": next(count), **more})

    with pytest.MonkeyPatch.context() as patch, jr.telemetry.attached(ctrl_c(1)):
        patch.setattr(jr.client, "forward_backward_custom", numbered)
        assert program(recipe, name, *arguments) == 130
    said = capsys.readouterr()
    assert "stopped after 3 of 40 steps" in said.out
    assert "compiling jaxreg_value_and_grad ..." in said.out
    assert said.err.strip() == "stopping after this step; Ctrl-C again ends it at once"
    if name == "remote_facts":
        assert "3 steps in" in said.out
        assert [*jr.telemetry.read_run(tmp_path / "run.jsonl").steps] == [0, 1, 2]
    else:
        assert "accuracy" in said.out
        assert "supervised stage" not in said.out
    assert module.main  # it is the program that ended, not the process


def test_ctrl_c_twice_ends_at_once_and_without_a_traceback(recipe, capsys, tmp_path):
    with jr.telemetry.attached(ctrl_c(2)):
        status = program(recipe, "remote_facts", "--steps", "40", "--log", str(tmp_path / "run.jsonl"))
    assert status == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in said.err
    assert "steps in" not in said.out


def test_the_service_does_not_hear_ctrl_c_at_the_terminal(recipe):
    with recipe("remote_facts").running_service() as service:
        assert os.getpgid(service._process.pid) != os.getpgid(0)


def test_the_service_says_what_is_wrong_and_ends_quietly():
    program = [sys.executable, str(EXAMPLES / "facts_service.py")]
    for port in ("x", "-1", "65536"):
        done = subprocess.run([*program, port], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    # As at a terminal: what a shell starts in the background, these tests perhaps, is told to ignore Ctrl-C.
    heard = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heard += f"sys.argv = ['facts_service.py']; runpy.run_path({program[1]!r}, run_name='__main__')"
    command = [sys.executable, "-c", heard]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        try:
            port = service.stdout.readline().split()[-1]
            done = subprocess.run([*program, port], capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, done.stderr) == (1, f"port {port}: Address already in use\n")
            service.send_signal(signal.SIGINT)
            assert service.communicate(timeout=60)[1] == ""
            assert service.returncode == 0
        finally:
            service.kill()


def test_the_check_is_printed_when_asked_for(recipe, capsys):
    recipe("remote_answers").main(["--steps", "1", "--check"])
    assert "linear in the weights" in capsys.readouterr().out
