"""How many rows are looked at follows from the run and from what a token costs in the model, and can be set."""

from types import SimpleNamespace

import pytest
from temposae.engine.config import EvalConfig, RunConfig, SAEConfig
from temposae.engine.errors import UserError
from temposae.evals import row_budget
from temposae.evals.row_budget import Cost, row_costs, row_counts

LATENTS = [4608, 4608, 576]


@pytest.fixture
def smollm2(monkeypatch):
    """A stream over a model of SmolLM2-135M's shape, at layer 15 of 30."""
    layer, head = 3_540_096, 49152 * 576
    monkeypatch.setattr(Cost, "of", classmethod(lambda cls, model: cls(16 * layer, 14 * layer + head)))
    return SimpleNamespace(model=SimpleNamespace(name="smollm2", d_model=576), positions=128)


@pytest.mark.parametrize("tokens", [100_000, 300_000, 1_000_000])
def test_evaluation_costs_at_most_a_quarter_of_the_run(smollm2, tokens):
    sizes = row_counts(smollm2, EvalConfig(), tokens, LATENTS)
    row, ce_row = row_costs(Cost.of(smollm2.model), smollm2, LATENTS)
    assert sizes.rows * row + sizes.ce_rows * ce_row <= tokens * Cost.of(smollm2.model).before / 4
    assert sizes.rows >= row_budget.FEWEST
    assert sizes.ce_rows >= row_budget.FEWEST_CE


def test_a_long_run_has_all_rows_and_a_short_one_the_fewest(smollm2):
    assert row_counts(smollm2, EvalConfig(), 10**8, LATENTS) == row_budget.Sizes(256, 96, 10**8 // 512)
    assert row_counts(smollm2, EvalConfig(), 1000, LATENTS) == row_budget.Sizes(32, 6, 128)


def test_what_is_set_wins(smollm2):
    assert row_counts(smollm2, EvalConfig(rows=40, ce_rows=3), 1000, LATENTS).of("core") == [40, 3]
    assert row_counts(smollm2, EvalConfig(rows=5), 1000, LATENTS).of("core") == [5, 5]


def test_the_embedded_model_has_all_rows(stream_of):
    assert row_counts(stream_of(), EvalConfig(), 1000, [64]) == row_budget.Sizes(256, 96, None)


def test_cost_is_that_of_the_parameters_that_a_token_meets(testbed):
    layers = [sum(p.numel() for p in block.parameters()) for block in testbed.bridge.blocks]
    head = 128 * testbed.bridge.cfg.d_vocab
    testbed.use(layers=[1])
    assert Cost.of(testbed) == Cost(sum(layers[:2]), sum(layers[2:]) + head)
    testbed.use(hooks=["blocks.1.hook_mlp_out"])  # its layer runs again with something else there
    assert Cost.of(testbed) == Cost(sum(layers[:2]), sum(layers[1:]) + head)
    testbed.use()


def test_settings_are_checked():
    sae = SAEConfig(d_in=8, d_sae=8, k=2)
    assert RunConfig(sae=sae, eval={"rows": 64}).eval.rows == 64
    with pytest.raises(UserError, match=r"eval\.rows: 0 is not allowed"):
        RunConfig(sae=sae, eval={"rows": 0})
    with pytest.raises(UserError, match=r"eval\.row: no such setting; did you mean rows"):
        RunConfig(sae=sae, eval={"row": 1})
