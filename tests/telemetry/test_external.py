"""The sinks of other libraries, each read back with that library's own reader."""

import math
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from sink_cases import a_report, compute, event, stop

import jaxreg as jr
from jaxreg.telemetry import attached, emit, log
from jaxreg.telemetry.otel import OpenTelemetry
from jaxreg.telemetry.spans import MOST
from jaxreg.telemetry.tensorboard import TensorBoard
from jaxreg.telemetry.wandb import WandB

OPTIONAL = ("tensorboard", "wandb", "opentelemetry")


def test_importing_jaxreg_imports_none_of_them():
    code = f"""
import sys, jaxreg
import jaxreg.telemetry.tensorboard, jaxreg.telemetry.wandb, jaxreg.telemetry.otel
print([name for name in {OPTIONAL} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: TensorBoard("logs"), "tensorboard"),
        (lambda: WandB(object()), "wandb"),
        (lambda: OpenTelemetry(), "otel"),
    ],
)
def test_a_missing_extra_names_itself(monkeypatch, make, extra):
    gone = [name for name in sys.modules if name.partition(".")[0] in OPTIONAL]
    for name in {*gone, *OPTIONAL}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'pip install "jaxreg\[{extra}\]"'):
        make()


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("tensorboard")

    def read(self, folder):
        """[(step, value)] by tag."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util

        accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
        accumulator.Reload()
        return {
            tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in accumulator.Tensors(tag)]
            for tag in accumulator.Tags()["tensors"]
        }

    def test_metrics_and_timings_at_their_steps(self, tmp_path):
        out = compute(l2=0.5)
        with attached(TensorBoard(tmp_path / "run")):
            for step in (3, 5):
                log(out, step=step, metrics={"optim/lr": 0.25}, measurements={"duration": 2.0})
            emit("warning", metadata={"kind": "x"})
        series = self.read(tmp_path / "run")
        want = out.to_flat_dict() | {"optim/lr": 0.25, "timing/duration": 2.0}
        assert set(series) == set(want)
        for name, value in want.items():
            assert series[name] == [(3, pytest.approx(value)), (5, pytest.approx(value))]

    def test_numbers_that_are_not_finite_and_names_in_any_script(self, tmp_path):
        with attached(TensorBoard(tmp_path)) as (sink,):
            sink(stop(0, metrics={"损失": math.nan, "a b": math.inf, "c": np.float64(-np.inf)}))
        series = self.read(tmp_path)
        assert math.isnan(series["损失"][0][1])
        assert (series["a b"], series["c"]) == ([(0, math.inf)], [(0, -math.inf)])

    def test_steps_without_a_number_count_up(self, tmp_path):
        sink = TensorBoard(tmp_path)
        for step in (None, None, 7, None):
            sink(stop(step, metrics={"x": 1.0}))
        sink.close()
        sink.close()
        sink(stop(9, metrics={"x": 1.0}))
        assert [step for step, _ in self.read(tmp_path)["x"]] == [0, 1, 7, 8]

    def test_it_can_be_watched_while_it_runs(self, tmp_path, monkeypatch):
        monkeypatch.setattr("jaxreg.telemetry.tensorboard.FLUSH", -1.0)
        with attached(TensorBoard(tmp_path)) as (sink,):
            sink(stop(0, metrics={"x": 1.0}))
            assert self.read(tmp_path) == {"x": [(0, 1.0)]}


class TestWandB:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_SILENT", "true")
        quiet = wandb.Settings(console="off", x_disable_stats=True)
        run = wandb.init(project="jaxreg", mode="offline", dir=tmp_path, settings=quiet)
        yield run
        run.finish()
        wandb.teardown()

    def records(self, run, tmp_path):
        """The finished run's transaction log: records in the blocks of a LevelDB log."""
        import wandb
        from wandb.proto import wandb_internal_pb2

        run.finish()
        wandb.teardown()  # waits for its service, which writes the log
        (path,) = tmp_path.rglob("*.wandb")
        data, at, begun = path.read_bytes(), 7, b""  # behind the file's header
        while at + 7 <= len(data):
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            begun += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(begun)
                begun = b""

    def read(self, run, tmp_path):
        """Rows of history, the metrics' x axes, and alerts."""
        rows, axes, alerts = [], {}, []
        for record in self.records(run, tmp_path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
                rows.append({k: float(v.strip('"')) for k, v in items.items() if k[0] != "_"})
            elif kind == "metric":
                axes[record.metric.name] = record.metric.step_metric
            elif kind == "alert":
                alerts.append((record.alert.title, record.alert.text, record.alert.level))
        return rows, axes, alerts

    def test_metrics_over_their_step(self, run, tmp_path):
        out = compute(l2=0.5)
        with attached(WandB(run)):
            for step in (5, 3, 4):  # a late step, and a run that went back, are not dropped
                log(out, step=step, metrics={"optim/lr": 0.25}, measurements={"duration": 2.0})
        rows, axes, alerts = self.read(run, tmp_path)
        want = out.to_flat_dict() | {"optim/lr": 0.25, "timing/duration": 2.0}
        assert rows == [want | {"step": step} for step in (5, 3, 4)]
        assert axes == {"step": ""} | dict.fromkeys(want, "step")
        assert alerts == []

    def test_odd_names_numbers_and_steps(self, run, tmp_path):
        metrics = {"reg/损失/x": math.nan, "reg/l2*/y": math.inf, "reg/l.2/z": -math.inf}
        sink = WandB(run)
        for step in (None, 7, None):
            sink(stop(step, metrics=metrics))
        rows, axes, _ = self.read(run, tmp_path)
        assert [row["step"] for row in rows] == [0, 7, 8]
        assert math.isnan(rows[0]["reg/损失/x"])
        assert (rows[0]["reg/l2*/y"], rows[0]["reg/l.2/z"]) == (math.inf, -math.inf)
        assert axes == {"step": "", "reg/损失/x": "step", "reg/l.2/z": "step"}

    @pytest.mark.parametrize("alerts", [False, True])
    def test_warnings_as_alerts_if_asked_for(self, run, tmp_path, alerts):
        with attached(WandB(run, alerts=alerts)):
            emit("warning", metadata={"kind": "spike", "term": "l" * 99, "message": "high"})
            emit("warning", metadata={"kind": "recompiles", "term": None, "message": "often"})
        sent = [("spike " + "l" * 57, "high", "WARN"), ("recompiles", "often", "WARN")]
        assert self.read(run, tmp_path)[2] == (sent if alerts else [])

    def test_the_run_stays_the_users(self, run, tmp_path):
        with attached(WandB(run)):
            pass
        run.log({"mine": 1.0})
        assert self.read(run, tmp_path)[0] == [{"mine": 1.0}]

    def test_what_is_no_run(self):
        pytest.importorskip("wandb")
        with pytest.raises(TypeError, match=r"takes the run that wandb.init\(\) gives, not str"):
            WandB("jaxreg")


class TestOpenTelemetry:
    @pytest.fixture
    def otel(self):
        """A sink, and what it has told: spans by name, and metrics by name and attributes."""
        pytest.importorskip("opentelemetry.sdk")
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        class Told:
            exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
            tracer_provider = TracerProvider(shutdown_on_exit=False)
            meter_provider = MeterProvider([reader], shutdown_on_exit=False)

            def sink(self):
                return OpenTelemetry(self.tracer_provider, self.meter_provider)

            def spans(self, name=None):
                return [s for s in self.exporter.get_finished_spans() if name in (None, s.name)]

            def metrics(self):
                data = self.reader.get_metrics_data()
                return {
                    (metric.name, *point.attributes.values()): point
                    for resource in data.resource_metrics
                    for scope in resource.scope_metrics
                    for metric in scope.metrics
                    for point in metric.data.data_points
                }

        told = Told()
        told.tracer_provider.add_span_processor(SimpleSpanProcessor(told.exporter))
        yield told
        told.tracer_provider.shutdown()
        told.meter_provider.shutdown()

    def test_a_loop_of_ones_own(self, otel):
        out = compute(l2=0.5, kl=0.25)
        with attached(otel.sink()):
            log(out, step=3, measurements={"duration": 2.0, "forward": 0.5})
        (span,) = otel.spans("custom_loss")
        want = {"step": 3, "loss.total": 19.5, "loss.base": 6.0, "loss.regularizer_total": 13.5}
        assert {key: span.attributes[key] for key in want} == want
        assert span.attributes["grad_norm.total"] == pytest.approx(out.to_flat_dict()["grad_norm/total"])
        assert span.end_time - span.start_time == pytest.approx(2e9)
        assert otel.spans("regularizer.compute") == []  # compiled terms have no time of their own
        metrics = otel.metrics()
        assert metrics["jaxreg.loss.total",].value == 19.5
        for key in ("value", "weight", "contribution", "grad_norm"):
            for name in ("l2", "kl"):
                want = out.to_flat_dict()[f"reg/{name}/{key}"]
                assert metrics[f"jaxreg.regularizer.{key}", name].value == want
        assert metrics["jaxreg.custom_loss.duration",].sum == 2.0
        assert metrics["jaxreg.custom_loss.part.duration", "forward"].sum == 0.5
        assert ("jaxreg.regularizer.duration", "l2") not in metrics

    def test_a_remote_step_with_a_host_term(self, otel, embedded):
        data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})] * 2
        with jr.host.HostRegularizer("judge", lambda data, x: 0.5, weight=1.0) as judge:
            objective = jr.compose(jr.losses.CrossEntropy(), [judge])
            with attached(otel.sink()):
                jr.client.forward_backward_custom(embedded, data, objective, step=7).result()
        (step,) = otel.spans("custom_loss")
        (term,) = otel.spans("regularizer.compute")
        assert (step.attributes["datums"], step.attributes["tokens"]) == (2, 6)
        assert "judge" in step.attributes["terms"]
        assert term.parent.span_id == step.context.span_id
        assert (term.attributes["regularizer"], term.attributes["value"]) == ("judge", 0.5)
        assert step.start_time <= term.start_time <= term.end_time <= step.end_time
        assert otel.metrics()["jaxreg.regularizer.duration", "judge"].count == 1
        assert otel.spans("compile")

    def test_under_the_span_that_is_around_it(self, otel):
        with attached(otel.sink()), otel.tracer_provider.get_tracer("mine").start_as_current_span("mine"):
            emit("custom_loss.start", step=1, metadata={"terms": ("l1",)})
        (mine,), (step,) = otel.spans("mine"), otel.spans("custom_loss")
        assert step.parent.span_id == mine.context.span_id

    def test_failures_are_recorded(self, otel):
        error = ValueError("no such token")
        sink = otel.sink()
        sink(event("custom_loss.start", 1, time=10.0, terms=("kl", "judge")))
        sink(event("regularizer.compute.start", 1, time=10.0, term="kl"))
        sink(event("regularizer.compute.start", 1, time=10.0, term="judge"))
        failed = dict(term="kl", error=error, on_error="raise")
        sink(event("regularizer.compute.exception", 1, {"duration": 1.0}, time=11.0, **failed))
        sink(event("custom_loss.exception", 1, time=12.0, error=error, inputs=None))
        sink(event("server.exception", 1, time=13.0, error=error))
        for name in ("custom_loss", "server"):
            (span,) = otel.spans(name)
            assert span.status.description == "ValueError: no such token"
            assert [(e.name, e.attributes["exception.type"]) for e in span.events] == [
                ("exception", "ValueError")
            ]
            assert span.status.is_ok is False
        (step,), (server,) = otel.spans("custom_loss"), otel.spans("server")
        assert server.parent.span_id == step.context.span_id
        kl, judge = otel.spans("regularizer.compute")
        assert (kl.start_time, kl.end_time, kl.attributes["on_error"]) == (10**10, 11 * 10**9, "raise")
        assert kl.status.is_ok is False
        assert (judge.attributes["unfinished"], judge.end_time) == (True, 12 * 10**9)
        assert kl.parent.span_id == judge.parent.span_id == step.context.span_id

    def test_a_compile_began_before_it_was_told(self, otel):
        otel.sink()(event("compile", None, {"duration": 0.5}, time=2.5, program="train", changed=["a", "b"]))
        (span,) = otel.spans()
        assert (span.name, span.start_time, span.end_time) == ("compile", 2 * 10**9, 25 * 10**8)
        assert dict(span.attributes) == {"program": "train", "changed": ("a", "b")}
        assert otel.metrics()["jaxreg.compile.duration",].sum == 0.5

    def test_steps_that_overlap(self, otel):
        sink = otel.sink()
        for step in (1, 2):
            sink(event("custom_loss.start", step, time=float(step)))
            sink(event("regularizer.compute.start", step, time=float(step), term="judge"))
        for step in (2, 1):
            about = {"term": "judge"}
            sink(event("regularizer.compute.stop", step, {"duration": 0.5, "value": 1.0}, **about))
            sink(stop(step, time=5.0 + step))
        steps = {span.attributes["step"]: span for span in otel.spans("custom_loss")}
        for number, span in steps.items():
            assert (span.start_time, span.end_time) == (number * 10**9, (5 + number) * 10**9)
        parents = [span.parent.span_id for span in otel.spans("regularizer.compute")]
        assert parents == [steps[2].context.span_id, steps[1].context.span_id]

    def test_in_threads(self, otel):
        def steps(first):
            for step in range(first, first + 50):
                emit("custom_loss.start", step=step)
                emit("regularizer.compute.start", step=step, metadata={"term": "judge"})
                log(out, step=step)

        out = compute(l2=0.5)
        with attached(otel.sink()) as (sink,):
            threads = [threading.Thread(target=steps, args=(first,)) for first in (0, 100, 200)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sink._spans._open == []
        spans = otel.spans("custom_loss")
        assert len({span.attributes["step"] for span in spans}) == len(spans) == 150
        assert len(otel.spans("regularizer.compute")) == 150

    def test_starts_without_an_end_are_bounded_and_told(self, otel):
        sink = otel.sink()
        for step in range(MOST + 10):
            sink(event("custom_loss.start", step))
        assert [span.attributes["step"] for span in otel.spans()] == list(range(10))
        sink(event("regularizer.compute.start", 5000, term="judge"))
        sink.close()
        sink.close()
        assert len(otel.spans("custom_loss")) == MOST + 11
        assert all(span.attributes["unfinished"] for span in otel.spans())
        assert all(span.end_time >= span.start_time for span in otel.spans())
        assert len(otel.spans("regularizer.compute")) == 1

    def test_steps_without_a_number_and_numbers_that_are_not_finite(self, otel):
        report = a_report("l1", total=None, nonfinite=["l1"])
        with attached(otel.sink()) as (sink,):
            sink(event("custom_loss.start", None))
            sink(stop(None, report))
            emit("warning", metadata={"kind": "nonfinite", "term": "l1", "message": "l1"})
        (span,) = otel.spans()
        assert span.attributes["nonfinite"] == ("l1",)
        assert not {"step", "loss.total", "unfinished"} & span.attributes.keys()
        assert ("jaxreg.loss.total",) not in otel.metrics()
        assert otel.metrics()["jaxreg.warnings", "nonfinite"].value == 1

    def test_without_an_sdk_nothing_happens(self):
        pytest.importorskip("opentelemetry.trace")
        with attached(OpenTelemetry()):
            log(compute(l2=0.5), step=1, measurements={"duration": 1.0})
