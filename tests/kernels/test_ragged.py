"""Ragged codes where tiles are computed again: exact with an outlier token, counted, and cheap by a model of their cost.
And the merge of candidates at rows with ties, equal values or few positive ones."""

from types import SimpleNamespace

import pytest
import torch
from temposae.kernels import encode_sparse
from temposae.kernels.configs import CONFIGS, DISPATCH_RATES
from temposae.kernels.cost import Cost
from temposae.kernels.encode_sparse import encode_threshold, encode_topk
from temposae.kernels.selection import candidates_per_tile

from .conftest import SMALL_BLOCKS, Shape
from .test_encode_sparse import MASKS, WIDE, activations, check, inputs, largest, largest_of_batch, mask_of, several

pytest.importorskip("triton")

SHAPES = (WIDE, Shape(N=18, D=40, F=150, K=6, T=3), Shape(N=12, D=33, F=515, K=5, T=2))
SHAPES_OR_SLOW = (SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:]))
each_shape = pytest.mark.parametrize("small", SHAPES_OR_SLOW, ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, poisoned):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")
    for op, config in CONFIGS[80].items():
        monkeypatch.setitem(CONFIGS[80], op, config | {k: v for k, v in SMALL_BLOCKS.items() if k in config})


def with_outlier(shape, mask_kind):
    """Operands with one token ten times as large as the others, and the activations."""
    arguments, (mask, pos) = inputs(shape), mask_of(mask_kind, shape)
    arguments[0][-1] *= 10
    return arguments, dict(center=arguments[3], mask=mask, pos=pos), activations(*arguments, mask, pos)


def full_tiles(acts, cut, keep, tile=SMALL_BLOCKS["BLOCK_F"]):
    """How many (token, tile) pairs have `keep` activations above the cut."""
    padded = torch.nn.functional.pad(acts, (0, -acts.shape[1] % tile))
    return int(((padded.unflatten(1, (-1, tile)) > cut).sum(2) >= keep).sum())


@MASKS
@each_shape
def test_an_outlier_token_of_a_batch(small, mask_kind, assert_close):
    shape = small
    (x, W_enc, b_enc, _), settings, acts = with_outlier(shape, mask_kind)
    aux_latents = torch.rand(shape.F, generator=shape.generator) < 0.5
    code, aux = encode_topk(x, W_enc, b_enc, shape.K, across_batch=True, aux_k=4, aux_latents=aux_latents, **settings)
    check(code, largest_of_batch(acts, shape.N * shape.K), assert_close)
    check(aux, largest(acts * aux_latents, 4), assert_close, "aux code")
    kept = acts.masked_fill(code.to_dense() == 0, 0)
    assert kept[-1].count_nonzero() > 1.5 * shape.K, "the outlier has most entries"
    assert code.recomputed.item() >= full_tiles(kept, 0, candidates_per_tile(shape.F, 2 * shape.K, 32)) > 0


@MASKS
@each_shape
@pytest.mark.parametrize("thresholded", [False, True], ids=["above zero", "above thresholds"])
def test_an_outlier_token_above_thresholds(small, mask_kind, thresholded, assert_close):
    shape = small
    (x, W_enc, b_enc, _), settings, acts = with_outlier(shape, mask_kind)
    threshold = 3 * torch.rand(shape.F, generator=shape.generator) if thresholded else None
    acts = acts if threshold is None else acts * (acts > threshold)
    n_entries, keep = int((acts > 0).sum()), candidates_per_tile(shape.F, 4, 32)
    for capacity in (None, n_entries, n_entries - 1)[: 3 if mask_kind == "no mask" else 2]:
        code = encode_threshold(x, W_enc, b_enc, threshold, expected=4, capacity=capacity, **settings)
        assert code.recomputed.item() == full_tiles(acts, 0, keep) > 0
        if capacity != n_entries - 1:
            check(code, acts, assert_close)
        assert code.overflow is None if capacity is None else bool(code.overflow) == (capacity < n_entries)


def test_each_unsure_tile_is_multiplied_once(monkeypatch, assert_close):
    """One product over blocks of tokens that share a tile, whatever the number of passes. Without it, entries are lost."""
    from temposae.kernels.encode_sparse import ragged

    x, W_enc, b_enc, center = inputs(WIDE._replace(N=20))
    b_enc[64:96] += 8  # a tile that is full on every token, so that it has several blocks
    acts = activations(x, W_enc, b_enc, center)
    launched, launch = [], ragged.launch_kernel
    for skipped in (None, ragged.recompute_kernel):

        def launch_most(kernel, grid, *arguments, skipped=skipped, **options):
            launched.append(kernel)
            if kernel is skipped:
                arguments[12].fill_(-1)
            else:
                launch(kernel, grid, *arguments, **options)

        monkeypatch.setattr(ragged, "launch_kernel", launch_most)
        code, _ = encode_topk(x, W_enc, b_enc, WIDE.K, center=center, across_batch=True)
        assert (code.to_dense() > 0).sum() == 20 * WIDE.K
        exact = torch.equal(code.to_dense() > 0, largest_of_batch(acts, 20 * WIDE.K) > 0)
        assert exact == (skipped is None)
        assert code.recomputed.item() >= 20
    assert launched.count(ragged.recompute_kernel) == 2
    assert launched.count(ragged.above_cut_kernel) == 2 * 8


@pytest.mark.parametrize("mask_kind", ["no mask", pytest.param("soft mask", marks=pytest.mark.slow)])
def test_same_bits_twice_with_an_outlier(mask_kind):
    (x, W_enc, b_enc, _), settings, _ = with_outlier(WIDE, mask_kind)
    for encode in (
        lambda: encode_topk(x, W_enc, b_enc, WIDE.K, across_batch=True, **settings)[0],
        lambda: encode_threshold(x, W_enc, b_enc, expected=4, capacity=2000, **settings),
    ):
        one, two = encode(), encode()
        used = int(one.offsets[-1])
        assert torch.equal(one.offsets, two.offsets)
        assert torch.equal(one.values[:used], two.values[:used])
        assert torch.equal(one.indices[:used], two.indices[:used])


def test_nothing_is_computed_again_where_no_tile_is_full(assert_close):
    x, W_enc, b_enc, center = inputs(WIDE)
    for shift in (-100.0, -4.0):
        acts = activations(x, W_enc, b_enc + shift, center)
        code = encode_threshold(x, W_enc, b_enc + shift, center=center, expected=60)
        check(code, acts, assert_close)
        assert code.recomputed.item() == 0


def test_each_dictionary_counts_its_own_tiles():
    """Side by side as many as alone."""
    shape = WIDE._replace(N=6, F=128)
    x, W_enc, b_enc, settings, _ = several(shape)
    x[-1] *= 10  # has most entries, in full tiles
    b_enc[:24] += 3
    for encode in (
        lambda *operands, **how: encode_topk(*operands, shape.K, across_batch=True, **how)[0],
        lambda *operands, **how: encode_threshold(*operands, expected=4, **how),
    ):
        alone = [
            int(encode(x, W, b, center=center, mask=None, pos=settings["pos"]).recomputed)
            for W, b, center in zip(W_enc.chunk(2, 1), b_enc.chunk(2), settings["center"], strict=True)
        ]
        assert encode(x, W_enc, b_enc, **settings).recomputed.tolist() == alone
        assert all(alone)


# --- the model of the cost, by counts

N, D, F, K, TILE = 8192, 2304, 65536, 64, 128
PASS_S = 2e-6  # an estimate: one program's turn over 2048 candidates, of which it waits for memory most of the time


def recomputation_seconds(pairs, largest_rows):
    """Time on an H100 from the number of pairs in each tile, and the largest number of rows of a token."""
    block_n = CONFIGS[90]["recompute"]["BLOCK_N"]
    blocks, n_pairs = int(-(-pairs // block_n).sum()), int(pairs.sum())
    flops = 2.0 * blocks * block_n * TILE * D
    lists = 2 * 32 * N * F // TILE  # a 32-byte sector for a tile's last candidate, twice
    rows = n_pairs * (2 * D + 4 * TILE * (1 + 5))  # x, then written once and read by five passes
    rates = DISPATCH_RATES[90]
    product = Cost(flops, blocks * 2 * TILE * D + rows + lists).seconds(
        rates.flops_per_s["triton"][2], rates.bytes_per_s
    )
    return product + 5 * PASS_S * (largest_rows * TILE / CONFIGS[90]["above_cut"]["BLOCK"])


@pytest.mark.parametrize("outlier", [False, True], ids=["", "an outlier"])
def test_an_outlier_costs_little_by_the_model(outlier, monkeypatch):
    """Tiles are counted on a sample of tokens in random directions, with norms that vary as those of activations do. In
    all, one outlier token x 10 adds at most 0.15 of a step at the bounds of memory and products."""
    monkeypatch.undo()  # the real blocks
    draw = torch.Generator().manual_seed(0)
    norms = (0.25 * torch.randn(96, 1, generator=draw)).exp()
    acts = norms * torch.randn(96, F, generator=draw)
    cut = acts.flatten().topk(96 * K).values[-1]
    keep = candidates_per_tile(F, 2 * K, TILE)

    def of_each_token(acts):
        return ((acts.unflatten(1, (-1, TILE)) > cut).sum(2) >= keep).sum(1)

    ordinary, extreme = of_each_token(acts), of_each_token(10 * acts[:1] / norms[0])
    assert 400 < int(extreme) <= F // TILE
    expected = float(ordinary.double().mean()) * N / (F // TILE)
    pairs = torch.poisson(torch.full((F // TILE,), expected), generator=draw).long()
    most = int(ordinary.max())
    if outlier:
        pairs[: int(extreme)] += 1
        most = int(extreme)
    rates = DISPATCH_RATES[90]
    encode = encode_sparse.cost(N, D, F).seconds(rates.flops_per_s["triton"][2], rates.bytes_per_s)
    step = encode + 26 * 2 * D * F / rates.bytes_per_s  # the encoder, and the update's traffic
    share = recomputation_seconds(pairs, most) / step
    assert share <= 0.15
    # One program that reads its tile of W_enc at a hundredth of the bandwidth, in each of five passes, would not do.
    serial = 5 * int(extreme) * 2 * TILE * D / (rates.bytes_per_s / 100)
    assert serial / step > 0.15


# --- merge


def candidates_of(values, keep, tile):
    """Packed candidates [N, TILES * keep] of activations [N, F], as the first kernel makes them."""
    f = values.shape[1]
    columns = torch.arange(f) % tile
    packed = (values.float().view(torch.int32) & ~127) | (tile - 1 - columns).int()
    padded = torch.nn.functional.pad(packed, (0, -f % tile), value=-1).unflatten(1, (-1, tile))
    return padded.sort(2, descending=True).values[:, :, :keep].contiguous()


@pytest.mark.parametrize("k", [1, 5, 12, 30])
@pytest.mark.parametrize(
    "kind", ["random", "ties", "all equal", "few positive", "none positive", "masked tiles", "nan"]
)
def test_merge(k, kind):
    """Against a sort by value, then by lower latent, with more tiles than K and with fewer."""
    from temposae.kernels.encode_sparse import merge

    n, f, tile, keep = 6, 300, 32, 3
    draw = torch.Generator().manual_seed(k)
    values = torch.rand(n, f, generator=draw)
    if kind == "ties":
        values = (4 * values).round()
    elif kind == "all equal":
        values.fill_(1.5)
    elif kind.endswith("positive"):
        values = values * (values > (0.99 if kind == "few positive" else 2))
    elif kind == "masked tiles":
        values[:, 32:160] = 0
    elif kind == "nan":
        values[2] = torch.nan
    packed = candidates_of(values, keep, tile)
    tiles = packed.shape[1]
    candidates = SimpleNamespace(
        launch=SimpleNamespace(x=values), packed=packed.flatten(1), keep=keep, tiles=tiles, n_tokens=n, tile=tile,
        n_latents=f,
    )  # fmt: skip
    code = merge.largest(candidates, k, exact=False)
    latents = torch.arange(tiles)[None, :, None] * tile + tile - 1 - packed % tile
    flat, key = latents.flatten(1), torch.where(packed < 0, -1, packed >> 7).flatten(1)
    order = (key.long() * 1000 - flat).sort(1, descending=True).indices[:, :k]
    kept = torch.zeros(n, tiles * tile).scatter(
        1, flat.gather(1, order), (key << 7).view(torch.float32).gather(1, order)
    )
    assert (code.indices.sort(1).values.diff(dim=1) > 0).all(), "a latent named twice"
    found = torch.zeros(n, tiles * tile).scatter(1, code.indices.long(), code.values)
    torch.testing.assert_close(found, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [3, 12])
def test_of_equal_activations_the_first_are_kept(k):
    x, W_enc = torch.zeros(3, 8), torch.randn(8, 301, generator=torch.Generator().manual_seed(0))
    code, _ = encode_topk(x, W_enc, torch.ones(301), k)
    assert torch.equal(code.indices.sort(1).values, torch.arange(k, dtype=torch.int32).expand(3, k))
    batch_code, _ = encode_topk(x, W_enc, torch.ones(301), k, across_batch=True)
    assert batch_code.offsets[-1] == 3 * k
    assert (batch_code.values == 1).all()
