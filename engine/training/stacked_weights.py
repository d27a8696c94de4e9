"""Weights and Adam's moments of several dictionaries of one size, one below the other, and their update."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.adam import BiasGradients, Moments, Rates, adam_each
from ...kernels.clip import clip
from ...kernels.fp8 import Fp8Rows
from ..config import TrainConfig
from ..ranks import Ranks
from ..sae import SparseAutoencoder
from .directions import hold_directions
from .gradients import DenseGradient, DenseGradients, EntryGradient, SparseGradients

LARGE = ("W_dec", "W_enc")  # the weights whose moments `TrainConfig.moments` narrows


def rounding_seed(name: str, step: int, first_latent: int = 0) -> int:
    """`Rates.seed` for the large weight `name`, from a row on, at a step. Multiples of 2^32 by the golden ratio keep apart:
    a row gets the random bits of another row's past only after about 2^30 / F steps, which does no harm."""
    base_seed = (len(LARGE) * step + LARGE.index(name)) * 0x9E3779B9
    return (base_seed + first_latent + 2**31) % 2**32 - 2**31


@torch.no_grad()
def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other. Several become views of the result."""
    if len(tensors) == 1:
        return tensors[0].detach()
    stacked = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, stacked.chunk(len(tensors)), strict=True):
        tensor.data = view
    return stacked


class StackedWeights:
    """The weights of S dictionaries, Adam's moments, and copies of large weights: in the products' dtype, and of W_enc in
    e4m3 with `TrainConfig.fp8`.

    Latents s F to (s + 1) F are those of the s-th. `leaves` are each dictionary's learned parameters and `moments` Adam's,
    by name; W_enc is [F, D]. Those of several dictionaries become views. `paces` are factors on the learning rate, `starts`
    the decoder rows that soft-frozen ones stay near.
    """

    def __init__(
        self, saes: Sequence[SparseAutoencoder], leaves: Sequence[Mapping[str, Tensor]],
        moments: Sequence[Mapping[str, Moments]], paces: Mapping[str, float], config: TrainConfig, dtype: torch.dtype,
        ranks: Ranks, starts: Sequence[Tensor | None],
    ):  # fmt: skip
        self.count, self.paces, self.config, self.dtype, self.ranks = len(saes), paces, config, dtype, ranks
        device, self._first_latent = saes[0].b_dec.device, ranks.rank * saes[0].cfg.d_sae
        wholes = [_with_frozen(sae, parameters) for sae, parameters in zip(saes, leaves, strict=True)]
        self.weights = {name: side_by_side([whole[name] for whole in wholes]) for name in wholes[0]}
        if self.count > 1:
            for sae, whole in zip(saes, wholes, strict=True):
                sae.W_enc.data = whole["W_enc"].detach().T
        # rows of a soft-frozen decoder start here, and stay near it
        self._start = None if starts[0] is None else torch.cat([start for start in starts if start is not None])
        self.weights["b_dec"] = self.weights["b_dec"].view(self.count, -1)
        self.moments = {name: _stacked_moments([each[name] for each in moments]) for name in moments[0]}
        self.moments["b_dec"] = Moments(*(m.view(self.count, -1) for m in self.moments["b_dec"][:2]))
        self.shadows: dict[str, Tensor] = {}
        if dtype != torch.float32:
            self.shadows = {name: torch.empty_like(self.weights[name], dtype=dtype) for name in LARGE}
        self.fp8 = Fp8Rows.of(self.weights["W_enc"]) if config.fp8 else None
        rounded_names = LARGE if config.moments != "float32" else ()
        # step sizes and corrections as the bits of float32, and seeds: int32 [2 or 4, S]
        self._numbers = torch.zeros(2 + len(rounded_names), self.count, dtype=torch.int32, device=device)
        self._step_size, self._correction = self._numbers[:2].view(torch.float32)
        self._seeds: dict[str, Tensor] = dict(zip(rounded_names, self._numbers[2:], strict=True))
        self._factor, self._no_norm = torch.ones(self.count, device=device), torch.zeros(self.count, device=device)
        self.refresh()

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def for_products(self, name: str) -> Tensor:
        """A large weight in the products' dtype."""
        return self.shadows.get(name, self.weights[name])

    def refresh(self) -> None:
        """Copy the large weights anew, after they were changed from outside."""
        for name, shadow in self.shadows.items():
            shadow.copy_(self.weights[name])
        if self.fp8 is not None:
            self.fp8.copy_(self.for_products("W_enc"))

    def set_rates(self, lrs: Sequence[float], step: int) -> None:
        """Write what changes from step to step besides the data to where the kernels read it."""
        step_sizes = [lr / (1 - self.config.beta1**step) for lr in lrs]
        floats = np.array([step_sizes, self.count * [(1 - self.config.beta2**step) ** 0.5]], dtype=np.float32)
        seeds = [self.count * [rounding_seed(name, step, self._first_latent)] for name in self._seeds]
        bits = torch.from_numpy(
            np.concatenate([floats.view(np.int32), np.array(seeds, np.int32).reshape(-1, self.count)])
        )
        # A copy from pinned memory does not wait for the device. torch reuses the memory only when the copy is done.
        self._numbers.copy_(bits.pin_memory() if self._numbers.is_cuda else bits, non_blocking=True)

    def update(
        self, gradients: SparseGradients | DenseGradients, small_gradients: dict[str, Tensor], x: Tensor,
        center: Tensor | None, overflow: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Take a step of Adam with all parameters, unless `overflow`. Returns the norms of the gradients [S].

        `small_gradients` has those of the parameters that only some dictionaries have. Those of biases are added.
        """
        large_gradients: dict[str, EntryGradient | DenseGradient] = {}
        if "W_enc" in self.moments:
            large_gradients["W_enc"] = gradients.encoder(x, center, self.weights["W_enc"])
        if "W_dec" in self.moments:
            large_gradients["W_dec"] = gradients.decoder(self.weights["W_dec"])
        biases = large_gradients["W_enc"].biases if "W_enc" in large_gradients else None
        rates = Rates(
            self._step_size, self._correction, self._factor, self.config.beta1, self.config.beta2, skip=overflow
        )
        norm = self._no_norm
        # The first pass over the entries, for the norms or the update, also gives the gradients of biases.
        if self.config.clip_norm is None:
            self._update_large(large_gradients, rates, is_first_pass=True)
            self._add_bias_gradients(small_gradients, gradients, biases, len(x))
        else:
            squared_norms = [grad.squared_norms() for grad in large_gradients.values()]
            self._add_bias_gradients(small_gradients, gradients, biases, len(x))
            norm = self._clip(self.config.clip_norm, squared_norms, dict(small_gradients))
            self._update_large(large_gradients, rates, is_first_pass=False)
        for pace in dict.fromkeys(self.paces[name] for name in small_gradients):
            paced_rates = rates if pace == 1 else rates._replace(step_size=pace * self._step_size)
            names = [name for name in small_gradients if self.paces[name] == pace]
            weights, grads = ([of[name] for name in names] for of in (self.weights, small_gradients))
            adam_each(weights, grads, [self.moments[name] for name in names], paced_rates)
        if "threshold" in small_gradients:
            self.weights["threshold"].clamp_min_(0)
        if self._start is not None:
            hold_directions(self.weights["W_dec"], self._start, self.shadows.get("W_dec"), skip=overflow)
        return norm

    def _clip(self, clip_norm: float, squared_norms: list[Tensor], small_gradients: dict[str, Tensor]) -> Tensor:
        """Set the factor that clips the gradients, and return their norm [S]. All ranks have the whole b_dec."""
        b_dec, latent_gradients = small_gradients.pop("b_dec"), list(small_gradients.values())
        if self.ranks.size > 1:
            squares = [*squared_norms, *(grad.square() for grad in latent_gradients)]
            latent_norms = torch.stack([each.view(self.count, -1).sum(1) for each in squares]).sum(0)
            squared_norms, latent_gradients = [self.ranks.sum_(latent_norms)], []
        return clip(squared_norms, [*latent_gradients, b_dec], clip_norm, self._factor)

    def _update_large(
        self, gradients: Mapping[str, EntryGradient | DenseGradient], rates: Rates, *, is_first_pass: bool
    ) -> None:
        for name, grad in gradients.items():
            rounded_rates = rates._replace(seed=self._seeds.get(name))
            fp8 = self.fp8 if name == "W_enc" else None
            grad.update(self.moments[name], rounded_rates, self.shadows.get(name), fp8, is_first_pass=is_first_pass)

    def _add_bias_gradients(
        self, small_gradients: dict[str, Tensor], gradients: SparseGradients | DenseGradients,
        biases: BiasGradients | None, n_tokens: int,
    ) -> None:  # fmt: skip
        s, contributions = self.count, gradients.contributions
        # b_dec is the decoder's bias and, except in transcoders, what is taken from the encoder's input.
        residual = contributions[0].residual[: s * n_tokens].view(s, n_tokens, -1)
        small_gradients["b_dec"] = residual.sum(1, dtype=torch.float32).mul_(-2 / n_tokens)
        if "b_enc" not in self.moments:
            return
        if biases is None:
            small_gradients["b_enc"] = gradients.by_latent([each.encoder_weights for each in contributions])
        else:
            small_gradients["b_enc"] = biases.encoder
            small_gradients["b_dec"] -= self.ranks.sum_(biases.center)


def _with_frozen(sae: SparseAutoencoder, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The learned parameters by name, and the frozen weights among W_enc [F, D], b_enc and W_dec."""
    frozen = {"W_enc": sae.W_enc.detach().T, "b_enc": sae.b_enc, "W_dec": sae.W_dec}
    return {**parameters, **{name: tensor for name, tensor in frozen.items() if name not in parameters}}


def _stacked_moments(moments: Sequence[Moments]) -> Moments:
    scales = [each.scales for each in moments if each.scales is not None]
    first, second = (
        side_by_side([each.exp_avg for each in moments]),
        side_by_side([each.exp_avg_sq for each in moments]),
    )
    return Moments(first, second, side_by_side(scales) if scales else None)
