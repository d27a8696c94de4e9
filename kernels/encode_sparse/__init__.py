"""encode_sparse: the activations that are kept of each token or of the batch, without those that aren't in between."""

import torch
from torch import Tensor

from ..checks import check_floating, check_one_device, check_shape
from ..code import SparseCode
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
    exact: bool = True, fp8: bool = False, dictionaries: int = 1, backend: str | None = None,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """The k largest of acts = relu((x - center) @ W_enc + b_enc) * mask[pos] for each token, and from the same product the
    aux_k largest among `aux_latents`.

    x, W_enc, b_enc, center, mask, pos  as in `encode`; a mask must not be negative
    k, aux_k     in [1, F]; aux_k = 0 for no second code
    aux_latents  bool [F]; None for all
    across_batch the N * k largest positive of the batch instead of k of each token (BatchTopK)
    dictionaries S > 1: so many dictionaries of F latents side by side, W_enc being [D, S F], and all else that has an F too;
                 center [D] or [S, D]. Each chooses by itself. The codes are over S F latents and S N tokens: s N + n is
                 token n as the s-th dictionary sees it

    Returns (code, aux code or None), their values in float32 (float64 for float64), the entries of a token in no particular
    order; both of fixed K, or with `across_batch` the first one ragged, as `select_batch_topk` has it. A token with fewer
    positive activations than k is filled up with zeros at other latents; which ones is left open. Of equal values, which
    are kept follows from the inputs alone (of a token, the lower latent). NaN counts as the largest.

    Triton never holds [N, F] where F is large beside k: each tile of latents keeps its few largest, their values rounded to
    17 significant bits, and the largest of those are exact unless a tile had more among them than it kept. `exact` looks
    for such tiles and computes them again, on the device, for the tokens that need it; `exact=False` doesn't, and may miss
    entries where many of a token's largest activations lie in one tile (with latents in random order, at F = 65536 and
    K = 64, one token in ten thousand misses one: recall 0.999998 by simulation). Doesn't wait for the device.

    `fp8` multiplies in e4m3 with a scale for each row of x - center and each latent, keeps k + max(k / 2, 8) of each token
    by that product, works out those again in x's dtype, and gives the k largest of them: values as exact as ever, but an
    activation that e4m3 takes for much smaller than it is may be missed. On a GPU it needs sm_89.

    Raises ValueError for shapes, dtypes or devices that do not fit, for k or aux_k out of range, and for `fp8` across the
    batch or on an older GPU.
    """
    inputs = EncoderInputs(x, W_enc, b_enc, center, mask, pos)
    selection = Selection(k, aux_k, aux_latents, across_batch, exact, dictionaries)
    selection.check(x, inputs.check())
    chosen_backend = inputs.choose_backend("encode_topk", cost=cost, backend=backend)
    if fp8:
        return _encode_fp8(inputs, selection, chosen_backend)
    if chosen_backend == "triton":
        from . import triton

        return triton.encode_topk(inputs, selection)
    return reference.encode_topk(inputs, selection)


def _encode_fp8(inputs: EncoderInputs, selection: Selection, backend: str) -> tuple[SparseCode, SparseCode | None]:
    x, W_enc, b_enc, center, mask, pos = inputs
    if selection.across_batch:
        raise ValueError("fp8 is for the k largest of each token, not across_batch")
    if selection.dictionaries > 1:
        raise ValueError(f"fp8 is for one dictionary, got {selection.dictionaries}")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError("fp8 needs a GPU of sm_89 or later")
    if center is not None:
        x = (x.to(accumulation_dtype(x)) - center).to(x.dtype)

    def with_margin(k: int) -> int:
        return min(k + max(k // 2, 8), W_enc.shape[1]) if k else 0

    def rescored(code: SparseCode, k: int) -> SparseCode:
        pre = decode_values_grad(code, W_enc.T, x, backend=backend) + b_enc.to(code.values.dtype)[code.indices]
        acts = pre.relu() * (code.values > 0)  # what fills a code up stays zero
        if mask is not None and pos is not None:
            acts = acts * weights_of(mask, pos[code.rows], code.indices)
        best = select_topk(acts, k, backend=backend)
        return SparseCode(best.values, code.indices.gather(1, best.indices.long()), code.n_latents)

    with_margins = selection._replace(k=with_margin(selection.k), aux_k=with_margin(selection.aux_k))
    arguments = Fp8Rows.of(x), Fp8Rows.of(W_enc.T), b_enc, mask, pos, with_margins
    codes = None
    if backend == "triton":
        from . import triton

        codes = triton.preselect(*arguments)
    code, aux = codes or reference.preselect(*arguments)
    return rescored(code, selection.k), None if aux is None else rescored(aux, selection.aux_k)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None = None, *, center: Tensor | None = None,
    mask: Mask | None = None, pos: Tensor | None = None, expected: int = 64, capacity: int | None = None,
    dictionaries: int = 1, backend: str | None = None,
) -> SparseCode:  # fmt: skip
    """Every activation acts = relu((x - center) @ W_enc + b_enc) * mask[pos] above its latent's threshold.

    x, W_enc, b_enc, center, mask, pos  as in `encode`; a mask must not be negative
    threshold  [F], any floating dtype, not negative; None for zero
    expected   about how many a token has; speed depends on it, the result doesn't
    capacity   how many entries the code has room for; its `overflow` is true if there are more, and then entries are
               missing. None for as many as there are
    dictionaries  S, as in `encode_topk`

    Returns a ragged code with values in float32 (float64 for float64), the entries of a token in no particular order,
    however many there are. NaN is kept, so that it is seen. Triton rounds values to 17 significant bits after the
    comparison and, unless `expected` is a large part of F, never holds [N, F]: see `encode_topk`. Without a capacity, waits
    for the device once, to know how many there are. Raises ValueError for shapes, dtypes or devices that do not fit.
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
        from . import triton

        return triton.encode_threshold(inputs, threshold, expected, capacity, dictionaries)
    return reference.encode_threshold(inputs, threshold, capacity, dictionaries)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """The product, and where triton writes and reads 4 candidates of 4 bytes for every 128 activations, torch writes the
    activations and selects from them in about 6 passes."""
    flops, bytes = cost_dense(n, d, f, itemsize=itemsize, masked=masked, backend=backend)
    return Cost(flops, bytes + (n * f / 4 - itemsize * n * f if backend == "triton" else 6 * itemsize * n * f))
