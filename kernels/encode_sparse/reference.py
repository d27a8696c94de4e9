"""encode_sparse in plain torch: encode, then select."""

from torch import Tensor

from .. import certified_topk
from ..code import SparseCode
from ..encode.reference import encode
from ..encoder_inputs import EncoderInputs
from ..fp8 import Fp8Rows
from ..masks import Mask
from ..select.reference import select_batch_topk, select_threshold, select_topk
from ..selection import Selection, select_above, select_both


def encode_topk(inputs: EncoderInputs, selection: Selection) -> tuple[SparseCode, SparseCode | None]:
    if certified_topk.applies(inputs, selection):
        return certified_topk.encode_topk(inputs, selection)
    # Negative activations are rectified after selection: the k largest are the same, and a pass over [N, F] is saved.
    code, aux = select_both(encode(inputs, relu=False), selection, select_topk, select_batch_topk)
    return _rectified(code), None if aux is None else _rectified(aux)


def _rectified(code: SparseCode) -> SparseCode:
    return code.with_values(code.values.relu())


def encode_threshold(
    inputs: EncoderInputs, threshold: Tensor | None, capacity: int | None, dictionaries: int
) -> SparseCode:
    return select_above(encode(inputs, relu=False), threshold, capacity, dictionaries, select_threshold)


def preselect(
    x: Fp8Rows, W_enc: Fp8Rows, b_enc: Tensor, mask: Mask | None, pos: Tensor | None, selection: Selection
) -> tuple[SparseCode, SparseCode | None]:
    """Return the k largest of the product of e4m3 operands."""
    return encode_topk(EncoderInputs(x.widened(), W_enc.widened().T, b_enc, None, mask, pos), selection)
