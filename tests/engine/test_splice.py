"""Dictionaries within a language model, by transformer_lens' own hooks."""

import pytest
import torch
from temposae.engine.composed import dictionary
from temposae.engine.config import MaskConfig, SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream.model_loading import load

HOOK, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
T, F = 12, 64


@pytest.fixture(scope="module")
def model():
    return load("testbed", torch.float32)[0]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 200, (3, T), generator=torch.Generator().manual_seed(0))


def made(**changes) -> SparseAutoencoder:
    given = {"d_in": 128, "d_sae": F, "k": 8, "mask": MaskConfig(kind="windows", positions=T), **changes}
    return dictionary(SAEConfig(**given), seed=2)


@pytest.mark.parametrize("changes", [{}, {"activation": "relu", "parts": ({"kind": "layer_norm"},)}])
def test_with_its_error_the_model_computes_what_it_did(model, tokens, changes):
    sae = made(**changes)
    plain = model(tokens)
    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK)):
        kept = model(tokens)
    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, error_term=False)):
        replaced = model(tokens)
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)
    assert (replaced - plain).abs().max() > 0.1


def test_what_the_model_goes_on_with_is_the_reconstruction_at_its_positions(model, tokens):
    sae = made()
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    pos = torch.arange(T).expand(3, T)
    expected = sae(cache[HOOK], pos)
    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, error_term=False)):
        _, found = model.run_with_cache(tokens, names_filter=HOOK)
    torch.testing.assert_close(found[HOOK], expected)
    assert not torch.allclose(expected, sae(cache[HOOK], torch.zeros_like(pos)))  # the mask knows where it is


def test_an_edit_moves_the_activations_by_what_it_changes(model, tokens):
    sae = made()
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    f = sae.encode(cache[HOOK], torch.arange(T).expand(3, T))
    latent = int(f.sum((0, 1)).argmax())

    def ablate(f: torch.Tensor) -> torch.Tensor:
        return f.clone().index_fill_(2, torch.tensor(latent), 0.0)

    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, edit=ablate)):
        _, found = model.run_with_cache(tokens, names_filter=HOOK)
    torch.testing.assert_close(
        found[HOOK], cache[HOOK] - f[..., latent, None] * sae.W_dec[latent], rtol=1e-4, atol=1e-4
    )


def test_gradients_reach_the_latents(model, tokens):
    sae, seen = made(), []

    def look(f: torch.Tensor) -> torch.Tensor:
        f.retain_grad()
        seen.append(f)
        return f

    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, edit=look)):
        model(tokens).logsumexp(-1).sum().backward()
    assert seen[0].grad is not None
    assert (seen[0].grad[seen[0] > 0] != 0).any()


def test_a_transcoder_replaces_what_another_hook_gives(model, tokens):
    sae = made(d_out=128)
    names = [MLP_IN, MLP_OUT]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    with model.hooks(fwd_hooks=sae.fwd_hooks(MLP_IN, target=MLP_OUT, error_term=False)):
        _, found = model.run_with_cache(tokens, names_filter=names)
    torch.testing.assert_close(found[MLP_OUT], sae(cache[MLP_IN], torch.arange(T).expand(3, T)))
    torch.testing.assert_close(found[MLP_IN], cache[MLP_IN])
    with pytest.raises(UserError, match="target: needed for a transcoder"):
        sae.fwd_hooks(MLP_IN)
    with pytest.raises(UserError, match="and for nothing else"):
        made().fwd_hooks(HOOK, target=MLP_OUT)


def hooked(**changes):
    """A HookedTransformer, whose `generate` has a key-value cache."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = {
        "n_layers": 2,
        "d_model": 128,
        "n_ctx": 32,
        "d_head": 32,
        "n_heads": 4,
        "d_vocab": 200,
        "act_fn": "gelu",
    }
    torch.manual_seed(3)
    return HookedTransformer(HookedTransformerConfig(**settings, **changes)).eval()


GENERATE = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False, "prepend_bos": False}
BEHIND = ("blocks.0.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre")


@pytest.fixture(scope="module")
def cached_model():
    return hooked()


def step_by_step(model, tokens, sizes, cache=None):
    """Logits of tokens given in pieces, with a cache."""
    cache = empty_cache(model, tokens) if cache is None else cache
    pieces = tokens.split(sizes, 1)
    return torch.cat([model(one, past_kv_cache=cache, attention_mask=torch.ones_like(one)) for one in pieces], 1)


def empty_cache(model, tokens):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache

    return Cache.init_cache(model.cfg, "cpu", len(tokens))


@pytest.mark.parametrize("positional", ["standard", "rotary"])
@pytest.mark.parametrize("hook", BEHIND)
@torch.no_grad()
def test_positions_go_on_behind_a_key_value_cache(hook, positional, tokens):
    model, sae = hooked(positional_embedding_type=positional), made()
    with model.hooks(fwd_hooks=sae.fwd_hooks(hook, error_term=False)):
        whole = model(tokens)
        for sizes in ([T], [5, 4, 3], [5, *[1] * 7]):
            torch.testing.assert_close(step_by_step(model, tokens, sizes), whole, rtol=1e-4, atol=1e-4)
        again = model(tokens)
        if positional == "rotary":  # of others, transformer_lens' own generate differs with a cache
            by_cache = model.generate(tokens[:, :6], **GENERATE)
            assert torch.equal(by_cache, model.generate(tokens[:, :6], use_past_kv_cache=False, **GENERATE))
    assert torch.equal(again, whole)
    with model.hooks(fwd_hooks=sae.fwd_hooks(hook, error_term=False, start=0)):  # as if each call began a row
        wrong = step_by_step(model, tokens, [5, *[1] * 7])
    assert (wrong - whole).abs().max() > 0.01


@torch.no_grad()
def test_the_start_can_be_given(cached_model, tokens):
    model, sae, hook = cached_model, made(), "blocks.0.hook_resid_pre"  # before the first attention
    with model.hooks(fwd_hooks=sae.fwd_hooks(hook, error_term=False)):
        whole = model(tokens)
        with pytest.raises(UserError, match="start: needed at blocks.0.hook_resid_pre.* 5 earlier tokens") as error:
            step_by_step(model, tokens, [5, 7])
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="start: needed .*a mask over positions .windows. and a single token"):
            step_by_step(model, tokens, [T - 1, 1])
    cache = empty_cache(model, tokens)
    at = sae.fwd_hooks(hook, error_term=False, start=lambda: cache[0].past_keys.shape[1])
    with model.hooks(fwd_hooks=at):
        found = step_by_step(model, tokens, [5, 1, 6], cache)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_single_token_without_a_cache_that_shows_is_refused(model, tokens):
    """transformer_lens' bridge doesn't show its cache to hooks."""
    sae = made()
    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, error_term=False)):
        with pytest.raises(UserError, match=f"start: needed at {HOOK}"):
            model.generate(tokens[:1, :4], **GENERATE)
        model.generate(tokens[:1, :4], use_past_kv_cache=False, **GENERATE)
    with model.hooks(fwd_hooks=sae.fwd_hooks(HOOK, error_term=False, start=0)):
        model(tokens[:1, :1])
    with model.hooks(fwd_hooks=made(mask=MaskConfig()).fwd_hooks(HOOK)):  # which looks at no positions
        model.generate(tokens[:1, :4], **GENERATE)


@torch.no_grad()
def test_a_dictionary_that_looks_along_rows_needs_whole_rows(cached_model, tokens):
    sae = made(activation="relu", parts=({"kind": "self_attention"},), mask=MaskConfig())
    assert sae.looks_along_rows
    with cached_model.hooks(fwd_hooks=sae.fwd_hooks("blocks.0.hook_resid_post", error_term=False)):
        cached_model(tokens)
        with pytest.raises(UserError, match="start: 5 is not allowed; .* needs whole rows"):
            step_by_step(cached_model, tokens, [5, 7])
