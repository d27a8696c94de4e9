"""Every setting is described at its field, and `temposae config` says so and checks files."""

import re
from pathlib import Path

import pytest
import yaml
from temposae.campaign.config import CampaignConfig
from temposae.cli.config import settings_page
from temposae.engine.config import Config, Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, SweepConfig
from temposae.engine.config.explain import SECTIONS, explain
from temposae.engine.errors import UserError
from temposae.engine.parts import PartSettings
from temposae.engine.registry import installed, is_own
from temposae.engine.stream.cache import Manifest, Shard
from temposae.engine.sweep import as_file, expand, resolve_without_model

from .commandline import run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
FILE_CONTENTS = {Manifest, Shard}  # of a cache: nobody writes them by hand


def settings_classes() -> set[type[Config]]:
    explained = {cls for classes in SECTIONS.values() for cls in classes} | {CampaignConfig, PartSettings}
    return explained | {cls.Settings for cls in installed().values() if is_own(cls)}


def test_no_class_of_settings_is_forgotten() -> None:
    classes = {cls for cls in Config.__subclasses__() if cls.__module__.startswith("temposae.")}
    assert classes - FILE_CONTENTS <= settings_classes()


@pytest.mark.parametrize("cls", sorted(settings_classes(), key=str), ids=lambda cls: cls.__qualname__)
def test_every_field_is_described(cls: type[Config]) -> None:
    for name, field in cls.model_fields.items():
        description = field.description or ""
        assert description.strip(), f"{cls.__qualname__}.{name} has no description"
        assert 1 <= len(re.findall(r"\.(?:\s|$)", description)) <= 3, (
            f"{cls.__qualname__}.{name}: one to three sentences"
        )
        assert description.endswith("."), f"{cls.__qualname__}.{name}"
        if not field.is_required() and field.get_default() is None:
            assert "Null" in description or "null" in description, f"{cls.__qualname__}.{name}: what does null mean?"


def test_the_page_is_what_the_classes_say() -> None:
    assert PAGE.read_text() == settings_page(), "run: temposae config --explain --markdown > docs/settings.md"
    assert run("config", "--explain", "--markdown").out == settings_page()


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("train.lr", ["train.lr: number above 0 and at most 10 or null; default null", "    Peak learning rate."]),
        ("sae.mask.kind", ["sae.mask.kind: none, random, ranges, windows, soft, or gaussian; default none"]),
        ("sae.mask", ["sae.mask: Weights over positions: ", "  positions: integer from 1 to 2^20; default 128"]),
        ("stream.layer", ["stream.layer: integer at least -2^31 and below 2^31 or null; default null"]),
        ("stream.max_norm", ["stream.max_norm: number above 1 and at most 10^9, auto, or null; default auto"]),
        ("sae.d_in", ["sae.d_in: integer at least 1 and below 2^31; required"]),
        ("sae.prefixes", ["sae.prefixes: list of integers at least 1 and below 2^31 or null; default null"]),
        ("campaign.seeds", ["campaign.seeds: integer from 1 to 1000; default 1"]),
        ("campaign.runs", ["campaign.runs: list of text; default [A1, A2, ..., E9]"]),
        ("layer_norm", ["layer_norm: Layer norm over a token's latents", "  place: acts or pre; default acts"]),
        ("layer_norm.place", ["layer_norm.place: acts or pre; default acts"]),
        ("dilated_conv.dilations", ["dilated_conv.dilations: list of integers from 1 to 10^15; default [1, 2, 4]"]),
    ],
)  # fmt: skip
def test_a_setting_a_section_or_a_part_is_explained(name: str, lines: list[str]) -> None:
    code, out, err = run("config", "--explain", name)
    assert (code, err) == (0, "")
    for line in lines:
        assert any(shown.startswith(line) for shown in out.splitlines()), out


def test_without_a_name_everything_is_explained() -> None:
    out = run("config", "--explain").out
    for name in (*SECTIONS, "campaign", "layer_norm", "pruning"):
        assert re.search(rf"^{re.escape(name)}: ", out, re.M), name
    assert max(map(len, out.splitlines())) < 140


def test_a_plugin_s_part_is_explained(tmp_path: Path) -> None:
    code = (
        "import temposae as ts\nfrom pydantic import Field\n\n\n"
        "class Settings(ts.PartSettings):\n"
        "    pull: float = Field(default=0.1, ge=0, description='Strength of the pull.')\n    bare: int = 1\n\n\n"
        "@ts.part('explained_gain')\nclass Gain(ts.Part):\n"
        '    """Scale latents. And more."""\n\n    Settings = Settings\n'
    )
    (tmp_path / "gain.py").write_text(code)
    out = run("config", "--explain", "explained_gain", "--plugin", tmp_path / "gain.py").out
    assert out == (
        "explained_gain: Scale latents.\n  pull: number at least 0; default 0.1\n      Strength of the pull.\n"
        "  bare: integer; default 1\n"
    )


def write(folder: Path, settings: object) -> Path:
    (folder / "c.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "c.yaml"


SMALL = {"stream": {"context": 32, "layer": 1}, "sae": {"k": 4, "parts": [{"kind": "feature_dropout"}]}}


def test_a_file_is_printed_with_all_defaults_and_again_the_same(tmp_path: Path) -> None:
    code, out, err = run("config", write(tmp_path, SMALL))
    assert (code, err) == (0, "")
    resolved = yaml.safe_load(out)
    assert list(resolved) == ["stream", "sae", "train", "eval", "plugins"]
    assert resolved["sae"].keys() == SAEConfig.model_fields.keys() - {"d_in", "d_sae", "d_out"}
    assert resolved["stream"].keys() == StreamConfig.model_fields.keys() - {"rows_per_forward"} | {"layer"}
    assert resolved["stream"]["layer"] == 1
    assert resolved["sae"]["mask"] == MaskConfig(positions=32).model_dump()
    assert resolved["sae"]["parts"] == [{"kind": "feature_dropout", "p": 0.2}]
    (tmp_path / "again.yaml").write_text(out)
    assert run("config", tmp_path / "again.yaml").out == out


def test_what_is_given_stays_and_several_are_named(tmp_path: Path) -> None:
    given = {"sae": {"d_in": 8, "d_sae": 64, "k": 4}, "stream": {"rows_per_forward": 8}, "sweep": {"k": [2, 4]}}
    printed = yaml.safe_load(run("config", write(tmp_path, given)).out)
    assert printed["dictionaries"] == [{"name": "k2", "k": 2}, {"name": "k4", "k": 4}]
    assert printed["sae"]["d_sae"] == 64
    runs = {name: RunConfig(**values) for name, values in expand(printed).items()}
    folder_settings = SweepConfig(dictionaries=runs).model_dump(mode="json")  # config.yaml of a sweep's folder
    out = run("config", write(tmp_path, folder_settings)).out
    assert {name: RunConfig(**values) for name, values in expand(yaml.safe_load(out)).items()} == runs


SWEEPS = {
    "a grid": {"sweep": {"k": [2, 4], "lr": [0.001, 0.002], "mask.kind": ["none", "ranges"]}},
    "layers and hooks": {
        "stream": {"context": 32},
        "dictionaries": [{"layer": 2}, {"hook": "blocks.0.hook_resid_post", "d_sae": 64}, {"k": 8}],
    },
    "parts": {
        "sweep": {"k": [2, 4]},
        "dictionaries": [{"name": "a", "parts": [{"kind": "layer_norm"}]}, {"name": "b"}],
    },
    "one of a list": {"dictionaries": [{"name": "only", "seed": 3}]},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_printed_sweep_is_the_same_sweep(name: str, tmp_path: Path) -> None:
    code, out, err = run("config", write(tmp_path, SWEEPS[name]))
    assert (code, err) == (0, "")
    assert resolve_without_model(expand(yaml.safe_load(out))) == resolve_without_model(expand(SWEEPS[name]))
    (tmp_path / "again.yaml").write_text(out)
    assert run("config", tmp_path / "again.yaml").out == out


def test_a_printed_sweep_trains(tmp_path: Path) -> None:
    small = {"sae": {"d_sae": 64}, "train": {"tokens": 512, "batch": 256, "control": False}, "sweep": {"k": [2, 4]}}
    (tmp_path / "printed.yaml").write_text(
        run("config", write(tmp_path, small | {"eval": {"after_training": False}})).out
    )
    code, _, err = run("train", tmp_path / "printed.yaml", "--out", tmp_path / "out")
    assert code == 0, err
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/metrics.jsonl")) == ["k2", "k4"]


def test_dictionaries_of_different_streams_are_no_sweep() -> None:
    runs = {name: RunConfig(sae={"d_in": 8, "d_sae": 64}, stream={"context": n}) for name, n in (("a", 32), ("b", 64))}
    with pytest.raises(UserError, match="dictionaries: stream differs"):
        as_file({name: run.model_dump(mode="json") for name, run in runs.items()})


def test_a_campaign_is_checked_with_its_runs(tmp_path: Path) -> None:
    out = run("config", write(tmp_path, {"runs": ["A2"], "seeds": 2})).out
    assert yaml.safe_load(out)["baselines"] == list(CampaignConfig().baselines)
    code, out, err = run("config", write(tmp_path, {"runs": ["A2"], "sae": {"l1_coefficient": -1}}))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "sae.l1_coefficient: -" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config"], "error: FILE: missing; give a file to check, or --explain"),
        (["config", "--markdown"], "error: --markdown: not allowed here"),
        (["config", "--explain", "train.lrr"], "error: 'train.lrr': no such setting, section or part; did you mean train.l"),
        (["config", "nowhere.yaml"], "error: config: nowhere.yaml can't be read"),
        (["config", {"train": {"lr": -1}}], "error: train.lr: -1 is not allowed; it must be a number above 0"),
        (["config", {"train": {"lrr": 1}}], "error: train.lrr: no such setting; did you mean lr"),
        (["config", {"sae": {"parts": [{"kind": "layer_nrm"}]}}], "error: sae.parts: 'layer_nrm' is not known; did you"),
        (["config", {"trian": {}}], "error: trian: no such setting; did you mean train"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: list, message: str, tmp_path: Path) -> None:
    code, out, err = run(*(write(tmp_path, word) if isinstance(word, dict) else word for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


def test_words_for_types_come_from_the_classes() -> None:
    assert explain("stream", Layer, Layer).settings[0].name == "layer"
    assert explain("sae.mask", MaskConfig, MaskConfig).settings[0].default == "none"
