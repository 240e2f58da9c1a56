"""The command line: what it says of itself, and one line for whatever is wrong."""

import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from places import ROOT
from run_cases import line, note, term, write

import jaxreg as jr
from jaxreg.cli.main import main
from jaxreg.telemetry import FlightRecorder, Inputs, attached, log

COMMANDS = ("doctor", "watch", "report", "replay")


def objective():
    return jr.compose(lambda x, batch: jnp.sum(x**2))


@pytest.fixture(autouse=True)
def _started_as_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jaxreg"])


@pytest.fixture
def flight(tmp_path):
    """A recording of one good step."""
    whole = objective()
    with attached(FlightRecorder(tmp_path)) as (recorder,):
        log(whole(jnp.ones(3))[1], step=4, inputs=Inputs(whole, jnp.ones(3)))
    return str(recorder.dump())


def told(capsys, *arguments):
    """What the command says is wrong: one line, and nothing on standard output."""
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


def refused(capsys, *arguments):
    """Why the arguments are none."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    return error


def test_without_a_command_it_lists_them(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in listed
        assert f"jaxreg {command}" in listed.partition("examples:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_description_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    about = text.partition("\n\n")[2].partition("\n\n")[0]
    assert len(about.split()) > 8
    assert f"jaxreg {command}" in text.partition("examples:")[2]
    assert all(len(row) <= 110 for row in text.splitlines())


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"jaxreg {jr.__version__} (jax {jax.__version__}, jaxlib ")


def test_wrong_arguments_are_told_on_one_line(capsys):
    assert "did you mean report? the commands are doctor, watch, report" in refused(capsys, "reprot")
    assert refused(capsys, "report").startswith(
        "jaxreg report: the following arguments are required: RUN.jsonl ("
    )
    assert "required: RUN.jsonl (" in refused(capsys, "watch", "--once")
    assert "required: FILE.flight (" in refused(capsys, "replay")
    for wrong in ("-1", "0", "nan", "soon"):
        assert f"above 0 is expected, not '{wrong}'" in refused(capsys, "watch", "x", "--interval", wrong)
    assert "--step" in refused(capsys, "replay", "x", "--step", "last")
    assert "unrecognized arguments: x" in refused(capsys, "doctor", "x")


@pytest.mark.parametrize("command", ["watch --once", "report"])
def test_what_is_no_run(command, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    write(tmp_path / "empty")
    write(tmp_path / "notes", note(3, "warning", message="m"))
    os.mkfifo(tmp_path / "pipe")
    for name, want in (
        ("binary", "binary holds no step of a run: none of its 10 lines is one"),
        ("empty", "empty holds no step of a run: it is empty so far"),
        ("notes", "notes holds no step of a run: only 1 note"),
        ("none", "none: No such file"),
        ("pipe", "pipe is no regular file"),
        (".", "Is a directory"),
        ("empty/run.jsonl", "run.jsonl: Not a directory"),
    ):
        assert want in told(capsys, *command.split(), str(tmp_path / name))
    assert "the file's name is empty" in told(capsys, *command.split(), "")


def test_a_report_goes_into_a_folder(tmp_path, capsys):
    run = str(write(tmp_path / "run.jsonl", line(0, term("kl"))))
    for out in (run, f"{run}/deeper/still"):
        assert f"should be a folder to write into, but a file {run} exists" in told(
            capsys, "report", run, "-o", out
        )
    assert "the folder's name is empty" in told(capsys, "report", run, "-o", "")


def test_what_is_no_recording(flight, tmp_path, capsys):
    whole = Path(flight).read_bytes()
    for name, data, want in (
        ("binary", bytes(range(255, 0, -1)), "is no flight recording"),
        ("text", b"\xff\xfe\xfa words", "is no flight recording"),
        ("empty", b"", "is empty"),
        ("cut", whole[: len(whole) // 2], "is a damaged flight recording"),
        (
            "run",
            b'{"step":0}\n',
            "is no flight recording, which FlightRecorder writes. It may be a run's file",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        said = told(capsys, "replay", str(tmp_path / name))
        assert f"{name} {want}" in said
        assert "Unicode" not in said
    assert "Is a directory" in told(capsys, "replay", str(tmp_path))
    assert "No such file" in told(capsys, "replay", str(tmp_path / "none"))


def test_objectives_that_cannot_be_had(flight, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from where it imports, started as python -m or as a script
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, source in (
        ("imports_badly", "x = 1 / 0"),
        ("parses_arguments", "raise SystemExit(2)"),
        ("is_no_python", "def ("),
        ("imports_what_is_not_there", "import no_such_module_at_all"),
        ("makes", "made = lambda: 3\ndef needs(x): ...\ndef fails(): raise KeyError('k')"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
    for name, want in (
        (
            "imports_badly:x",
            "importing the module 'imports_badly' raised ZeroDivisionError: division by zero (im",
        ),
        ("parses_arguments:x", "raised SystemExit: 2 (parses_arguments.py, line 1)"),
        ("is_no_python:x", "raised SyntaxError: invalid syntax (is_no_python.py, line 1)"),
        ("imports_what_is_not_there:x", "No module named 'no_such_module_at_all'"),
        ("makes.py:made", "name the module and not its file: makes:made"),
        ("./makes:made", "'./makes' is no name of a module"),
        ("makes:made", "is no objective (what compose returns) but int"),
        ("makes:needs", "missing 1 required positional argument: 'x'"),
        ("makes:fails", "raised KeyError: 'k' (makes.py, line 3)"),
        ("makes:made.deeper", "'makes' has no 'made.deeper'"),
        ("makes", "module:attribute"),
    ):
        assert want in told(capsys, "replay", flight, "--objective", name)
    assert "--objective module:attribute" in told(capsys, "replay", flight, "--step", "4")
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(objective=objective))
    assert "has no step 9" in told(capsys, "replay", flight, "--objective", "mine:objective", "--step", "9")


def test_the_doctor_where_jax_does_not_start(capsys, monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    said = told(capsys, "doctor")
    assert "JAX starts on no device (JAX_PLATFORMS='cuda'): Unable to initialize" in said


def test_ctrl_c_leaves_no_traceback(flight, capsys, monkeypatch):
    from jaxreg.recorder import replay

    def stops(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "summary", stops)
    assert main(["replay", flight]) == 130
    assert capsys.readouterr().err == "jaxreg replay: interrupted\n"


def test_a_reader_that_has_gone_leaves_no_traceback(flight):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxreg", "replay", flight]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_what_the_encoding_does_not_have_is_no_error(flight):
    command = [sys.executable, "-m", "jaxreg", "replay", flight, "--objective", "mine:objective"]
    Path(flight).with_name("mine.py").write_text(
        "import jax.numpy as jnp, jaxreg as jr\n"
        "objective = jr.compose(lambda x, b: (jnp.sum(x**2), {'‖x‖': jnp.sum(x)}))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        command,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        cwd=Path(flight).parent,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?x?" in done.stdout


def test_python_m_and_the_script_are_the_same_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"jaxreg": "jaxreg.cli.main:main"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg", "watch"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.startswith("python -m jaxreg watch: the following arguments are required: RUN.jsonl")
