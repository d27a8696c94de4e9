"""encode_topk and encode_threshold against a float64 encoder and a stable sort: as a set, with the values at its latents."""

import pytest
import torch
from temposae.kernels import certified_topk
from temposae.kernels.configs import CONFIGS
from temposae.kernels.encode import encode
from temposae.kernels.encode_sparse import encode_threshold, encode_topk
from temposae.kernels.fp8 import Fp8Rows
from temposae.kernels.masks import GaussianMask, weights_at
from temposae.kernels.selection import Selection, candidates_per_tile

from .conftest import SMALL_BLOCKS, Shape

WIDE = Shape(N=9, D=24, F=301, K=12, T=5)  # ten small tiles, fewer candidates in each than K


@pytest.fixture(
    params=["torch", "torch by bfloat16", "triton in small blocks"], ids=["torch", "torch-bfloat16", "triton"]
)
def wide_backend(request, monkeypatch, poisoned):
    if request.param == "torch by bfloat16":
        monkeypatch.setattr(certified_topk, "_is_faster", lambda *sizes: True)
    if request.param.startswith("torch"):
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
    return acts if mask is None else acts * weights_at(mask, pos).double()


def mask_of(kind, shape):
    """A mask of a kind for these T and F, or None, and a position for each token."""
    pos = torch.randint(0, shape.T, (shape.N,), generator=shape.generator)
    weights = torch.rand(shape.T, shape.F, generator=shape.generator)
    masks = {"hard mask": weights > 0.3, "soft mask": weights}
    masks["Gaussians"] = GaussianMask(weights[0] * shape.T, 0.5 + shape.T / 4)
    return masks.get(kind), pos


MASK_KINDS = ("no mask", "hard mask", "soft mask", "Gaussians")
MASKS = pytest.mark.parametrize("mask_kind", MASK_KINDS)


def largest(acts, k):
    """[N, F] with the k largest of each row, the first among equals, and zeros elsewhere."""
    where = acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(acts).scatter(1, where, acts.gather(1, where))


def check(code, expected, assert_close, name="code"):
    assert code.values.dtype == torch.float32
    assert (code.values >= 0).all()
    where = code.rows * code.n_latents + code.indices
    used = where.numel() if code.offsets is None else int(code.offsets[-1])
    assert (where.flatten()[:used].sort().values.diff() > 0).all(), f"{name}: a latent named twice"
    dense = code.to_dense()
    assert torch.equal(dense > 0, expected > 0), f"{name}: other latents"
    assert_close(dense, expected, name=name)


@MASKS
def test_both_codes(shape, backend, mask_kind, assert_close):
    arguments, (mask, pos) = inputs(shape), mask_of(mask_kind, shape)
    aux_latents = torch.rand(shape.F, generator=shape.generator) < 0.5
    x, W_enc, b_enc, center = arguments
    code, aux = encode_topk(
        x, W_enc, b_enc, shape.K, center=center, mask=mask, pos=pos, aux_k=max(1, shape.K // 2),
        aux_latents=aux_latents, backend=backend,
    )  # fmt: skip
    acts = activations(*arguments, mask, pos)
    check(code, largest(acts, shape.K), assert_close)
    check(aux, largest(acts * aux_latents, max(1, shape.K // 2)), assert_close, "aux code")


def largest_of_batch(acts, total):
    """[N, F] with the `total` largest positive ones, and zeros elsewhere."""
    where = acts.flatten().topk(total).indices
    return torch.zeros_like(acts).flatten().scatter(0, where, acts.flatten()[where]).view_as(acts)


@pytest.mark.parametrize("mask_kind", ["no mask", "hard mask"])
def test_largest_of_the_batch(shape, backend, mask_kind, assert_close):
    arguments, (mask, pos) = inputs(shape), mask_of(mask_kind, shape)
    x, W_enc, b_enc, center = arguments
    code, _ = encode_topk(
        x, W_enc, b_enc, shape.K, center=center, mask=mask, pos=pos, across_batch=True, backend=backend
    )
    assert code.values.shape == (shape.N * shape.K,)
    check(code, largest_of_batch(activations(*arguments, mask, pos), shape.N * shape.K), assert_close)


@pytest.mark.parametrize(
    ("thresholded", "mask_kind"),
    [(False, "soft mask"), (True, "no mask"), (True, "hard mask")],
    ids=["above zero-soft mask", "above thresholds-no mask", "above thresholds-hard mask"],
)
def test_above_a_threshold(shape, backend, thresholded, mask_kind, assert_close):
    arguments, (mask, pos) = inputs(shape), mask_of(mask_kind, shape)
    x, W_enc, b_enc, center = arguments
    threshold = 2 * torch.rand(shape.F, generator=shape.generator) if thresholded else None
    acts = activations(*arguments, mask, pos)
    expected = acts if threshold is None else acts * (acts > threshold)
    code = encode_threshold(
        x, W_enc, b_enc, threshold, center=center, mask=mask, pos=pos, expected=shape.K, backend=backend
    )
    assert len(code.values) == int((expected > 0).sum())
    check(code, expected, assert_close)


@pytest.mark.parametrize(
    "kind",
    [
        "all in one tile",
        "none positive",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("random", "one token has most", "a value twice")),
    ],
)
def test_ragged_codes_are_exact(wide_backend, kind, assert_close):
    x, W_enc, b_enc, center = inputs(WIDE)
    if kind == "all in one tile":
        b_enc[64:96] += 8
    elif kind == "one token has most":
        x[2] *= 20
    elif kind == "none positive":
        b_enc -= 100
    elif kind == "a value twice":  # at the cut, which takes one of them
        x = x[:1].repeat(WIDE.N, 1)
    acts, total = activations(x, W_enc, b_enc, center), WIDE.N * WIDE.K
    if kind == "a value twice":
        total += 4
        code = encode_topk(x, W_enc, b_enc, 1, center=center, across_batch=True, backend=wide_backend)[0]
        best = acts[0].argmax()
        assert (code.indices == best).all()
        assert code.offsets.diff().tolist() == [1] * WIDE.N
    else:
        code = encode_topk(x, W_enc, b_enc, WIDE.K, center=center, across_batch=True, backend=wide_backend)[0]
        check(code, largest_of_batch(acts, total), assert_close)
    threshold = torch.full((WIDE.F,), 1.5)
    code = encode_threshold(x, W_enc, b_enc, threshold, center=center, expected=4, backend=wide_backend)
    check(code, acts * (acts > 1.5), assert_close)


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


S = 2


def several(shape, mask_kind="no mask"):
    """Arguments for S dictionaries side by side, and the activations of each, float64 [S, N, F]."""
    each = [inputs(shape._replace(T=shape.T + nth)) for nth in range(S)]
    x, (_, pos) = each[0][0], mask_of(mask_kind, shape)
    W_enc, b_enc = torch.cat([one[1] for one in each], 1), torch.cat([one[2] for one in each])
    centers = torch.stack([one[3] for one in each])
    masks = [mask_of(mask_kind, shape._replace(K=shape.K + nth))[0] for nth in range(S)]
    acts = torch.stack([activations(x, *one[1:], mask, pos) for one, mask in zip(each, masks, strict=True)])
    if mask_kind == "no mask":
        mask = None
    elif mask_kind == "Gaussians":
        mask = masks[0]._replace(centre=torch.cat([one.centre for one in masks]))
    else:
        mask = torch.cat(masks, 1)
    return x, W_enc, b_enc, dict(center=centers, mask=mask, pos=pos, dictionaries=S), acts


def apart(acts):
    """[S N, S F]: what each dictionary says of each token, and zeros for the latents of the others."""
    return torch.block_diag(*acts)


def check_several(shape, mask_kind, backend, assert_close):
    x, W_enc, b_enc, settings, acts = several(shape, mask_kind)
    aux_latents = torch.rand(S, shape.F, generator=shape.generator) < 0.5
    settings["backend"] = backend
    code, aux = encode_topk(
        x, W_enc, b_enc, shape.K, aux_k=max(1, shape.K // 2), aux_latents=aux_latents.flatten(), **settings
    )
    check(code, apart([largest(one, shape.K) for one in acts]), assert_close)
    of_aux = [largest(one * on, max(1, shape.K // 2)) for one, on in zip(acts, aux_latents, strict=True)]
    check(aux, apart(of_aux), assert_close, "aux code")
    code, _ = encode_topk(x, W_enc, b_enc, shape.K, across_batch=True, **settings)
    assert len(code.values) == S * shape.N * shape.K
    check(code, apart([largest_of_batch(one, shape.N * shape.K) for one in acts]), assert_close, "of the batch")
    threshold = torch.rand(S, shape.F, generator=shape.generator)
    expected = apart(acts * (acts > threshold[:, None]))
    size = int((expected > 0).sum())
    code = encode_threshold(x, W_enc, b_enc, threshold.flatten(), expected=shape.K, **settings)
    assert len(code.values) == size
    check(code, expected, assert_close, "above thresholds")


@pytest.mark.slow
@pytest.mark.parametrize("mask_kind", ["no mask", "soft mask"])
def test_dictionaries_side_by_side(shape, backend, mask_kind, assert_close):
    check_several(shape, mask_kind, backend, assert_close)


@pytest.mark.parametrize(
    "mask_kind",
    ["hard mask", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("no mask", "soft mask", "Gaussians"))],
)
def test_dictionaries_side_by_side_in_tiles_of_their_own(wide_backend, mask_kind, assert_close):
    check_several(WIDE._replace(N=4, F=128, K=9), mask_kind, wide_backend, assert_close)


@pytest.mark.parametrize("dictionaries", [1, 2])
def test_a_code_that_is_too_small_says_so(wide_backend, dictionaries, assert_close):
    x, W_enc, b_enc, center = inputs(WIDE._replace(N=4, F=128))
    acts = activations(x, W_enc, b_enc, center)
    size = int((acts > 0).sum())
    for capacity in (size - 1, size, 3 * size):
        code = encode_threshold(
            x, W_enc, b_enc, center=center, expected=4, capacity=capacity, dictionaries=dictionaries,
            backend=wide_backend,
        )  # fmt: skip
        if capacity >= 2 * size or (dictionaries == 1 and capacity >= size):
            assert not code.overflow
            expected = acts if dictionaries == 1 else apart(torch.stack(acts.chunk(2, 1)))
            check(code, expected, assert_close)
            assert len(code.values) == capacity
        elif capacity < size:
            assert code.overflow
            assert int(code.offsets[-1]) <= capacity


@pytest.mark.parametrize(
    ("mask_kind", "wide_backend"),
    [
        pytest.param(kind, backend, marks=() if backend == "torch" or kind == "no mask" else pytest.mark.slow)
        for kind in MASK_KINDS
        for backend in ("torch", "triton")
    ],
    indirect=["wide_backend"],
)
def test_fp8_finds_almost_all_and_gives_exact_values(wide_backend, mask_kind, assert_close):
    shape = WIDE._replace(N=40)
    arguments, (mask, pos) = inputs(shape), mask_of(mask_kind, shape)
    x, W_enc, b_enc, center = arguments
    aux_latents = torch.arange(shape.F) % 2 == 0
    codes = encode_topk(
        x, W_enc, b_enc, shape.K, center=center, mask=mask, pos=pos, aux_k=6, aux_latents=aux_latents,
        fp8=Fp8Rows.of(W_enc.T), backend=wide_backend,
    )  # fmt: skip
    acts = activations(*arguments, mask, pos)
    for code, k, of in ((codes[0], shape.K, acts), (codes[1], 6, acts * aux_latents)):
        dense = code.to_dense()
        assert_close(dense, of * (dense > 0), name="values")
        assert (code.indices.sort(1).values.diff(dim=1) > 0).all()
        wanted = largest(of, k) > 0
        assert ((dense > 0) & wanted).sum() >= 0.97 * wanted.sum()
        assert (code.l0() == wanted.sum(1)).all()


@pytest.mark.parametrize("wide_backend", ["triton in small blocks"], indirect=True)
def test_the_product_is_in_fp8(wide_backend, assert_close):
    """What is preselected are the largest by the product of what e4m3 makes of x and W_enc, and no others."""
    from temposae.kernels.encode_sparse import merge

    x, W_enc, b_enc, _ = inputs(WIDE)
    rows = Fp8Rows.of(x), Fp8Rows.of(W_enc.T)
    assert rows[0].rows.float().abs().amax(1).tolist() == [448.0] * WIDE.N
    x8, w8 = (operand.widened()[:, : WIDE.D] for operand in rows)
    assert_close(x8, x, 0.04)
    code, _ = merge.preselect(*rows, b_enc, None, None, Selection(WIDE.K, 0, None, False, False, 1))
    check(code, largest(activations(x8, w8.T, b_enc, torch.zeros(WIDE.D)), WIDE.K), assert_close)


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
    threshold = encode_threshold(x, W_enc, b_enc, center=center, expected=4, backend=wide_backend)
    in_row = threshold.rows == 3
    assert in_row.any()
    assert threshold.values[in_row].isnan().all()
    assert not threshold.values[~in_row].isnan().any()
    assert_close(code.to_dense()[others], largest(activations(x, W_enc, b_enc, center)[others], WIDE.K))


@pytest.mark.parametrize("wide_backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_same_bits_twice(wide_backend):
    x, W_enc, b_enc, _ = inputs(WIDE)
    b_enc[64:96] += 8
    for across_batch in (False, True):
        one, two = (
            encode_topk(x, W_enc, b_enc, WIDE.K, across_batch=across_batch, backend=wide_backend)[0] for _ in range(2)
        )
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.indices, two.indices)


def test_candidates_suffice_for_all_but_one_row_in_a_hundred():
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
        (dict(fp8=Fp8Rows.of(torch.ones(6, 4)), across_batch=True), "fp8 is for the k largest of each token"),
        (
            dict(fp8=Fp8Rows.of(torch.ones(5, 4))),
            r"fp8.rows must have shape \[F, columns\] = \[6, 128\], got \[5, 128\]",
        ),
        (dict(aux_latents=torch.ones(5).bool()), r"aux_latents must have shape \[F\] = \[6\]"),
        (dict(aux_latents=torch.ones(6)), "aux_latents must be bool, got torch.float32"),
        (dict(b_enc=torch.ones(5)), r"b_enc must have shape \[F\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(x=torch.ones(2, 4), W_enc=torch.ones(4, 6), b_enc=torch.ones(6), k=2) | change
    with pytest.raises(ValueError, match=message):
        encode_topk(**arguments)
