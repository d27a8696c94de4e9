"""Budgets of hot kernels. test_aot.py holds them on the installed Triton, `bench.aot --budgets` on any other."""

import pytest
from temposae.bench.aot import SPECS
from temposae.bench.budgets import BUDGETS, Budget, over_budget


def test_every_hot_kernel_has_a_budget() -> None:
    hot = {name for name, spec in SPECS.items() if spec.hot and not name.endswith("fp32")}
    assert BUDGETS.keys() == hot


def test_what_is_over_its_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "merge", Budget(registers=128, instructions=1000, loop_instructions=900))
    within = dict(
        name="merge", arch=90, registers=128, instructions=1000, loop_instructions=900, spill_bytes=0, triton="9.9"
    )
    assert (
        over_budget([within, within | dict(arch=80, registers=255), within | dict(name="rescan bf16", registers=255)])
        == []
    )
    (fault,) = over_budget([within | dict(instructions=1001)])
    assert fault == "merge: 1001 instructions, over its budget of 1000 (Triton 9.9)"
    monkeypatch.setitem(BUDGETS, "merge", Budget(128, 1000, 900, registers_36=160))
    assert [over_budget([within | dict(registers=160, triton=version)]) for version in ("3.6.0", "3.7.1")] == [
        [], ["merge: 160 registers, over its budget of 128 (Triton 3.7.1)"],
    ]  # fmt: skip
    assert len(over_budget([within | dict(registers=129, loop_instructions=901, spill_bytes=8)])) == 3
