"""encode_topk against a float64 encoder and a stable sort: as a set, with the values at the chosen latents."""

import pytest
import torch
from temposae.kernels.configs import CONFIGS
from temposae.kernels.encode import encode, encode_topk

from .conftest import SMALL_BLOCKS, Shape

WIDE = Shape(N=9, D=24, F=301, K=12, T=5)  # ten small tiles, fewer candidates in each than K


@pytest.fixture(params=["torch", "triton in small blocks"], ids=["torch", "triton"])
def wide_backend(request, monkeypatch, poisoned):
    if request.param == "torch":
        return "torch"
    pytest.importorskip("triton")
    for op, config in CONFIGS[80].items():
        monkeypatch.setitem(CONFIGS[80], op, config | {k: v for k, v in SMALL_BLOCKS.items() if k in config})
    return "triton"


def inputs(shape, *, whole=False):
    n, d, f, *_ = shape
    generator = shape.generator
    x, W_enc = torch.randn(n, d, generator=generator), torch.randn(f, d, generator=generator).T / d**0.5
    b_enc, center = torch.randn(f, generator=generator), torch.randn(d, generator=generator)
    if whole:  # many exact ties, and every sum exact
        x, W_enc, b_enc, center = x.round(), (2 * W_enc).round(), b_enc.round(), center.round()
    return x, W_enc, b_enc, center


def activations(x, W_enc, b_enc, center, mask=None, pos=None):
    acts = ((x.double() - center.double()) @ W_enc.double() + b_enc.double()).relu()
    return acts if mask is None else acts * mask[pos].double()


def largest(acts, k):
    """[N, F] with the k largest of each row, the first among equals, and zeros elsewhere."""
    where = acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(acts).scatter(1, where, acts.gather(1, where))


def check(code, expected, assert_close, name="code"):
    assert code.values.dtype == torch.float32
    assert (code.values >= 0).all()
    assert (code.indices.sort(1).values.diff(dim=1) > 0).all(), f"{name}: a latent named twice"
    dense = code.to_dense()
    assert torch.equal(dense > 0, expected > 0), f"{name}: other latents"
    assert_close(dense, expected, name=name)


@pytest.mark.parametrize("mask_kind", ["no mask", "hard mask", "soft mask"])
def test_both_codes(shape, backend, mask_kind, assert_close):
    arguments = inputs(shape)
    pos = torch.randint(0, shape.T, (shape.N,), generator=shape.generator)
    mask = torch.rand(shape.T, shape.F, generator=shape.generator) if mask_kind != "no mask" else None
    mask = mask > 0.3 if mask_kind == "hard mask" else mask
    aux_latents = torch.rand(shape.F, generator=shape.generator) < 0.5
    x, W_enc, b_enc, center = arguments
    code, aux = encode_topk(
        x, W_enc, b_enc, shape.K, center=center, mask=mask, pos=pos, aux_k=max(1, shape.K // 2),
        aux_latents=aux_latents, backend=backend,
    )  # fmt: skip
    acts = activations(*arguments, mask, pos)
    check(code, largest(acts, shape.K), assert_close)
    check(aux, largest(acts * aux_latents, max(1, shape.K // 2)), assert_close, "aux code")


@pytest.mark.parametrize("kind", ["random", "all in one tile", "ties", "few positive", "none positive", "K = F"])
def test_selection_is_exact(wide_backend, kind, assert_close):
    shape = WIDE._replace(F=40, K=40) if kind == "K = F" else WIDE
    x, W_enc, b_enc, center = inputs(shape, whole=kind == "ties")
    if kind == "all in one tile":
        b_enc[64:96] += 8
    elif kind.endswith("positive"):
        b_enc -= 4 if kind == "few positive" else 100
    acts = activations(x, W_enc, b_enc, center)
    code, _ = encode_topk(x, W_enc, b_enc, shape.K, center=center, backend=wide_backend)
    check(code, largest(acts, shape.K), assert_close)
    if kind == "few positive":
        assert (acts > 0).any()
        assert ((acts > 0).sum(1) < shape.K).any()


@pytest.mark.parametrize("wide_backend", ["triton in small blocks"], indirect=True)
def test_what_exact_is_for(wide_backend):
    """Without it, what one tile has more than its candidates is lost."""
    x, W_enc, b_enc, center = inputs(WIDE)
    b_enc[128:160] += 8
    expected = largest(activations(x, W_enc, b_enc, center), WIDE.K) > 0
    found = {
        exact: encode_topk(x, W_enc, b_enc, WIDE.K, center=center, exact=exact, backend=wide_backend)[0].to_dense() > 0
        for exact in (True, False)
    }
    recall = {exact: float((dense & expected).sum() / expected.sum()) for exact, dense in found.items()}
    assert recall[True] == 1
    assert 0.4 < recall[False] < 0.95


def test_aux_code_is_exact_when_all_of_it_lies_in_one_tile(wide_backend, assert_close):
    x, W_enc, b_enc, center = inputs(WIDE)
    aux_latents = torch.arange(WIDE.F) // 32 == 3
    code, aux = encode_topk(
        x, W_enc, b_enc, WIDE.K, center=center, aux_k=WIDE.K, aux_latents=aux_latents, backend=wide_backend
    )
    acts = activations(x, W_enc, b_enc, center)
    check(code, largest(acts, WIDE.K), assert_close)
    check(aux, largest(acts * aux_latents, WIDE.K), assert_close, "aux code")


@pytest.mark.parametrize("wide_backend", ["triton in small blocks"], indirect=True)
def test_tiles_that_a_hard_mask_empties_are_left_out(wide_backend, assert_close):
    """Weights of NaN would show, even where they are masked, if they were multiplied with."""
    shape = WIDE._replace(N=40, T=8)
    x, W_enc, b_enc, _ = inputs(shape)
    pos = (torch.arange(shape.N) * shape.T) // shape.N
    mask = (torch.arange(shape.T) < 4)[:, None] == (torch.arange(shape.F) < 128)[None, :]
    expected = largest(activations(x, W_enc, b_enc, torch.zeros(shape.D), mask, pos), shape.K)
    broken = W_enc.clone()
    broken[:, 128:] = torch.nan
    first, second = slice(0, 16), slice(16, 40)  # tiles of 16 tokens: only the first lies in the first half for good
    found = {name: encode_topk(x, w, b_enc, shape.K, mask=mask, pos=pos, backend=wide_backend)[0].to_dense()
             for name, w in (("whole", W_enc), ("broken", broken))}  # fmt: skip
    assert_close(found["whole"], expected)
    assert_close(found["broken"][first], expected[first])
    assert found["broken"][second].isnan().any()
    acts = encode(x, broken, b_enc, mask=mask, pos=pos, backend=wide_backend)
    assert not acts[first].isnan().any()
    assert acts[second].isnan().any()


def test_nan_shows_in_its_own_row_only(wide_backend, assert_close):
    x, W_enc, b_enc, center = inputs(WIDE)
    x[3, 0] = torch.nan
    code, _ = encode_topk(x, W_enc, b_enc, WIDE.K, center=center, backend=wide_backend)
    others = torch.arange(WIDE.N) != 3
    assert code.values[3].isnan().all()
    assert_close(code.to_dense()[others], largest(activations(x, W_enc, b_enc, center)[others], WIDE.K))


def test_same_bits_twice(wide_backend):
    x, W_enc, b_enc, _ = inputs(WIDE)
    b_enc[64:96] += 8
    one, two = (encode_topk(x, W_enc, b_enc, WIDE.K, backend=wide_backend)[0] for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)


def test_candidates_suffice_for_all_but_one_row_in_a_hundred():
    pytest.importorskip("triton")
    from temposae.kernels.encode.triton import candidates_per_tile

    generator = torch.Generator().manual_seed(0)
    for f, k in ((65536, 64), (16384, 64), (16384, 32), (131072, 64), (4096, 8)):
        keep, tiles = candidates_per_tile(f, k, 128), f // 128
        chosen = torch.rand(1000, f, generator=generator).topk(k).indices // 128
        busiest = torch.zeros(1000, tiles, dtype=torch.int64).scatter_add_(1, chosen, torch.ones_like(chosen)).amax(1)
        assert (busiest >= keep).float().mean() < 0.03
        assert (busiest >= keep - 1).float().mean() > 0.01, "fewer would do"
        assert tiles * keep >= k
    assert candidates_per_tile(1024, 64, 128) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), r"k must lie in \[1, F\] = \[1, 6\], got 0"),
        (dict(k=7), "got 7"),
        (dict(aux_k=7), r"aux_k must lie in \[0, F\] = \[0, 6\], got 7"),
        (dict(aux_latents=torch.ones(5).bool()), r"aux_latents must have shape \[F\] = \[6\]"),
        (dict(aux_latents=torch.ones(6)), "aux_latents must be bool, got torch.float32"),
        (dict(b_enc=torch.ones(5)), r"b_enc must have shape \[F\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(x=torch.ones(2, 4), W_enc=torch.ones(4, 6), b_enc=torch.ones(6), k=2) | change
    with pytest.raises(ValueError, match=message):
        encode_topk(**arguments)
