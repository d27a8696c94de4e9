"""Model folders: with and without a tokenizer, and refused where their tensors aren't those of the model."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.train import train
from temposae.evals.core import core
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [f"w{n}" for n in range(90)]


def llama(folder, vocabulary=90, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **special, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
KINDS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=90, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma 3": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "qwen 2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen 3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_hold_the_tensors_of_their_architecture(kind, tmp_path):
    """As transformers saves them all is well; with a tensor under another name, gone or too many, none is made up."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    model.save_pretrained(tmp_path)
    loaded = LanguageModel(str(tmp_path))
    rows = torch.randint(90, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(rows), model(rows).logits, rtol=1e-4, atol=1e-4)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    first = next(name for name in whole if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")))
    rest = {name: value for name, value in whole.items() if name != first}

    def refused(tensors, *words):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as error:
            LanguageModel(str(tmp_path))
        for word in ("doesn't hold the tensors of its architecture", *words):
            assert word in str(error.value)
        assert "\n" not in str(error.value)

    refused({f"_orig_mod.{name}": value for name, value in whole.items()}, "torch.compile adds _orig_mod. to names")
    refused(rest, f"it lacks {first}")
    refused(rest | {first.replace("mlp", "mpl"): whole[first]}, f"lacks {first} and has", "mpl")
    refused(whole | {"value_head.weight": torch.ones(3)}, "it has value_head.weight")


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    llama(tmp_path / "theirs")
    folder = llama(tmp_path / "model")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    theirs = tmp_path / "theirs" / "model.safetensors"
    for file in ("../theirs/model.safetensors", str(theirs), ".."):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
        with pytest.raises(UserError, match=r"index.json is not allowed; it names .*, which is outside of its folder"):
            LanguageModel(str(folder))
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json can't be read \(JSONDecodeError\)"):
        LanguageModel(str(folder))
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert LanguageModel(str(folder)).n_layers == 2


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with suppress(UserError):
        LanguageModel(str(folder))
    assert not (tmp_path / "ran").exists()


def tokenizer(folder, words=WORDS, **special):
    of_words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=of_words, **special).save_pretrained(folder)


def test_a_model_without_a_tokenizer_trains_on_ids(tmp_path):
    folder = llama(tmp_path / "model")
    ids = np.random.default_rng(0).integers(0, 90, (80, 24))
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"tokens": row}) for row in ids.tolist()))
    config = StreamConfig(model=str(folder), data=str(tmp_path / "ids.npy"), context=24, buffer_tokens=512)
    stream = ActivationStream(config, tokens=1024, batch=128)
    assert stream.model.tokenizer is None
    rows = stream.text.next(3)
    assert rows.tokens.tolist() == ids[:3].tolist()
    of_column = ActivationStream(
        config.model_copy(update={"data": str(tmp_path / "ids.jsonl")}), tokens=1024, batch=128, model=stream.model
    )
    assert of_column.text.next(3).tokens.tolist() == ids[:3].tolist()
    run = train(stream, SAEConfig(d_in=32, d_sae=64, k=4), TrainConfig(tokens=1024, batch=128))
    assert run.metrics[-1]["fvu"] < 1
    assert core(stream, run.sae, {}, rows=4, ce_rows=4)["ce"]["clean"] > 0
    (tmp_path / "a.txt").write_text("some text\n\nmore text")
    with pytest.raises(UserError, match=r"^data: .*a.txt holds text, and the model has no tokenizer; give token ids"):
        ActivationStream(config.model_copy(update={"data": str(tmp_path / "a.txt")}), model=stream.model)
    ids[7, 3] = 90
    np.save(tmp_path / "wrong.npy", ids)
    with pytest.raises(UserError, match=r"wrong.npy document 7 holds token 90, .*; the model has tokens 0 to 89$"):
        ActivationStream(config.model_copy(update={"data": str(tmp_path / "wrong.npy")}), model=stream.model)


def test_ids_are_those_that_the_model_embeds(tmp_path):
    """A model often embeds more tokens than its tokenizer has, and sometimes fewer."""
    tokenizer(llama(tmp_path / "large", vocabulary=120), bos_token="w1")
    tokenizer(llama(tmp_path / "small", vocabulary=60), bos_token="w1")
    np.save(tmp_path / "ids.npy", np.full((30, 24), 119))
    (tmp_path / "a.txt").write_text("\n\n".join(["w5 w6 w7 w8"] * 30 + ["w5 w75"]))
    large, small = (LanguageModel(str(tmp_path / name)) for name in ("large", "small"))
    config = StreamConfig(context=24, buffer_tokens=64)
    of = lambda model, name, **more: ActivationStream(
        config.model_copy(update={"data": str(tmp_path / name), **more}), tokens=64, batch=16, model=model
    )
    assert of(large, "ids.npy", bos=False).text.next(1).tokens.tolist() == [[119] * 24]
    with pytest.raises(UserError, match=r"holds token 119, which is not allowed; the model has tokens 0 to 59$"):
        of(small, "ids.npy")
    text = of(small, "a.txt", repeat=False)
    with pytest.raises(
        UserError, match=r"document 30 holds token 75, which is not allowed; the model has tokens 0 to 59$"
    ):
        text.text.next(100)


def test_a_tokenizer_without_special_tokens_has_none(tmp_path):
    """transformer_lens adds an <|endoftext|> that no model embeds."""
    tokenizer(llama(tmp_path))
    (tmp_path / "a.txt").write_text("\n\n".join(["w5 w6 w7 w8"] * 60))
    config = StreamConfig(model=str(tmp_path), data=str(tmp_path / "a.txt"), context=24, buffer_tokens=64)
    stream = ActivationStream(config, tokens=64, batch=16)
    assert stream.text.bos is None
    assert stream.text.next(1).tokens[0, :5].tolist() == [5, 6, 7, 8, 0]
    assert stream.next(16).x.isfinite().all()
    with pytest.raises(
        UserError, match=r"^stream.bos: true is not allowed; the model has no embedding for the tokenizer's"
    ):
        ActivationStream(config.model_copy(update={"bos": True}), model=stream.model)


def test_a_text_of_which_no_word_is_known_is_refused(tmp_path):
    tokenizer(llama(tmp_path), unk_token="w0")
    (tmp_path / "a.txt").write_text("\n\n".join(["an english text"] * 60))
    config = StreamConfig(model=str(tmp_path), data=str(tmp_path / "a.txt"), context=24)
    with pytest.raises(
        UserError, match=r"^data: the model's tokenizer knows no word of .*a.txt; all tokens are unknown"
    ):
        ActivationStream(config)


def test_a_folder_with_settings_of_a_tokenizer_but_no_words_has_none(tmp_path):
    tokenizer(llama(tmp_path))
    assert LanguageModel(str(tmp_path)).tokenizer is not None
    (tmp_path / "tokenizer.json").unlink()
    assert (tmp_path / "tokenizer_config.json").exists()
    assert LanguageModel(str(tmp_path)).tokenizer is None
