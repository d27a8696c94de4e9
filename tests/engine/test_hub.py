"""Dictionaries on a hub that is a folder: no test here reaches the network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from temposae import load, save
from temposae.engine import interchange
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.interchange import hub
from temposae.engine.sae import SparseAutoencoder

from ..commandline import run
from ..layouts import LLAMASCOPIUM


class Folder:
    """`HfApi` and `snapshot_download` of repositories that are folders below `root`."""

    def __init__(self, root: Path):
        self.root, self.asked, self.made = root, [], []

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        self.asked.append((repo, revision))
        if not (self.root / repo).is_dir():
            raise OSError(f"404: no {repo}\nRequest ID: x")
        return [str(p.relative_to(self.root / repo)) for p in (self.root / repo).rglob("*") if p.is_file()]

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        from huggingface_hub.utils import filter_repo_objects

        copy = self.root.parent / "cache" / repo
        for file in filter_repo_objects(self.list_repo_files(repo, revision), allow_patterns=allow_patterns):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repo / file, copy / file)
        return str(copy)

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.append((repo, private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, path_in_repo: str | None) -> str:
        shutil.copytree(folder_path, self.root / repo_id / (path_in_repo or ""), dirs_exist_ok=True)
        return f"https://hub/{repo_id}"


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Folder:
    found = Folder(tmp_path / "remote")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def made() -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3), seed=1)


def test_a_dictionary_is_loaded_by_name_from_its_folder_alone(remote, tmp_path):
    repo = remote.root / "lab" / "saes"
    save(made(), repo / "layer_3" / "[a]")
    interchange.write(made(), repo / "layer_4", "saelens")
    (repo / "layer_3" / "big.bin").write_bytes(b"0" * 100)
    assert torch.equal(load("lab/saes/layer_3/[a]").W_dec, made().W_dec)
    assert not (tmp_path / "cache" / "lab" / "saes" / "layer_3" / "big.bin").exists()
    assert not (tmp_path / "cache" / "lab" / "saes" / "layer_4").exists()
    assert torch.equal(load("lab/saes/layer_4@v1.0").W_dec, made().W_dec)
    assert ("lab/saes", "v1.0") in remote.asked


def test_a_folder_without_one_names_those_that_have(remote):
    for layer in range(7):
        save(made(), remote.root / "lab" / "saes" / f"layer_{layer}")
    message = (
        "lab/saes is not a dictionary's folder on the hub; there are layer_0, layer_1, layer_2, layer_3, layer_4, ..."
    )
    with pytest.raises(UserError, match=message):
        load("lab/saes")
    with pytest.raises(
        UserError, match=r"lab/other is not a local folder and can't be downloaded \(404: no lab/other\)"
    ):
        load("lab/other")


def test_a_slip_of_the_pen_does_not_ask_the_hub(remote, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in ("runs/demo", "nothing", str(tmp_path / "a" / "b"), "a b/c"):
        with pytest.raises(UserError, match="does not exist; give a run folder or a checkpoint folder"):
            load(path)
    assert remote.asked == []


LOADS = {
    "saelens": 'SAE.from_pretrained("lab/new", "layer_2")',
    "sparsify": 'SparseCoder.load_from_hub("lab/new", hookpoint="layer_2")',
}


@pytest.mark.parametrize("to", ["temposae", "saelens", "dictionary_learning", "sparsify"])
def test_what_is_uploaded_comes_back_with_a_card(remote, tmp_path, to):
    save(made(), tmp_path / "mine")
    (tmp_path / "mine" / "evals").mkdir()
    scores = {"explained_variance": 0.9123, "l0": 3.0, "controls": {"random": {"explained_variance": 0.5}}}
    (tmp_path / "mine" / "evals" / "core.json").write_text(json.dumps(scores))
    code, out, _ = run("upload", tmp_path / "mine", "lab/new/layer_2", "--to", to, "--private")
    assert (code, out.strip()) == (0, "https://hub/lab/new")
    assert remote.made == [("lab/new", True)]
    assert torch.equal(load("lab/new/layer_2").W_dec, made().W_dec)
    card = (remote.root / "lab" / "new" / "layer_2" / "README.md").read_text()
    assert card.startswith(f'---\nlibrary_name: "{to}"\n')
    assert "| explained variance | 0.9123 | 0.5000 |" in card
    assert "| d_sae (F) | 20 |" in card
    assert 'temposae.load("lab/new/layer_2")' in card
    assert "None" not in card
    assert "tokens" not in card  # nobody said how many
    if to in LOADS:
        assert LOADS[to] in card


def test_names_that_cannot_be_are_refused(remote, tmp_path):
    save(made(), tmp_path / "mine")
    for name in ("new", "lab/new@main", "/lab/new"):
        code, _, err = run("upload", tmp_path / "mine", name)
        assert code == 2
        assert f"to: {name!r} is not allowed; it must be OWNER/REPOSITORY" in err
    assert remote.made == []


def test_what_may_be_a_name():
    assert all(map(hub.is_name, ("a/b", "a/b/c/d@x", "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")))
    assert not any(map(hub.is_name, ("a", "/a/b", "../a", "~/a", "a b/c")))


def test_a_file_on_the_hub_stands_for_its_folder(remote):
    repo = remote.root / "lab" / "saes"
    interchange.write(made(), repo / "layer_4", "saelens")
    LLAMASCOPIUM["2024"].write(repo / "first")
    assert torch.equal(load("lab/saes/layer_4/sae_weights.safetensors").W_dec, made().W_dec)
    assert load("lab/saes/first").cfg.activation == "relu"
