"""Checkpoints of every release of other libraries: they compute here what they do there, and files that lie are named."""

import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from temposae.engine import interchange
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.evals.api import BUFFERLESS, stream_of

from ..layouts import (
    ALL,
    B_ENC,
    CORE,
    DICTIONARY_LEARNING,
    GEMMA_SCOPE,
    JUMP,
    LLAMASCOPIUM,
    LOWER,
    SAELENS,
    SPARSIFY,
    TRANSCODER,
    W_ENC,
    Case,
    D,
    F,
    K,
    X,
    drawn,
    learned,
    linear,
    nested,
    npz,
    saelens,
)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_release_means_what_its_library_means(tmp_path, name):
    case = ALL[name]
    folder = tmp_path / (case.folder.partition("/checkpoints")[0])
    case.write(folder)
    sae, f = checkpoint.load(tmp_path / case.folder), case.f()
    assert (f > 0).any(1).float().mean() > 0.9
    scale = f.abs().max()
    assert (sae.encode(X).double() - f).abs().max() < 1e-5 * scale
    x_hat = case.x_hat(f)
    assert (sae(X).double() - x_hat).norm() < 1e-5 * x_hat.norm()


@pytest.mark.parametrize("name", ALL)
def test_the_path_of_a_file_stands_for_its_folder(tmp_path, monkeypatch, name):
    """Of the weights, and of the settings; from within the folder as well."""
    case = ALL[name]
    if "/checkpoints/" in case.folder:
        pytest.skip("weights of a step are read by their own path alone")
    folder = tmp_path / case.folder
    case.write(folder)
    expected = checkpoint.load(folder)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "activation_scaler.json"]
    assert files
    for file in files:
        for change, path in ((tmp_path, file), (file.parent, Path(file.name))):
            monkeypatch.chdir(change)
            found = checkpoint.find(path)
            assert found.folder.absolute() == folder
            for key, tensor in expected.state_dict().items():
                assert torch.equal(found.dictionary().state_dict()[key], tensor)


def test_so_does_a_file_of_our_own(tmp_path):
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3))
    checkpoint.write(tmp_path / "mine", 0, {name: (sae.cfg, sae.state_dict()) for name in ("sae", "random")})
    for name in ("sae.safetensors", "checkpoint.json"):
        assert torch.equal(checkpoint.load(tmp_path / "mine" / name).W_dec, sae.W_dec)
    with pytest.raises(
        UserError, match=r"random\.safetensors is not a dictionary's file; give its folder .*/mine, or sae"
    ):
        checkpoint.load(tmp_path / "mine" / "random.safetensors")


def changed(case: Case, **cfg: Any) -> Callable[[Path], None]:
    """The files of a case, with other settings; `trainer.x` is x among the settings of the trainer."""

    def write(folder: Path) -> None:
        case.write(folder)
        file = next(path for path in folder.glob("*.json"))
        settings = json.loads(file.read_text())
        for name, value in cfg.items():
            within, _, last = name.rpartition(".")
            target = settings[within] if within else settings
            target.pop(last, None)
            if value is not MISSING:
                target[last] = value
        file.write_text(json.dumps(settings))

    return write


MISSING = object()
FLAT, NESTED, TOPK = SAELENS["flat"], SAELENS["nested"], SAELENS["nested topk"]
LONG = "x" * 5000
#: what is refused, and the beginning of why
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "tanh": (changed(FLAT, activation_fn_str="tanh-relu"), "activation_fn: tanh-relu is not allowed; it must be relu"),
    "activation without a name": (changed(FLAT, activation_fn_str=None), "activation_fn: null is not allowed"),
    "topk without k": (changed(FLAT, activation_fn_str="topk"), "topk is not allowed without activation_fn_kwargs.k"),
    "topk in a new file": (changed(NESTED, activation_fn_str="topk", activation_fn_kwargs={"k": 3}), "in SAELens 6"),
    "signed topk": (
        changed(FLAT, activation_fn_str="topk", activation_fn_kwargs={"k": 3, "signed": True}), "kwargs.signed: "
    ),
    "abstopk": (changed(TOPK, architecture="abstopk"), "architecture: abstopk .* work only in SAELens"),
    "temporal": (changed(NESTED, architecture="temporal"), "architecture: temporal .* work only in SAELens"),
    "skip": (changed(NESTED, architecture="skip_transcoder"), "architecture: skip_transcoder is not allowed; "),
    "no architecture": (changed(NESTED, architecture=MISSING), "architecture: missing; SAELens 6 has one"),
    "architecture of a list": (changed(NESTED, architecture=["topk"]), r'architecture: \["topk"\] is not allowed'),
    "long architecture": (changed(NESTED, architecture=LONG), r"architecture: x{131}\.\.\.x{66} is not allowed"),
    "escapes": (changed(NESTED, architecture="\x1b[2J\nx"), r"architecture: \\x1b\[2J\\nx is not allowed"),
    "layer norm": (changed(NESTED, normalize_activations="layer_norm"), "activations: layer_norm .* its own norm"),
    "constant norm": (changed(NESTED, normalize_activations="constant_norm_rescale"), "activations: constant_norm_"),
    "scaled": (changed(FLAT, normalize_activations=True), "expected_average_only_in .* folds it into"),
    "whitened": (changed(NESTED, normalize_activations="covariance_whitening"), "activations: covariance_whitening"),
    "scaled somehow": (changed(NESTED, normalize_activations="sometimes"), "activations: sometimes .* must be none"),
    "b_dec": (changed(NESTED, apply_b_dec_to_input="no"), "input: no is not allowed; it must be true or false"),
    "b_dec null": (changed(NESTED, apply_b_dec_to_input=None), "input: null is not allowed; it must be true"),
    "version": (changed(FLAT, sae_lens_version="newest"), "sae_lens_version: newest is not allowed"),
    "d_in": (changed(NESTED, d_in=13), "d_in: 13 does not fit the weights, where it is 12"),
    "d_sae": (changed(NESTED, d_sae=10**15), "d_sae: 1000000000000000 does not fit the weights, where it is 120"),
    "d_sae of text": (changed(NESTED, d_sae="many"), "d_sae: many is not allowed; it must be a whole number from 1 on"),
    "expansion": (changed(SAELENS["first"], d_sae=MISSING, expansion_factor=7), "d_sae: 84 does not fit the weights"),
    "d_out": (changed(SAELENS["nested transcoder"], d_out=3), "d_out: 3 does not fit the weights, where it is 12"),
    "huge k": (changed(TOPK, k=10**30), "k: 10{30} is not allowed; it must be a whole number from 1 on"),
    "k above F": (changed(TOPK, k=121), "k: 121 is not allowed; it must be at most d_sae"),
    "k of a flag": (changed(TOPK, k=True), "k: true is not allowed; it must be a whole number"),
    "k below 1": (changed(TOPK, k=-1), "k: -1 is not allowed; it must be a whole number"),
    "factors": (
        changed(SAELENS["flat, latents have factors"], finetuning_scaling_factor=False), "scaling_factor: not allowed"
    ),
    "metadata": (changed(NESTED, metadata=["x"]), r'metadata: \["x"\] is not allowed; it must be settings by name'),
    "context": (changed(FLAT, context_size="long"), "context_size: long .* whole number from 2 on"),
    "same places": (
        changed(NESTED, metadata={"sae_lens_version": "6.0.0", "model_name": "x", "hook_name": "a", "hook_name_out": "a"}),
        "target: a is not allowed",
    ),
    "no trainer": (changed(DICTIONARY_LEARNING["AutoEncoder"], trainer=MISSING), "trainer: missing; it must have"),
    "no class": (changed(DICTIONARY_LEARNING["AutoEncoderNew"], **{"trainer.dict_class": None, "trainer.trainer_class": 3}),
                 "trainer.dict_class: missing"),
    "identity": (
        changed(DICTIONARY_LEARNING["AutoEncoder"], **{"trainer.dict_class": "IdentityDict"}),
        "trainer.dict_class: IdentityDict is not allowed; .* work only in dictionary_learning",
    ),
    "activation_dim": (
        changed(DICTIONARY_LEARNING["AutoEncoder"], **{"trainer.activation_dim": 99}), "activation_dim: 99 does not fit"
    ),
    "batchtopk without a threshold": (
        learned(linear("b_dec"), dict_class="BatchTopKSAE", k=K), "BatchTopKSAE of before December 2024 has no threshold"
    ),
    "another class' tensors": (learned(linear("bias"), dict_class="AutoEncoderTopK", k=K), "has no 'b_dec' in config.json"),
    "groups": (
        learned(CORE | {"k": torch.tensor(5), "threshold": torch.tensor(1.0), "group_sizes": torch.tensor([-1, 121])},
                dict_class="MatryoshkaBatchTopKSAE"),
        "group_sizes: it must contain numbers of latents",
    ),
    "groupmax": (changed(SPARSIFY["later"], activation="groupmax"), "activation: groupmax .* work only in sparsify"),
    "signed": (changed(SPARSIFY["first"], signed=True), "signed: true is not allowed; it must be false"),
    "skip connection": (changed(SPARSIFY["later"], skip_connection=True), "skip_connection: true is not allowed"),
    "num_latents": (changed(SPARSIFY["later"], num_latents=7), "num_latents: 7 does not fit the weights"),
    "expansion_factor": (changed(SPARSIFY["first"], expansion_factor=32), "num_latents: 384 does not fit the weights"),
    "affine": (changed(GEMMA_SCOPE["2 transcoder"], affine_connection=True), "affine_connection: true is not allowed"),
    "gemma without a name": (GEMMA_SCOPE["2 res"].write, "it must contain one of resid_post, attn_out"),
    "gemma's factors": (npz(LOWER | {"scaling_factor": torch.full((F,), 2.0)}), "scaling_factor: not allowed"),
    "crosscoder": (changed(LLAMASCOPIUM["topk"], sae_type="crosscoder"), "sae_type: crosscoder .* only in Llamascop"),
    "glu": (changed(LLAMASCOPIUM["topk"], use_glu_encoder=True), "use_glu_encoder: true is not allowed"),
    "batchtopk": (changed(LLAMASCOPIUM["topk"], act_fn="batchtopk"), "act_fn: batchtopk is not allowed; it must be relu"),
    "token-wise": (changed(LLAMASCOPIUM["topk"], norm_activation="token-wise"), "norm_activation: token-wise"),
    "no norms": (changed(LLAMASCOPIUM["topk"], norm_activation="dataset-wise"), "dataset_average_activation_norm.* missing"),
    "norms of 0": (
        changed(LLAMASCOPIUM["2024 topk"], dataset_average_activation_norm={"in": 0, "out": 1}), "0.0 is not allowed"
    ),
    "d_model": (changed(LLAMASCOPIUM["topk"], d_model=5), "d_model: 5 does not fit the weights, where it is 12"),
    "expansion of Llamascopium": (changed(LLAMASCOPIUM["topk"], expansion_factor=3), "expansion_factor: 36 does not fit"),
}  # fmt: skip


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.find(path)
    message = str(error.value)
    assert message.startswith(f"sae: {path}")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_or_lies_is_named(tmp_path, name):
    write, why = REFUSED[name]
    write(tmp_path / "folder")
    assert re.search(why, refusal(tmp_path / "folder"))


def numbers(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return saelens(nested("jumprelu"), JUMP | {name: tensor})


ODD_TENSORS = {
    "NaN": (numbers("W_enc", W_ENC.where(W_ENC < 2, torch.nan)), "W_enc has numbers that are not finite"),
    "infinite": (numbers("threshold", torch.full((F,), torch.inf)), "threshold has numbers that are not finite"),
    "whole numbers": (numbers("W_enc", W_ENC.long()), "W_enc has dtype torch.int64; it must have"),
    "complex": (numbers("b_enc", B_ENC.to(torch.complex64)), "b_enc has dtype torch.complex64"),
    "another shape": (numbers("b_enc", torch.zeros(F, 1)), r"b_enc has shape \[120, 1\]; .* must be \[120\]"),
    "no matrix": (numbers("W_dec", torch.zeros(F, D, 1)), r"W_dec has shape \[120, 12, 1\]; it must be a matrix"),
    "one more": (numbers("W_skip", torch.zeros(D, D)), "sae_weights.safetensors has W_skip, which can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_odd_tensors_are_named(tmp_path, name):
    write, why = ODD_TENSORS[name]
    write(tmp_path / "folder")
    assert re.search(why, refusal(tmp_path / "folder"))


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", "[" * 100_000, '{"architecture": ' + "[" * 100_000, "\xff\xfe", "null"]
)
def test_settings_that_are_damaged_are_named(tmp_path, text):
    NESTED.write(tmp_path / "folder")
    (tmp_path / "folder" / "cfg.json").write_bytes(text.encode("latin-1"))
    assert re.search(r"cfg\.json is (damaged|not allowed)", refusal(tmp_path / "folder"))


def test_settings_that_are_too_large_are_not_parsed(tmp_path):
    NESTED.write(tmp_path / "folder")
    with (tmp_path / "folder" / "cfg.json").open("wb") as file:
        file.truncate(2**40)
    assert "cfg.json has 1,099,511,627,776 bytes" in refusal(tmp_path / "folder")


def lying_npz(folder: Path) -> None:
    """An array whose header says that it has a million million numbers."""
    npz(JUMP)(folder)
    with zipfile.ZipFile(folder / "params.npz", "a") as packed, packed.open("W_big.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})  # pyright: ignore[reportArgumentType]


def packed_npz(folder: Path) -> None:
    """Zeros, a thousand times as many as the file has bytes."""
    folder.mkdir()
    np.savez_compressed(folder / "params.npz", W_enc=np.zeros((3000, 10_000), np.float32))


def thin_pt(folder: Path) -> None:
    """A tensor of one number, which it repeats a million million times."""
    learned(linear("bias") | {}, dict_class="AutoEncoder")(folder)
    torch.save(linear("bias") | {"encoder.weight": torch.zeros(1).expand(10**6, 10**6)}, folder / "ae.pt")


@pytest.mark.parametrize(("write", "file"), [(lying_npz, "params.npz"), (packed_npz, "params.npz"), (thin_pt, "ae.pt")])
def test_files_that_lie_about_their_size_are_named(tmp_path, write, file):
    write(tmp_path / "folder")
    assert f"{file} is damaged; " in refusal(tmp_path / "folder")


def test_what_else_lies_in_a_folder_is_named(tmp_path):
    folder = tmp_path / "folder"
    NESTED.write(folder)
    (folder / "sae_weights.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"W_enc": "../../secret.safetensors"}}')
    assert re.search(
        r"it has cfg.json and model-00001-of-00002.safetensors, model.safetensors.index.json, where sae.safetensors or "
        r"sae_weights.safetensors is read$",
        refusal(folder),
    )
    above = tmp_path / "above"
    for layer in range(3):
        SPARSIFY["later"].write(above / f"layers.{layer}")
    assert refusal(above).endswith("give one of the folders in it: layers.0, layers.1, layers.2")


def test_nothing_outside_the_folder_is_opened(tmp_path):
    """Whatever the settings name."""
    path = "../../secret"
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "a" / "folder"
    names = ("dataset_path", "model_name", "hook_name", "sae_pretrained_name_or_path", "file", "weight_map", "weights")
    changed(NESTED, **dict.fromkeys(names, path), metadata={"sae_lens_version": "6.0.0", "dataset_path": path})(folder)
    opened: list[str] = []
    watch = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watch[0] else None)
    found = checkpoint.load(folder)
    watch[0] = False
    assert found.cfg.d_in == D
    assert str(folder / "cfg.json") in opened
    assert not [file for file in opened if "secret" in file]


@pytest.mark.parametrize("linked", [False, True])
def test_a_transcoder_of_gemma_scope_is_no_sae(tmp_path, linked):
    """Its tensors have the shapes of an SAE's; a link to it does not make it one."""
    folder = tmp_path / TRANSCODER
    npz(JUMP)(folder)
    if linked:
        (tmp_path / "mine").symlink_to(folder)
        folder = tmp_path / "mine"
    found = checkpoint.find(folder)
    assert found.dictionary().cfg.d_out == D
    assert (found.where["model"], found.where["target"]) == ("google/gemma-2-2b", "blocks.2.hook_mlp_out")


def test_a_copy_is_one_by_the_name_that_is_left(tmp_path):
    npz(JUMP)(tmp_path / "my-transcoders" / "layer_2" / "width_16k" / "average_l0_9")
    assert checkpoint.load(tmp_path / "my-transcoders" / "layer_2" / "width_16k" / "average_l0_9").cfg.d_out == D


def test_where_no_name_says_which_it_is_that_is_told(tmp_path):
    npz(JUMP)(tmp_path / "mine")
    with pytest.warns(UserWarning, match="mine: read as an SAE; no folder name above it"):
        assert checkpoint.load(tmp_path / "mine").cfg.d_out is None


def test_what_lies_beside_the_files_is_checked(tmp_path):
    """Every bit of it, and that it belongs to the files as they are."""
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, k=3, activation="batchtopk"), seed=1)
    interchange.write(sae, tmp_path / "mine", "saelens")
    place = tmp_path / "mine" / interchange.BESIDE
    whole = place.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found, told = checkpoint.load(tmp_path / "mine"), None
        except UserError as error:
            found, told = None, str(error)
        assert found.cfg == sae.cfg if found is not None else interchange.BESIDE in str(told)
    place.write_bytes(whole)
    (tmp_path / "mine" / "cfg.json").write_text((tmp_path / "mine" / "cfg.json").read_text() + " ")
    with pytest.warns(UserWarning, match="was changed since it was written; temposae.safetensors is not used"):
        assert checkpoint.load(tmp_path / "mine").cfg.activation == "jumprelu"


def test_what_is_said_of_the_text_is_what_evals_read(tmp_path, capsys):
    folder = tmp_path / "folder"
    (tmp_path / "text.txt").write_text("The ground was wet.\n" * 200)
    about = {"model_name": "testbed", "hook_name": "blocks.1.hook_resid_post", "context_size": 24, "prepend_bos": False}
    about["dataset_path"] = str(tmp_path / "text.txt")
    wide = {"W_enc": drawn(128, F), "W_dec": drawn(F, 128), "b_enc": B_ENC, "b_dec": drawn(128)}
    saelens(nested("topk", k=K, d_in=128, metadata=about | {"sae_lens_version": "6.0.0"}), wide)(folder)
    stream = stream_of(checkpoint.find(folder), None, None, None, None, tokens=1, **BUFFERLESS)
    config = stream.config
    assert (config.context, config.bos, config.hook) == (24, False, "blocks.1.hook_resid_post")
    assert capsys.readouterr().out.strip().endswith("context 24, bos false")
    del about["model_name"]  # which is then given
    saelens(nested("topk", k=K, d_in=128, metadata=about | {"sae_lens_version": "6.0.0"}), wide)(folder)
    config = stream_of(checkpoint.find(folder), "testbed", 1, None, None, tokens=1, **BUFFERLESS).config
    assert (config.context, config.bos, config.data) == (24, False, about["dataset_path"])
    assert next(iter(stream.held_out(2))).tokens.shape[1] <= 24


@pytest.mark.parametrize("name", ["Llamascopium: topk", "sparsify: later", "Gemma Scope: 2 res"])
def test_weights_without_their_settings_are_named(tmp_path, name):
    ALL[name].write(tmp_path / "folder")
    file = next((tmp_path / "folder").glob("*.json"))
    file.unlink()
    if name.startswith("Gemma"):  # which has none in some releases
        assert "it must contain one of resid_post" in refusal(tmp_path / "folder")
    else:
        assert re.search(rf"; it has \w+\.safetensors, and no .*{file.name}.* beside it$", refusal(tmp_path / "folder"))


def test_settings_above_the_folder_are_named_by_their_path(tmp_path):
    SPARSIFY["later"].write(tmp_path / "layers.1")
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is damaged" in refusal(tmp_path / "layers.1")


@pytest.mark.parametrize("change", ["to_sparse", "quantized", "meta"])
def test_tensors_of_another_kind_are_named(tmp_path, change):
    encoder = W_ENC.T.contiguous()
    odd = {
        "to_sparse": encoder.to_sparse(), "meta": encoder.to("meta"),
        "quantized": torch.quantize_per_tensor(encoder, 0.1, 0, torch.qint8),
    }[change]  # fmt: skip
    DICTIONARY_LEARNING["AutoEncoder"].write(tmp_path / "folder")
    torch.save(linear("bias") | {"encoder.weight": odd}, tmp_path / "folder" / "ae.pt")
    assert "ae.pt is not allowed; encoder.weight is not a dense tensor" in refusal(tmp_path / "folder")
