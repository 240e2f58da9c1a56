"""What a batch is padded to: close sizes by default, few of them, and always pairs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import jaxreg as jr
from jaxreg.batch.buckets import close_length, close_rows, coarse_length, coarse_rows


@given(st.integers(1, 100_000))
def test_a_size_holds_what_it_is_for_with_little_padding(n):
    for bucket, least, share in ((close_length, 8, 1 / 5), (close_rows, 8, 1 / 9)):
        size = bucket(n)
        assert n <= size == bucket(size)
        assert size % 2 == 0
        if n >= least:
            assert (size - n) / size < share
    assert n <= coarse_length(n) == coarse_length(coarse_length(n))
    assert n <= coarse_rows(n)
    assert coarse_rows(n) % 2 == 0


def test_how_many_programs_there_are():
    assert len({close_length(n) for n in range(1, 1025)}) == 29
    assert len({close_rows(n) for n in range(1, 65)}) == 24
    for power in range(4, 15):
        assert len({close_length(n) for n in range(2**power + 1, 2 ** (power + 1) + 1)}) == 4
    assert {close_rows(n) - n for n in range(1, 17)} == {0, 1}


def test_what_is_a_multiple_already_is_not_padded():
    batch = jr.TokenBatch.pack([{"x": np.ones(32)}] * 8)
    assert batch.shape == (8, 32)
    assert jr.TokenBatch.pack([{"x": np.ones(33)}] * 9).shape == (10, 40)
