"""Names that become paths: those of settings and manifests that somebody else may have written lead nowhere else."""

import json
from pathlib import Path

import pytest
import yaml
from temposae.engine.config import RunConfig, SweepConfig
from temposae.engine.errors import UserError
from temposae.engine.storage.path_names import expand_path, file_name, folder_name
from temposae.engine.stream.cache import read_manifest
from temposae.engine.sweep import expand
from temposae.engine.train import train_together
from temposae.evals import features

from ..commandline import run

BAD = (
    "", ".", "..", "../victim", "../../victim", "/abs", "a/b", "a\\b", "summary.json", "config.yaml", "Config.YAML", "evals",
    "checkpoints", "Figures", "metrics.jsonl", "report.html", ".writing-a", ".hidden", "-k", "a.",
    "a\nb", "a" * 151, "é" * 100,
)  # fmt: skip
RUN = {"sae": {"d_in": 128, "d_sae": 64, "k": 4}, "train": {"tokens": 512, "batch": 256}}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_elsewhere_is_refused_wherever_it_is_given(name: str) -> None:
    for give in (
        lambda: folder_name(name),
        lambda: SweepConfig(**{"dictionaries": {name: RUN}}),
        lambda: expand({"dictionaries": [{"k": 2}, {"k": 4, "name": name}]}),
    ):
        with pytest.raises(ValueError, match=r"name: .* is not allowed; it must be valid as a folder's name"):
            give()


@pytest.mark.parametrize("name", ["k16_lr0.0003", "layer2-a+b", "5", "blocks.2.hook_resid_post", "größe"])
def test_an_ordinary_name_is_taken(name: str) -> None:
    assert folder_name(name) == file_name(name) == name


def test_names_that_are_one_folder_on_some_disks_are_refused() -> None:
    with pytest.raises(UserError, match=r"'Deep' and 'deep' are the same folder"):
        expand({"dictionaries": [{"name": "Deep"}, {"name": "deep"}]})
    with pytest.raises(UserError, match=r"'Deep' and 'deep' are the same folder"):
        SweepConfig(**{"dictionaries": {"Deep": RUN, "deep": RUN}})


def test_millions_of_combinations_are_refused_before_they_are_built() -> None:
    many = {key: list(range(1, 400)) for key in ("k", "seed", "aux_k", "tokens")}
    with pytest.raises(
        UserError, match=r"sweep: 25,344,958,401 dictionaries are not allowed; a stream has at most 1,000"
    ):
        expand({"sweep": many})


@pytest.mark.parametrize("name", ["../victim", "../../victim", "ABSOLUTE", "summary.json", ""])
def test_a_run_of_somebody_else_writes_and_deletes_nothing_outside(name: str, tmp_path: Path, stream_of) -> None:
    """A sweep's names in config.yaml lead to a folder that holds what a run would clear away."""
    victim = tmp_path / "victim"
    (victim / "checkpoints" / ".writing-old").mkdir(parents=True)
    (victim / "checkpoints" / ".writing-old" / "thesis.tex").write_text("years of work")
    (victim / "metrics.jsonl").write_text("mine\n")
    folder = tmp_path / "runs" / "other"
    folder.mkdir(parents=True)
    name = str(victim) if name == "ABSOLUTE" else name
    (folder / "config.yaml").write_text(yaml.safe_dump({"dictionaries": {name: RUN}}))
    before = files(tmp_path)
    code, _, said = run("train", "--resume", "--out", folder)
    assert code == 2
    assert said.startswith("error: dictionaries.name: ")
    assert said.count("\n") == 1
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="name: "):  # and from Python
        train_together(stream_of(), {name or "..": RunConfig(**RUN), "b": RunConfig(**RUN)}, out=tmp_path / "x")
    assert files(tmp_path) == before


@pytest.mark.parametrize("link", ["checkpoints", "metrics.jsonl", "a/checkpoints"])
def test_a_link_out_of_a_run_s_folder_is_not_followed_at_resume(link: str, tmp_path: Path, stream_of) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    (victim / "step_00000001").mkdir(parents=True)
    (victim / "step_00000001" / "thesis.tex").write_text("years of work")
    runs = {name: RunConfig(**RUN) for name in "ab"}
    train_together(stream_of(), runs, out=folder)
    place = folder / link
    if place.is_dir():
        place.rename(tmp_path / "moved")
    place.symlink_to(victim if link.endswith("checkpoints") else victim / "step_00000001" / "thesis.tex")
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"resume: .*{link} is a link to .*victim"):
        train_together(stream_of(), runs, out=folder, resume=True)
    assert files(tmp_path) == before


def test_a_shard_lies_beside_its_manifest(tmp_path: Path) -> None:
    shard = {
        "file": "../../victim",
        "tokens": 1,
        "kept": 1,
        "rows": 1,
        "bytes": 1,
        "header": 0,
        "ends": [1],
        "crc32": {},
        "place": {},
    }
    manifest = {
        "format": "temposae-cache/2", "stream": {}, "seed": 0, "hooks": {}, "dtype": "float32", "positions": 2,
        "special": [], "wanted": 1, "shard_mb": 1.0, "shards": [shard],
    }  # fmt: skip
    (tmp_path / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"cache.json is damaged \(file: '../../victim' is not allowed"):
        read_manifest(tmp_path)


def test_a_part_of_a_store_lies_in_it(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for part in ("../../victim.parquet", "/abs.parquet", "features/../../x", "features/a/b", 3):
        (tmp_path / "store.json").write_text(json.dumps({"format": features.FORMAT, "parts": [part]}))
        with pytest.raises(UserError, match=r"store.json is damaged \(file: .* must be the name of a file"):
            features.info(tmp_path)


def test_nobody_s_home_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: '~nouser/x' is not allowed; there is no user nouser"):
        expand_path("~nouser/x", "out")
    assert expand_path("~/x", "out") == Path.home() / "x"
