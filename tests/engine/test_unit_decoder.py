"""A dictionary read with decoder rows of norm 1: x_hat and the selection are its own, whatever the norms were."""

from typing import Any

import pytest
import torch
from temposae.engine import registry
from temposae.engine.composed import dictionary
from temposae.engine.config import MaskConfig, SAEConfig
from temposae.engine.parts import Part, part
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.unit_decoder import unit_decoder

D, F, T, N = 12, 40, 16, 96
DICTIONARIES: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"}, "topk": {}, "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"}, "matryoshka": {"activation": "batchtopk", "prefixes": (10, F)},
    "mask": {"mask": MaskConfig(kind="ranges", positions=T)}, "transcoder": {"activation": "relu", "d_out": 9},
    "topk transcoder": {"d_out": 9}, "topk without b_dec": {"apply_b_dec_to_input": False},
    "parts": {"parts": ({"kind": "reads_the_decoder"},)},
}  # fmt: skip


@pytest.fixture
def reads_the_decoder(monkeypatch):
    """A part that looks at the rows of the decoder: it must see them as they were trained."""
    registry.find("layer_norm")  # ours are known from here on
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))
    latents = lambda self, f, seen: f * (seen.sae.W_dec.norm(dim=1) > 1)
    part("reads_the_decoder")(type("ReadsTheDecoder", (Part,), {"latents": latents}))


def made(kind: str) -> SparseAutoencoder:
    """Row norms from 0.1 to 10, the third row zero; random biases and thresholds."""
    sae = dictionary(SAEConfig(**{"d_in": D, "d_sae": F, "k": 5, "aux_k": 4, **DICTIONARIES[kind]}), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.W_dec.mul_(10 ** torch.linspace(-1, 1, F)[torch.randperm(F, generator=draw)][:, None])
        sae.W_dec[2] = 0
        for name, tensor in sae.state_dict().items():
            if name in ("b_enc", "b_dec", "threshold"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) / 2)
    return sae


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_the_function_stays_and_the_rows_have_norm_one(reads_the_decoder, kind, assert_close):
    sae = made(kind)
    unit = unit_decoder(sae)
    x, pos = torch.randn(N, D, generator=torch.Generator().manual_seed(0)), torch.arange(N) % T
    norm = sae.W_dec.detach().norm(dim=1)
    expected = torch.ones(F)
    expected[2] = 0
    assert_close(unit.W_dec.norm(dim=1), expected, 1e-6)
    assert norm[norm > 0].min() < 0.2
    assert norm.max() > 5

    raw, code = sae.encode_sparse(x, pos), unit.encode_sparse(x, pos)
    assert torch.equal(code.to_dense() != 0, raw.to_dense() != 0)  # the same latents are selected
    by = torch.where(norm > 0, norm, 1)
    assert_close(code.to_dense(), raw.to_dense() * by, 1e-6)
    assert_close(unit.encode(x, pos), raw.to_dense() * by, 1e-6)
    x_hat = sae(x, pos).detach()
    for found in (unit.decode(code), unit.decode(code.to_dense()), unit(x, pos)):
        assert_close(found, x_hat, 1e-6)
    assert_close(code.to_dense() @ unit.W_dec + unit.b_dec, x_hat, 1e-6)  # as whoever reads the rows has it


def test_folding_the_encoder_of_a_topk_dictionary_would_be_another_function():
    sae = made("topk")
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    folded, unit = made("topk"), unit_decoder(sae)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(folded, name).copy_(getattr(unit, name))
    assert (folded(x) - sae(x)).norm() > 0.1 * sae(x).norm()


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_weights_are_those_of_the_same_function(activation, assert_close):
    """Where activations commute with scale, the encoder that is shown gives the latents by itself."""
    unit = unit_decoder(made(activation))
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    pre = ((x - unit.b_dec) @ unit.W_enc + unit.b_enc).relu()
    f = unit.encode(x)
    assert_close(torch.where(f > 0, pre, 0), f, 1e-5)


def test_a_dictionary_with_rows_of_norm_one_is_passed_through():
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=5), seed=1)
    unit = unit_decoder(sae)
    assert unit.W_dec.data_ptr() == sae.W_dec.data_ptr()
    x = torch.randn(N, D)
    assert torch.equal(unit.encode_sparse(x).values, sae.encode_sparse(x).values)
    assert unit_decoder(unit) is unit
