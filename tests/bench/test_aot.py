"""The order of the compile report."""

import pytest
from temposae.bench import aot, sass


def test_rows_come_by_op_and_then_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = aot.Compiled(32, 0, 0, 4, sass.Code({}, []), 0, "9.9")
    monkeypatch.setattr(aot, "compiled", lambda name, arch: kernel)
    names = [name for name, spec in aot.SPECS.items() if spec.since <= 80][:3]
    rows = [(row["name"], row["arch"]) for row in aot.report([90, 80], names[::-1])]
    assert rows == [(name, arch) for name in names for arch in (80, 90)]


def test_variants_of_an_op_stand_together() -> None:
    ops = [spec.kernel.partition(".")[0] for spec in aot.SPECS.values()]
    assert len(set(ops)) == sum(op != before for op, before in zip(ops, ["", *ops], strict=False))
