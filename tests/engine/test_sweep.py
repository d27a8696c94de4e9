"""Sweeps: what a file of settings stands for, and what is wrong with it, said by name."""

import pytest
from temposae.engine.errors import UserError
from temposae.engine.sweep import expand, resolve

SMALL = {"stream": {"context": 32}, "sae": {"d_sae": 64, "k": 4}, "train": {"tokens": 4096}}


def test_a_grid_is_every_combination():
    found = expand({**SMALL, "sweep": {"k": [2, 4], "lr": [0.001, 0.0003], "activation": ["topk"]}})
    assert list(found) == ["k2_lr0.001_topk", "k2_lr0.0003_topk", "k4_lr0.001_topk", "k4_lr0.0003_topk"]
    assert found["k2_lr0.0003_topk"] == {
        "stream": {"context": 32},
        "sae": {"d_sae": 64, "k": 2, "activation": "topk"},
        "train": {"tokens": 4096, "lr": 0.0003},
    }
    assert SMALL["sae"] == {"d_sae": 64, "k": 4}  # untouched


def test_a_list_is_taken_one_by_one_and_in_every_combination_of_a_grid():
    listed = [{"k": 2}, {"name": "deep", "layer": 2, "mask.kind": "ranges", "prefixes": [8, 64]}]
    found = expand({**SMALL, "dictionaries": listed})
    assert list(found) == ["k2", "deep"]
    assert found["deep"]["stream"] == {"context": 32, "layer": 2}
    assert found["deep"]["sae"] == {"d_sae": 64, "k": 4, "mask": {"kind": "ranges"}, "prefixes": [8, 64]}
    assert found["k2"]["sae"] == {"d_sae": 64, "k": 2}
    both = expand({**SMALL, "dictionaries": listed, "sweep": {"seed": [0, 1]}})
    assert list(both) == ["k2_seed0", "k2_seed1", "deep_seed0", "deep_seed1"]
    assert expand(SMALL) == {"": SMALL}


def test_models_say_what_the_settings_leave_open():
    model, runs = resolve(expand({"sae": {"k": 8}, "sweep": {"layer": [0, 2]}}))
    assert model.hooks == ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    assert {name: run.stream.hook for name, run in runs.items()} == dict(
        zip(("layer0", "layer2"), model.hooks, strict=True)
    )
    assert {(run.sae.d_in, run.sae.d_sae, run.sae.k) for run in runs.values()} == {(128, 1024, 8)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sweep": 3}, ("sweep: 3", "section")),
        ({"sweep": {"k": 3}}, ("sweep.k: 3", "[3]")),
        ({"sweep": {"k": []}}, ("sweep.k: []", "list")),
        ({"sweep": {"kk": [1]}}, ("sweep.kk", "did you mean", "k")),
        ({"sweep": {"batch": [1]}}, ("sweep.batch", "all dictionaries of a stream must share it")),
        ({"sweep": {"context": [1]}}, ("sweep.context", "not a setting that may differ")),
        ({"dictionaries": {"a": 1}}, ("dictionaries", "list of sections")),
        ({"dictionaries": []}, ("dictionaries: []", "list of sections")),
        ({"dictionaries": [{"k": 2}, {"k": 2}]}, ("dictionaries: 'k2' comes twice",)),
        ({"dictionaries": [{"k": 2}], "sweep": {"k": [2]}}, ("dictionaries: k", "one of the two")),
        ({"dictionaries": [{"name": "../up"}]}, ("dictionaries.name: '../up'", "folder")),
        ({"dictionaries": [{"name": "checkpoints"}]}, ("dictionaries.name: 'checkpoints'",)),
        ({"sweep": {"k": [2]}, "sae": 4}, ("sae: 4", "section")),
    ],
)  # fmt: skip
def test_a_sweep_that_makes_no_sense_is_named(settings, words):
    with pytest.raises(UserError) as error:
        expand({**SMALL, **settings})
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sweep": {"k": [2, 65]}}, ("k65: sae.k: 65", "at most d_sae (64)")),
        ({"sweep": {"lr": [0.1, -1]}}, ("lr-1: train.lr: -1", "a number above 0")),
        ({"sweep": {"layer": [1, 9]}}, ("layer9: layer: 9", "0 to 3")),
        ({"sweep": {"hook": ["blocks.1.hook_out_of_this_world"]}}, ("hook", "out_of_this_world", "did you mean")),
    ],
)
def test_a_dictionary_that_makes_no_sense_is_named(settings, words):
    with pytest.raises(UserError) as error:
        resolve(expand({**SMALL, **settings}))
    assert [word for word in words if word not in str(error.value)] == []
