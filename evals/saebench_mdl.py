"""Description length by SAEBench 0.6.0's definitions (https://github.com/adamkarvonen/SAEBench), for `mdl.py`.

    w_j       max(`LEAST_MAXIMUM`, largest f_j) / num_bins     width of the bins [m w_j, (m + 1) w_j) of latent j
    length    sum_j H(f_j > 0) + P(f_j > 0) H(bin_j)           bin_j over all tokens; zeros are in bin 0
    mse_loss  sqrt(mean over tokens and D of (x - x_hat)^2) / D
    x_hat     from the k largest f of a token and zeros, with every latent, zeros too, moved to the middle of its bin

Each of `NUM_BINS` is measured with each of `K_VALUES`. k changes the error only. The result is the shortest length with an
`mse_loss` below `THRESHOLD`, or the shortest of all if there is none. That is the stated rule of SAEBench's
`pick_minimum_viable`. Its runner doesn't call that function. If only some lengths are viable, the function looks up the
position among them in the list of all, and so returns another one.

The length is not that of a code. A code needs H(bin_j | f_j > 0) bits for a value, not H(bin_j).

Negative activations (`lm_neurons` has them) count as inactive and are in no bin, as in SAEBench's functions. Differences
from its runner:

- Largest activations, errors and entropies are those of the same tokens, all that are read. SAEBench takes the largest of
  40,960 rows, and every error and every length of another 4,096.
- The text is that of the run, not FineWeb.
- For the error, SAEBench puts an activation exactly at the border of two bins into the lower one. Here it is in the upper.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.code import SparseCode
from .evaluation import Autoencoder, TextActivations, chunks, joined, squared_distance

NUM_BINS = (4, 6, 8, 12, 16, 32)
K_VALUES = (16, 24, 32)
THRESHOLD = 0.01  # of mse_loss
LEAST_MAXIMUM = 100.0  # the last bin ends there or later
PROTOCOL = {
    "num_bins_values": list(NUM_BINS), "k_values": list(K_VALUES), "mse_epsilon_threshold": THRESHOLD,
    "least_maximum": LEAST_MAXIMUM,
}  # fmt: skip


def figures(autoencoder: Autoencoder, collected: TextActivations) -> dict[str, Any]:
    """`bits_per_token`, its two terms, `mse_loss` and what else was measured of the chosen setting, and all `settings` by
    SAEBench's names."""
    (n, D), settings = collected.x.shape, _settings(autoencoder, collected)
    chosen = pick(settings)
    spread = float(squared_distance(collected.x, collected.mean).sum())
    error = (chosen["mse_loss"] * D) ** 2 * n * D
    return {
        "bits_per_token": chosen["description_length"],
        "bits_per_dimension": chosen["description_length"] / D,
        "active_bits": chosen.pop("active_bits"),
        "value_bits": chosen.pop("value_bits"),
        "fvu_rounded": error / spread if spread else None,
        **{name: chosen[name] for name in ("num_bins", "k", "mse_loss", "within_threshold")},
        "settings": [{k: v for k, v in setting.items() if not k.endswith("_bits")} for setting in settings],
    }


def pick(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the shortest lengths within the threshold, or of all if none is within it."""
    viable = [setting for setting in settings if setting["within_threshold"]]
    return min(viable or settings, key=lambda setting: setting["description_length"])


def _settings(autoencoder: Autoencoder, collected: TextActivations) -> list[dict[str, Any]]:
    """Length and error of every number of bins with every k."""
    code, x, F = collected.code(autoencoder), collected.x, len(autoencoder.W_dec)
    largest = x.new_full((F,), LEAST_MAXIMUM).scatter_reduce(0, code.indices.long(), code.values, "amax")
    binned = torch.bincount(code.indices[code.values < 0], minlength=F).neg() + len(x)  # tokens of a latent in some bin
    positive = joined([code.with_values(code.values.clamp_min(0))])
    rank, settings = _ranks(positive), []
    most = int(rank.max()) + 1 if len(rank) else 0
    for num_bins in NUM_BINS:
        width = largest / num_bins
        of_entry = width[positive.indices.long()]
        bins = torch.floor(positive.values / of_entry).clamp_max(num_bins - 1)
        lengths = _lengths(positive, bins, num_bins, binned)
        above = bins * of_entry  # middle of the bin, above the middle of bin 0
        middle = x - width / 2 @ autoencoder.W_dec
        errors = {
            k: _error(autoencoder, middle, positive.with_values(torch.where(rank < k, above, 0)))
            for k in {min(k, most) for k in K_VALUES}
        }
        for k in K_VALUES:
            loss = math.sqrt(errors[min(k, most)] / x.numel()) / x.shape[1]
            within = {"mse_loss": loss, "within_threshold": loss < THRESHOLD}
            settings.append({"num_bins": num_bins, "k": k, **lengths, **within})
    return settings


def _lengths(code: SparseCode, bins: Tensor, num_bins: int, binned: Tensor) -> dict[str, float]:
    """The length and its terms. `bins` of the entries of a positive code; `binned` [F]: tokens that are in some bin."""
    F, latent = code.n_latents, code.indices.long()
    counts = torch.bincount(latent * num_bins + bins.long(), minlength=F * num_bins).view(F, num_bins)
    firings = counts.sum(1)
    counts[:, 0] += binned - firings  # zeros
    p = firings.double() / code.n_tokens
    active = float(_bits(torch.stack([p, 1 - p], 1)).sum())
    value = float((p * _bits(counts / binned.clamp_min(1).double()[:, None])).sum())
    return {"description_length": active + value, "active_bits": active, "value_bits": value}


def _bits(shares: Tensor) -> Tensor:
    """Entropies of rows of shares, in bits."""
    return torch.special.entr(shares).sum(1) / math.log(2)


def _ranks(code: SparseCode) -> Tensor:
    """Place of each entry among its token's, from 0 for the largest value."""
    assert code.offsets is not None
    order = code.values.sort(descending=True, stable=True).indices
    order = order[code.rows[order].sort(stable=True).indices]
    places = torch.arange(len(order), device=order.device) - code.offsets[code.rows]
    return torch.empty_like(order).index_copy_(0, order, places)


def _error(autoencoder: Autoencoder, x: Tensor, code: SparseCode) -> float:
    """Squared error of the code's nonzero entries, summed over x [n, D]."""
    parts = chunks(x, joined([code]))
    return float(sum(squared_distance(part_x, autoencoder.decode(part)).sum() for part_x, part in parts))
