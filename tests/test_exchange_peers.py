"""Dictionaries that go to SAELens, dictionary_learning and sparsify and come from there, through these libraries' code."""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from temposae import ActivationStream, SAEConfig, SparseAutoencoder, StreamConfig, load
from temposae.bench.libraries import skip_init
from temposae.engine import interchange
from temposae.engine.config import RunConfig
from temposae.engine.storage import checkpoint
from temposae.engine.stream.model import LanguageModel, next_token_losses
from temposae.engine.stream.model_loading import TESTBED

from .commandline import run

pytestmark = pytest.mark.slow
D, F, K, N = 24, 96, 8, 1000
X = 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def library(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "dictionary_learning":
        skip_init(name, unless="nnsight")


def randomised(module: torch.nn.Module) -> Any:
    """With biases and thresholds that are not all the same, and decoder rows of several norms."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "threshold" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
            elif tensor.ndim == 2:
                tensor.mul_(0.5 + torch.rand(tensor.shape[0], 1, generator=draw))
    return module


def ours(activation: str, **changes: Any) -> SparseAutoencoder:
    return randomised(SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=K, activation=activation, aux_k=5, **changes)))  # pyright: ignore[reportArgumentType]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-5 * b.norm()


def alike(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    assert a.cfg == b.cfg
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


SAELENS = [
    ("relu", {}), ("topk", {}), ("jumprelu", {}), ("batchtopk", {}), ("topk", {"apply_b_dec_to_input": False}),
    ("relu", {"d_out": 9}), ("jumprelu", {"d_out": 9}), ("batchtopk", {"prefixes": (30, F)}),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "changes"), SAELENS)
def test_saelens_loads_what_we_write_and_we_what_it_saves(tmp_path, activation, changes):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = ours(activation, **changes)
    interchange.write(sae, tmp_path / "ours", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        close(theirs.encode(X), sae.encode(X))
        close(theirs(X), sae(X))
    alike(load(tmp_path / "ours"), sae)
    theirs.save_model(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    close(back(X), sae(X))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(back.state_dict()[name], sae.state_dict()[name])


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk"])
def test_saelens_training_classes_come_over_as_they_are_saved(tmp_path, architecture):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]

    cls, config = get_sae_training_class(architecture)
    sizes = {"k": K} if "topk" in architecture else {}
    sizes |= {"matryoshka_widths": [32, F]} if "matryoshka" in architecture else {}
    trained = randomised(cls(config(d_in=D, d_sae=F, **sizes)))
    trained.save_inference_model(tmp_path / "theirs")
    theirs, found = SAE.load_from_disk(tmp_path / "theirs"), load(tmp_path / "theirs")
    with torch.no_grad():
        close(found(X), theirs(X))
        close(found.encode(X), theirs.encode(X))
    interchange.write(found, tmp_path / "again", "saelens")
    with torch.no_grad():
        close(SAE.load_from_disk(tmp_path / "again")(X), theirs(X))


DICTIONARY_LEARNING = {
    "relu": ("dictionary", "AutoEncoder", {"normalize_decoder": False}), "topk": ("trainers.top_k", "AutoEncoderTopK", {}),
    "batchtopk": ("trainers.batch_top_k", "BatchTopKSAE", {}), "jumprelu": ("dictionary", "JumpReluAutoEncoder", {}),
    "matryoshka": ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning_loads_what_we_write_and_we_what_it_saves(tmp_path, kind):
    library("dictionary_learning")
    module, name, options = DICTIONARY_LEARNING[kind]
    cls = getattr(import_module(f"dictionary_learning.{module}"), name)
    sae = ours("batchtopk", prefixes=(30, F)) if kind == "matryoshka" else ours(kind)
    interchange.write(sae, tmp_path / "ours", "dictionary_learning")
    theirs = cls.from_pretrained(str(tmp_path / "ours" / "ae.pt"), **options)
    with torch.no_grad():
        close(theirs.encode(X), sae.encode(X))
        close(theirs(X), sae(X))
    alike(load(tmp_path / "ours"), sae)
    torch.save(theirs.state_dict(), _beside(tmp_path / "theirs", tmp_path / "ours" / "config.json") / "ae.pt")
    close(load(tmp_path / "theirs")(X), sae(X))


def _beside(folder: Path, config: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config.read_text())
    return folder


@pytest.mark.parametrize("trainer", ["TopKTrainer", "BatchTopKTrainer"])
def test_dictionaries_that_its_trainers_leave_come_over(tmp_path, trainer):
    library("dictionary_learning")
    module = {"TopKTrainer": "top_k", "BatchTopKTrainer": "batch_top_k"}[trainer]
    cls = getattr(import_module(f"dictionary_learning.trainers.{module}"), trainer)
    place = {"layer": 3, "lm_name": "gpt2", "submodule_name": "resid_post", "device": "cpu"}
    made = cls(steps=10, warmup_steps=0, activation_dim=D, dict_size=F, k=K, **place)
    for step in range(3):
        made.update(step, X)
    made.ae.threshold.fill_(0.7)
    (tmp_path / "theirs").mkdir()
    torch.save(made.ae.state_dict(), tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": made.config}))
    found = load(tmp_path / "theirs")
    with torch.no_grad():
        close(found(X), made.ae(X))
        close(found.encode(X), made.ae.encode(X))


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_loads_what_we_write_and_we_what_it_saves(tmp_path, monkeypatch, transcode):
    library("sparsify")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    sae = ours("topk", **({"d_out": D} if transcode else {}))
    interchange.write(sae, tmp_path / "ours", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        close(theirs(X).sae_out, sae(X))
    alike(load(tmp_path / "ours"), sae)
    theirs.save_to_disk(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    close(back(X), sae(X))
    interchange.write(back, tmp_path / "again", "sparsify")
    with torch.no_grad():
        assert torch.equal(SparseCoder.load_from_disk(tmp_path / "again")(X).sae_out, theirs(X).sae_out)


# what the libraries make of where a dictionary was trained -----------------------------------------------------------------

WIDTH = 128  # of the embedded model
RESIDUAL, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
PLACE = {"model": "testbed", "hook": RESIDUAL, "context": 64, "data": "texts/mine.txt"}


def of_testbed(activation: str, **changes: Any) -> SparseAutoencoder:
    """With the biases, norms and thresholds of `randomised`, in units of the embedded model's activations."""
    settings = SAEConfig(d_in=WIDTH, d_sae=256, k=K, activation=activation, **changes)  # pyright: ignore[reportArgumentType]
    return randomised(SparseAutoencoder(settings))


def placed(sae: SparseAutoencoder, **changes: Any) -> RunConfig:
    return RunConfig(stream=StreamConfig(**PLACE | changes), sae=sae.cfg)


@pytest.fixture(scope="module")
def spliced() -> Any:
    """SAELens' own bridge to the embedded model, and rows of its language [6, 64]."""
    library("sae_lens")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge  # pyright: ignore[reportMissingImports]

    stream = ActivationStream(StreamConfig(model="testbed", context=64), tokens=64)
    rows = next(iter(stream.held_out(6)))
    return SAETransformerBridge.boot_transformers(str(TESTBED), device="cpu"), stream.model, rows.tokens


def ours_spliced(
    model: LanguageModel, tokens: torch.Tensor, sae: SparseAutoencoder, hook: str, target: str | None
) -> Any:
    """The mean CE with what the dictionary gives in place of the activations, at every position."""
    read: list[torch.Tensor] = []
    hooks = [(hook, lambda x, hook: read.append(x))] if target else []
    replace = lambda x, hook: sae(read[0] if target else x)
    with torch.no_grad():
        logits = model.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, (target or hook, replace)])
    return next_token_losses(logits, tokens).mean()


HOOKS = (
    RESIDUAL,
    "blocks.1.hook_out",
    "blocks.2.hook_resid_pre",
    "blocks.1.hook_attn_out",
    MLP_OUT,
)
SPLICES = [(activation, changes, RESIDUAL) for activation, changes in SAELENS if "d_out" not in changes]
SPLICES += [(activation, {"d_out": WIDTH}, MLP_IN) for activation in ("relu", "jumprelu", "batchtopk")]
SPLICES += [("topk", {}, hook) for hook in HOOKS[1:]]


@pytest.mark.parametrize(("activation", "changes", "hook"), SPLICES)
def test_saelens_splices_what_we_write_by_its_own_call(tmp_path, spliced, activation, changes, hook):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    bridge, model, tokens = spliced
    model.use(hooks=[hook])
    changes = changes | ({"prefixes": (30, 256)} if "prefixes" in changes else {})
    sae = randomised(SparseAutoencoder(SAEConfig(d_in=model.d_model, d_sae=256, k=K, activation=activation, **changes)))
    target = MLP_OUT if "d_out" in changes else None
    interchange.write(sae, tmp_path / "ours", "saelens", placed(sae, hook=hook, target=target))
    theirs = SAE.load_from_disk(tmp_path / "ours")
    clean = bridge(tokens, return_type="loss")
    loss = bridge.run_with_saes(tokens, saes=[theirs], return_type="loss")
    assert loss.item() == pytest.approx(ours_spliced(model, tokens, sae, hook, target).item(), rel=1e-5)
    assert abs(loss - clean) > 0.01
    assert bridge(tokens, return_type="loss") == clean
    _, cache = bridge.run_with_cache_with_saes(tokens, saes=[theirs])
    acts = cache[bridge.get_sae_hook_name(theirs)]
    assert ((acts > 0).float().sum(-1).mean() > 0.5).item()


@pytest.fixture
def on_hub(tmp_path, monkeypatch) -> Path:
    """A folder below which lies what the libraries' downloads find: OWNER/REPOSITORY/..."""
    root = tmp_path / "hub"
    root.mkdir()

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        file = root / repo_id / subfolder / filename
        if not file.is_file():
            raise LocalEntryNotFoundError(f"no {file}")
        return str(file)

    for module in ("sae_lens.loading.pretrained_sae_loaders", "sae_bench.custom_saes.base_sae"):
        if find_spec(module.partition(".")[0]) is not None:
            import_module(module)
    loaded = [module for name, module in sys.modules.items() if name.startswith(("sae_lens.", "sae_bench."))]
    for module in loaded:
        if hasattr(module, "hf_hub_download"):
            monkeypatch.setattr(module, "hf_hub_download", download)
    return root


#: what SAELens' own runner puts into the metadata of what it saves
RUNNERS = (
    "dataset_path", "hook_name", "model_name", "model_class_name", "hook_head_index", "context_size", "seqpos_slice",
    "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "sequence_separator_token",
    "disable_concat_sequences", "sae_lens_version", "sae_lens_training_version", "training_architecture",
    "training_architecture_details",
)  # fmt: skip


@pytest.mark.parametrize(("activation", "changes"), SAELENS)
def test_saelens_and_saebench_find_out_where_it_was_trained(tmp_path, on_hub, activation, changes):
    library("sae_lens")
    pytest.importorskip("sae_bench")
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = ours(activation, **changes)
    target = MLP_OUT if "d_out" in changes else None
    folder = on_hub / "me" / "saes" / "layer_1"
    interchange.write(sae, folder, "saelens", placed(sae, target=target), tokens=4096)
    theirs = SAE.load_from_disk(folder)
    about = theirs.cfg.metadata
    assert {name for name in RUNNERS if not name.startswith("training_architecture")} <= about.keys()
    assert target or set(RUNNERS) <= about.keys()
    assert (about.model_name, about.hook_name, about.hook_name_out) == ("testbed", RESIDUAL, target)
    assert (about.context_size, about.prepend_bos, about.dataset_path) == (64, True, "texts/mine.txt")
    assert (about.exclude_special_tokens, about.disable_concat_sequences, about.training_tokens) == (True, True, 4096)
    assert (about.sae_lens_version, about.sae_lens_training_version) == (version("sae-lens"), None)
    assert (theirs.cfg.dtype, theirs.cfg.normalize_activations) == ("float32", "none")
    if changes.get("prefixes"):
        assert about.training_architecture == "matryoshka_batchtopk"
    by_name, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("me/saes", "layer_1")
    assert by_name.cfg.metadata == about
    assert cfg["metadata"]["hook_name"] == RESIDUAL
    assert sparsity is None
    for given in ("layer_1", theirs):
        _, found, _ = load_and_format_sae("me/saes", given, "cpu")
        assert (found.cfg.model_name, found.cfg.hook_name, found.cfg.hook_layer) == ("testbed", RESIDUAL, 1)
        assert (found.cfg.context_size, found.cfg.prepend_bos, found.cfg.dtype) == (64, True, "float32")
        assert found.cfg.model_from_pretrained_kwargs == {}
        assert found.cfg.architecture_str == theirs.cfg.architecture()
        with torch.no_grad():
            close(found(X), sae(X))
    theirs.save_model(tmp_path / "theirs")  # and so back to us
    where = load_where(tmp_path / "theirs")
    expected = {"bos": True, "drop_special": True, **({"target": target} if target else {})}
    assert where == PLACE | expected


def load_where(folder: Path) -> dict[str, Any]:
    return checkpoint.find(folder).where


def test_saelens_runner_saves_what_we_keep(tmp_path):
    """Its own metadata, by its own class, as its runner fills it in."""
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import SAEMetadata  # pyright: ignore[reportMissingImports]

    sae = ours("topk")
    interchange.write(sae, tmp_path / "ours", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    theirs.cfg.metadata = SAEMetadata(
        model_name="testbed", hook_name=RESIDUAL, hook_head_index=None, context_size=32, prepend_bos=False,
        seqpos_slice=(None,), model_from_pretrained_kwargs={}, dataset_path="some/text", exclude_special_tokens=False,
        disable_concat_sequences=True,
    )  # fmt: skip
    theirs.save_model(tmp_path / "theirs")
    assert load_where(tmp_path / "theirs") == {
        "model": "testbed", "hook": RESIDUAL, "context": 32, "bos": False, "data": "some/text", "drop_special": False,
    }  # fmt: skip


def test_saelens_own_store_reads_the_text_as_we_do(tmp_path, spliced):
    """Context and BOS come from what we write."""
    from datasets import Dataset
    from sae_lens import SAE, ActivationsStore  # pyright: ignore[reportMissingImports]

    bridge, model, tokens = spliced
    sae = of_testbed("topk")
    interchange.write(sae, tmp_path / "ours", "saelens", placed(sae))
    words = model.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    store = ActivationsStore.from_sae(
        bridge, SAE.load_from_disk(tmp_path / "ours"), Dataset.from_dict({"text": words * 20}), streaming=False
    )
    batch = store.get_batch_tokens(2)
    assert batch.shape == (2, 64)
    assert (batch[:, 0] == model.tokenizer.bos_token_id).all()


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_readers_of_dictionary_learnings_files_find_function_and_place(on_hub, monkeypatch, kind):
    """Its own, SAELens' and SAEBench's."""
    for name in ("dictionary_learning", "sae_lens"):
        library(name)
    pytest.importorskip("sae_bench")
    for name in ("nnsight", "zstandard"):  # with which it reads text
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(LanguageModel=None))
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]
    from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading.pretrained_sae_loaders import (  # pyright: ignore[reportMissingImports]
        dictionary_learning_sae_huggingface_loader_1,
    )

    sae = ours("batchtopk", prefixes=(30, F)) if kind == "matryoshka" else ours(kind)
    with torch.no_grad():  # SAEBench takes rows of norm 1 alone
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    folder = on_hub / "me" / "saes" / "trainer_0"
    interchange.write(sae, folder, "dictionary_learning", placed(sae))
    theirs, config = load_dictionary(str(folder), "cpu")
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"]) == ("testbed", 1)
    assert (config["trainer"]["submodule_name"], config["buffer"]["ctx_len"]) == ("resid_post_layer_1", 64)
    saebench = {
        "relu": relu_sae.load_dictionary_learning_relu_sae, "topk": topk_sae.load_dictionary_learning_topk_sae,
        "batchtopk": batch_topk_sae.load_dictionary_learning_batch_topk_sae,
        "jumprelu": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
        "matryoshka": batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae,
    }[kind]  # fmt: skip
    module = sys.modules[saebench.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "hf_hub_download", lambda repo_id, filename, **_: str(on_hub / repo_id / filename))
        measured = saebench("me/saes", "trainer_0/ae.pt", "testbed", torch.device("cpu"), torch.float32)
    assert (measured.cfg.model_name, measured.cfg.hook_name, measured.cfg.hook_layer) == ("testbed", RESIDUAL, 1)
    by_saelens = SAE.from_pretrained("me/saes", "trainer_0", converter=dictionary_learning_sae_huggingface_loader_1)
    about = by_saelens.cfg.metadata
    assert (about.model_name, about.hook_name, about.context_size) == ("testbed", RESIDUAL, 64)
    with torch.no_grad():
        for found in (theirs, measured, by_saelens):
            close(found(X), sae(X))
            close(found.encode(X), sae.encode(X))


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_loads_many_from_folders_named_by_modules(tmp_path, monkeypatch, transcode):
    library("sparsify")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    sae = ours("topk", **({"d_out": D} if transcode else {}))
    for name in ("layers.1.mlp", "layers.2"):
        interchange.write(sae, tmp_path / "run" / name, "sparsify")
    found = SparseCoder.load_many(str(tmp_path / "run"), local=True)
    assert set(found) == {"layers.1.mlp", "layers.2"}
    for name, theirs in found.items():
        assert theirs.cfg.transcode == transcode
        with torch.no_grad():
            close(theirs(X).sae_out, sae(X))
        theirs.save_to_disk(tmp_path / "again" / name)
    (tmp_path / "again" / "config.json").write_text(
        json.dumps({"model": "testbed", "dataset": "some/text", "ctx_len": 64, "sae": {}})
    )
    mlp = {"hook": "blocks.1.mlp.hook_in", "target": "blocks.1.mlp.hook_out"} if transcode else {}
    assert load_where(tmp_path / "again" / "layers.1.mlp") == {
        "model": "testbed", "data": "some/text", "context": 64, "hook": "blocks.1.mlp.hook_out", **mlp
    }  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "jumprelu"])
def test_saelens_takes_it_for_one_of_gemma_scopes(on_hub, activation):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader  # pyright: ignore[reportMissingImports]

    sae = ours(activation)
    repo, name = "google/gemma-scope-2b-pt-res", "layer_5/width_16k/average_l0_10"
    folder = on_hub / repo / name
    interchange.write(sae, folder, "gemma-scope")

    def small(**options: Any) -> Any:
        options["cfg_overrides"] = (options["cfg_overrides"] or {}) | {"d_in": D, "d_sae": F}
        return gemma_2_sae_huggingface_loader(**options)

    theirs = SAE.from_pretrained(repo, name, converter=small)
    with torch.no_grad():
        close(theirs(X), sae(X))
        close(theirs.encode(X), sae.encode(X))
    (folder / interchange.BESIDE).unlink()
    where = load_where(folder)
    assert where == {"model": f"google/{theirs.cfg.metadata.model_name}", "hook": theirs.cfg.metadata.hook_name}


def test_a_run_goes_to_saelens_by_command_and_is_spliced(tmp_path, spliced, monkeypatch):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(tmp_path)
    size = ("--activation", "batchtopk", "--d-sae", "256", "--k", "8", "--tokens", "16384")
    code, _, err = run("train", "--model", "testbed", "--layer", "1", *size, "--out", "mine")
    assert code == 0, err
    assert run("convert", "mine", "theirs", "--to", "saelens").code == 0
    bridge, model, tokens = spliced
    sae, theirs = load("mine"), SAE.load_from_disk("theirs")
    assert theirs.cfg.metadata.training_tokens == 16384
    loss = bridge.run_with_saes(tokens, saes=[theirs], return_type="loss")
    assert loss.item() == pytest.approx(ours_spliced(model, tokens, sae, RESIDUAL, None).item(), rel=1e-5)
    assert loss - bridge(tokens, return_type="loss") > 0.01
