"""Candidates from bfloat16 products: the bound that certifies a selection, the float32 path for the rest, the use."""

import pytest
import torch
from temposae.kernels import certified_topk
from temposae.kernels.autograd import encode_topk as encode_with_gradients
from temposae.kernels.certified_topk import OUTPUT, applies, bfloat16_candidates, bfloat16_speedup, upper_bounds
from temposae.kernels.encode_sparse import encode_topk
from temposae.kernels.encoder_inputs import EncoderInputs
from temposae.kernels.selection import Selection

TOPK = Selection(k=4, aux_k=0, aux_latents=None, across_batch=False, exact=True, dictionaries=1)


def drawn(n, d, f, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=generator), torch.randn(f, d, generator=generator) / d**0.5
    scale = torch.rand(f, 1, generator=generator).exp2().square()
    return x, (scale * W).T, torch.randn(f, generator=generator)


def aligned(n, d, f):
    """Every element is rounded by half a step, always downwards, so that all errors add up: Cauchy-Schwarz is tight."""
    half_step = 1 + 2.0**-8
    return torch.full((n, d), half_step), torch.full((f, d), half_step).T, torch.full((f,), half_step)


def one_large(n, d, f):
    x, W, b = drawn(n, d, f)
    x[:, 0] *= 1000
    W[1] *= 1000
    return x, W, 100 * b


@pytest.mark.parametrize("make", [drawn, aligned, one_large])
@pytest.mark.parametrize("size", [(7, 5, 9), (40, 300, 70), (9, 2304, 130)], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_activation_exceeds_its_bound(make, size, scale):
    x, W_enc, b_enc = make(*size)
    x, b_enc = scale * x, scale * b_enc
    bounds = upper_bounds(x, W_enc, b_enc)
    assert bounds is not None
    bounds = OUTPUT * bounds.double()
    exact = x.double() @ W_enc.double() + b_enc.double()
    in_float32 = torch.addmm(b_enc, x, W_enc).double()
    for pre in (exact, in_float32):
        assert (bounds >= pre)[pre > 0].all()
    slack = (bounds - exact) / (x.norm(dim=1)[:, None] * W_enc.norm(dim=0) + b_enc.abs()).double()
    assert slack.max() < 0.03, "a bound this loose certifies little"


@pytest.mark.parametrize("across_batch", [False, True])
def test_differences_below_bfloat16_are_left_to_float32(across_batch, monkeypatch):
    """Most latents are nearly the same, so a bfloat16 product does not say which of them are the largest."""
    generator = torch.Generator().manual_seed(0)
    n, d, f = 12, 64, 200
    x, b_enc, same = torch.randn(n, d, generator=generator), torch.zeros(f), torch.randn(d, 1, generator=generator)
    W_enc = same + 1e-4 * torch.randn(f, d, generator=generator).T
    W_enc[:, : f // 8] = torch.randn(f // 8, d, generator=generator).T
    acts = (x.double() @ W_enc.double()).relu()
    tokens = []
    encode = certified_topk.encode
    monkeypatch.setattr(certified_topk, "encode", lambda inputs: tokens.append(len(inputs.x)) or encode(inputs))
    with bfloat16_candidates(True):
        code, _ = encode_topk(x, W_enc, b_enc, 4, across_batch=across_batch)
    assert tokens, "nothing was left to float32"
    flat = acts.flatten()[None] if across_batch else acts
    best = flat.topk(4 * n if across_batch else 4, dim=1)
    expected = torch.zeros_like(flat).scatter(1, best.indices, best.values).view_as(acts)
    assert torch.equal(code.to_dense() > 0, expected > 0)


def test_few_tokens_are_left_to_float32(monkeypatch):
    monkeypatch.setattr(certified_topk, "encode", lambda inputs: pytest.fail(f"{len(inputs.x)} tokens"))
    with bfloat16_candidates(True):
        for across_batch in (False, True):
            encode_topk(*drawn(100, 256, 4096), 32, across_batch=across_batch)


def test_gradients_are_those_of_the_float32_path(assert_close):
    x, W_enc, b_enc = drawn(30, 48, 160)
    W_enc, b_enc = W_enc.requires_grad_(), b_enc.requires_grad_()
    dead = torch.arange(160) % 3 == 0
    gradients = []
    for enabled in (True, False):
        with bfloat16_candidates(enabled):
            code, aux = encode_with_gradients(x, W_enc, b_enc, k=7, aux_k=5, aux_latents=dead)
        gradients.append(torch.autograd.grad(code.values.square().sum() + aux.values.sum(), (W_enc, b_enc)))
    for of_candidates, expected in zip(*gradients, strict=True):
        assert_close(of_candidates, expected)


@pytest.fixture
def used(monkeypatch):
    """used(speedup, *arguments): whether a processor with this speedup takes candidates from bfloat16 products."""

    def use(speedup, x, W_enc, b_enc=None, center=None, selection=TOPK):
        monkeypatch.setattr(certified_topk, "bfloat16_speedup", lambda: speedup)
        b_enc = torch.zeros(W_enc.shape[1]) if b_enc is None else b_enc
        return applies(EncoderInputs(x, W_enc, b_enc, center, None, None), selection)

    return use


def empty(n, d, f, dtype=torch.float32):
    return torch.empty(n, d, dtype=dtype), torch.empty(f, d, dtype=dtype).T


@pytest.mark.parametrize(
    ("size", "k", "from_speedup"),
    [
        ((1024, 768, 4096), 32, 3.0),
        ((1024, 768, 16384), 32, 1.5),
        ((8192, 2304, 65536), 64, 1.5),
        ((16, 768, 16384), 32, None),  # rounding W_enc costs more than it saves
        ((1024, 32, 16384), 32, None),
        ((1024, 768, 1024), 64, None),  # too many candidates
    ],
    ids=str,
)
def test_the_decision_follows_sizes_and_the_processor(used, size, k, from_speedup):
    for speedup in (0.0, 1.5, 3.0):
        expected = from_speedup is not None and speedup >= from_speedup
        assert used(speedup, *empty(*size), selection=TOPK._replace(k=k)) == expected


def test_what_cannot_be_certified_takes_the_float32_path(used):
    x, W_enc = empty(1024, 768, 16384)
    assert used(3.0, x, W_enc)
    assert not used(3.0, x, W_enc.contiguous()), "rows of W_enc are gathered"
    assert not used(3.0, *empty(1024, 768, 16384, torch.float64))
    assert not used(3.0, x, W_enc, selection=TOPK._replace(dictionaries=2))
    assert not used(3.0, x, W_enc, selection=TOPK._replace(aux_k=2))
    assert not used(3.0, x, W_enc, center=torch.zeros(2, 768))
    with bfloat16_candidates(False):
        assert not used(3.0, x, W_enc)


@pytest.mark.parametrize(
    ("features", "measured", "speedup"),
    [((), 9.0, 0.0), (("avx512_bf16",), 1.9, 1.5), (("avx512_bf16", "amx_tile"), 5.0, 3.0), (("amx_tile",), 1.1, 0.0)],
    ids=str,
)
def test_the_processor_decides(monkeypatch, features, measured, speedup):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=name in features: has, raising=False)
    monkeypatch.setattr(certified_topk, "_measured_speedup", lambda: measured)
    assert bfloat16_speedup.__wrapped__() == speedup
