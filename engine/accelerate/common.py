"""What all libraries' dictionaries have in common: our ops under autocast, and the activations of dead latents for AuxK."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.code import SparseCode
from ..fused import DENSE_FROM

PROBED = 64  # tokens whose activations are counted, at most, and one of so many in a batch
ONE_OF = 64
REST = 15  # calls that go to the library after a look that found too many latents in use
# Products over entries alone are faster on a CPU up to this share of the latents in use (on a GPU it is `DENSE_FROM`), and
# from so many tokens and activations on: below, what surrounds them takes the time.
SPARSE_TO = 1 / 32
TOKENS, ACTIVATIONS = 512, 2**19
_resting: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def product_dtype(x: Tensor) -> torch.dtype:
    """What x is cast to in a matrix product: autocast's dtype where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x: Tensor) -> torch.autocast:
    """A block without autocast: our ops are told what their products run in."""
    return torch.autocast(x.device.type, enabled=False)


def sparse_code(
    encoder: Callable[..., Any], x: Tensor, W: Tensor, b: Tensor, *settings: Any, **options: Any
) -> SparseCode:
    """The code of x [N, D] by one of the encoders of `ops`, its product as autocast has it."""
    dtype = product_dtype(x)
    with without_autocast(x):
        values, indices, *offsets = encoder(x.to(dtype), W, b, *settings, **options)
    return SparseCode(values, indices, W.shape[1], offsets[0] if offsets else None)


def decoded(code: SparseCode, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec + sum of values * W_dec [F, D] over each token's entries, its product as autocast has it."""
    dtype, W_dec = product_dtype(W_dec), W_dec.contiguous()  # its rows are gathered many times over
    with without_autocast(W_dec):
        if dtype == W_dec.dtype:
            return ops.decode(values, code.indices, W_dec, b_dec, offsets=code.offsets)
        zero_bias = b_dec.new_zeros(b_dec.shape, dtype=dtype)
        return ops.decode(values, code.indices, W_dec.to(dtype), zero_bias, offsets=code.offsets) + b_dec


def at_entries(per_latent: Tensor, code: SparseCode) -> Tensor:
    """per_latent [F] for each entry of the code; carries a gradient."""
    return per_latent[code.live(code.indices).long()]


def dense(code: SparseCode, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Activations [N, F] of these values."""
    return code.with_values(values).to_dense().to(dtype)


def bias_for_centred(b: Tensor, center: Tensor, W: Tensor) -> Tensor:
    """b for an x - center that is given as a constant: the same number, through which center gets its gradient -W db of
    (x - center) @ W + b. A gradient of x [N, D] alone for its sum would be far more work."""
    if not (torch.is_grad_enabled() and center.requires_grad):
        return b
    with without_autocast(W):
        return b - (center - center.detach()) @ W.detach()


def prefix_reconstructions(
    code: SparseCode, values: Tensor, W_dec: Tensor, b_dec: Tensor, ends: list[int]
) -> Tensor:  # fmt: skip
    """x_hat [G, N, D] from the latents below each of `ends`, which ascend to F."""
    grouped, order = code.grouped(torch.tensor(ends, device=values.device))
    group_reconstructions = decoded(grouped, values.flatten()[order], W_dec, torch.zeros_like(b_dec))
    return group_reconstructions.unflatten(0, (len(ends), -1)).cumsum(0) + b_dec


def pays(k: float, x: Tensor, W: Tensor) -> bool:
    """Whether, for x [N, D], products over k latents a token are faster than over all of W [D, F]'s."""
    share = DENSE_FROM if W.is_cuda else SPARSE_TO
    return k <= share * W.shape[1] and len(x) >= TOKENS and len(x) * W.shape[1] >= ACTIVATIONS


def may_pay(owner: Any, x: Tensor, W: Tensor) -> bool:
    """Whether x [N, D] is large enough, and no recent look at the dictionary or trainer found too many latents in use."""
    calls_to_rest = _resting.get(owner, 0)
    if calls_to_rest:
        _resting[owner] = calls_to_rest - 1
    return not calls_to_rest and pays(0, x, W)


@torch.no_grad()
def active_per_token(owner: Any, x: Tensor, W: Tensor, b: Tensor, above: Tensor | float = 0.0) -> int | None:
    """About how many of a token's pre-activations x @ W + b exceed `above`, from a few tokens of x [N, D]; None where they
    are too many for products over entries to pay, and then the next calls rest. Waits for the device."""
    n_probed = min(PROBED, max(1, len(x) // ONE_OF))
    probed = x[:: len(x) // n_probed][:n_probed]
    n_active = float(((probed @ W + b) > above).sum()) / n_probed
    if pays(n_active, x, W):
        return max(1, round(n_active))
    _resting[owner] = REST
    return None


def among_dead(x: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> Tensor:
    """Pre-activations [N, n_dead] of the dead latents alone: x [N, D], W [D, F], b and dead [F]."""
    return x @ W[:, dead] + b[dead]


def largest(acts: Tensor, k: int) -> Tensor:
    """acts [N, M] with all but the k largest of each row 0, whatever their sign."""
    top = acts.topk(k, sorted=False)
    return torch.zeros_like(acts).scatter(1, top.indices, top.values)
