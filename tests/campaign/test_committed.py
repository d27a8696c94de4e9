"""The campaigns that docs/campaign holds: they are what their settings say, and whole."""

import json
import re
from pathlib import Path

import pytest
from temposae.campaign.config import CampaignConfig, entries
from temposae.campaign.documented import RUNS
from temposae.engine.config import read_yaml

DOCS = Path(__file__).resolve().parents[2] / "docs" / "campaign"
COMMITTED = sorted(path.parent.name for path in DOCS.glob("*/campaign.yaml"))


@pytest.mark.parametrize("name", COMMITTED)
def test_results_are_those_of_the_settings_beside_them(name):
    config = CampaignConfig(**read_yaml(DOCS / name / "campaign.yaml"))
    found = json.loads((DOCS / name / "campaign.json").read_text())
    trained = {one["condition"]: one for one in (found["runs"] | found["baselines"]).values()}
    assert set(trained) == {one.condition for one in entries(config)}
    assert {one["run"] for one in found["runs"].values()} == set(config.runs)
    assert (found["seeds"], found["evals"], found["share"]) == (config.seeds, list(config.evals), config.share)
    for run, one in found["runs"].items():
        assert one["failed"] is None, run
        assert one["fvu_last"] < one["fvu_first"], run
        assert one["l0"] > 0, run
        assert all(len(scores["values"]) == config.seeds for scores in one["scores"].values())
        assert ("analysis" in one) == (one["trained_as"] is not None), run


@pytest.mark.parametrize("name", COMMITTED)
def test_the_report_names_every_run_and_shows_figures_that_are_there(name):
    text = (DOCS / name / "report.md").read_text()
    found = json.loads((DOCS / name / "campaign.json").read_text())
    for run, one in found["runs"].items():
        assert f"\n| {run} " in text
        assert one["beats_random"] or one["why_not"], run
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(figures) > 10
    for figure in figures:
        assert (DOCS / name / figure).stat().st_size > 5_000, figure


def test_two_of_them_have_all_runs():
    whole = [
        name for name in COMMITTED if set(CampaignConfig(**read_yaml(DOCS / name / "campaign.yaml")).runs) == set(RUNS)
    ]
    assert whole == ["relu", "topk"]
