"""The model from a hook on gives the logits of the whole model, over architectures, and runs no layer before the hook."""

import pytest
import torch
from temposae.engine.stream import LanguageModel
from temposae.engine.stream import model as model_module
from temposae.engine.testbed import training
from temposae.engine.testbed.language import Language
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

LAYERS, D = 4, 32
SIZES = dict(
    hidden_size=D, intermediate_size=48, num_attention_heads=4, num_hidden_layers=LAYERS, max_position_embeddings=128
)
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    GPT2Config: {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
    GPTNeoXConfig: SIZES,
    LlamaConfig: SIZES | HEADS,
    Qwen2Config: SIZES | {"num_key_value_heads": 2},
    Qwen3Config: SIZES | HEADS,
    Gemma2Config: SIZES | HEADS | {"sliding_window": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    Gemma3TextConfig: SIZES | HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 8},
}
HOOKS = (
    "blocks.2.hook_resid_post",
    "blocks.0.hook_resid_pre",
    f"blocks.{LAYERS - 1}.hook_resid_post",
    "blocks.2.hook_mlp_out",
    "blocks.1.hook_attn_out",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random weights, by kind of model."""
    language, found = Language(), {}
    for kind, sizes in KINDS.items():
        torch.manual_seed(0)
        found[kind] = tmp_path_factory.mktemp(kind.__name__)
        model = AutoModelForCausalLM.from_config(kind(vocab_size=len(language.vocabulary), **sizes))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (p.ndim == 1))
        model.save_pretrained(found[kind])
        training.tokenizer(language).save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_whole_model_gives(folders, kind):
    model = LanguageModel(folders[kind], device="cpu")
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 200, (3, 60), generator=draw)
    plain = model.logits(tokens)
    for hook in HOOKS:
        model.use(hooks=[hook])
        tail = model.tail()
        assert tail is not None, hook
        x = model.activations(tokens)
        other = x + torch.randn(x.shape, generator=draw) * x.std()
        replaced = model.logits(tokens, lambda _, other=other: other)
        assert (replaced - plain).abs().max() > 0.01
        for hidden, right in ((tail.begin(tokens, x), plain), (tail.replaced(tokens, other), replaced)):
            found = torch.cat([tail.logits(part) for part in hidden.flatten(0, 1).split(37)])
            torch.testing.assert_close(found.view_as(right), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "first", "again"),
    [("blocks.1.hook_resid_post", [2, 3], [2, 3]), ("blocks.1.hook_mlp_out", [0, 1, 2, 3], [1, 2, 3])],
)
def test_layers_before_the_hook_do_not_run_again(hook, first, again):
    model = LanguageModel("testbed", hook=hook, device="cpu")
    tail, ran = model.tail(), []
    assert tail is not None
    for i, layer in enumerate(tail.model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    tokens = torch.ones(1, 8, dtype=torch.long)
    tail.begin(tokens, x := model.activations(tokens))
    assert ran == first
    ran.clear()
    tail.replaced(tokens, x)
    assert ran == again


def test_one_that_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(model_module, "Tail", Wrong)
    assert LanguageModel("testbed", device="cpu").tail() is None


class Wrong(model_module.Tail):
    """Forgets what comes after the head."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden)
