"""Dictionaries within a language model, by transformer_lens' own hooks."""

import pytest
import torch
from temposae.engine.composed import dictionary
from temposae.engine.config import MaskConfig, SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream.loading import load

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
