"""The table of ops in docs/variants.md is what training steps do."""

from pathlib import Path

import pytest
from temposae.bench.results import markdown
from temposae.campaign.documented import BASELINES, RUNS

from .ops import outside, used

DOCS = Path(__file__).resolve().parents[2] / "docs" / "variants.md"
#: runs that are a mask, weights or penalties, and so go through the engine's ops
ON_THE_OPS = ["A1", "A2", "A3", "A4", *(f"B{i}" for i in range(1, 7)), "C1", "C2", "C5", "C6", "E1", "E2", "E3"]


def table() -> list[str]:
    rows = [("run", "what", "ops with relu", "ops with topk", "outside of them")]
    for name, run in (BASELINES | RUNS).items():
        if run.trained_as is not None:
            rows.append((name, run.title, f"as {run.trained_as}", f"as {run.trained_as}", ""))
            continue
        ops = [", ".join(used(name, activation)) for activation in ("relu", "topk")]
        left = {what.partition(":")[0]: what for a in ("topk", "relu") for what in outside(name, a)}
        rows.append((name, run.title, *ops, "; ".join(left.values())))
    return markdown(rows)


def test_the_table_in_the_docs_is_what_a_step_does():
    written = DOCS.read_text()
    for line in table():
        assert line in written, f"docs/variants.md lacks this line:\n{line}"


@pytest.mark.parametrize("run", [run for run in ON_THE_OPS if run in RUNS])
def test_mask_weight_and_penalty_runs_go_through_the_ops(run):
    assert {"encode", "loss"} <= set(used(run, "relu"))
    found = set(used(run, "topk"))
    assert {"decode", "loss", "weight_grad"} <= found
    assert found & {"encode", "encode_sparse"}


def test_a_step_without_an_op_is_seen():
    """B8's norm needs pre-activations, which the encoder's kernel never writes."""
    assert "encode" not in used("B8", "relu")
    assert outside("B8", "relu") == ["encoder: layer_norm"]
    assert outside("A1", "topk") == []
