"""One training step for one dictionary: gradient projection, clipping, Adam, renormalisation, and what is counted."""

import math

import torch
from torch import Tensor

from ..kernels.adam import Moments, Rates, adam
from ..kernels.loss import PositionSums
from .config import TrainConfig
from .errors import UserError
from .sae import Objective, SparseAutoencoder
from .step import DENSE_FROM, LARGE, FusedStep, fits, rounding_seed
from .stream import Batch


def default_lr(d_sae: int) -> float:
    """2e-4 * sqrt(2^14 / F), the power law of Gao et al. (arXiv 2406.04093, figure 3)."""
    return 2e-4 * math.sqrt(2**14 / d_sae)


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear up over the first `warmup` of the run, linear down to zero
    over the last `decay` of it."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def has_fp8(device: torch.device) -> bool:
    """Whether products in e4m3 run there; Triton's interpreter has them, too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


class Learner:
    """A dictionary in training: the optimiser, the step count, dead latents, and sums between two reports.

    Activations are scaled by `scale`, the power of two nearest to sqrt(D) / mean |x|, so that one learning rate serves
    every model; being a power of two, it can be folded into the biases and taken out again without any rounding.
    `step` takes a batch and never waits for the device; `report` does.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, mean: Tensor, mean_norm: float, n_positions: int):
        self.sae, self.config, self.n_positions = sae, config, n_positions
        self.scale = 2.0 ** round(math.log2(math.sqrt(sae.cfg.d_in) / max(mean_norm, 1e-30)))
        self.mean = mean * self.scale
        sae.initialise_bias(self.mean)
        device = self.mean.device
        self.lr = config.lr if config.lr is not None else default_lr(sae.cfg.d_sae)
        # Adam sees W_enc as it lies in memory, [F, D]: on a CPU it takes three times as long over a transposed view.
        self.leaves = {
            name: p if p.is_contiguous() else torch.nn.Parameter(p.detach().T)
            for name, p in sae.named_parameters()
            if p.requires_grad
        }
        self.narrow = {}  # moments that torch's Adam can't hold
        if config.moments != "float32":
            self.narrow = {n: Moments.zeros(self.leaves[n], config.moments) for n in LARGE if n in self.leaves}
        # Thresholds are of the order of |x| ~ sqrt(D), and learn at that pace.
        self.paces = {name: math.sqrt(sae.cfg.d_in) if name == "threshold" else 1.0 for name in self.leaves}
        groups = [
            {"params": [leaf], "pace": self.paces[name]}
            for name, leaf in self.leaves.items()
            if name not in self.narrow
        ]
        self.adam = torch.optim.Adam(groups, lr=self.lr, betas=(config.beta1, config.beta2), fused=True)
        self.dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        for group in groups:  # as torch begins them, but for the fused step as well
            (leaf,) = group["params"]
            moments = {key: torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.zeros((), device=device), **moments}
        self.fused = FusedStep(sae, self.moments(), self.paces, config, self.dtype) if fits(sae) else None
        if config.fp8 and not (self.fused is not None and sae.cfg.activation == "topk" and has_fp8(device)):
            raise UserError("train.fp8: true is not allowed; it needs sae.activation topk and a GPU from sm_89 on")
        self.dead_after = config.dead_after_tokens or min(10_000_000, max(config.tokens // 10, 10 * config.batch))
        self.idle_tokens = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=device)
        self.steps_done = 0
        # Looked at when reporting: AuxK is skipped while there is nothing for it to do, and a relu dictionary, which begins
        # with half of its latents active, takes the dense path until few are.
        self.any_dead = False
        self.l0 = float(sae.cfg.d_sae if sae.cfg.activation == "relu" else sae.expected)
        self._reset()

    def _reset(self) -> None:
        T, device = self.n_positions, self.mean.device
        self._sums = PositionSums(*(torch.zeros(T, device=device) for _ in PositionSums._fields))
        self._spread = torch.zeros((), device=device)
        self._losses = torch.zeros(3, device=device)  # loss without AuxK, AuxK, gradient norm
        self._steps = 0

    def step(self, batch: Batch) -> None:
        """One update on batch.x [N, D] at batch.pos [N]."""
        config = self.config
        x = batch.x.to(self.dtype) * self.scale
        if self.steps_done == 0:
            self.sae.initialise_threshold(x, batch.pos)
        dead = self.idle_tokens >= self.dead_after if self.any_dead else None
        lr = self.lr * schedule(self.steps_done, config.steps, config.warmup, config.decay)
        for group in self.adam.param_groups:
            group["lr"] = group["pace"] * lr
        if self.fused is not None and not self.is_dense:
            expected = self.sae.expected if self.sae.cfg.activation != "relu" else max(1, math.ceil(self.l0))
            found, norm = self.fused(x, batch.pos, self.n_positions, dead, expected, lr=lr, step=self.steps_done + 1)
        else:
            found, norm = self._unfused_step(x, batch.pos, dead, lr)

        self.sae.follow(found.least_kept)
        self.idle_tokens.add_(len(x)).masked_fill_(found.fired, 0)
        self.steps_done += 1
        self._steps += 1
        self._sums = PositionSums(*(a + b.detach() for a, b in zip(self._sums, found.sums, strict=True)))
        self._spread += (x - self.mean).square().sum()
        loss = found.loss.detach()
        aux = found.aux_loss if found.aux_loss is not None else torch.zeros_like(loss)
        self._losses += torch.stack([loss - aux, aux, torch.zeros_like(norm) if config.clip_norm is None else norm])

    @property
    def is_dense(self) -> bool:
        """Whether so many latents are active that dense products are faster; only relu dictionaries have a path for that."""
        return self.sae.cfg.activation == "relu" and self.l0 > DENSE_FROM * self.sae.cfg.d_sae

    def _unfused_step(self, x: Tensor, pos: Tensor, dead: Tensor | None, lr: float) -> tuple[Objective, Tensor]:
        """The update by autograd and torch's Adam (ours for narrow moments): for every dictionary and device, and what the
        fused one must equal."""
        found = self.sae.objective(x, pos, self.n_positions, dead)
        found.loss.backward()
        self.sae.project_decoder_gradient()
        for name, parameter in self.sae.named_parameters():
            if name in self.leaves and self.leaves[name] is not parameter and parameter.grad is not None:
                self.leaves[name].grad = parameter.grad.T
        norm = torch.zeros_like(found.loss)
        if self.config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), self.config.clip_norm)
        self.adam.step()
        for name, moments in self.narrow.items():
            leaf = self.leaves[name]
            if leaf.grad is not None:
                adam(leaf.detach(), leaf.grad, moments, self._rates(name, lr))
        for leaf in self.leaves.values():
            leaf.grad = None
        self.sae.zero_grad()
        self.sae.constrain()
        return found, norm

    def _rates(self, name: str, lr: float) -> Rates:
        """Adam's settings for a parameter in this step, its gradient being clipped already."""
        beta1, beta2, step, device = self.config.beta1, self.config.beta2, self.steps_done + 1, self.mean.device
        numbers = (lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, 1.0)
        step_size, correction, factor = (torch.full((), number, device=device) for number in numbers)
        seed = torch.full((), rounding_seed(name, step), dtype=torch.int32, device=device)
        return Rates(step_size, correction, factor, beta1, beta2, seed=seed)

    def moments(self) -> dict[str, Moments]:
        """Adam's moments by parameter, in the layout of `leaves`."""
        held = {name: self.adam.state[leaf] for name, leaf in self.leaves.items() if name not in self.narrow}
        return {name: Moments(state["exp_avg"], state["exp_avg_sq"]) for name, state in held.items()} | self.narrow

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The moments of all parameters and torch's step counts, as checkpoints name them."""
        found = {}
        for name, leaf in self.leaves.items():
            held = self.narrow[name]._asdict() if name in self.narrow else self.adam.state[leaf]
            found |= {f"adam.{name}.{key}": value for key, value in held.items() if value is not None}
        return found

    def report(self) -> dict[str, float]:
        """Means since the last report. Waits for the device.

        `loss`: squared error per token (scaled activations) and L1 term; `aux_loss`: what AuxK adds to it in training;
        `fvu`: squared error over that of predicting the mean; `dead`: latents idle for `dead_after` tokens;
        `gradient_norm`: before clipping, where that is asked for.
        """
        tokens = float(self._sums.count.sum())
        loss, aux, norm = (self._losses / max(1, self._steps)).tolist()
        dead = int((self.idle_tokens >= self.dead_after).sum())
        found = {
            "loss": loss,
            "aux_loss": aux,
            "fvu": float(self._sums.squared_error.sum() / self._spread),
            "l0": float(self._sums.l0.sum()) / tokens,
            "l1": float(self._sums.l1.sum()) / tokens / self.scale,
            "dead": dead,
            "dead_fraction": dead / self.sae.cfg.d_sae,
            "lr": self.adam.param_groups[0]["lr"],
        }
        if self.config.clip_norm is not None:
            found["gradient_norm"] = norm
        self.any_dead = dead > 0
        was_dense, self.l0 = self.is_dense, found["l0"]
        if was_dense and self.fused is not None:
            self.fused.refresh()
        self._reset()
        return found

    def state(self) -> dict[str, Tensor]:
        """Moments, counters and sums: all that the weights don't hold."""
        found = {"idle_tokens": self.idle_tokens, "mean": self.mean, "spread": self._spread, "losses": self._losses}
        found |= {f"sums.{key}": value for key, value in self._sums._asdict().items()}
        numbers = {
            "scale": self.scale,
            "steps_done": self.steps_done,
            "steps": self._steps,
            "any_dead": self.any_dead,
            "l0": self.l0,
        }
        found |= {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        for held in self.adam.state.values():
            held["step"].fill_(self.steps_done)  # the fused step doesn't count
        return found | self._optimizer_state()

    def load_state(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Go on from `state`, with the dictionary's `weights` in units of x.

        Raises UserError for moments of another kind than `config.moments`: they are not converted.
        """
        held = self._optimizer_state()
        kinds = {torch.bfloat16: "bfloat16", torch.int8: "8bit"}
        saved = kinds.get(state["adam.W_enc.exp_avg"].dtype, "float32")
        if saved != self.config.moments:
            raise UserError(
                f"train.moments: {self.config.moments} is not allowed; the checkpoint's are {saved}, and are not converted"
            )
        self.sae.load_state_dict(weights)
        self.scale = float(state["scale"])
        self.sae.scale_(self.scale)
        self.mean.copy_(state["mean"])
        self.idle_tokens.copy_(state["idle_tokens"])
        self._spread.copy_(state["spread"])
        self._losses.copy_(state["losses"])
        for key, value in self._sums._asdict().items():
            value.copy_(state[f"sums.{key}"])
        self.steps_done, self._steps = int(state["steps_done"]), int(state["steps"])
        self.any_dead, self.l0 = bool(state["any_dead"]), float(state["l0"])
        for key, value in held.items():
            value.copy_(state[key])
        if self.fused is not None:
            self.fused.refresh()
