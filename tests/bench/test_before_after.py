"""Other libraries' training scripts before and after: that the diffs are small, apply and make the steps faster."""

import json
import re
from pathlib import Path

import pytest
from temposae.bench import before_after
from temposae.bench.before_after import FOLDER, LIBRARIES, patched, scripts
from temposae.bench.data import Shape
from temposae.engine.errors import UserError

from ..peers import library

RESULTS = sorted((FOLDER.parent / "results" / "peers").glob("*.json"))


@pytest.mark.parametrize("name", LIBRARIES)
def test_five_lines_at_most_change(name):
    before, after = scripts(name)
    changed = [line for line in (FOLDER / f"train_{name}.diff").read_text().splitlines() if line[:1] in "+-"][2:]
    assert 0 < len(changed) <= 5
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert [line.strip() for line in added] == ["from temposae import accelerate", "accelerate(trainer)"]
    assert "temposae" not in before


def test_a_diff_of_another_source_is_refused():
    diff = "--- a\n+++ b\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"
    assert patched("one\ntwo\nthree\n", diff) == "one\n2\nthree\n"
    with pytest.raises(ValueError, match="not there once: 'one.ntwo.n'"):
        patched("one\nthree\n", diff)


def test_unknown_libraries_are_named():
    with pytest.raises(UserError, match="library: 'saelense' is not allowed; there are saelens, "):
        before_after.measure([Shape(64, 8, 32, 2)], ["saelense"], device="cpu", steps=5, rounds=1)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_what_was_measured_is_never_slower(path: Path):
    found = json.loads(path.read_text())
    assert {case["library"] for case in found["peers"]} == set(LIBRARIES)
    for case in found["peers"]:
        assert case["times_faster"] == pytest.approx(case["before_ms"] / case["after_ms"])
        assert case["times_faster"] >= 0.95, case


def test_the_document_shows_what_was_measured():
    root = FOLDER.parents[1]
    text = (root / "docs" / "exchange.md").read_text()
    shown = re.findall(r"<!-- temposae bench peers (\S+) -->\n(.*?)\n*<!-- end of table -->", text, re.DOTALL)
    assert [root / name for name, _ in shown] == RESULTS
    for name, block in shown:
        assert block.strip() == before_after.table(json.loads((root / name).read_text())).strip()


@pytest.mark.slow
def test_scripts_run_before_and_after(tmp_path):
    for module in LIBRARIES.values():
        library(module)
    found = before_after.measure([Shape(256, 128, 1024, 8)], list(LIBRARIES), device="cpu", steps=8, rounds=1)
    assert [case["library"] for case in found["peers"]] == list(LIBRARIES)
    assert not found["left_out"]
    assert all(line in before_after.table(found) for line in ("| saelens ", "x faster"))
