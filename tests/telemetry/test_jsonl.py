"""The run's file: strict JSON, whole lines, and readable after crashes, full disks and other writers."""

import contextlib
import errno
import json
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SUPPORT
from sink_cases import a_report, compute, event, stop

import jaxreg as jr
from jaxreg.telemetry import attached, log
from jaxreg.telemetry import lines as lines_file
from jaxreg.telemetry.jsonl import JSONL, encode


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def read(path):
    """Every line, strictly: whole, an object, and without NaN."""
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split(b"\n")[:-1]]


def written(path, *events):
    sink = JSONL(path)
    for each in events:
        sink(each)
    sink.close()
    return read(path)


def python(code, *arguments):
    """A process of its own that runs the code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(SUPPORT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "jaxreg.telemetry")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "jaxreg.telemetry"]


class TestRecords:
    def test_a_step_is_its_report(self, path):
        out = compute(l2=0.5)
        with attached(JSONL(path)):
            log(out, step=4, metrics={"optim/learning_rate": 1e-3}, measurements={"duration": 0.25})
        (record,) = [line for line in read(path) if "event" not in line]
        assert list(record)[:2] == ["step", "time"]
        assert record.pop("metrics") == {"optim/learning_rate": 1e-3}
        assert record.pop("timings") == {"duration": 0.25}
        assert record.pop("step") == 4
        assert math.isfinite(record.pop("time"))
        assert record == out.to_dict()

    @pytest.mark.parametrize("norms", [True, False])
    @pytest.mark.parametrize("x", [3.0, math.nan, math.inf, 1e30])
    def test_nothing_that_the_report_has_comes_again(self, path, x, norms):
        out = compute(x, norms, l2=0.5, kl=0.0)
        record, _ = written(path, stop(0, out.to_dict(), out.to_flat_dict()), event("warning"))
        assert "metrics" not in record
        assert "timings" not in record
        assert ("nonfinite" in record) is not (x == 3.0)

    def test_what_the_loop_says_otherwise_than_the_report_is_kept(self, path):
        flat = compute(l2=0.5).to_flat_dict() | {"loss/total": 7.0, "loss/val": 8.0, "reg/l2/other": math.nan}
        (record,) = written(path, stop(0, compute(l2=0.5).to_dict(), flat))
        assert record["metrics"] == {"loss/total": 7.0, "loss/val": 8.0, "reg/l2/other": None}

    def test_numbers_of_any_kind_and_what_is_none(self, path):
        metrics = {
            "a": np.float32(0.5),
            "b": jnp.int32(2),
            "c": np.nan,
            "d": -np.inf,
            "e": "no",
            "f": 10**400,
        }
        (record,) = written(path, stop(np.int64(5), metrics=metrics, duration=np.float64(2)))
        assert record["step"] == 5
        assert record["metrics"] == {"a": 0.5, "b": 2.0, "c": None, "d": None, "e": None, "f": None}
        assert record["timings"] == {"duration": 2.0}

    @pytest.mark.parametrize("name", ["дивергенция", "损失", "😀", "a\u2028b", "a\x85b", '"', "\\", "l1 (b)"])
    def test_names_in_any_script(self, path, name):
        (record,) = written(path, stop(0, a_report(name), {name: 1.0}))
        assert list(record["regularizers"]) == [name]
        assert record["metrics"] == {name: 1.0}
        assert len(path.read_text().splitlines()) == 1  # though str.splitlines() splits at more than newlines

    def test_a_step_without_a_number(self, path):
        assert [r["step"] for r in written(path, stop(None), stop(2))] == [None, 2]

    def test_step_comes_first(self, path):
        written(path, stop(3), event("warning", kind="spike"))
        assert all(line.startswith(b'{"step":3,') for line in path.read_bytes().splitlines())


NOTES = [
    (
        event("custom_loss.exception", error=ValueError("bad\nbatch"), inputs=object()),
        {"error": "ValueError: bad\nbatch"},
    ),
    (event("server.exception", error=OSError(28, "full")), {"error": "OSError: [Errno 28] full"}),
    (
        event("regularizer.compute.exception", None, {"duration": 1.5}, term="kl", error=ZeroDivisionError()),
        {"term": "kl", "error": "ZeroDivisionError: ", "seconds": 1.5},
    ),
    (
        event("compile", None, {"duration": 0.5}, program="step", changed=["x: [3] -> [4]"], terms=("kl",)),
        {"program": "step", "changed": ["x: [3] -> [4]"], "seconds": 0.5},
    ),
    (
        event("warning", kind="spike", term=None, message="high"),
        {"kind": "spike", "term": None, "message": "high"},
    ),
]


class TestNotes:
    @pytest.mark.parametrize(("note", "rest"), NOTES, ids=lambda x: getattr(x, "name", ""))
    def test_what_happened_between_the_steps(self, path, note, rest):
        assert written(path, note) == [{"step": note.step, "time": 2.5, "event": note.name, **rest}]

    def test_other_events_have_no_line(self, path):
        names = ["custom_loss.start", "regularizer.compute.start", "regularizer.compute.stop", "mine"]
        assert written(path, *(event(name, term="l1") for name in names)) == []

    def test_real_compiles_and_failures(self, path):
        with attached(JSONL(path)):
            compute(l2=0.123, another=1.0)
        notes = read(path)
        assert notes
        assert {note["event"] for note in notes} == {"compile"}
        assert all(note["program"] and note["changed"] and note["seconds"] > 0 for note in notes)


class TestStrict:
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )

    @given(st.dictionaries(st.text(), anything, max_size=5))
    def test_any_object_is_one_line_of_strict_json(self, record):
        line = encode(record)
        assert line.count(b"\n") == 1
        assert json.loads(line, parse_constant=refuse) == _finite(record)

    numbers = st.none() | st.floats() | st.integers(-(2**60), 2**60)

    @given(
        st.dictionaries(st.text(), numbers, max_size=4),
        st.lists(st.text(min_size=1), max_size=3, unique=True),
        st.dictionaries(st.text(), numbers, max_size=3),
        st.none() | st.integers(0, 2**53),
    )
    def test_any_report(self, tmp_path_factory, custom, terms, metrics, step):
        path = tmp_path_factory.mktemp("run") / "run.jsonl"
        (record,) = written(path, stop(step, a_report(*terms, custom=custom), metrics))
        assert record["step"] == step
        assert list(record["regularizers"]) == terms
        assert all(term["custom"] == _finite(custom) for term in record["regularizers"].values())
        left = set(metrics) - set(record.get("metrics", ()))  # none but a name of the report's own
        assert all(name.startswith(("loss/", "grad_norm/", "reg/")) for name in left)

    def test_what_is_no_json_is_told_all_the_same(self):
        class Odd:
            def __str__(self):
                return "odd"

        line = encode({1: np.float32("nan"), "a": jnp.arange(2), "b": (Odd(), {2.5}), "c": np.array(3)})
        assert json.loads(line) == {"1": None, "a": [0, 1], "b": ["odd", [2.5]], "c": 3}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TestOpening:
    def test_it_makes_the_folder(self, tmp_path):
        assert len(written(tmp_path / "a" / "b" / "run.jsonl", stop(0))) == 1

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=rf"give the path of a file.*{tmp_path.name}"):
            JSONL(tmp_path)

    @pytest.mark.parametrize("below", ["run.jsonl", "a/run.jsonl"])
    def test_a_folder_that_cannot_be(self, tmp_path, below):
        # Below a regular file nobody may write, root included, whom permissions do not stop.
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=rf"is a file, not a folder: give the path.*{below}"):
            JSONL(tmp_path / "file" / below)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a folder that root cannot write to")
    def test_a_read_only_folder_as_root(self):
        with pytest.raises(OSError, match=r"give the path of a file in a folder that can be written.*/proc/"):
            JSONL("/proc/run.jsonl")

    @pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
    def test_a_read_only_folder(self, tmp_path):
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        try:
            with pytest.raises(PermissionError, match="in a folder that can be written"):
                JSONL(tmp_path / "run.jsonl")
        finally:
            tmp_path.chmod(stat.S_IRWXU)

    def test_a_pipe_is_no_file_to_go_on_with(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no regular file"):
            JSONL(tmp_path / "pipe")

    @pytest.mark.parametrize("content", [b"\x89PNG\r\n", b"step,loss\n1,2", b"\n"])
    def test_another_file_is_left_alone(self, path, content):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"run\.jsonl is there and is no file of JSON lines.*nothing was"
        ):
            JSONL(path)
        assert path.read_bytes() == content

    def test_a_backlog_of_nothing(self, path):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            JSONL(path, backlog=0)

    def test_close_twice_and_events_after_it(self, path):
        sink = JSONL(path)
        sink(stop(0))
        sink.close()
        sink.close()
        sink(stop(1))
        assert [record["step"] for record in read(path)] == [0]


class TestGoingOn:
    WHOLE = b'{"step":1,"time":2,"loss_total":3.0}\n'

    @pytest.mark.parametrize("cut", [1, 8, len(WHOLE) - 2])
    @pytest.mark.parametrize("before", [0, 1, 3])
    def test_a_torn_tail_is_cut_off(self, path, told, before, cut):
        path.write_bytes(before * self.WHOLE + self.WHOLE[:cut])
        assert len(written(path, stop(2))) == before + 1
        assert f"its {cut} bytes are cut off" in told()[0]
        assert str(path) in told()[0]

    @pytest.mark.parametrize("tail", [b"\0" * 5000, "é".encode()[:1], b"nul", b"[1]", b"1", b'{"a":' * 10**5])
    def test_whatever_the_tail_is(self, path, tail):
        path.write_bytes(self.WHOLE + tail)
        assert [record["step"] for record in written(path, stop(2))] == [1, 2]

    def test_a_whole_object_without_its_newline_is_kept(self, path, told):
        path.write_bytes(self.WHOLE + self.WHOLE[:-1])
        JSONL(path).close()
        assert path.read_bytes() == 2 * self.WHOLE
        assert told() == []

    def test_a_line_that_another_writer_ends_is_not_torn(self, path, monkeypatch, told):
        path.write_bytes(self.WHOLE + self.WHOLE[:9])

        def ends(seconds):
            with path.open("ab") as file:
                file.write(self.WHOLE[9:])

        monkeypatch.setattr(lines_file.time, "sleep", ends)
        assert [record["step"] for record in written(path, stop(2))] == [1, 1, 2]
        assert told() == []

    @pytest.mark.parametrize(
        ("content", "step"),
        [
            (b"", None),
            (WHOLE, 1),
            (b'{"step":7}\n' + WHOLE + b'{"step":9,"event":"warning"}\n', 1),
            (b'{"step":7}\n{"step":null}\n{"step":true}\n\n{"step":"x"}\n[1]\nrubbish\n', 7),
            (b'{"step":7}\n{"step":8}', 8),
            (b'{"step":7}\n{"step":8', 7),
            (b'{"step":9,"event":"compile"}\n', None),
            (b'{"step":100}\n{"step":70}\n', 70),  # gone on from an older checkpoint: it is at 70
        ],
    )
    def test_where_the_run_stopped(self, path, content, step):
        path.write_bytes(content)
        sink = JSONL(path)
        sink.close()
        assert sink.last_step == step

    @pytest.mark.parametrize("block", [1, 3, 7, 1000])
    def test_from_the_end_block_by_block(self, path, monkeypatch, block):
        monkeypatch.setattr(lines_file, "BLOCK", block)
        path.write_bytes(b'{"step":7}\n' + b'{"step":9,"event":"compile"}\n' * 20 + b"{}\n\n{torn")
        sink = JSONL(path)
        assert list(sink._file.from_the_end())[-1] == b'{"step":7}'
        assert len(list(sink._file.from_the_end())) == 24
        sink.close()
        assert sink.last_step == 7

    def test_only_the_end_is_read(self, path, monkeypatch):
        path.write_bytes(b"{}\n" * 10**6 + self.WHOLE)
        portions = []
        pread = os.pread

        def counted(fd, count, start):
            portions.append(count)
            return pread(fd, count, start)

        monkeypatch.setattr(os, "pread", counted)
        sink = JSONL(path)
        sink.close()
        assert sink.last_step == 1
        assert sum(portions) < 4 * lines_file.BLOCK

    def test_a_run_goes_on_and_the_reader_takes_the_later_lines(self, path):
        written(path, *(stop(step, a_report("l1", total=1.0)) for step in range(5)))
        assert JSONL(path).last_step == 4
        records = written(path, *(stop(step, a_report("l1", total=2.0)) for step in range(3, 6)))
        assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 3, 4, 5]
        read_run = pytest.importorskip("jaxreg.watching.run").read_run
        assert list(read_run(path).series("loss/total")) == [1, 1, 1, 2, 2, 2]


class Disk:
    """os.write on a disk with so much room; ``errno`` where there is none."""

    def __init__(self, monkeypatch, room=0):
        self.room, self.write, self.tried = room, os.write, 0
        monkeypatch.setattr(lines_file.os, "write", self)

    def __call__(self, fd, data):
        self.tried += 1
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.write(fd, data[: self.room])
        self.room -= taken
        return taken


class TestFullDisk:
    @pytest.fixture
    def sink(self, path):
        sink = JSONL(path, backlog=5)
        yield sink
        sink.close()

    @pytest.mark.parametrize("room", [0, 1, 100, 400, 500, 700])
    def test_lines_wait_and_come_in_order(self, path, monkeypatch, told, sink, room):
        disk = Disk(monkeypatch, room)
        for step in range(4):
            sink(stop(step))
            read(path)  # whole lines all the time
        assert len(told()) == 1
        assert str(path) in told()[0]
        assert "No space left on device" in told()[0] or "bytes; is the disk full?" in told()[0]
        disk.room = 10**6
        sink(event("warning", 3))
        assert [record["step"] for record in read(path)] == [0, 1, 2, 3, 3]
        assert "can be written again" in told()[1]
        sink(stop(4))
        assert [record["step"] for record in read(path)] == [0, 1, 2, 3, 3, 4]
        assert len(told()) == 2

    def test_the_oldest_are_dropped_and_counted(self, path, monkeypatch, told, sink):
        disk = Disk(monkeypatch)
        for step in range(9):
            sink(stop(step))
        disk.room = 10**6
        sink(stop(9))
        assert [record["step"] for record in read(path)] == [5, 6, 7, 8, 9]
        first, dropping, last = told()
        assert "No space left" in first
        assert "5 lines wait for room, and from now on the oldest of them are dropped" in dropping
        assert "5 lines that waited are in it, 5 were dropped" in last

    def test_room_that_comes_before_the_end(self, path, monkeypatch, sink):
        disk = Disk(monkeypatch)
        sink(stop(0))
        disk.room = 10**6
        sink.close()
        assert [record["step"] for record in read(path)] == [0]

    def test_what_is_lost_at_the_end_is_told(self, path, monkeypatch, told, sink):
        Disk(monkeypatch)
        for step in range(7):
            sink(stop(step))
        sink.close()
        sink.close()
        assert "closed, and 7 lines could not be written" in told()[-1]
        assert sum("they are lost" in message for message in told()) == 1

    def test_another_writers_line_behind_the_part_is_not_cut(self, path, monkeypatch, sink):
        """What is spoilt then is one line; the next begins anew."""
        other = b'{"step":"another"}\n'
        disk = Disk(monkeypatch, room=50)
        fstat = os.fstat

        def meanwhile(fd):
            with path.open("ab") as file:
                file.write(other)
            return fstat(fd)

        monkeypatch.setattr(lines_file.os, "fstat", meanwhile)
        sink(stop(0))
        disk.room = 1  # no more than the newline that ends the spoilt line
        sink(stop(1))
        assert path.read_bytes().endswith(other)
        monkeypatch.setattr(lines_file.os, "fstat", fstat)
        disk.room = 10**6
        sink(stop(2))
        spoilt, *rest = [line for line in path.read_bytes().split(b"\n") if line]
        assert spoilt.endswith(other[:-1])
        assert [json.loads(line)["step"] for line in rest] == ["another", 0, 1, 2]

    def test_a_failing_close_is_told(self, path, monkeypatch, told):
        sink = JSONL(path)
        close = os.close

        def fails(fd):
            close(fd)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(lines_file.os, "close", fails)
        sink.close()
        assert "Input/output error while closing" in told()[0]

    @pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
    def test_a_limit_on_the_files_size(self, path):
        """The kernel itself takes parts of lines here, and refuses the rest with EFBIG."""
        code = """
            import resource, sys
            from sink_cases import stop
            from jaxreg.telemetry.jsonl import JSONL
            path = sys.argv[1]
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            for limit in (1, 1000, 1234):
                sink = JSONL(f"{path}.{limit}")
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                for step in range(20):
                    sink(stop(step))
                    content = open(f"{path}.{limit}", "rb").read()
                    assert content == b"" or content.endswith(b"}\\n"), content
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                print(content.count(b"\\n"))
                sink(stop(20))
                sink.close()
        """
        process = python(code, path)
        counts = [int(count) for count in finished(process).split()]
        assert counts[0] == 0
        assert 0 < counts[1] <= counts[2] < 20
        for limit in (1, 1000, 1234):
            records = read(path.with_name(f"{path.name}.{limit}"))
            assert [record["step"] for record in records] == list(range(21))

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs")
    def test_a_disk_that_is_really_full(self, tmp_path, told):
        with _tmpfs(tmp_path / "small", 64) as folder:
            path, filler = folder / "run.jsonl", folder / "filler"
            sink = JSONL(path)
            sink(stop(0))
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(512)):
                    pass
            for step in range(1, 100):  # more than what is left of the file's last page
                sink(stop(step))
                read(path)
            assert len(read(path)) < 100
            filler.unlink()
            sink(stop(100))
            sink.close()
            assert [record["step"] for record in read(path)] == list(range(101))
        assert "can be written again" in told()[1]


@contextlib.contextmanager
def _tmpfs(folder, kilobytes):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class TestManyWriters:
    def test_two_processes_tear_no_line(self, path):
        code = """
            import sys
            from sink_cases import a_report, stop
            from jaxreg.telemetry.jsonl import JSONL
            sink = JSONL(sys.argv[1])
            print("ready", flush=True)
            sys.stdin.readline()
            for step in range(2000):
                sink(stop(step, a_report(*"abcdefgh"[: 1 + step % 8]), {"writer": float(sys.argv[2])}))
            sink.close()
        """
        processes = [python(code, path, number) for number in (1, 2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            finished(process)
        steps = {1: [], 2: []}
        for record in read(path):
            steps[record["metrics"]["writer"]].append(record["step"])
        assert steps == {1: list(range(2000)), 2: list(range(2000))}

    def test_threads_and_sinks(self, path):
        shared = JSONL(path)

        def write(sink, number):
            for step in range(300):
                sink(stop(step, metrics={"writer": number}))

        sinks = [shared, shared, JSONL(path), JSONL(path)]
        threads = [threading.Thread(target=write, args=(sink, i)) for i, sink in enumerate(sinks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sink in sinks:
            sink.close()
        steps = [[r["step"] for r in read(path) if r["metrics"]["writer"] == i] for i in range(4)]
        assert steps == [list(range(300))] * 4

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
    def test_a_killed_run_goes_on(self, path):
        code = """
            import itertools, sys
            from sink_cases import a_report, stop
            from jaxreg.telemetry.jsonl import JSONL
            sink = JSONL(sys.argv[1])
            report = a_report(*map(str, range(200)))
            for step in itertools.count(0 if sink.last_step is None else sink.last_step + 1):
                sink(stop(step, report))
                print(step, flush=True)
        """
        done = -1
        for _ in range(2):
            process = python(code, path)
            for line in process.stdout:
                done = int(line)
                if done % 37 == 36:
                    break
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
        sink = JSONL(path)
        assert sink.last_step >= done  # a line is in the file before the call returns
        sink(stop(sink.last_step + 1))
        sink.close()
        assert [record["step"] for record in read(path)] == list(range(sink.last_step + 2))

    def test_opening_while_another_appends_cuts_nothing(self, path):
        report = a_report(*map(str, range(300)))  # many pages: whoever looks may see half of it
        sink, over = JSONL(path), threading.Event()

        def write():
            while not over.is_set():
                sink(stop(0, report))

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(20):
            JSONL(path).close()
        over.set()
        thread.join()
        sink.close()
        assert {len(record["regularizers"]) for record in read(path)} == {300}

    def test_in_a_thread_of_the_loop_while_detaching(self, path):
        sink = jr.telemetry.attach(JSONL(path))
        out = compute(l2=0.5)
        threads = [threading.Thread(target=log, args=(out,), kwargs={"step": step}) for step in range(8)]
        for thread in threads:
            thread.start()
        jr.telemetry.detach(sink)
        for thread in threads:
            thread.join()
        read(path)
