"""A small campaign, from its settings to its results: trained on one stream, measured, resumed, and one of it failing."""

import json
import re
from importlib import import_module

import pytest
import torch
from temposae.campaign.config import CampaignConfig, entries
from temposae.campaign.results import read_results
from temposae.campaign.run_campaign import _references, campaign
from temposae.engine.errors import Stopped, UserError
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import HELD_OUT, read_metrics
from temposae.engine.storage.sealed import write_json
from temposae.variants.loss_weights import AdaptiveWeights

from ..commandline import run

SMALL = {
    "runs": ["A1", "C6", "C7", "D1"],
    "baselines": ["relu"],
    "seeds": 2,
    "sae": {"d_sae": 64, "activation": "topk", "k": 8},
    "train": {"tokens": 8192, "batch": 512, "lr": 4e-3, "held_out_rows": 4},
    "stream": {"buffer_tokens": 4096},
    "evals": ["core", "sparse_probing"],
    "share": 8,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("campaign") / "out"
    return out, campaign(CampaignConfig(**SMALL), out)


def test_every_run_is_trained_to_the_end_and_measured(made):
    out, found = made
    assert found == read_results(out)
    assert list(found["runs"]) == ["A1", "C6", "C7", "D1"]
    assert list(found["baselines"]) == ["relu"]
    for one in (found["runs"] | found["baselines"]).values():
        assert one["steps"] == -(-8192 // 512)
        assert one["fvu_last"] < one["fvu_first"]
        assert one["l0"] > 0 if one["activation"] == "relu" else one["l0"] == pytest.approx(8, abs=0.2)
        assert 0 <= one["dead_fraction"] < 0.9
        assert one["explained_variance"] > one["scores"]["explained_variance"]["random"]["mean"]
        assert one["failed"] is None
        for scores in one["scores"].values():
            assert len(scores["values"]) == 2
        assert one["scores"]["explained_variance"]["spread"] > 0
    assert found["runs"]["C7"]["trained_as"] == "C6"
    assert found["runs"]["C7"]["scores"] == found["runs"]["C6"]["scores"]
    assert found["runs"]["A1"]["trained_as"] is None
    assert "analysis" not in found["runs"]["C6"]
    evolution = found["runs"]["C7"]["analysis"]
    assert len(evolution["correlation"]["values"]) == 2
    assert 0 < evolution["least"]["mean"] < 1 < evolution["most"]["mean"]


def test_scores_are_those_that_the_runs_hold(made):
    out, found = made
    for nth, name in enumerate(found["runs"]["D1"]["folders"]):
        result = json.loads((out / name / "evals" / "core.json").read_text())
        scores = found["runs"]["D1"]["scores"]["explained_variance"]
        assert scores["values"][nth] == result["explained_variance"]
        assert scores["random"]["values"][nth] == result["controls"]["random"]["explained_variance"]
        lines = read_metrics(out / name, name=HELD_OUT)
        assert lines[0]["step"] == 0
        assert found["runs"]["D1"]["scores"]["fvu_first"]["values"][nth] == lines[0]["fvu"]
        assert found["runs"]["D1"]["scores"]["fvu_last"]["values"][nth] == lines[-1]["fvu"]


def test_beating_the_control_is_by_both_scores(made):
    _, found = made
    for one in found["runs"].values():
        means = {key: (one["scores"][key]["mean"], one["scores"][key]["random"]["mean"])
                 for key in ("explained_variance", "probing")}  # fmt: skip
        assert one["beats_random"] == all(own > other for own, other in means.values())
        assert (one["why_not"] is None) == one["beats_random"]


def test_all_see_the_same_whole_rows(made):
    out, _ = made
    for name in ("A1-s0", "D1-s1"):
        assert checkpoint.find(out / "runs" / name).run.stream.mode == "sequences"
    tokens = {name: read_metrics(out / "runs" / name)[-1]["tokens"] for name in ("relu-s0", "A1-s0", "D1-s1")}
    assert len(set(tokens.values())) == 1


@pytest.mark.slow
def test_an_interrupted_campaign_goes_on(made, tmp_path, monkeypatch):
    """Stopped while it trains and while it measures; in the end its weights are those of one that never stopped."""
    out, config = tmp_path / "out", CampaignConfig(**SMALL)
    after, stopped = AdaptiveWeights.after, []

    def stops(self, seen):
        after(self, seen)
        if seen.step == 9 and not stopped:
            stopped.append(True)
            raise Stopped(15, "now")

    monkeypatch.setattr(AdaptiveWeights, "after", stops)
    with pytest.raises(Stopped):
        campaign(config, out)
    with pytest.raises(UserError, match="resume: the settings differ"):
        campaign(CampaignConfig(**{**SMALL, "seeds": 1}), out, resume=True)
    with pytest.raises(UserError, match="exists and is not empty"):
        campaign(config, out)
    from temposae.campaign import run_campaign as module

    evaluate, measured = module.evaluate, []

    def counted(*args, **kwargs):
        measured.append(args[2].name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        campaign(config, out, resume=True)
    monkeypatch.setattr(module, "evaluate", evaluate)
    found = campaign(config, out, resume=True)
    for one in ("C6-s0", "D1-s1"):
        own, other = (checkpoint.find(place / "runs" / one).tensors("sae") for place in (out, made[0]))
        assert all(torch.equal(own[name], other[name]) for name in other)
    assert {name: one["explained_variance"] for name, one in found["runs"].items()} == {
        name: one["explained_variance"] for name, one in made[1]["runs"].items()
    }
    again = campaign(config, out, resume=True)  # nothing is left to do, and what it took is not forgotten
    assert again["runs"] == found["runs"]
    assert all(again["seconds"][what] >= took for what, took in found["seconds"].items())


def test_settings_that_are_refused_leave_no_folder(tmp_path):
    changes = {"stream": {"context": 16}, "sae": {"mask": {"kind": "windows", "positions": 64}}}
    config = CampaignConfig(runs=("A1",), baselines=(), **changes)
    with pytest.raises(UserError, match=r"mask\.positions: 64 is not allowed; rows have 16 positions"):
        campaign(config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(self, seen):
        raise RuntimeError("no weights today")

    monkeypatch.setattr(AdaptiveWeights, "weigh", fails)
    settings = {**SMALL, "seeds": 1, "runs": ["A1", "C6", "C7"], "evals": ["core"]}
    found = campaign(CampaignConfig(**settings), tmp_path / "out")
    assert found["runs"]["C6"]["failed"] == {"C6": "step 1: RuntimeError: no weights today"}
    assert "no weights today" in found["runs"]["C7"]["why_not"]
    assert found["runs"]["C6"]["beats_random"] is None
    assert found["runs"]["A1"]["explained_variance"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "run: give one, as in temposae run A2; --list shows them all"),
        (["run", "A11"], "run: 'A11' is not allowed; did you mean A1"),
        (["campaign", "--runs", "A1,Z9"], "runs: 'Z9' is not allowed"),
        (["campaign", "--resume"], "resume: give --out FOLDER, the folder of the run or campaign"),
        (["plot", "nowhere"], "nowhere has no campaign.yaml"),
        (["run", "A6", "--d-sae", "100"], "groups: 8 is not allowed; it must divide d_sae (100)"),
        (["run", "A1", "--activation", "jumprelu", "--target-l0", "0"], "train.target_l0: 0"),
    ],
)
def test_a_wrong_word_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_conditions_have_names_of_their_own():
    config = CampaignConfig(runs=["A1", "C3"], baselines=["relu"], axes={"d_sae": [64, 128]}, seeds=2)
    assert [one.name for one in entries(config)][:4] == [
        "relu-d_sae64-s0", "relu-d_sae64-s1", "relu-d_sae128-s0", "relu-d_sae128-s1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "baselines"),
    [(["A2"], ["relu"]), (["A2", "--activation", "topk"], ["topk"]), (["batchtopk"], ["batchtopk"])],
)
def test_a_run_stands_beside_the_plain_dictionary_of_its_activation(arguments, baselines, monkeypatch):
    cli = import_module("temposae.cli.campaign")  # temposae.cli has the command under that name
    given = []
    monkeypatch.setattr(cli, "_campaign", lambda name, settings, *others: given.append(settings))
    assert run("run", *arguments).code == 0
    assert given[0]["baselines"] == baselines


def test_an_analysis_alone_has_a_line_in_the_table(made, capsys):
    from temposae.cli.output import campaign_table

    _, found = made
    alone = {**found, "runs": {"C7": found["runs"]["C7"]}}
    campaign_table(alone)
    assert "C7" in capsys.readouterr().out.split("C7, weight evolution, in C6:\n")[0]
    campaign_table(found)
    shown = capsys.readouterr().out
    assert re.search(r"C7, weight evolution, in C6:\nleast weight at the end +[\d.]+ ± [\d.]+\n", shown)
    assert "│ C7" not in shown


def test_a_run_is_compared_with_the_plain_dictionary_of_its_seed_and_that_with_the_next(made):
    out, _ = made
    planned = entries(CampaignConfig(**SMALL | {"baselines": ["relu", "topk"]}))
    plain = [entry.name for entry in planned if entry.run == "topk"]
    for name in plain:
        if not (out / "runs" / name).exists():
            (out / "runs" / name).symlink_to(out / "runs" / planned[0].name)
    for entry in (entry for entry in planned if entry.run in ("A1", "topk")):
        reference, same_recipe = _references(entry, planned, out / "runs")
        assert reference is not None
        assert same_recipe is not None
        assert [found.of_run.name for found in (reference, same_recipe)] == [plain[entry.seed], plain[1 - entry.seed]]
    lone = [entry for entry in planned if entry.seed == 0]
    assert _references(lone[-1], lone, out / "runs")[1] is None
    assert _references(planned[-1], planned[:1], out / "runs") == (None, None)


def test_results_of_an_earlier_version_are_refused(made, tmp_path):
    _, found = made
    write_json(tmp_path / "campaign.json", found | {"format": "temposae-campaign/1"})
    with pytest.raises(UserError, match=r"has format 'temposae-campaign/1'; this version reads temposae-campaign/2"):
        read_results(tmp_path)
