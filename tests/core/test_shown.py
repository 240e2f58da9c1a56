"""What outputs, batches and objectives look like in text and in notebooks: no failure, no tracer read."""

import functools
import html.parser
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr
from jaxreg.base.shown import called, number


class Cells(html.parser.HTMLParser):
    """The rows of a table, and its caption; complains of a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.caption = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "caption":
            self.caption += data


def base(x, batch):
    return jnp.sum(x), {"first": x[0]}


def l1(x, batch):
    return jnp.sum(jnp.abs(x)), {"max": jnp.max(x)}


def objective(norms=True, **fields):
    terms = [
        jr.RegularizerSpec(name="a<b>&", fn=l1, weight=0.5),
        jr.RegularizerSpec(name="b", fn=l1, weight=2.0),
    ]
    return jr.compose(base, terms, track_grad_norms=norms, **fields)


X = jnp.array([3.0, -4.0])


def test_an_output_is_a_table_of_its_terms():
    _, out = objective(norms=False)(X)
    assert repr(out).splitlines() == [
        "CustomLossOutput",
        "  term       value  weight  contribution  metrics",
        "  base loss     -1                    -1  first 3",
        "  a<b>&          7     0.5           3.5  max 3",
        "  b              7       2            14  max 3",
        "  total                             16.5",
    ]


def test_norms_are_columns_where_they_are_tracked():
    (_, out), gradient = objective().value_and_grad(X)
    head, first, second, *_, total = Cells(out._repr_html_()).rows
    assert head[4:6] == ["grad_norm", "grad_norm_weighted"]
    assert first[4:6] == ["1.414", "1.414"]
    assert second[4:6] == ["1.414", "0.7071"]
    assert float(total[5]) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-3)


def test_html_is_escaped_and_says_what_the_text_says():
    _, out = objective(norms=False)(X)
    markup = out._repr_html_()
    assert "a<b>" not in markup
    shown = Cells(markup)
    assert shown.caption == "CustomLossOutput"
    text = [line.split() for line in repr(out).splitlines()[1:]]
    assert [" ".join(row).split() for row in shown.rows] == text
    assert "currentColor" in markup  # at home on a dark page
    assert "#" not in markup


def test_state_and_aux_are_named():
    scheduled = jr.compose(
        lambda x, batch: jnp.sum(x),
        [dict(name="s", fn=l1, weight=optax.linear_schedule(0.0, 1.0, 10))],
        forward=lambda params, batch: (params, 7),
        has_aux=True,
    )
    _, out = scheduled(X, state=scheduled.init())
    assert repr(out).startswith("CustomLossOutput (with state for step 1, aux)\n")


def test_vmapped_outputs_show_a_few_numbers_or_their_range():
    outs = jax.vmap(lambda x: objective(norms=False)(x)[1])
    assert "[-1, -1]" in repr(outs(jnp.stack([X, X])))
    assert "-5 … -1 [5]" in repr(outs(jnp.stack([X - i / 2 for i in range(5)])))


def test_tracers_are_shown_by_shape_and_nothing_is_read(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("read")

    seen = []

    @jax.jit
    def traced(objective, x):
        _, out = objective(x)
        with monkeypatch.context() as patch:
            patch.setattr(np, "asarray", refuse)
            seen.extend(
                [repr(out), out._repr_html_(), repr(objective), objective._repr_html_(), repr(out.base_loss)]
            )
        return out

    traced(objective(norms=False), X)
    assert all("float32[]" in text for text in seen)


@pytest.mark.parametrize("leaf", [object(), None, 0, "text", jax.ShapeDtypeStruct((2,), np.float32)])
def test_whatever_jax_puts_into_a_pytree_can_be_shown(leaf):
    _, out = objective()(X)
    made = jr.TokenBatch.from_arrays(x=jnp.zeros((2, 3)))
    for whole in (out, objective(), made, out.base_loss, out.regularizers["b"]):
        other = jax.tree.map(lambda _: leaf, whole)
        assert repr(other)
        if hasattr(other, "_repr_html_"):
            assert other._repr_html_()


def test_a_part_of_an_output_is_a_line():
    _, out = objective(norms=False)(X)
    assert repr(out.base_loss) == "BaseLossOutput(value=-1, custom={first 3})"
    assert repr(out.regularizers["b"]) == (
        "RegularizerOutput('b', value=7, weight=2, contribution=14, custom={max 3})"
    )
    assert out.on_host().to_dict() == out.to_dict()
    assert repr(out.on_host()) == repr(out)


def test_an_objective_says_its_terms_their_weights_and_places():
    def forward(params, batch):
        return params["w"]

    made = jr.compose(
        jr.losses.CrossEntropy(inputs="logits"),
        [
            dict(name="kl", fn=jr.regularizers.KL(reference="ref"), weight=optax.constant_schedule(0.5)),
            dict(name="sp", fn=jr.regularizers.L2SP(reference={"w": X, "b": X}), weight=0.1),
            dict(name="part", fn=jr.of("logits", functools.partial(l1)), weight=1.0),
            jr.host.HostRegularizer("far", print, weight=3.0),
        ],
        forward=forward,
        track_grad_norms=jr.GradNorms(wrt="params"),
    )
    assert repr(made).splitlines() == [
        "CompositeLoss(",
        "  base: CrossEntropy(inputs='logits'),",
        "  kl: schedule · KL(reference='ref'),",
        "  sp: 0.1 · L2SP(reference=2 arrays) (on params),",
        "  part: 1 · of('logits', partial(l1)),",
        "  far: 3 · on the host: print,",
        "  forward=forward,",
        "  track_grad_norms=GradNorms(wrt='params')",
        ")",
    ]
    rows = Cells(made._repr_html_()).rows
    assert rows[0] == ["term", "weight", "on", "function"]
    assert rows[3] == ["sp", "0.1", "params", "L2SP(reference=2 arrays)"]
    assert "kl: 0.25 ·" in repr(made.with_weights({"kl": 0.25}))


def test_vmapped_weights_and_schedules_under_jit():
    made = jr.compose(base, [dict(name="s", fn=l1, weight=optax.constant_schedule(1.0))])
    seen = []
    jax.jit(lambda made: seen.append(repr(made)))(made)
    assert "s: schedule or float32[] ·" in seen[0]
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), made.with_weights({"s": 0.5}))
    assert "s: 0.5 [4] ·" in repr(many)


def test_donated_arrays_can_be_shown():
    x = jnp.ones((2, 3))
    made = jr.compose(base, [dict(name="w", fn=jr.regularizers.L2SP(reference=x), weight=1.0)])
    batch, (_, out) = jr.TokenBatch.from_arrays(x=x), objective()(X)
    x.delete()
    out.loss_total.delete()
    assert "L2SP(reference=float32[2, 3])" in repr(made)
    assert "x        float32  [2, 3]" in repr(batch)
    assert "float32[] (deleted)" in repr(out)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "1"),
        (jnp.bfloat16(1.5), "1.5"),
        (np.float32("nan"), "nan"),
        (jnp.arange(3), "[0, 1, 2]"),
        (jnp.zeros((2, 2)), "0 [2, 2]"),
        (jnp.zeros((0, 4)), "[]"),
        (jnp.ones(2, complex), "complex64[2]"),
        (jax.random.key(0), "key<fry>[]"),
        ("text", "str[]"),
    ],
)
def test_a_number(value, text):
    assert number(value) == text


def test_what_functions_are_called():
    class Own:
        def __call__(self, x, batch):
            return x

    assert called(l1) == "l1"
    assert called(jnp.sum) == "sum"
    assert called(lambda x: x).startswith("<lambda> at test_shown.py:")
    assert called(functools.partial(l1, batch="b")) == "partial(l1, batch='b')"
    assert called(Own()) == "Own"
    assert called([X, {"a": X}]) == "2 arrays"
    assert len(called("x" * 500)) < 100


def test_a_token_batch_shows_what_it_holds():
    batch = jr.TokenBatch.pack(
        [{"ref": [-1.0, -2.0], "weights": [0.0, 1.0]}, {"ref": [-4.0], "weights": [1.0]}], length_buckets=[4]
    )
    assert repr(batch).splitlines() == [
        "TokenBatch of 2 datums, 3 tokens, of which 2 count, padded to 2 × 4",
        "  array    dtype    shape   lowest … highest",
        "  mask     bool     [2, 4]             0 … 1",
        "  weights  float32  [2, 4]             0 … 1",
        "  lengths  int32    [2]                1 … 2",
        "  ref      float32  [2, 4]           -4 … -1",
    ]
    assert Cells(batch._repr_html_()).rows[-1] == ["ref", "float32", "[2, 4]", "-4 … -1"]
    assert repr(jax.vmap(lambda batch: batch)(jax.tree.map(lambda a: a[None], batch))).startswith(
        "TokenBatch\n"
    )
    seen = []
    jax.jit(lambda batch: seen.append((repr(batch), batch._repr_html_())))(batch)
    assert "ref      float32  [2, 4]" in seen[0][0]
    assert "of 2 datums" not in seen[0][0]
    assert repr(pickle.loads(pickle.dumps(batch))) == repr(batch)
