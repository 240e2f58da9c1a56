"""Requests without an SDK: both forms are exact inverses, and bytes from strangers are safe."""

import contextlib
import json

import msgpack
import numpy as np
import pytest
from clients import make_data
from hypothesis import given
from hypothesis import strategies as st

import jaxreg as jr
from jaxreg.base import msgpack as _msgpack

payload = jr.client.payload
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def requests(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    k = draw(st.none() | st.integers(1, 3))
    data, gradients = [], []
    for n in lengths:
        size = n * (k or 1)
        shape = (n,) if k is None else (n, k)
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n))
        targets = draw(st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size))
        values = draw(st.lists(float32s, min_size=size, max_size=size))
        data.append(jr.client.Datum(ids, {"target_tokens": np.asarray(targets, np.int64).reshape(shape)}))
        gradients.append(np.asarray(values, np.float32).reshape(shape))
    seq_id = draw(st.none() | st.integers(0, 2**40))
    return payload.request(data, gradients, model_id=draw(st.text(max_size=20)), seq_id=seq_id), gradients


@given(requests())
def test_the_two_forms_are_exact_inverses(made):
    body, gradients = made
    data = payload.encode(body)
    assert payload.decode(data) == body
    assert payload.encode(payload.decode(data)) == data
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    sent = [d["loss_fn_inputs"]["weights"] for d in body["forward_backward_input"]["data"]]
    for tensor, gradient in zip(sent, gradients, strict=True):
        array = np.asarray(tensor["data"], np.float32).reshape(tensor["shape"])
        np.testing.assert_array_equal(array, -gradient)


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_is_a_request(data):
    try:
        decoded = payload.decode(data)
    except payload.DecodeError:
        return
    assert isinstance(decoded, dict)


@given(requests(), st.data())
def test_a_message_that_was_damaged_is_refused_or_read(made, data):
    message = bytearray(payload.encode(made[0]))
    at = data.draw(st.integers(0, len(message) - 1))
    if data.draw(st.booleans()):
        del message[at:]
    else:
        message[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(payload.DecodeError):
        assert isinstance(payload.decode(bytes(message)), dict)


def array_bytes(dtype="float32", shape=(2,), raw=b"\0" * 8):
    header = msgpack.packb([dtype, list(shape)])
    return msgpack.ExtType(1, len(header).to_bytes(2, "little") + header + raw)


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def inside(value):
    return {"forward_backward_input": {"x": value}}


HOSTILE = {
    "nested deeper": msgpack.packb(nested(40)),
    "no message of jaxreg's: .*": b"\x81" * 3000,  # nesting without an end
    "unknown extension type 7": msgpack.packb({"a": msgpack.ExtType(7, b"x")}),
    "dtype 'object'": msgpack.packb({"a": array_bytes("object")}),
    "dtype 'float64'": msgpack.packb({"a": array_bytes("float64", raw=b"\0" * 16)}),
    "array of shape": msgpack.packb({"a": array_bytes(shape=(1 << 40,))}),
    "array of shape .*-1": msgpack.packb({"a": array_bytes(shape=(-1,))}),
    "broken header": msgpack.packb({"a": msgpack.ExtType(1, b"\x09\0abc")}),
    "without a header": msgpack.packb({"a": msgpack.ExtType(1, b"")}),
    "a request is a dict": msgpack.packb([1, 2]),
    "tensor with .* not finite": msgpack.packb(inside(array_bytes(raw=np.float32([np.nan, 1]).tobytes()))),
    "a number that is not finite": msgpack.packb(inside(float("inf"))),
    "more than 1048576 items": msgpack.packb({"a": [[{}] * 60000] * 20}),
    "with 'forward_backward_input'": msgpack.packb({}),
    "token ids": msgpack.packb({"forward_backward_input": {"tokens": array_bytes()}}),
    "Timestamp": msgpack.packb({"a": msgpack.Timestamp(1)}),
    "type bytes|exceeds": msgpack.packb({"a": b"raw"}),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_bytes_are_refused(message):
    with pytest.raises(payload.DecodeError, match=message):
        payload.decode(HOSTILE[message])


def test_a_header_that_promises_much_takes_no_memory():
    import tracemalloc

    promises = (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\x00\x00\xff\xff" * 30,
    )
    tracemalloc.start()
    for promise in promises:
        with pytest.raises(payload.DecodeError):
            payload.decode(promise)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_size_is_bounded():
    body = payload.encode({"forward_backward_input": {}})
    with pytest.raises(payload.DecodeError, match="max_bytes"):
        payload.decode(body, max_bytes=2)
    with pytest.raises(TypeError, match="takes bytes"):
        payload.decode("text")


def test_what_cannot_be_sent_is_named():
    data = make_data(lengths=(2, 3))
    good = [np.zeros(2), np.zeros(3)]
    with pytest.raises(ValueError, match="1 gradients for 2 datums"):
        payload.request(data, good[:1], model_id="m")
    with pytest.raises(ValueError, match=r"datum 1: the gradient has shape \(2,\)"):
        payload.request(data, [good[0], good[0]], model_id="m")
    with pytest.raises(ValueError, match="datum 0: the gradient is not finite"):
        payload.request(data, [np.array([0, np.nan]), good[1]], model_id="m")
    with pytest.raises(TypeError, match="datum 0: model_input"):
        payload.request([jr.client.Datum("text", data[0].loss_fn_inputs)], good[:1], model_id="m")
    with pytest.raises(ValueError, match="does not hold"):
        payload.encode(inside({"data": [0.1], "dtype": "float32", "shape": [1]}))
    with pytest.raises(TypeError, match="value of type set"):
        payload.encode(inside({1}))
    with pytest.raises(ValueError, match="is nan, which JSON does not have"):
        payload.encode(inside(float("nan")))
    with pytest.raises(ValueError, match="a request is a dict with 'forward_backward_input'"):
        payload.encode({"a": 1})


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
arrays = st.sampled_from(_msgpack.DTYPES).flatmap(
    lambda dtype: st.lists(st.integers(0, 1), max_size=6).map(lambda v: np.asarray(v, dtype))
)


@given(
    st.recursive(
        plain | arrays, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c, max_size=3)
    )
)
def test_trees_of_arrays_come_back_as_they_were(tree):
    def same(a, b):
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(tree, _msgpack.decode(_msgpack.encode(tree)))
