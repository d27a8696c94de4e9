"""Runs: loss falls, the same seed gives the same run, a stop costs nothing, nothing is lost or overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors import safe_open
from temposae.engine.config import MaskConfig, SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.storage.checkpoint import load, save
from temposae.engine.storage.files import UNFINISHED
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.train import train

from ..stepping import stopped_after

SAE = SAEConfig(d_in=128, d_sae=96, k=4, aux_k=8)
SETTINGS = TrainConfig(tokens=12_000, batch=256, log_every_steps=5, checkpoint_every_steps=12, dead_after_tokens=2000)


def timeless(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in metrics]


@pytest.fixture
def whole(stream_of, tmp_path):
    """An uninterrupted run and its folder."""
    return train(stream_of(), SAE, SETTINGS, out=tmp_path / "whole"), tmp_path / "whole"


def test_a_run_learns_and_fills_its_folder(whole):
    run, folder = whole
    fvu = [line["fvu"] for line in run.metrics]
    assert fvu[-1] < 0.5 * fvu[0]
    assert fvu[-1] < run.metrics[-1]["random"]["fvu"]
    assert run.metrics[-1]["l0"] == pytest.approx(4, abs=0.1)
    assert timeless(read_metrics(folder)) == timeless(run.metrics)
    assert [line["step"] for line in run.metrics] == [*range(5, 47, 5), 47]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["stream"]["hook"] == "blocks.1.hook_resid_post"
    assert settings["sae"]["d_sae"] == 96
    assert [p.name for p in checkpoint.all_in(folder)] == ["step_00000036", "step_00000047"]
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(load(folder), name), getattr(run.sae, name))


def test_the_control_has_the_decoder_it_began_with(whole):
    run, folder = whole
    control = checkpoint.find(folder).dictionary("random")
    fresh = SparseAutoencoder(SAE, seed=SETTINGS.seed)
    assert control.cfg.decoder == "random"
    assert torch.equal(control.W_dec, fresh.W_dec)
    assert not torch.equal(control.W_enc, fresh.W_enc)
    assert not torch.equal(control.b_enc, fresh.b_enc)
    assert not torch.equal(control.b_dec, fresh.b_dec)
    assert not torch.equal(run.sae.W_dec, fresh.W_dec)


def test_the_dictionary_is_in_units_of_the_activations(whole, stream_of):
    run, _ = whole
    batch = stream_of(seed=5).next(2000)
    x = batch.x.float()
    error = (x - run.sae(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
    assert error == pytest.approx(run.metrics[-1]["fvu"], rel=0.2)


def test_the_same_seed_gives_the_same_run(whole, stream_of):
    run, _ = whole
    again = train(stream_of(), SAE, SETTINGS)
    assert timeless(again.metrics) == timeless(run.metrics)
    other = train(stream_of(seed=1), SAE, SETTINGS.model_copy(update={"seed": 1}))
    assert timeless(other.metrics) != timeless(run.metrics)


def stop_and_resume(stream_of, sae, settings, folder, steps):
    """A run that was interrupted after so many steps, and went on."""
    with stopped_after(steps):
        train(stream_of(), sae, settings, out=folder)
    return train(stream_of(), sae, settings, out=folder, resume=True)


@pytest.mark.parametrize("steps", [3, 12, 24, 40], ids="stopped_at_{}".format)
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(whole, stream_of, tmp_path, monkeypatch, steps):
    run, folder = whole
    resumed = stop_and_resume(stream_of, SAE, SETTINGS, tmp_path / "half", steps)
    for name, value in run.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
    for name in ("sae", "random", "state"):
        expected, found = (checkpoint.find(f).tensors(name) for f in (folder, tmp_path / "half"))
        assert all(torch.equal(expected[key], found[key]) for key in expected | found)
    assert timeless(read_metrics(tmp_path / "half")) == timeless(read_metrics(folder))


def test_a_resumed_run_tidies_what_a_kill_left(whole, stream_of, tmp_path):
    """Killed behind its last checkpoint, before the older ones were removed, or while it wrote one."""
    folder = tmp_path / "killed"
    shutil.copytree(whole[1], folder)
    kept = checkpoint.all_in(folder)
    shutil.copytree(kept[0], checkpoint.place(folder, 1))
    (folder / "checkpoints" / f"{UNFINISHED}x").mkdir()
    train(stream_of(), SAE, SETTINGS, out=folder, resume=True)
    assert sorted((folder / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_survive_a_stop(stream_of, tmp_path, monkeypatch, activation):
    sae, settings = SAE.model_copy(update={"activation": activation}), SETTINGS.model_copy(update={"control": False})
    expected = train(stream_of(), sae, settings).sae
    stop_and_resume(stream_of, sae, settings, tmp_path / "half", 30)
    found = load(tmp_path / "half")
    assert (expected.threshold > 0).all()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize(("moments", "dtypes"), [("bfloat16", ("BF16", "BF16")), ("8bit", ("I8", "U8"))])
def test_narrow_moments_survive_a_stop(stream_of, tmp_path, monkeypatch, moments, dtypes):
    settings = SETTINGS.model_copy(update={"moments": moments, "tokens": 8000})
    train(stream_of(), SAE, settings, out=tmp_path / "whole")
    stop_and_resume(stream_of, SAE, settings, tmp_path / "half", 17)
    for name in ("sae", "random", "state"):
        expected, found = (checkpoint.find(tmp_path / folder).tensors(name) for folder in ("whole", "half"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    with safe_open(checkpoint.find(tmp_path / "half").folder / "state.safetensors", "pt") as file:
        for name in ("sae.adam.W_enc", "sae.adam.W_dec", "random.adam.W_enc"):
            keys = (f"{name}.exp_avg", f"{name}.exp_avg_sq")
            assert tuple(file.get_slice(key).get_dtype() for key in keys) == dtypes
            assert all(file.get_tensor(key).any() for key in keys)
    with pytest.raises(UserError, match=f"resume: train.moments is float32, and {moments} in .*config.yaml"):
        train(stream_of(), SAE, settings.model_copy(update={"moments": "float32"}), out=tmp_path / "half", resume=True)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        pytest.param(activation, kind, marks=[pytest.mark.slow] * (kind != "none" and activation not in first))
        for kind, first in {"none": (), "random": ("topk",), "ranges": ("relu",), "soft": ("jumprelu", "topk"),
                            "gaussian": ("batchtopk",)}.items()
        for activation in ("topk", "batchtopk", "jumprelu", "relu")
    ],
)  # fmt: skip
def test_every_activation_and_mask_learns(stream_of, activation, kind):
    sae = SAE.model_copy(update={"activation": activation, "mask": MaskConfig(kind=kind)})
    run = train(stream_of(), sae, SETTINGS.model_copy(update={"control": False}))
    assert run.metrics[-1]["fvu"] < 0.8 * run.metrics[0]["fvu"]
    assert run.metrics[-1]["l0"] > 0
    if kind in ("random", "ranges"):  # nothing fires where the mask is off
        batch = stream_of(seed=3).next(500)
        f = run.sae.encode(batch.x.float(), batch.pos)
        assert (f[~run.sae.mask.weights()[batch.pos.long()]] == 0).all()
    if kind == "soft":
        fresh = SparseAutoencoder(sae, seed=SETTINGS.seed)
        assert not torch.equal(run.sae.mask.logits, fresh.mask.logits)


def test_a_run_that_diverges_is_stopped_and_named(stream_of, tmp_path):
    with pytest.raises(UserError, match=r"train.lr: 1e\+30 made .*try a smaller one"):
        train(stream_of(), SAE, SETTINGS.model_copy(update={"lr": 1e30, "clip_norm": None}), out=tmp_path / "run")


def test_what_does_not_fit_is_refused_before_any_work(stream_of, tmp_path):
    stream = stream_of()
    for sae, settings, message in (
        (SAE.model_copy(update={"d_in": 64}), SETTINGS, "sae.d_in: 64 is not allowed.* width 128"),
        (SAE, SETTINGS.model_copy(update={"batch": 4096}), "train.batch: 4096 is not allowed"),
        (
            SAE.model_copy(update={"mask": MaskConfig(kind="soft", positions=64, beyond="error")}),
            SETTINGS,
            "mask.positions: 64 is not allowed; it must be at least 128",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(stream, sae, settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert stream.counts["rows"] == 0


def test_nothing_is_overwritten(whole, stream_of, tmp_path):
    run, folder = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="out: .* exists and is not empty"):
        train(stream_of(), SAE, SETTINGS, out=folder)
    with pytest.raises(UserError, match=r"resume: train.tokens is 13000, and \d+ in .*config.yaml"):
        train(stream_of(), SAE, SETTINGS.model_copy(update={"tokens": 13_000}), out=folder, resume=True)
    with pytest.raises(UserError, match="already exists; nothing is overwritten"):
        save(run.sae, checkpoint.all_in(folder)[0])
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "every"), [("sae.safetensors", 97), ("checkpoint.json", 1)])
def test_a_checkpoint_cut_at_any_byte_is_named(tmp_path, name, every):
    save(SparseAutoencoder(SAEConfig(d_in=3, d_sae=5, k=2)), tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = path.read_bytes().rstrip()
    for keep in range(0, len(content), every):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match=f"{name}.*damaged"):
            load(tmp_path / "saved")


def test_a_flipped_byte_is_named(tmp_path):
    save(SparseAutoencoder(SAE), tmp_path / "saved")
    path = tmp_path / "saved" / "sae.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged; its contents are not what was written"):
        load(tmp_path / "saved")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="can't be written .*No space left.* unchanged"):
        save(SparseAutoencoder(SAE), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_saving_and_loading_changes_no_bit(tmp_path):
    sae = SparseAutoencoder(SAE.model_copy(update={"mask": MaskConfig(kind="soft")}), seed=4)
    save(sae, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.cfg == sae.cfg
    assert again.W_enc.T.is_contiguous()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in sae.state_dict().items())


@pytest.mark.slow
def test_kill_9_and_resume_by_command(tmp_path):
    """The command line, killed without warning after its first checkpoint, resumes to the weights of a whole run."""
    config = tmp_path / "config.yaml"
    settings = {
        "train": {"tokens": 60_000, "batch": 256, "checkpoint_every_steps": 40},
        "stream": {"buffer_tokens": 8192},
    }
    config.write_text(yaml.safe_dump(settings | {"sae": {"d_sae": 128, "k": 8}}))
    command = [sys.executable, "-m", "temposae", "train"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, config, "--out", tmp_path / "whole"], env=environment, check=True)
    process = subprocess.Popen([*command, config, "--out", tmp_path / "killed"], env=environment)
    while not checkpoint.all_in(tmp_path / "killed") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, "--resume", "--out", tmp_path / "killed"], env=environment, check=True)
    whole, killed = (checkpoint.find(tmp_path / name).tensors("sae") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    figures = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert figures[0]["explained_variance"] == figures[1]["explained_variance"]
