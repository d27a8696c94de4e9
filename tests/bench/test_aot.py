"""The order of the compile report."""

import pytest
from temposae.bench import aot


def test_rows_come_by_op_and_then_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_measure", lambda spec, arch: {})
    names = [name for name, spec in aot.SPECS.items() if spec.since <= 80][:3]
    rows = [(row["name"], row["arch"]) for row in aot.report([90, 80], names[::-1])]
    assert rows == [(name, arch) for name in names for arch in (80, 90)]


def test_variants_of_an_op_stand_together() -> None:
    ops = [spec.kernel.partition(".")[0] for spec in aot.SPECS.values()]
    assert len(set(ops)) == sum(op != before for op, before in zip(ops, ["", *ops], strict=False))
