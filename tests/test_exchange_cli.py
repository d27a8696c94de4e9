"""`temposae convert`: layouts by command, and mistakes in one line."""

import torch
from temposae import SAEConfig, SparseAutoencoder, load, save
from temposae.engine.config import MaskConfig

from .commandline import run


def test_there_and_back(tmp_path):
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3, activation="batchtopk", aux_k=5), seed=1)
    save(sae, tmp_path / "mine")
    code, out, err = run("convert", tmp_path / "mine", tmp_path / "theirs", "--to", "saelens")
    assert code == 0
    assert (
        err == f"note: {tmp_path / 'mine'} does not say where it was trained, so neither does {tmp_path / 'theirs'}\n"
    )
    assert out.strip() == f"{tmp_path / 'theirs'}: batchtopk, D = 6, F = 20, in the format of saelens"
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "temposae.safetensors"
    }  # fmt: skip
    assert run("convert", tmp_path / "theirs", tmp_path / "back", "--to", "temposae").code == 0
    found = load(tmp_path / "back")
    assert found.cfg == sae.cfg
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), sae.state_dict().values(), strict=True))


def test_mistakes_are_one_line(tmp_path):
    save(SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3)), tmp_path / "mine")
    mask = MaskConfig(kind="windows", positions=8)
    save(SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3, mask=mask)), tmp_path / "masked")
    (tmp_path / "there").mkdir()
    cases = [
        (("mine", "new", "--to", "sealens"), "to: sealens is not allowed; it must be saelens, dictionary_learning"),
        (
            ("masked", "new", "--to", "saelens"),
            "mask.kind: windows is not allowed; only temposae's own format has masks",
        ),
        (("mine", "new", "--to", "gemma-scope"), "activation: topk is not allowed here"),
        (("mine", "there", "--to", "saelens"), "already exists; nothing is overwritten"),
        (("mine", "there", "--to", "temposae"), "already exists; nothing is overwritten"),
        (("none", "new", "--to", "saelens"), "none does not exist; give a run folder"),
        (("mine", "new", "--to", "saelens", "--dictionary", "random"), "has no 'random'; it has sae"),
    ]
    for (source, out, *others), message in cases:
        code, _, err = run("convert", tmp_path / source, tmp_path / out, *others)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
