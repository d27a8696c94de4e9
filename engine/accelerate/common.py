"""Functions that all libraries' dictionaries share: ops under autocast, and activations of dead latents for AuxK."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.backend import dense_from
from ...kernels.code import SparseCode

# active latents are counted on one token in ONE_OF, but on at most PROBED tokens
PROBED, ONE_OF = 64, 64
REST = 15  # calls that use the library's code after a count that found too many active latents
# On a CPU, sparse products are faster up to this share of active latents (on a GPU: `dense_from`), and from this many
# tokens and activations on. Below, overhead dominates.
SPARSE_TO = 1 / 32
TOKENS, ACTIVATIONS = 512, 2**19
_resting: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x in a matrix product: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def sparse_code(
    encoder: Callable[..., Any], x: Tensor, W: Tensor, b: Tensor, *settings: Any, **options: Any
) -> SparseCode:
    """The code of x [N, D] from one of the encoders of `ops`, with the product in autocast's dtype."""
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # operands have the dtype of the product
        values, indices, *offsets = encoder(x.to(dtype), W, b, *settings, **options)
    return SparseCode(values, indices, W.shape[1], offsets[0] if offsets else None)


def decoded(code: SparseCode, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec + sum of values * W_dec [F, D] over each token's entries, with the product in autocast's dtype."""
    dtype, W_dec = product_dtype(W_dec), W_dec.contiguous()  # rows are gathered many times
    with torch.autocast(W_dec.device.type, enabled=False):
        if dtype == W_dec.dtype:
            return ops.decode(values, code.indices, W_dec, b_dec, offsets=code.offsets)
        zero_bias = b_dec.new_zeros(b_dec.shape, dtype=dtype)
        return ops.decode(values, code.indices, W_dec.to(dtype), zero_bias, offsets=code.offsets) + b_dec


def at_entries(per_latent: Tensor, code: SparseCode) -> Tensor:
    """The value of per_latent [F] at each entry of the code. Differentiable."""
    return per_latent[code.live(code.indices).long()]


def dense(code: SparseCode, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense activations [N, F] with these values at the code's entries."""
    return code.with_values(values).to_dense().to(dtype)


def bias_for_centred(b: Tensor, center: Tensor, W: Tensor) -> Tensor:
    """b with the same value, through which `center` gets its gradient -W db of (x - center) @ W + b although x - center is a
    constant. This avoids the gradient of x [N, D], of which only the sum is needed."""
    if not (torch.is_grad_enabled() and center.requires_grad):
        return b
    with torch.autocast(W.device.type, enabled=False):
        return b - (center - center.detach()) @ W.detach()


def prefix_reconstructions(
    code: SparseCode, values: Tensor, W_dec: Tensor, b_dec: Tensor, ends: list[int]
) -> Tensor:  # fmt: skip
    """x_hat [G, N, D] from the latents below each of `ends`, which ascend to F."""
    grouped, order = code.grouped(torch.tensor(ends, device=values.device))
    group_reconstructions = decoded(grouped, values.flatten()[order], W_dec, torch.zeros_like(b_dec))
    return group_reconstructions.unflatten(0, (len(ends), -1)).cumsum(0) + b_dec


def pays(k: float, x: Tensor, W: Tensor) -> bool:
    """Whether products over k latents per token of x [N, D] are faster than dense ones over all of W [D, F]."""
    share = dense_from(W.device) if W.is_cuda else SPARSE_TO
    return k <= share * W.shape[1] and len(x) >= TOKENS and len(x) * W.shape[1] >= ACTIVATIONS


def may_pay(owner: Any, x: Tensor, W: Tensor) -> bool:
    """Whether x [N, D] is large enough, and no recent count for this dictionary or trainer found too many active latents."""
    calls_to_rest = _resting.get(owner, 0)
    if calls_to_rest:
        _resting[owner] = calls_to_rest - 1
    return not calls_to_rest and pays(0, x, W)


@torch.no_grad()
def active_per_token(owner: Any, x: Tensor, W: Tensor, b: Tensor, above: Tensor | float = 0.0) -> int | None:
    """Estimate from a few tokens of x [N, D] how many pre-activations x @ W + b per token exceed `above`.

    Returns None if they are too many for sparse products. The next REST calls use the library's code. Synchronises.
    """
    n_probed = min(PROBED, max(1, len(x) // ONE_OF))
    probed = x[:: len(x) // n_probed][:n_probed]
    n_active = float(((probed @ W + b) > above).sum()) / n_probed
    if pays(n_active, x, W):
        return max(1, round(n_active))
    _resting[owner] = REST
    return None


def code_above(owner: Any, x: Tensor, W: Tensor, b: Tensor, limit: Tensor | None = None) -> SparseCode | None:
    """The code of pre-activations x @ W + b above a nonnegative limit [F] or above 0. None if dense products are faster."""
    n_active = active_per_token(owner, x, W, b, 0.0 if limit is None else limit)
    return None if n_active is None else sparse_code(ops.encode_threshold, x, W, b, limit, expected=n_active)


def magnitudes(gates: SparseCode, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> SparseCode:
    """Activations of a gated dictionary at the entries with an open gate, from the gates' values."""
    product = gates.values - at_entries(b_gate.detach(), gates)
    return gates.with_values((product * at_entries(r_mag.exp(), gates) + at_entries(b_mag, gates)).relu())


def among_dead(x: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> Tensor:
    """Pre-activations [N, n_dead] of the dead latents, from x [N, D], W [D, F], b and dead [F]."""
    return x @ W[:, dead] + b[dead]


def largest(acts: Tensor, k: int) -> Tensor:
    """acts [N, M] with all but the k largest of each token set to 0."""
    top = acts.topk(k, sorted=False)
    return torch.zeros_like(acts).scatter(1, top.indices, top.values)
