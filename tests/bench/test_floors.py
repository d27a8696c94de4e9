"""Floors are arithmetic: they must be the published table's, and must move with every term."""

from dataclasses import replace

import pytest
import torch
from temposae.bench import floors
from temposae.bench.floors import KNOWN, Rates, card_named, op_floor, step_floors, step_work
from temposae.kernels import certified_topk
from temposae.kernels.cost import Cost

# ms of a step at N = 8192, D = 2304, K = 64, to the printed digit: dense, materialised, fused, fused with bf16 moments
TABLE = {
    ("H100", 16384): (6.8, 4.1, 3.8, 3.6),
    ("H100", 65536): (27.3, 10.1, 8.6, 7.8),
    ("H100", 131072): (54.7, 18.0, 15.0, 13.4),
    ("H200", 16384): (5.5, 3.4, 3.2, 3.0),
    ("H200", 65536): (22.2, 7.9, 6.9, 6.4),
    ("H200", 131072): (44.4, 14.0, 11.9, 10.8),
}


@pytest.mark.parametrize(("card", "f"), TABLE)
def test_floors_are_those_of_the_table(card: str, f: int) -> None:
    found = step_floors(8192, 2304, f, 64, KNOWN[card])
    assert [f"{value:.1f}" for value in found] == [f"{value:.1f}" for value in TABLE[card, f]]


def test_floor_of_a_step_small_enough_to_work_out_by_hand() -> None:
    rates = Rates("round numbers", {2: 1e12, 4: 5e11}, 1e9, 2e9, "a test")
    # P = 2DF = 40, G = 2NKD = 160 bytes, E = 2NDF = 800 FLOP = 8e-7 ms; bandwidths are 1e6 and 2e6 bytes a ms
    e, s = 8e-7, 160e-6 + 3 * 80e-6
    found = step_floors(20, 2, 10, 2, rates)
    assert found.dense == pytest.approx(6 * e + (34 * 40 + 8 * 200) * 1e-6)
    assert found.materialised == pytest.approx(e + 2 * 200e-6 + s + 38 * 40e-6)
    assert found.fused == pytest.approx(e + 200e-6 / 4 + s + 0.05 + 26 * 40e-6)
    assert found.fused_bf16_moments == pytest.approx(found.fused - 8 * 40e-6)
    # in float32 operands are twice as wide, products half as fast, and there is no shadow to write
    wide = step_floors(20, 2, 10, 2, rates, itemsize=4)
    narrow = step_floors(20, 2, 10, 2, replace(rates, candidate_flops=2 * rates.flops[4]), itemsize=4)
    assert narrow.dense == wide.dense
    saved = 1e3 * 20 * 2 * 10 / rates.flops[4]
    assert wide.fused - narrow.fused == pytest.approx(saved)
    assert wide.materialised - narrow.materialised == pytest.approx(saved)
    assert wide.fused == pytest.approx(2 * e + 200e-6 / 4 + 2 * s + 0.05 + 24 * 40e-6)
    assert wide.dense == pytest.approx(12 * e + (32 * 40 + 16 * 200) * 1e-6)


def test_work_of_a_step_is_what_its_floor_stands_for() -> None:
    rates = Rates("round numbers", {2: 1e12}, 1e9, 1e9, "a test")
    n, d, f, k = 1000, 10, 100, 2
    found = step_work(n, d, f, k, rates)
    assert found.flops == 2 * n * d * f + 4 * 2 * n * k * d  # one product, and four gathers' multiply-adds
    assert found.bytes == n * f / 4 + 4 * 2 * n * k * d + 26 * 2 * d * f
    assert found.floor_ms == step_floors(n, d, f, k, rates).fused
    # where half of all latents are active, six products of matrices take less time than the gathers
    half = step_work(n, d, f, f / 2, rates)
    assert half.flops == 6 * 2 * n * d * f
    assert half.bytes == 34 * 2 * d * f + 4 * 2 * n * f
    assert half.floor_ms == step_floors(n, d, f, f / 2, rates).dense < step_floors(n, d, f, f / 2, rates).fused
    assert step_work(n, d, f, 0, rates).floor_ms == step_floors(n, d, f, 0, rates).fused


def test_op_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    rates = Rates("round numbers", {2: 1e12}, 1e9, 1e9, "a test")
    assert op_floor(Cost(flops=4e9, bytes=1e6), rates, 2) == pytest.approx(4.0)
    assert op_floor(Cost(flops=4e9, bytes=7e6), rates, 2) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_only_the_cards_of_the_table_take_its_rates(name: str, card: str | None) -> None:
    assert card_named(name, KNOWN) == card


def test_an_unknown_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 128 MiB and a product of 2048-matrices that take 10 ms each."""
    monkeypatch.setattr(torch, "randn", torch.empty)  # nothing is computed here
    monkeypatch.setattr(floors, "samples", lambda call, device, repeats: [12.0, 10.0, 11.0])
    floors.copy_rate.cache_clear()
    floors.matmul_rate.cache_clear()
    try:
        for speedup in (0.0, 2.0):
            monkeypatch.setattr(certified_topk, "bfloat16_speedup", lambda speedup=speedup: speedup)
            found = floors.rates_of("cpu", 4)
            assert found.source == "measured here"
            assert found.flops == {4: pytest.approx(2 * 2048**3 / 0.010)}
            assert found.candidate_flops == (found.flops[4] if speedup else None)
            assert found.bytes_per_s == pytest.approx(2 * 2**27 / 0.010)
    finally:
        floors.copy_rate.cache_clear()
        floors.matmul_rate.cache_clear()
