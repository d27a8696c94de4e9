"""Candidates from bfloat16 products: the bound that certifies a selection, the float32 path for the rest, the use."""

from types import SimpleNamespace

import pytest
import torch
from temposae.kernels import certified_topk
from temposae.kernels.autograd import encode_topk as encode_with_gradients
from temposae.kernels.certified_topk import (
    OUTPUT,
    applies,
    bfloat16_candidates,
    bfloat16_speedup,
    bound_operands,
    upper_bounds,
)
from temposae.kernels.encode_sparse import encode_topk
from temposae.kernels.encoder_inputs import EncoderInputs
from temposae.kernels.masks import GaussianMask, weights_at
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


def representable(n, d, f):
    """bfloat16 numbers, which have no rounding errors: what is left are those of sums."""
    return tuple(tensor.bfloat16().float() for tensor in drawn(n, d, f))


def tiny_norms(n, d, f):
    """Squares of such numbers are zero in float32."""
    x, W, b = drawn(n, d, f)
    return 1e-25 * x, W, 0 * b


def grown(n, d, f):
    """Every element is rounded away from zero, and all errors add up: |x^| = |x| + |x - x^|."""
    above_half_step = 1 + 2.0**-8 + 2.0**-20
    return torch.full((n, d), above_half_step), torch.full((f, d), -above_half_step).T, torch.zeros(f)


@pytest.mark.parametrize("make", [drawn, aligned, one_large, representable, tiny_norms, grown])
@pytest.mark.parametrize("size", [(7, 5, 9), (3, 14, 9), (40, 300, 70), (9, 2304, 130)], ids=str)
def test_the_operands_allow_for_the_rounding_of_both_sums(make, size):
    x, W_enc, b_enc = make(*size)
    torch.use_deterministic_algorithms(True)  # unwritten memory holds NaN
    try:
        rows, latents = bound_operands(x, W_enc, b_enc)
    finally:
        torch.use_deterministic_algorithms(False)
    columns = rows.shape[1]
    assert columns % 32 == 0
    rows, latents, x, W_enc, b_enc = (tensor.double() for tensor in (rows, latents, x, W_enc, b_enc))
    # What a float32 sum of that many products may lose, in any order: of the bound's operands, and of the activation's.
    lost = columns * 2.0**-24 * (rows.abs() @ latents.abs().T + x.abs() @ W_enc.abs() + b_enc.abs())
    assert (rows @ latents.T - (x @ W_enc + b_enc) >= lost).all()


def test_the_factor_covers_two_roundings_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    acts, weights = 1 + torch.rand(2, 2**20, generator=generator)
    bounds = acts.bfloat16().mul_(weights)
    assert bounds.dtype == torch.bfloat16
    assert (OUTPUT * bounds.double() >= acts.double() * weights.double()).all()
    assert (1.007 * bounds.double() < acts.double() * weights.double()).any(), "this would do"


@pytest.mark.parametrize(
    ("x_scale", "W_scale", "b"),
    [(1e18, 1e19, 0), (1, 1, 2e37), (1e25, 1e-15, 0), (torch.nan, 1, 0), (1, torch.inf, 0), (1, 1, torch.nan)],
)
def test_numbers_without_a_bound_take_the_float32_path(x_scale, W_scale, b, assert_close):
    x, W_enc, b_enc = drawn(6, 8, 40)
    x[1], W_enc[:, 3], b_enc[5] = x_scale * x[1].sign(), W_scale * W_enc[:, 3].sign(), b
    assert upper_bounds(x, W_enc, b_enc) is None
    for across_batch in (False, True):
        codes = []
        for enabled in (True, False):
            with bfloat16_candidates(enabled):
                codes.append(encode_topk(x, W_enc, b_enc, 4, across_batch=across_batch)[0])
        assert torch.equal(codes[0].indices, codes[1].indices)
        assert codes[0].values.equal(codes[1].values) or codes[0].values.isnan().any()


def selected(acts, k, across_batch):
    """[N, F] with the K largest of each token, or the N K largest, the first among equals, and zeros elsewhere."""
    flat = acts.flatten()[None] if across_batch else acts
    best = flat.sort(dim=1, descending=True, stable=True).indices[:, : k * len(acts) // len(flat)]
    return torch.zeros_like(flat).scatter(1, best, flat.gather(1, best)).view_as(acts)


def one_row(n, d, f):
    """All tokens are the same and have no product, so the activations are the biases."""
    x, W_enc, b_enc = torch.ones(n, d), torch.zeros(f, d).T, torch.zeros(f)
    return x, W_enc, b_enc


def below_bfloat16(n, d, f):
    """All activations are the same bfloat16 number, and the largest come last."""
    x, W_enc, _ = one_row(n, d, f)
    return x, W_enc, 1 + 2.0**-9 * torch.arange(f) / f


def equal(n, d, f):
    """Each activation is there several times."""
    x, W_enc, b_enc = drawn(n, d, f)
    return x.round(), (2 * W_enc).round(), b_enc.round()


def few_positive(n, d, f):
    """Latent 0, which unused entries name, has a large bias and is never active."""
    x, W_enc, b_enc = drawn(n, d, f)
    x[:, 0], W_enc[0, 0] = 1, -100
    b_enc -= 4
    b_enc[0] = 50
    return x, W_enc, b_enc


def candidates_that_are_zero(n, d, f):
    """Two latents are large. Of the others, those with the largest bounds are slightly negative, the rest positive."""
    x, W_enc, b_enc = drawn(n, d, f)
    x, sign = x[:1].repeat(n, 1), torch.where(torch.arange(f) < 3 * f // 4, -1, 1)
    W_enc[:, : 3 * f // 4] *= 10
    b_enc = 1e-3 * sign * (1 + b_enc.abs()) - x[0] @ W_enc
    b_enc[:2] += 100
    return x, W_enc, b_enc


@pytest.mark.parametrize("across_batch", [False, True])
@pytest.mark.parametrize("make", [below_bfloat16, equal, few_positive, candidates_that_are_zero])
def test_the_selection_is_exact(make, across_batch):
    x, W_enc, b_enc = make(6, 24, 120)
    acts = (x.double() @ W_enc.double() + b_enc.double()).relu()
    with bfloat16_candidates(True):
        code, _ = encode_topk(x, W_enc, b_enc, 4, across_batch=across_batch)
        of_rows, _ = encode_topk(x, W_enc.contiguous(), b_enc, 4, across_batch=across_batch)  # such as SAELens'
    assert (code.values >= 0).all()
    assert torch.equal(code.to_dense() > 0, selected(acts, 4, across_batch) > 0)
    assert torch.equal(code.indices, of_rows.indices)
    assert torch.equal(code.values, of_rows.values)


@pytest.mark.parametrize("across_batch", [False, True])
@pytest.mark.parametrize("kind", ["hard mask", "soft mask", "Gaussians"])
def test_masks_centers_and_auxiliary_codes(kind, across_batch, monkeypatch, assert_close):
    n, d, f, t = 24, 32, 120, 9
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = drawn(n, d, f)
    W_enc[:, f // 2 :] = W_enc[:, :1] + 1e-3 * W_enc[:, f // 2 :]  # so that tokens that like them are left to float32
    b_enc[f // 2 :] = b_enc[0]
    x[::2] += 3 * W_enc[:, 0]
    center, weights = torch.randn(d, generator=generator), torch.rand(t, f, generator=generator)
    pos, dead = torch.randint(0, t, (n,), generator=generator), torch.arange(f) % 3 == 1
    mask = {"hard mask": weights > 0.3, "soft mask": weights, "Gaussians": GaussianMask(t * weights[0], 4.0)}[kind]
    acts = ((x - center).double() @ W_enc.double() + b_enc.double()).relu() * weights_at(mask, pos).double()
    tokens, encode = [], certified_topk.encode
    monkeypatch.setattr(certified_topk, "encode", lambda inputs: tokens.append(len(inputs.x)) or encode(inputs))
    with bfloat16_candidates(True):
        code, aux = encode_topk(
            x, W_enc, b_enc, 4, center=center, mask=mask, pos=pos, aux_k=5, aux_latents=dead, across_batch=across_batch
        )
    assert across_batch or (len(tokens) == 2 and tokens[0] < n)  # the auxiliary code takes float32 for all
    for sparse, expected in ((code, selected(acts, 4, across_batch)), (aux, selected(acts * dead, 5, False))):
        assert torch.equal(sparse.to_dense() > 0, expected > 0)
        assert_close(sparse.to_dense(), expected)


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
    assert torch.equal(code.to_dense() > 0, selected(acts, 4, across_batch) > 0)


@pytest.mark.parametrize("across_batch", [False, True])
def test_few_more_candidates_are_worked_out_without_float32_for_all(across_batch, monkeypatch):
    """Bounds do not tell 2 K candidates from others of the 20 or 12 latents that are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    n, d, f, k = 12, 64, 4000, 4
    clusters = [torch.arange(f) % 200 == 7, (torch.arange(f) % 333 == 3) & (torch.arange(f) < 3900)]
    W_enc, x = torch.zeros(d, f), torch.empty(n, d)
    for i, cluster in enumerate(clusters):
        same, size = torch.randn(d, 1, generator=generator), int(cluster.sum())
        W_enc[:, cluster] = same + 1e-3 * torch.randn(size, d, generator=generator).T
        x[i::2] = 60 * same.T / same.square().sum() + 1e-3 * torch.randn(n // 2, d, generator=generator)
    b_enc = torch.where(clusters[0] | clusters[1], 0.0, -100.0)
    x[1] = torch.linalg.qr(W_enc[:, [7, 3]], mode="complete").Q[
        :, -1
    ]  # bounds of latents that are not active are positive
    x[1] -= 0.01 * W_enc[:, 7] / W_enc[:, 7].square().sum()
    acts = (x.double() @ W_enc.double() + b_enc.double()).relu()
    monkeypatch.setattr(certified_topk, "encode", lambda inputs: pytest.fail(f"{len(inputs.x)} tokens in float32"))
    further, ragged = [], certified_topk._ragged
    monkeypatch.setattr(certified_topk, "_ragged", lambda chosen: further.append(chosen.sum(1)) or ragged(chosen))
    with bfloat16_candidates(True):
        code, _ = encode_topk(x, W_enc, b_enc, k, across_batch=across_batch)
    assert torch.cat(further).tolist() == [20, 0 if across_batch else 32] + 5 * [20, 12]
    dense, expected = code.to_dense().double(), selected(acts, k, across_batch)
    kept = dense > 0  # activations of 60 that differ by 1e-5 may change places
    torch.testing.assert_close(dense[kept], acts[kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dense[kept].sort().values, expected[expected > 0].sort().values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("across_batch", [False, True])
def test_few_tokens_are_left_to_float32(across_batch, monkeypatch):
    monkeypatch.setattr(certified_topk, "encode", lambda inputs: pytest.fail(f"{len(inputs.x)} tokens"))
    x, W_enc, b_enc = drawn(100, 256, 4096)
    with bfloat16_candidates(True):
        encode_topk(x, W_enc, b_enc, 32, across_batch=across_batch)
        encode_topk(
            *few_positive(10, 24, 120), 12, across_batch=across_batch
        )  # all that can be positive are candidates
        encode_topk(x, W_enc[:, :60], b_enc[:60] + 100, 32, across_batch=across_batch)  # so are all latents


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
        ((1024, 768, 4096), 32, 2.0),
        ((1024, 768, 16384), 32, 2.0),
        ((8192, 2304, 65536), 64, 2.0),
        ((16, 768, 16384), 32, None),  # rounding W_enc costs more than it saves
        ((1024, 32, 16384), 32, None),
        ((1024, 768, 1024), 64, None),  # too many candidates
        ((1024, 2304, 4096), 64, None),  # whose rows come from memory
        ((1024, 128, 4096), 32, 3.0),  # with the margin
    ],
    ids=str,
)
def test_the_decision_follows_sizes_and_the_processor(used, size, k, from_speedup):
    for speedup in (0.0, 2.0, 3.0):
        expected = from_speedup is not None and speedup >= from_speedup
        assert used(speedup, *empty(*size), selection=TOPK._replace(k=k)) == expected


def test_the_decision_counts_a_transposition(used):
    (x, W_enc), selection = empty(1024, 768, 2048), TOPK._replace(k=32)
    assert used(2.0, x, W_enc, selection=selection)
    assert not used(2.0, x, W_enc.contiguous(), selection=selection)
    assert used(3.0, x, W_enc.contiguous(), selection=selection)


def test_what_cannot_be_certified_takes_the_float32_path(used):
    x, W_enc = empty(1024, 768, 16384)
    assert used(3.0, x, W_enc)
    assert not used(3.0, *empty(1024, 768, 16384, torch.float64))
    assert not used(3.0, x, W_enc, selection=TOPK._replace(dictionaries=2))
    assert not used(3.0, x, W_enc, selection=TOPK._replace(aux_k=2))
    assert not used(3.0, x, W_enc, center=torch.zeros(2, 768))
    with bfloat16_candidates(False):
        assert not used(3.0, x, W_enc)
    assert used(3.0, x, W_enc)
    assert not used(3.0, x, W_enc.requires_grad_())
    with torch.no_grad(), bfloat16_candidates(True):
        assert used(0.0, x, W_enc)
        assert not used(0.0, x[:0], W_enc)
        assert not used(0.0, x.to("meta"), W_enc)


@pytest.mark.parametrize(
    ("features", "measured", "speedup"),
    [((), 9.0, 0.0), (("avx512_bf16",), 1.9, 2.0), (("avx512_bf16", "amx_tile"), 5.0, 3.0), (("amx_tile",), 1.1, 0.0)],
    ids=str,
)
def test_the_processor_decides(monkeypatch, features, measured, speedup):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=name in features: has, raising=False)
    calls = []
    monkeypatch.setattr(certified_topk, "_measured_speedup", lambda: calls.append(1) or measured)
    bfloat16_speedup.cache_clear()
    assert [bfloat16_speedup(), bfloat16_speedup()] == [speedup, speedup]
    assert len(calls) == bool(features), "measured once per process"
    bfloat16_speedup.cache_clear()


def test_the_measurement_divides_float32_by_bfloat16(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(certified_topk, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(torch, "mm", lambda x, w: clock.append(clock.pop() + x.element_size()))
    assert certified_topk._measured_speedup() == 2
