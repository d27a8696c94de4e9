"""Clocks and counters, on calls whose time and memory are known."""

import time

import pytest
import torch
from temposae.bench import timing


def test_quantiles_are_those_of_the_samples() -> None:
    found = timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert found == pytest.approx((2.0, 3.5, 5.0, 6))
    with pytest.raises(ValueError, match="no samples"):
        timing.quantiles([])


def test_a_sample_is_milliseconds_a_call() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.05)

    assert 50 <= timing.sample(call, "cpu", inner=3) < 140
    assert len(calls) == 3
    assert timing.inner_calls(call, "cpu", least_ms=0.1) == 1
    assert timing.inner_calls(lambda: None, "cpu", least_ms=1000) == 100


def test_samples_warm_up_first_and_stop_in_time() -> None:
    calls = []
    assert len(timing.samples(lambda: calls.append(1), "cpu", repeats=4, inner=2, warm=3)) == 4
    assert len(calls) == 3 + 4 * 2
    assert len(timing.samples(lambda: time.sleep(0.02), "cpu", repeats=100, warm=0, seconds=0.05)) < 10
    assert len(timing.samples(lambda: None, "cpu", repeats=5, seconds=0)) == 1


def test_memory_is_the_most_that_was_held_at_a_time() -> None:
    megabyte = 2**18  # floats

    def call() -> torch.Tensor:
        a = torch.ones(3 * megabyte)
        b = a + 1  # 6 held
        del a
        c = torch.ones(2 * megabyte)  # 5 held
        del b
        return c

    kept, found = timing.memory(call, "cpu")
    assert found.peak == pytest.approx(6 * 2**20, rel=0.01)
    assert found.held == pytest.approx(2 * 2**20, rel=0.01)
    assert kept.sum() == 2 * megabyte
