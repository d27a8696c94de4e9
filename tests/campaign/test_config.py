"""What a campaign's settings stand for: which dictionaries, in which conditions, on which stream."""

import pytest
from temposae.campaign.config import CampaignConfig, entries, fitting_share
from temposae.campaign.documented import RUNS
from temposae.campaign.documented.strictness import strict
from temposae.engine.errors import UserError


def made(**settings):
    given = {"runs": ["A1"], "baselines": ["topk"], **settings}
    return {one.name: one for one in entries(CampaignConfig(**given))}


def test_all_runs_unless_told():
    every = CampaignConfig()
    assert every.runs == tuple(RUNS)
    assert CampaignConfig(runs="all").runs == tuple(RUNS)
    names = {one.name for one in entries(every)}
    assert names == {"relu", "topk", "batchtopk", "slices", "random_slices"} | {
        name for name, run in RUNS.items() if run.trained_as is None
    }


def test_analyses_are_trained_once_as_their_parent():
    assert list(made(runs=["C3", "C2", "C4"])) == ["topk", "C2"]


def test_seeds_are_dictionaries_of_their_own():
    found = made(seeds=3)
    assert list(found) == [f"{run}-s{seed}" for run in ("topk", "A1") for seed in range(3)]
    assert [one.sections["train"]["seed"] for one in found.values()] == [0, 1, 2] * 2
    assert {one.label for one in found.values()} == {"topk", "A1"}


def test_axes_are_conditions_that_all_are_trained_in():
    found = made(axes={"d_sae": [64, 128], "activation": ["relu", "topk"]}, sae={"k": 8})
    assert len(found) == 6  # the baseline topk is there with topk only
    one = found["A1-d_sae128_topk"]
    assert (one.condition, one.run) == ("d_sae128_topk", "A1")
    assert one.sections["sae"] | {"mask": None} == {
        "d_sae": 128, "activation": "topk", "l1_coefficient": 0.04, "mask": None, "k": 8
    }  # fmt: skip
    assert found["A1-d_sae64_relu"].sections["sae"]["activation"] == "relu"
    assert "topk-d_sae64_relu" not in found


def test_runs_that_differ_in_a_rate_or_coefficient_keep_the_ratio():
    found = made(runs=["A2", "A3", "B3", "B4"], train={"lr": 1e-3}, sae={"l1_coefficient": 0.4})
    assert [found[run].sections["train"]["lr"] for run in ("A2", "B3", "B4")] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert [found[run].sections["sae"]["l1_coefficient"] for run in ("A2", "A3")] == pytest.approx([0.4, 2.0])
    assert made(runs=["B4"])["B4"].sections["train"]["lr"] == pytest.approx(3e-5)
    assert made(runs=["B4"], train={"lr": "1e-3"})["B4"].sections["train"]["lr"] == pytest.approx(
        1e-4
    )  # YAML has strings
    assert made(runs=["B4"], train={"lr": "fast"})["B4"].sections["train"]["lr"] == "fast"


def test_baselines_that_are_an_activation_keep_it():
    found = made(baselines=["relu", "topk", "slices"], sae={"activation": "batchtopk"})
    assert {name: one.sections["sae"]["activation"] for name, one in found.items()} == {
        "relu": "relu", "topk": "topk", "slices": "batchtopk", "A1": "batchtopk"
    }  # fmt: skip


def test_settings_for_all_win_over_the_logs_and_reach_only_what_has_them():
    found = made(train={"lr": 1e-3, "target_l0": 32}, stream={"layer": 2})
    assert found["A1"].sections["train"]["lr"] == 1e-3
    assert found["A1"].sections["train"]["target_l0"] == 32
    assert "target_l0" not in found["topk"].sections["train"]
    assert found["topk"].sections["stream"]["layer"] == 2


def test_masks_are_as_long_as_the_rows():
    found = made(runs=["A1", "A5"], stream={"context": 64})
    assert found["A1"].sections["sae"]["mask"]["positions"] == 64
    assert found["A5"].sections["sae"]["mask"] == {"kind": "ranges", "ranges": 64, "positions": 64}
    assert found["A5"].sections["stream"]["context"] == 64


def test_strictness_of_masks_is_an_axis():
    found = made(axes={"strictness": ["hard", "soft", "annealed"]})
    assert list(found) == ["topk", "A1-hard", "A1-soft", "A1-annealed"]
    masks = [one.sections["sae"].get("mask") for one in found.values()]
    assert masks == [
        None,
        {"kind": "random", "fraction": 0.5, "positions": 128},
        {"kind": "soft", "fraction": 0.5, "start": "random", "positions": 128},
        {
            "kind": "soft", "fraction": 0.5, "start": "random", "positions": 128,
            "temperature": 5.0, "temperature_end": 0.1,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "how", "expected"),
    [
        ({"kind": "gaussian", "blend": True}, "hard", {"kind": "windows", "blend": True}),
        ({"kind": "gaussian"}, "soft", {"kind": "gaussian"}),
        ({"kind": "soft"}, "hard", {"kind": "random"}),
        ({"kind": "soft", "temperature": 5.0, "temperature_end": 0.1}, "soft", {"kind": "soft"}),
        ({"kind": "ranges", "ranges": 8}, "hard", {"kind": "ranges", "ranges": 8}),
        ({}, "hard", None),
    ],
)
def test_what_a_mask_becomes(mask, how, expected):
    assert strict(mask, how) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": ["A1", "B11"]}, "runs: 'B11' is not allowed; did you mean B1"),
        ({"baselines": ["A1"]}, "baselines: 'A1' is not allowed"),
        ({"evals": ["sparse"]}, "evals: 'sparse' is not allowed; did you mean sparse_probing"),
        ({"axes": {"strictness": ["firm"]}}, "axes.strictness: 'firm' is not allowed; there are hard, soft, annealed"),
        ({"axes": {"kk": [1]}}, "sweep.kk: not a setting that may differ"),
        ({"seeds": 0}, "seeds: 0 is not allowed"),
        ({"run": ["A1"]}, "run: no such setting; did you mean runs"),
    ],
)
def test_what_can_t_be_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        made(**settings)


@pytest.mark.parametrize(("tokens", "share"), [(1, 16), (512, 16), (8192, 8), (20_000, 3), (65_536, 1), (10**9, 1)])
def test_small_runs_are_measured_on_less_text(tokens, share):
    assert fitting_share(tokens) == share
