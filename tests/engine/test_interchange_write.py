"""Dictionaries written in other libraries' layouts: what comes back, bit for bit, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from temposae.engine import interchange
from temposae.engine.config import MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint

D, F, K, T = 12, 40, 5, 8
KINDS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"}, "topk": {"activation": "topk"}, "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"}, "matryoshka": {"activation": "batchtopk", "prefixes": (10, 25, F)},
    "matryoshka topk": {"activation": "topk", "prefixes": (20, F)},
    "transcoder": {"activation": "relu", "d_out": 9}, "topk transcoder": {"activation": "topk", "d_out": D},
    "jumprelu transcoder": {"activation": "jumprelu", "d_out": 9},
    "jumprelu without b_dec": {"activation": "jumprelu", "apply_b_dec_to_input": False},
    "topk without b_dec": {"activation": "topk", "apply_b_dec_to_input": False},
}  # fmt: skip
#: what a library does not have, and what it says of that
LACKS = {
    "saelens": {"topk transcoder": "activation: topk is not allowed; SAELens' transcoders are relu or jumprelu"},
    "dictionary_learning": dict.fromkeys(
        ("transcoder", "topk transcoder", "jumprelu transcoder"), "dictionary_learning has no transcoders"
    ),
    "sparsify": {kind: "sparsify has only topk" for kind, one in KINDS.items() if one["activation"] != "topk"},
    "gemma-scope": dict.fromkeys(
        ("topk", "topk transcoder", "matryoshka topk", "topk without b_dec"), "topk is not allowed|d_out: not allowed"
    )
    | dict.fromkeys(("transcoder", "jumprelu transcoder"), "d_out: not allowed"),
}
WRITABLE = [(to, kind) for to in interchange.WRITTEN for kind in KINDS if kind not in LACKS[to]]


def made(kind: str, **changes: Any) -> SparseAutoencoder:
    """A dictionary with random biases and thresholds."""
    sae = SparseAutoencoder(SAEConfig(**{"d_in": D, "d_sae": F, "k": K, "aux_k": 7, **KINDS[kind], **changes}), seed=3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "threshold"):
            if (tensor := sae.state_dict().get(name)) is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=draw))
    return sae


def same(a: SparseAutoencoder, b: SparseAutoencoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return a.cfg == b.cfg and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(("to", "kind"), WRITABLE)
def test_what_is_written_comes_back_bit_for_bit(tmp_path, to, kind):
    sae, out = made(kind), tmp_path / "other"
    interchange.write(sae, out, to)
    assert same(checkpoint.load(out), sae)


@pytest.mark.parametrize(("to", "kind"), [(to, kind) for to, lacking in LACKS.items() for kind in lacking])
def test_what_a_library_does_not_have_is_refused_with_the_reason(tmp_path, to, kind):
    with pytest.raises(UserError, match=LACKS[to][kind]):
        interchange.write(made(kind), tmp_path / "other", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "kind"), WRITABLE)
def test_without_what_lies_beside_it_the_function_is_the_same(tmp_path, to, kind):
    sae, out = made(kind), tmp_path / "other"
    interchange.write(sae, out, to)
    (out / interchange.BESIDE).unlink()
    found, x = checkpoint.load(out), 2 * torch.randn(1000, D, generator=torch.Generator().manual_seed(0))
    assert (sae.encode(x) > 0).any()
    torch.testing.assert_close(found(x), sae(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    second = tmp_path / "again"
    if to == "dictionary_learning" and kind.startswith("matryoshka"):
        assert found.cfg.prefixes == (sae.cfg.prefixes if kind == "matryoshka" else None)
    interchange.write(found, second, to)  # what was read is written as it was
    weights = interchange.LIBRARIES[to].weights[0]
    first, again = (interchange.tensors_in(place / weights) for place in (out, second))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_that_were_changed_are_read_as_they_are(tmp_path):
    sae, out = made("batchtopk"), tmp_path / "other"
    interchange.write(sae, out, "saelens")
    tensors = load_file(out / "sae_weights.safetensors")
    tensors["b_enc"] += 1
    save_file(tensors, out / "sae_weights.safetensors")
    found = checkpoint.load(out)
    assert found.cfg.activation == "jumprelu"
    torch.testing.assert_close(found.b_enc, sae.b_enc + 1)


def test_where_it_was_trained_goes_with_it(tmp_path):
    sae = made("transcoder")
    stream = StreamConfig(model="gpt2", hook="blocks.3.ln2.hook_normalized", target="blocks.3.hook_mlp_out")
    run = RunConfig(stream=stream, sae=sae.cfg)
    interchange.write(sae, tmp_path / "other", "saelens", run)
    found = checkpoint.find(tmp_path / "other").run
    assert found is not None
    assert (found.stream.model, found.stream.hook, found.stream.target) == (stream.model, stream.hook, stream.target)
    plain = made("topk")
    place = StreamConfig(model="gpt2", hook="blocks.7.hook_resid_post")
    interchange.write(plain, tmp_path / "third", "dictionary_learning", RunConfig(stream=place, sae=plain.cfg))
    trainer = json.loads((tmp_path / "third" / "config.json").read_text())["trainer"]
    assert (trainer["lm_name"], trainer["layer"], trainer["submodule_name"]) == ("gpt2", 7, "resid_post_layer_7")


PLACE = {
    "model": "gpt2", "hook": "blocks.3.hook_resid_post", "data": "texts/mine.txt", "context": 64, "bos": False,
    "drop_special": False, "max_norm": 7.0,
}  # fmt: skip


@pytest.mark.parametrize("to", interchange.WRITTEN)
def test_all_that_is_known_of_place_and_text_comes_back(tmp_path, to):
    """And to our own layout from there."""
    sae = made("topk" if to == "sparsify" else "batchtopk")
    stream = StreamConfig(**PLACE)
    interchange.write(sae, tmp_path / "other", to, RunConfig(stream=stream, sae=sae.cfg))
    found = checkpoint.find(tmp_path / "other")
    assert {name: found.where[name] for name in PLACE} == PLACE
    assert found.run is not None
    assert found.run.stream == stream
    assert found.tokens is None


SAELENS_PLACE = {
    "sae_lens_version": "6.54.12", "sae_lens_training_version": None, "model_name": "gpt2",
    "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}, "hook_name": "blocks.3.hook_resid_post",
    "hook_head_index": None, "context_size": 64, "seqpos_slice": [None], "prepend_bos": False,
    "exclude_special_tokens": False, "sequence_separator_token": None, "disable_concat_sequences": True,
    "dataset_path": "texts/mine.txt", "training_tokens": 4096,
}  # fmt: skip


def written(folder: Path, sae: SparseAutoencoder, run: RunConfig | None, tokens: int | None = None) -> dict[str, Any]:
    interchange.write(sae, folder, "saelens", run, tokens=tokens)
    return json.loads((folder / "cfg.json").read_text())


def test_saelens_is_told_what_its_own_files_tell(tmp_path):
    sae = made("matryoshka")
    cfg = written(tmp_path / "other", sae, RunConfig(stream=StreamConfig(**PLACE), sae=sae.cfg), 4096)
    details = {"k": K, "matryoshka_widths": [10, 25, F]}
    kind = {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": details}
    assert cfg["metadata"] == SAELENS_PLACE | kind


def test_a_place_has_its_name_in_a_hooked_transformer(tmp_path):
    """Where there is one: the residual stream's names there are not those of a TransformerBridge."""
    sae = made("topk")
    run = RunConfig(stream=StreamConfig(**PLACE | {"hook": "blocks.3.hook_out"}), sae=sae.cfg)
    cfg = written(tmp_path / "other", sae, run)
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert checkpoint.find(tmp_path / "other").where["hook"] == "blocks.3.hook_out"
    heads = RunConfig(stream=StreamConfig(**PLACE | {"hook": "blocks.3.attn.hook_z"}), sae=sae.cfg)
    assert written(tmp_path / "heads", sae, heads)["reshape_activations"] == "hook_z"
    assert cfg["reshape_activations"] == "none"


def test_of_activations_from_anywhere_no_model_is_claimed(tmp_path):
    sae = made("topk")
    cfg = written(
        tmp_path / "other", sae, RunConfig(stream=StreamConfig(activations="mine.npy", hook="x"), sae=sae.cfg)
    )
    assert cfg["metadata"].keys() == {
        "sae_lens_version", "sae_lens_training_version", "training_architecture", "training_architecture_details"
    }  # fmt: skip


def test_what_another_library_did_not_say_is_not_made_up(tmp_path):
    """dictionary_learning names model and layer; what it does not is not told SAELens as our defaults."""
    sae = made("jumprelu")
    interchange.write(sae, tmp_path / "theirs", "dictionary_learning", where={"model": "gpt2", "hook": PLACE["hook"]})
    (tmp_path / "theirs" / interchange.BESIDE).unlink()
    found = checkpoint.find(tmp_path / "theirs")
    interchange.write(found.dictionary(), tmp_path / "other", "saelens", where=found.where, tokens=found.tokens)
    metadata = json.loads((tmp_path / "other" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gpt2", PLACE["hook"])
    for name in (
        "context_size",
        "prepend_bos",
        "exclude_special_tokens",
        "disable_concat_sequences",
        "training_tokens",
    ):
        assert metadata[name] is None
    assert "training_architecture" not in metadata


@pytest.mark.parametrize(
    ("hook", "layer", "name"),
    [
        ("blocks.7.hook_resid_post", 7, "resid_post_layer_7"),
        ("blocks.7.hook_out", 7, "resid_post_layer_7"),
        ("blocks.7.hook_mlp_out", None, "blocks.7.hook_mlp_out"),
    ],
)
def test_a_layer_is_its_output(tmp_path, hook, layer, name):
    """dictionary_learning's readers take a layer for the residual stream after it, whatever the submodule is called."""
    sae = made("batchtopk")
    run = RunConfig(stream=StreamConfig(**PLACE | {"hook": hook}), sae=sae.cfg)
    interchange.write(sae, tmp_path / "other", "dictionary_learning", run)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["trainer"]["layer"], config["trainer"]["submodule_name"]) == (layer, name)
    assert config["buffer"] == {"d_submodule": D, "io": "out", "ctx_len": 64}


def test_settings_that_were_changed_are_read_as_they_are(tmp_path):
    sae, out = made("topk"), tmp_path / "other"
    cfg = written(out, sae, RunConfig(stream=StreamConfig(**PLACE), sae=sae.cfg))
    cfg |= {"k": K - 2, "metadata": cfg["metadata"] | {"hook_name": "blocks.4.hook_resid_post"}}
    (out / "cfg.json").write_text(json.dumps(cfg))
    found = checkpoint.find(out)
    assert found.dictionary().cfg.k == K - 2
    assert found.where["hook"] == "blocks.4.hook_resid_post"


@pytest.mark.parametrize(("step", "tokens"), [(0, None), (3, 3072), (9, 5000)])
def test_tokens_are_those_that_it_was_trained_on_by_then(tmp_path, step, tokens):
    sae = made("topk")
    run = RunConfig(sae=sae.cfg, train=TrainConfig(tokens=5000, batch=1024))
    checkpoint.write(tmp_path / "mine", step, {"sae": (sae.cfg, sae.state_dict())}, run)
    assert checkpoint.find(tmp_path / "mine").tokens == tokens


@pytest.mark.parametrize("to", interchange.WRITTEN)
def test_positions_are_not_dropped_in_silence(tmp_path, to):
    mask = MaskConfig(kind="windows", positions=T)
    with pytest.raises(UserError, match=r"mask\.kind: windows is not allowed; only temposae's own format has masks"):
        interchange.write(made("topk", mask=mask), tmp_path / "other", to)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_targets_are_named(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="already exists; nothing is overwritten"):
        interchange.write(made("topk"), tmp_path / "other", "saelens")
    with pytest.raises(
        UserError, match="to: sealens is not allowed; it must be saelens, dictionary_learning, sparsify"
    ):
        interchange.write(made("topk"), tmp_path / "new", "sealens")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(interchange, "_save", full)
    with pytest.raises(UserError, match="can't be written .*No space left"):
        interchange.write(made("topk"), tmp_path / "other", "saelens")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [10, 200])
def test_a_cut_npz_is_refused(tmp_path, cut):
    out: Path = tmp_path / "other"
    interchange.write(made("jumprelu"), out, "gemma-scope")
    (out / "params.npz").write_bytes((out / "params.npz").read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"params\.npz is damaged"):
        checkpoint.load(out)
