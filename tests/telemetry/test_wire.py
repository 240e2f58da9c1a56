"""Tinker's names: one colon, a reduction that its SDK knows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sink_cases import a_report, compute, event

import jaxreg as jr
from jaxreg.core.output import flat
from jaxreg.telemetry import attached, log
from jaxreg.telemetry.wire import REDUCTIONS, TinkerMetrics, tinker_metrics


def test_every_flat_name_with_its_reduction():
    out = compute(l2=0.5)
    assert tinker_metrics(out) == {f"custom/{k}:mean": v for k, v in out.to_flat_dict().items()}
    assert tinker_metrics(out)["custom/reg/l2/contribution:mean"] == 9.0
    assert tinker_metrics(out)["custom/reg/l2/grad_norm_weighted:mean"] == pytest.approx(3 * math.sqrt(2))


@pytest.mark.parametrize("norms", [True, False])
def test_of_a_report_the_same(norms):
    out = compute(norms=norms, l2=0.5, kl=0.1)
    assert tinker_metrics(out.to_dict()) == tinker_metrics(out)
    assert {k: v for k, v in flat(out.to_dict()).items() if v is not None} == out.to_flat_dict()


def test_what_is_not_finite_stays_and_a_report_has_none():
    out = compute(math.nan, l2=0.5)
    assert math.isnan(tinker_metrics(out)["custom/loss/total:mean"])
    assert tinker_metrics(out.to_dict()) == {
        "custom/reg/l2/weight:mean": 0.5,
        "custom/grad_norm/base:mean": pytest.approx(math.sqrt(2)),
    }


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("tokens:sum", "custom/reg/l1/tokens:sum"),
        ("p:95", "custom/reg/l1/p_95:mean"),
        ("a:b:max", "custom/reg/l1/a_b:max"),
        (":sum", "custom/reg/l1/:sum"),
    ],
)
def test_one_colon_and_it_is_the_reductions(metric, name):
    assert tinker_metrics(a_report("l1", custom={metric: 2.0}))[name] == 2.0


@given(st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=5))
def test_any_name_can_be_split(custom):
    for name in tinker_metrics(a_report("l1", custom=custom)):
        stem, reduction = name.split(":")
        assert stem.startswith("custom/")
        assert reduction in REDUCTIONS


def test_the_sink_sends_the_loops_own_too():
    sent = []
    out = compute(l2=0.5)
    with attached(TinkerMetrics(lambda *what: sent.append(what))):
        log(out, step=3, metrics={"optim/lr": 0.1, "loss:sum": 4})
        log(out)
    ours = tinker_metrics(out)
    assert sent == [(3, ours | {"custom/optim/lr:mean": 0.1, "custom/loss:sum": 4.0}), (None, ours)]


def test_a_remote_step_sends_them(embedded):
    sent = {}
    data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})]
    objective = jr.compose(jr.losses.CrossEntropy(), [dict(name="l2", fn=jr.regularizers.L2(), weight=0.1)])
    with attached(TinkerMetrics(sent.__setitem__)):
        result = jr.client.forward_backward_custom(embedded, data, objective, step=7).result()
    assert sent[7] == tinker_metrics(result.output)


def test_the_sdk_reduces_them():
    """Two requests' metrics through the SDK's own reduction."""
    helpers = pytest.importorskip("tinker.lib.chunked_fwdbwd_helpers")
    from tinker.types import ForwardBackwardOutput

    def reply(metrics, datums):
        outputs = [{}] * datums
        return ForwardBackwardOutput(loss_fn_output_type="", metrics=metrics, loss_fn_outputs=outputs)

    first, second = (
        tinker_metrics(a_report("l1", total=total, custom={"n:sum": total, "a:b": 1.0}))
        for total in (1.0, 4.0)
    )
    together = helpers.combine_fwd_bwd_output_results([reply(first, 2), reply(second, 1)]).metrics
    assert set(together) == set(first)
    assert together["custom/loss/total:mean"] == 2.0
    assert together["custom/reg/l1/n:sum"] == 5.0
    assert set(helpers.REDUCE_MAP) >= REDUCTIONS


def test_other_events_send_nothing():
    TinkerMetrics(lambda *_: pytest.fail("sent"))(event("compile"))
