"""encode_sparse: encode and select in one op, without storing dense activations."""

from torch import Tensor

from ..backend import has_fp8
from ..checks import check_floating, check_one_device, check_shape
from ..code import SparseCode
from ..configs import FP8_SINCE
from ..cost import Cost
from ..decode import decode_values_grad
from ..encode import cost as cost_dense
from ..encoder_inputs import EncoderInputs
from ..fp8 import Fp8Rows
from ..masks import Mask, weights_of
from ..numerics import accumulation_dtype
from ..select import select_topk
from ..selection import Selection, latents_per_dictionary
from . import reference


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, center: Tensor | None = None, mask: Mask | None = None,
    pos: Tensor | None = None, aux_k: int = 0, aux_latents: Tensor | None = None, across_batch: bool = False,
    exact: bool = True, fp8: Fp8Rows | None = None, dictionaries: int = 1, backend: str | None = None,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Return the k largest of acts = relu((x - center) @ W_enc + b_enc) * mask[pos] per token and, from the same
    product, the aux_k largest among `aux_latents`.

    x, W_enc, b_enc, center, mask, pos  as in `encode`; a mask must not be negative
    k, aux_k      in [1, F]; aux_k = 0 for no second code
    aux_latents   bool [F]; None for all
    across_batch  keep the N * k largest positive activations of the batch instead (BatchTopK)
    dictionaries  S > 1: S dictionaries side by side, with W_enc [D, S F], S F instead of F elsewhere, and center [D] or
                  [S, D]. Each selects on its own. The codes have S F latents and S N tokens: token s N + n is token n
                  in dictionary s

    Returns (code, aux code or None), with values in float32 (float64 for float64). A token's entries have no particular
    order. Codes have a fixed K, but with `across_batch` the first is ragged, as in `select_batch_topk`. A token with
    fewer than k positive activations is padded with zeros at arbitrary other latents. Ties are resolved by the inputs
    alone (among the k largest of a token, the lower latent wins). NaN counts as the largest value.

    Triton does not wait for the device, and does not store [N, F] if F is large relative to k. Each tile of latents
    keeps a few candidates, rounded to 17 significant bits. The k largest candidates are the k largest activations,
    unless a tile has more of them than it keeps. `exact` finds such tiles and computes them again for the tokens
    concerned. `exact=False` may miss entries: with latents in random order, F = 65536 and K = 64, one token in ten
    thousand misses one (recall 0.999998 in a simulation).

    `fp8`, which must be `Fp8Rows.of(W_enc.T)`, multiplies in e4m3 with a scale per row of x - center and per latent,
    keeps k + max(k / 2, 8) latents per token, computes those again in x's dtype, and returns the k largest. Values are
    as exact as without fp8, but an activation that e4m3 underestimates may be missed. On a GPU it needs sm_89.

    Raises ValueError for shapes, dtypes or devices that do not fit together, for k or aux_k out of range, and for `fp8`
    with `across_batch`, several dictionaries or an older GPU.
    """
    inputs = EncoderInputs(x, W_enc, b_enc, center, mask, pos)
    selection = Selection(k, aux_k, aux_latents, across_batch, exact, dictionaries)
    selection.check(x, inputs.check())
    chosen_backend = inputs.choose_backend("encode_topk", cost=cost, backend=backend)
    if fp8 is not None:
        return _encode_fp8(inputs, selection, fp8, chosen_backend)
    if chosen_backend == "triton":
        from . import merge

        return merge.encode_topk(inputs, selection)
    return reference.encode_topk(inputs, selection)


def _encode_fp8(
    inputs: EncoderInputs, selection: Selection, encoder: Fp8Rows, backend: str
) -> tuple[SparseCode, SparseCode | None]:
    x, W_enc, b_enc, center, mask, pos = inputs
    if selection.across_batch:
        raise ValueError("fp8 is for the k largest of each token, not for across_batch=True")
    if selection.dictionaries > 1:
        raise ValueError(f"fp8 is for one dictionary, got {selection.dictionaries}")
    if not has_fp8(x.device):
        raise ValueError(f"fp8 needs a GPU of sm_{FP8_SINCE} or later")
    encoder.check("fp8", *W_enc.T.shape)
    if center is not None:
        x = (x.to(accumulation_dtype(x)) - center).to(x.dtype)

    def with_margin(k: int) -> int:
        return min(k + max(k // 2, 8), W_enc.shape[1]) if k else 0

    def rescored(code: SparseCode, k: int) -> SparseCode:
        pre = decode_values_grad(code, W_enc.T, x, backend=backend) + b_enc.to(code.values.dtype)[code.indices]
        acts = pre.relu() * (code.values > 0)  # padding stays zero
        if mask is not None and pos is not None:
            acts = acts * weights_of(mask, pos[code.rows], code.indices)
        best = select_topk(acts, k, backend=backend)
        return SparseCode(best.values, code.indices.gather(1, best.indices.long()), code.n_latents)

    with_margins = selection._replace(k=with_margin(selection.k), aux_k=with_margin(selection.aux_k))
    arguments = Fp8Rows.of(x), encoder, b_enc, mask, pos, with_margins
    codes = None
    if backend == "triton":
        from . import merge

        codes = merge.preselect(*arguments)
    code, aux = codes or reference.preselect(*arguments)
    return rescored(code, selection.k), None if aux is None else rescored(aux, selection.aux_k)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None = None, *, center: Tensor | None = None,
    mask: Mask | None = None, pos: Tensor | None = None, expected: int = 64, capacity: int | None = None,
    dictionaries: int = 1, backend: str | None = None,
) -> SparseCode:  # fmt: skip
    """Return all activations acts = relu((x - center) @ W_enc + b_enc) * mask[pos] above their latent's threshold.

    x, W_enc, b_enc, center, mask, pos  as in `encode`; a mask must not be negative
    threshold     [F], any floating dtype, not negative; None for zero
    expected      about how many entries a token has; affects speed, not the result
    capacity      number of entries that the code can hold. If there are more, some are missing and `overflow` is true.
                  None for as many as there are
    dictionaries  S, as in `encode_topk`

    Returns a ragged code with values in float32 (float64 for float64), a token's entries in no particular order. NaN is
    kept, so that it gets noticed. Triton rounds values to 17 significant bits after the comparison and does not store
    [N, F] unless `expected` is a large part of F: see `encode_topk`. Waits for the device twice without a capacity, to
    know the numbers of full tiles and of entries. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    inputs = EncoderInputs(x, W_enc, b_enc, center, mask, pos)
    f = inputs.check()
    latents_per_dictionary(f, dictionaries)
    if threshold is not None:
        check_shape("threshold", threshold, F=f)
        check_floating(threshold=threshold)
        check_one_device(x=x, threshold=threshold)
    if expected < 1:
        raise ValueError(f"expected must be at least 1, got {expected}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if inputs.choose_backend("encode_threshold", cost=cost, backend=backend) == "triton":
        from . import merge

        return merge.encode_threshold(inputs, threshold, expected, capacity, dictionaries)
    return reference.encode_threshold(inputs, threshold, capacity, dictionaries)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """The product and the selection. Triton writes and reads 4 candidates of 4 bytes per 128 activations. Torch writes
    the activations and makes about 6 passes over them."""
    flops, bytes = cost_dense(n, d, f, itemsize=itemsize, masked=masked, backend=backend)
    return Cost(flops, bytes + (n * f / 4 - itemsize * n * f if backend == "triton" else 6 * itemsize * n * f))
