"""Dictionaries in the layouts of other libraries: what they compute, by these libraries' formulas in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.train import train

from ..commandline import run

D, F, K = 12, 40, 5
HOOK = "blocks.2.hook_resid_post"
NORMS = {HOOK: 9.0, "blocks.2.hook_mlp_out": 5.0}  # mean |x|


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * len(shape) + sum(shape) + seed))


X = 3 * drawn(64, D)
W_ENC, W_DEC, B_ENC, B_DEC = drawn(D, F), drawn(F, D), 0.3 * drawn(F), drawn(D, seed=1)
THRESHOLD = 2 * drawn(F, seed=2).abs()


def saelens(folder: Path, architecture: str, *, threshold: torch.Tensor | None = None, **changes: Any) -> Path:
    folder.mkdir()
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": True, **changes}
    cfg["metadata"] = {"model_name": "testbed", "hook_name": HOOK}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    save_file(tensors | ({} if threshold is None else {"threshold": threshold}), folder / "sae_weights.safetensors")
    return folder


def dictionary_learning(folder: Path, dict_class: str, tensors: dict[str, Any]) -> Path:
    folder.mkdir()
    place = {"lm_name": "testbed", "layer": 2, "submodule_name": "resid_post_layer_2"}
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, "k": K, **place}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


def linear(bias: str = "b_dec", **others: torch.Tensor) -> dict[str, torch.Tensor]:
    names = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, bias: B_DEC}
    return {name: tensor.contiguous() for name, tensor in names.items()} | others


def sparsify(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    cfg = {"activation": "topk", "num_latents": F, "k": K, "transcode": False, "skip_connection": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    return folder


def gemma_scope(folder: Path) -> Path:
    place = folder / "gemma-scope-2b-pt-res" / "layer_2" / "width_40"
    place.mkdir(parents=True)
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    np.savez(place / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return place


def llamascopium(folder: Path, act_fn: str, **changes: Any) -> Path:
    folder.mkdir()
    cfg = {
        "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": act_fn, "top_k": K, "hook_point_in": HOOK,
        "hook_point_out": HOOK, "use_decoder_bias": True, "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(cfg | changes))
    tensors = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
    tensors |= {"activation_function.log_jumprelu_threshold": THRESHOLD.log()} if act_fn == "jumprelu" else {}
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in NORMS.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def pre(*, minus_b_dec: bool = True) -> torch.Tensor:
    return (X.double() - minus_b_dec * B_DEC.double()) @ W_ENC.double() + B_ENC.double()


def top(acts: torch.Tensor) -> torch.Tensor:
    kept = acts.relu().topk(K, dim=1)
    return torch.zeros_like(acts).scatter_(1, kept.indices, kept.values)


def above(acts: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    return acts.relu() * (acts > threshold)


CASES = {
    "saelens standard": (lambda f: saelens(f, "standard"), lambda: pre().relu()),
    "saelens without b_dec": (
        lambda f: saelens(f, "standard", apply_b_dec_to_input=False), lambda: pre(minus_b_dec=False).relu()
    ),
    "saelens topk": (lambda f: saelens(f, "topk"), lambda: top(pre())),
    "saelens jumprelu": (
        lambda f: saelens(f, "jumprelu", threshold=THRESHOLD, apply_b_dec_to_input=False),
        lambda: above(pre(minus_b_dec=False), THRESHOLD.double()),
    ),
    "dictionary_learning topk": (
        lambda f: dictionary_learning(f, "AutoEncoderTopK", linear(k=torch.tensor(K), threshold=torch.tensor(-1.0))),
        lambda: top(pre()),
    ),
    "dictionary_learning batchtopk": (
        lambda f: dictionary_learning(f, "BatchTopKSAE", linear(k=torch.tensor(K), threshold=torch.tensor(4.0))),
        lambda: above(pre(), 4.0),
    ),
    "dictionary_learning jumprelu": (
        lambda f: dictionary_learning(
            f, "JumpReluAutoEncoder",
            {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD},
        ),
        lambda: above(pre(minus_b_dec=False), THRESHOLD.double()),
    ),
    "sparsify": (sparsify, lambda: top(pre())),
    "sparsify transcoder": (lambda f: sparsify(f, transcode=True), lambda: top(pre(minus_b_dec=False))),
    "gemma-scope": (gemma_scope, lambda: above(pre(minus_b_dec=False), THRESHOLD.double())),
    "llamascopium": (lambda f: llamascopium(f, "relu"), lambda: pre(minus_b_dec=False).relu()),
    "llamascopium jumprelu": (
        lambda f: llamascopium(f, "jumprelu"), lambda: above(pre(minus_b_dec=False), THRESHOLD.double())
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_computes_what_its_library_does(tmp_path, case):
    write, expected = CASES[case]
    found = checkpoint.find(write(tmp_path / "other"))
    assert isinstance(found, checkpoint.Loaded)
    sae, f = found.dictionary(), expected()
    assert (f > 0).any(1).all()
    assert (sae.encode(X).double() - f).abs().max() < 1e-4
    assert (sae(X).double() - (f @ W_DEC.double() + B_DEC.double())).abs().max() < 1e-3
    assert (sae.W_dec == W_DEC).all()
    if case.startswith(("sparsify", "llamascopium")):
        assert found.run is None
        assert found.where == ({"hook": HOOK} if case.startswith("llamascopium") else {})
    else:
        model = "google/gemma-2-2b" if case == "gemma-scope" else "testbed"
        assert found.run is not None
        assert (found.run.stream.model, found.run.stream.hook) == (model, HOOK)
        assert found.tokens is None


def test_the_k_beside_the_weights_is_the_one_that_counts(tmp_path):
    """As the library's own loader has it; training may have come down from another."""
    tensors = linear(k=torch.tensor(K - 1), threshold=torch.tensor(-1.0))
    sae = checkpoint.find(dictionary_learning(tmp_path / "other", "AutoEncoderTopK", tensors)).dictionary()
    assert sae.cfg.k == K - 1


def test_rows_of_norm_one_with_latents_that_count_the_norm(tmp_path):
    sae = checkpoint.find(saelens(tmp_path / "other", "topk", rescale_acts_by_decoder_norm=True)).dictionary()
    norm = W_DEC.double().norm(dim=1)
    f = top(pre() * norm)
    assert (sae.encode(X).double() - f).abs().max() < 1e-3
    assert (sae(X).double() - ((f / norm) @ W_DEC.double() + B_DEC.double())).abs().max() < 1e-3
    assert sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("counts_norm", [False, True])
@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
def test_llamascopium_with_activations_that_were_scaled(tmp_path, act_fn, counts_norm):
    """What it computes by its own formulas: x scaled to norm sqrt(D), and back to the other hook's norm."""
    target = "blocks.2.hook_mlp_out"
    changes = {
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": counts_norm,
        "hook_point_out": target,
    }
    sae = checkpoint.find(llamascopium(tmp_path / "other", act_fn, **changes)).dictionary()
    inside, outside = D**0.5 / NORMS[HOOK], D**0.5 / NORMS[target]
    norm = W_DEC.double().norm(dim=1) if counts_norm else torch.ones(F, dtype=torch.float64)
    acts = ((X.double() * inside) @ W_ENC.double() + B_ENC.double()) * norm
    f = {"relu": acts.relu(), "topk": top(acts), "jumprelu": above(acts, THRESHOLD.double())}[act_fn] / norm
    x_hat = (f @ W_DEC.double() + B_DEC.double()) / outside
    assert (f > 0).any(1).all()
    assert (sae(X).double() - x_hat).abs().max() < 1e-3
    assert ((sae.encode(X) > 0) == (f > 0)).all()


@pytest.mark.parametrize(("architecture", "activation"), [("standard", "relu"), ("jumprelu", "jumprelu")])
def test_training_goes_on_from_it_with_rows_of_norm_one(tmp_path, architecture, activation):
    threshold = THRESHOLD if architecture == "jumprelu" else None
    folder = saelens(tmp_path / "other", architecture, threshold=threshold)
    still = TrainConfig(tokens=64, batch=64, lr=1e-12, control=False, init=str(folder))
    sae = train(X, SAEConfig(d_in=D, d_sae=F, k=K, activation=activation), still).sae
    assert sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-5
    expected = checkpoint.load(folder)(X)
    assert (sae(X) - expected).norm() < 1e-3 * expected.norm()


class Other:
    """What a pickle may hold besides tensors."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: saelens(f, "temporal"), "architecture: temporal is not allowed; it must be standard, topk, jumprelu"),
        (lambda f: saelens(f, "gated"), "other has no 'b_gate' in cfg.json or sae_weights.safetensors"),
        (lambda f: llamascopium(f, "batchtopk"), "act_fn: batchtopk is not allowed; it must be relu, topk, jumprelu"),
        (lambda f: llamascopium(f, "relu", sae_type="clt"), "sae_type: clt is not allowed; it must be sae"),
        (lambda f: saelens(f, "topk", normalize_activations="layer_norm"), "normalize_activations: layer_norm is not"),
        (lambda f: saelens(f, "jumprelu"), "other has no 'threshold' in cfg.json or sae_weights.safetensors"),
        (lambda f: saelens(f, "jumprelu", threshold=torch.ones(3)), r"threshold has shape \[3\]; .* must be \[40\]"),
        (lambda f: saelens(f, "standard", activation_fn_str="tanh-relu"), "activation_fn: tanh-relu is not allowed"),
        (lambda f: saelens(f, "topk", k=None), "other has no 'k' in cfg.json"),
        (lambda f: saelens(f, "standard", threshold=THRESHOLD), "weights.safetensors has threshold, which can't be read"),
        (lambda f: sparsify(f, signed=True), "signed: true is not allowed; it must be false"),
        (lambda f: sparsify(f, skip_connection=True), "skip_connection: true is not allowed; it must be false"),
        (
            lambda f: dictionary_learning(f, "AutoEncoder", linear("bias", r_mag=torch.ones(F))),
            "ae.pt has r_mag, which can't be read",
        ),
        (lambda f: saelens(f, "topk", k=99), "k: 99 is not allowed; it must be at most d_sae"),
        (lambda f: sparsify(f, activation="groupmax"), "activation: groupmax is not allowed; it must be topk"),
        (lambda f: dictionary_learning(f, "IdentityDict", linear()), "dict_class: IdentityDict is not allowed"),
        (lambda f: dictionary_learning(f, "AutoEncoderTopK", {"b_dec": Other()}), "tensors, which are never loaded$"),
        (lambda f: dictionary_learning(f, "AutoEncoderTopK", {"k": 3}), "ae.pt is not allowed; it must have tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, write, message):
    with pytest.raises(UserError, match=message) as error:
        checkpoint.find(write(tmp_path / "other"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "other") in str(error.value)


@pytest.mark.parametrize("write", [lambda f: saelens(f, "topk"), sparsify])
def test_cut_weights_are_refused(tmp_path, write):
    folder = write(tmp_path / "other")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{weights.name} is damaged"):
        checkpoint.find(folder)


def test_commands_take_such_a_folder(tmp_path):
    """Where it does not say of which model it is, that must be given; the hook is the one that it says, unless given."""
    folder, unnamed, store = sparsify(tmp_path / "layers.2"), sparsify(tmp_path / "unnamed"), tmp_path / "store"
    command = ("features", "--out", store, "--tokens", "300")
    code, _, err = run(*command, "--sae", unnamed)
    assert code == 2
    assert "does not say what it was trained on; give --model, and --hook or --layer" in err
    code, _, err = run(*command, "--sae", folder)
    assert code == 2
    assert f"{folder} names the hook blocks.2.hook_resid_post, but no model; give --model\n" in err
    for options, layer in (((), 2), (("--layer", "1"), 1), (("--hook", "blocks.0.hook_resid_post"), 0)):
        code, _, err = run(*command, "--sae", folder, "--model", "testbed", *options)
        assert code == 2
        assert f"sae: d_in = 12 does not fit; blocks.{layer}.hook_resid_post has width 128 in testbed" in err


def test_a_folder_that_says_where_it_was_trained_needs_no_options(tmp_path):
    folder = saelens(tmp_path / "theirs", "topk", d_in=128)
    tensors = {"W_enc": drawn(128, F), "W_dec": drawn(F, 128), "b_enc": B_ENC, "b_dec": drawn(128)}
    save_file(tensors, folder / "sae_weights.safetensors")
    code, out, err = run("features", "--sae", folder, "--out", tmp_path / "store", "--tokens", "300")
    assert code == 0, err
    assert out.startswith(f"{folder} says: model testbed, hook {HOOK}\n")
    held = json.loads((tmp_path / "store" / "store.json").read_text())
    assert held["stream"]["hook"] == HOOK


#: what else SAELens' files say, and what we make of it
SAID = {
    "context": {"context_size": 64}, "bos": {"prepend_bos": False}, "data": {"dataset_path": "some/text"},
    "drop_special": {"exclude_special_tokens": False},
}  # fmt: skip
MEANT = {"context": 64, "bos": False, "data": "some/text", "drop_special": False}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("is_old", [False, True])
def test_what_saelens_says_of_the_text_is_kept(tmp_path, name, is_old):
    """From before version 6.0, what is metadata now was beside the other settings."""
    folder = saelens(tmp_path / "other", "topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    about = {"model_name": "testbed", "hook_point" if is_old else "hook_name": HOOK} | SAID[name]
    cfg = {**cfg, "metadata": None, **about} if is_old else {**cfg, "metadata": about}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert checkpoint.find(folder).where == {"model": "testbed", "hook": HOOK, name: MEANT[name]}


def test_an_old_topk_of_saelens_is_one(tmp_path):
    """It calls itself standard, and its k is an option of the activation function. Unless told, b_dec is taken from x."""
    folder = saelens(tmp_path / "other", "standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, k=None)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["architecture"], cfg["apply_b_dec_to_input"]
    (folder / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": False}))
    sae = checkpoint.find(folder).dictionary()
    assert (sae.cfg.activation, sae.cfg.k, sae.cfg.apply_b_dec_to_input) == ("topk", 3, True)


@pytest.mark.parametrize("changes", [{"hook_head_index": 0}, {"hook_point_head_index": 3}])
def test_a_head_is_not_the_whole_of_its_hook(tmp_path, changes):
    folder = saelens(tmp_path / "other", "topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | changes}))
    assert checkpoint.find(folder).where == {"model": "testbed"}


@pytest.mark.parametrize(
    ("name", "transcode", "place"),
    [
        ("layers.3", False, {"hook": "blocks.3.hook_resid_post"}),
        ("h.3", False, {"hook": "blocks.3.hook_resid_post"}),
        ("layers.3/seed1", False, {"hook": "blocks.3.hook_resid_post"}),
        ("layers.3.mlp", False, {"hook": "blocks.3.mlp.hook_out"}),
        ("layers.3.mlp", True, {"hook": "blocks.3.mlp.hook_in", "target": "blocks.3.mlp.hook_out"}),
        ("layers.3", True, {"hook": "blocks.3.hook_resid_pre", "target": "blocks.3.hook_resid_post"}),
        ("layers.3.self_attn", False, {"hook": "blocks.3.attn.hook_out"}),
        ("embed_tokens", False, {}),
    ],
)
def test_sparsifys_folders_are_named_by_modules_below_the_runs_settings(tmp_path, name, transcode, place):
    above = {"model": "testbed", "dataset": "some/text", "ctx_len": 64, "sae": {}}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(above))
    folder = sparsify(tmp_path / name, transcode=transcode)
    assert checkpoint.find(folder).where == {"model": "testbed", "context": 64, "data": "some/text", **place}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("gemma-scope-2b-pt-res/layer_5", {"model": "google/gemma-2-2b", "hook": "blocks.5.hook_resid_post"}),
        ("gemma-scope-9b-it-mlp/layer_5", {"model": "google/gemma-2-9b-it", "hook": "blocks.5.hook_mlp_out"}),
        ("gemma-scope-2b-pt-att/layer_5", {"model": "google/gemma-2-2b", "hook": "blocks.5.attn.hook_z"}),
        ("gemma-scope-2b-pt-res/embedding", {"model": "google/gemma-2-2b", "hook": "hook_embed"}),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/0a/layer_5",
            {
                "model": "google/gemma-2-2b", "hook": "blocks.5.ln2.hook_normalized", "target": "blocks.5.hook_mlp_out"
            },
        ),
        ("mine/layer_5", {}),
    ],
)  # fmt: skip
def test_gemma_scopes_folders_say_where(tmp_path, path, place):
    folder = gemma_scope(tmp_path / "made")
    (tmp_path / path).parent.mkdir(parents=True)
    folder.rename(tmp_path / path)
    found = checkpoint.find(tmp_path / path)
    assert found.where == place
    assert (found.dictionary().cfg.d_out is not None) == ("target" in place)


@pytest.mark.parametrize(
    ("place", "hook"),
    [
        ({"submodule_name": "resid_post_layer_4", "layer": 4}, "blocks.4.hook_resid_post"),
        ({"submodule_name": "blocks.4.hook_mlp_out", "layer": None}, "blocks.4.hook_mlp_out"),
        ({"submodule_name": "mlp_layer_4", "layer": 4}, None),
        ({"submodule_name": None, "layer": 4}, None),
    ],
)
def test_dictionary_learnings_submodules_and_contexts_are_kept(tmp_path, place, hook):
    folder = dictionary_learning(tmp_path / "other", "AutoEncoder", linear("bias"))
    config = json.loads((folder / "config.json").read_text())
    config = {"trainer": config["trainer"] | place, "buffer": {"ctx_len": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    expected = {"model": "testbed", "context": 64} | ({} if hook is None else {"hook": hook})
    assert checkpoint.find(folder).where == expected
