"""Training steps: gradient projection, clipping, Adam, renormalisation, and what is counted; for one dictionary, or for
several of one size at a time."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adam import Moments, Rates, adam
from ..kernels.loss import PositionSums
from .config import SAEConfig, TrainConfig
from .errors import UserError
from .fused import DENSE_FROM, LARGE, FusedStep, Outcome, fits, rounding_seed, side_by_side
from .metrics import HeldOutSums, fvu, per_token
from .ranks import ALONE, Ranks
from .registry import reads
from .run_sample import RunSample, needs_sample
from .sae import BatchContext, Objective, SparseAutoencoder
from .stream import Batch


def default_lr(sae: SAEConfig, train: TrainConfig) -> float:
    """The peak learning rate where the settings give none:

        min(0.016, 0.65 (batch / F)^(1/6) / (D^(1/2) steps^(1/3)))

    A step of Adam moves a unit-norm row of W_dec by about lr sqrt(D), so wide activations take a smaller rate. A short run
    takes a larger one, because rows have fewer steps to reach their directions. docs/learning-rate.md has the grids that the
    rule was fitted to. A dictionary that is trained already (`init`) has its directions, and a short run's rate would
    destroy them: its rate is at most 2e-4 sqrt(2^14 / F), the power law of Gao et al. (arXiv 2406.04093, figure 3).
    """
    rate = 0.65 * (train.batch / sae.d_sae) ** (1 / 6) / (sae.d_in**0.5 * train.steps ** (1 / 3))
    max_rate = 0.016 if train.init is None else 2e-4 * math.sqrt(2**14 / sae.d_sae)
    return min(max_rate, rate)


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear up over the first `warmup` of the run, linear down to zero
    over the last `decay` of it."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def annealed(step: int, steps: int, share: float, start: int, end: int) -> int:
    """A number of latents that goes from `start` to `end` over the first `share` of the run, in 16 steps: a kernel is
    compiled for each."""
    levels_done = min(16, int(16 * step / max(1e-9, share * steps)))
    return round(start + (end - start) * levels_done / 16)


def has_fp8(device: torch.device) -> bool:
    """Whether products in e4m3 run there; Triton's interpreter has them, too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


MATCHING = 20.0, 0.1  # of `target_l0`: how far log(sparsity coefficient) may go in a run, and how far ahead it looks
ROOM = 1.5  # for entries, of those that the last code of unknown size had


class Counts(NamedTuple):
    """What is counted of S dictionaries."""

    idle_tokens: Tensor  # int64 [S, F]: since each latent was last active
    sums: Tensor  # [S, 4, T]: `PositionSums` since the last report
    spread: Tensor  # [S]: squared distance of activations from their mean since then
    losses: Tensor  # [S, 3]: loss without AuxK, AuxK and gradient norm since then

    def add(self, n: int, spread: Tensor, outcome: Outcome) -> None:
        """Count a batch of n tokens."""
        self.idle_tokens.add_(n).masked_fill_(outcome.fired, 0)
        self.sums.add_(torch.stack([total.detach() for total in outcome.sums], 1))
        self.spread.add_(spread)
        loss = outcome.loss.detach()
        aux = torch.zeros_like(loss) if outcome.aux_loss is None else outcome.aux_loss
        self.losses.add_(torch.stack([loss - aux, aux, outcome.norm], 1))


class Learner:
    """A dictionary in training: the optimiser, the step count, dead latents, and sums between two reports.

    Activations are scaled by `scale`, the power of two nearest to sqrt(D) / mean |x|, so that one learning rate serves
    every model; being a power of two, it can be folded into the biases and taken out again without any rounding.
    `step` takes a batch and never waits for what was just launched; `report` does. Where the kernels run, the work is
    done by a `Cohort`, of this dictionary alone unless it was put into a larger one.
    """

    def __init__(
        self, sae: SparseAutoencoder, config: TrainConfig, mean: Tensor, mean_norm: float, n_positions: int,
        b_dec: Tensor | None = None, *, hook: str = "x", trained: bool = False, ranks: Ranks = ALONE,
    ):  # fmt: skip
        """`mean` is that of what is to be given, `mean_norm` that of x, the activations at `hook`. b_dec starts as `b_dec`,
        or the mean, unless the dictionary is `trained` already, in units of x. Of several `ranks`, `sae` becomes this
        one's part of it."""
        self.cfg: SAEConfig = sae.cfg  # of the whole dictionary
        self.reads, self.hook = reads(sae.cfg), hook
        sae = sae.shard(ranks).to(mean.device)
        self.sae, self.config, self.n_positions, self.ranks = sae, config, n_positions, ranks
        self.scale = 2.0 ** round(math.log2(math.sqrt(sae.cfg.d_in) / max(mean_norm, 1e-30)))
        self.mean = mean * self.scale
        self._is_new = not trained
        if trained:
            sae.scale_(self.scale)
        else:
            sae.initialise_bias(self.mean if b_dec is None else b_dec * self.scale)
        device = self.mean.device
        self.lr = config.lr if config.lr is not None else default_lr(self.cfg, config)
        # Adam sees W_enc as it lies in memory, [F, D]: on a CPU it takes three times as long over a transposed view.
        self.leaves = {
            name: parameter if parameter.is_contiguous() else torch.nn.Parameter(parameter.detach().T)
            for name, parameter in sae.named_parameters()
            if parameter.requires_grad
        }
        self.narrow = {}  # moments that torch's Adam can't hold
        if config.moments != "float32":
            self.narrow = {
                name: Moments.zeros(self.leaves[name], config.moments) for name in LARGE if name in self.leaves
            }
        self.paces = {name: sae.paces.get(name, 1.0) for name in self.leaves}
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
        if config.fp8 and not (fits(sae) and sae.cfg.activation == "topk" and has_fp8(device)):
            raise UserError("train.fp8: true is not allowed; it needs sae.activation topk and a GPU from sm_89 on")
        self.dead_after = config.dead_after_tokens or min(10_000_000, max(config.tokens // 10, 10 * config.batch))
        idle_tokens = torch.zeros(1, sae.cfg.d_sae, dtype=torch.int64, device=device)
        sums = torch.zeros(1, len(PositionSums._fields), n_positions, device=device)
        self.counts = Counts(idle_tokens, sums, torch.zeros(1, device=device), torch.zeros(1, 3, device=device))
        self.steps_done = self.tokens_done = 0
        self._steps = 0  # since the last report
        # of `target_l0`: log of the factor on the sparsity coefficients; log(L0 / target) and its speed
        self.matching = torch.zeros(3, device=device)
        # Looked at when reporting: AuxK is skipped while there is nothing for it to do, and a relu dictionary, which begins
        # with half of its latents active, takes the dense path until few are.
        self.any_dead = False
        self.l0 = float(self.cfg.d_sae if sae.cfg.activation == "relu" else sae.expected)
        self.cohort = Cohort([self]) if (fits(sae) and config.accumulate == 1) or ranks.size > 1 else None

    def step(self, batch: Batch) -> None:
        """One update on batch.x [N, D] at batch.pos [N], towards batch.target."""
        if self.cohort is not None and not self.is_unfused:
            if len(self.cohort.learners) > 1:
                raise RuntimeError("this dictionary takes its steps with others: call Cohort.step")
            self.cohort.step(batch)
        else:
            x, dead = self.scaled(batch.x), self.dead
            target = x if "second" in self.reads else self.scaled(batch.target)
            context = self._batch_context(batch) if self.reads else None
            outcome = self._unfused_step(x, batch.pos, dead, self.begin_step(x, batch.pos), target, context)
            self.counts.add(len(x), (target - self.mean).square().sum(), outcome)
            self.match(outcome.sums)
            self.sae.follow(None if outcome.least_kept is None else outcome.least_kept[0], self.threshold_pace)
        resample_steps = self.config.resample_every_steps
        if resample_steps is not None and self.steps_done % resample_steps == 0:
            self._resample(self.scaled(batch.x), batch.pos, self.scaled(batch.target))

    def _batch_context(self, batch: Batch) -> BatchContext:
        """What the dictionary's parts read."""
        second = self.scaled(batch.target) if "second" in self.reads else None
        return BatchContext(batch.row if "rows" in self.reads else None, batch.attribute, second)

    def match(self, sums: PositionSums) -> None:
        """Change the sparsity coefficients after a step, for `target_l0`: with u = log(L0 / target) of the step, u' how
        fast it moves in a step (a mean over about ten), and S the run's steps,

            log c += 20 / S * max(-1, min(1, u + 0.1 S u'))

        Biases follow late, so that looking ahead keeps it from going too far."""
        if self.config.target_l0 is None:
            return
        l0, steps = sums.l0.sum() / sums.count.sum(), self.config.steps
        log_c, previous, speed = self.matching
        log_ratio = (l0 / self.config.target_l0).clamp_min(1e-3).log()
        speed.lerp_((log_ratio - previous) * (self.steps_done > 1), 0.1)
        previous.copy_(log_ratio)
        log_c.add_((log_ratio + MATCHING[1] * steps * speed).clamp(-1, 1) * (MATCHING[0] / steps))

    def scaled(self, x: Tensor) -> Tensor:
        """x as the dictionary sees it."""
        return x.to(self.dtype) * self.scale

    def begin_step(self, x: Tensor, pos: Tensor) -> float:
        """The learning rate of a step on scaled x, which from now on counts as done."""
        config = self.config
        if self.steps_done == 0 and self._is_new:
            self.sae.initialise_threshold(x, pos, self.ranks)
        lr = self.lr * schedule(self.steps_done, config.steps, config.warmup, config.decay)
        if config.k_start is not None:
            self.sae.k = annealed(self.steps_done, config.steps, config.k_anneal, config.k_start, self.cfg.k)
        warmup = min(1.0, (self.steps_done + 1) / max(1.0, config.sparsity_warmup * config.steps))
        self.sae.pressure = warmup if config.target_l0 is None else warmup * self.matching[0].exp()
        self.sae.at(self.steps_done / max(1, config.steps - 1), self.steps_done, config.seed)
        for group in self.adam.param_groups:
            group["lr"] = group["pace"] * lr
        self.steps_done += 1
        self.tokens_done += len(x)
        self._steps += 1
        return lr

    def fit_threshold(self, sample: RunSample) -> None:
        """Fit batchtopk's inference threshold to a sample of the run, where that applies (`needs_sample`)."""
        if needs_sample(self.cfg) and (sample_batch := sample.at(self.hook)) is not None:
            if self.cohort is not None:
                self.cohort.settle()
            x, pos = sample_batch
            self.sae.fit_threshold(self.scaled(x), pos, self.ranks)

    @property
    def threshold_pace(self) -> float:
        """How fast batchtopk's threshold follows: a mean over the last fortieth of the run, and at most 100 batches, when
        the learning rate has nearly come down to zero, so that it is that of the dictionary as it ends."""
        return min(1.0, max(0.01, 40 / self.config.steps))

    @property
    def dead(self) -> Tensor | None:
        """Which latents [F] AuxK is for; None for none."""
        return (self.counts.idle_tokens >= self.dead_after)[0] if self.any_dead else None

    @property
    def expected(self) -> int:
        """About how many latents of a token are active."""
        return max(1, math.ceil(self.l0 / self.ranks.size)) if self.sae.cfg.activation == "relu" else self.sae.expected

    @property
    def is_dense(self) -> bool:
        """Whether so many latents are in use on a token that dense products are faster than gathers."""
        active_latents = self.sae.k if self.cfg.activation in ("topk", "batchtopk") else self.l0
        return active_latents > DENSE_FROM * self.cfg.d_sae and self.cfg.prefixes is None and self.ranks.size == 1

    @property
    def is_unfused(self) -> bool:
        """Whether a step is dense and goes by autograd even where there are kernels: those take a code to begin with."""
        return self.is_dense and self.sae.cfg.activation == "relu"

    def _unfused_step(
        self,
        x: Tensor,
        pos: Tensor,
        dead: Tensor | None,
        lr: float,
        target: Tensor,
        context: BatchContext | None = None,
    ) -> Outcome:
        """The update by autograd and torch's Adam (ours for narrow moments): for every dictionary and device, and what the
        fused one must equal."""
        objective = self._gradients(x, pos, dead, target, context)
        self.sae.project_decoder_gradient()
        for name, parameter in self.sae.named_parameters():
            if name in self.leaves and self.leaves[name] is not parameter and parameter.grad is not None:
                self.leaves[name].grad = parameter.grad.T
        norm = torch.zeros_like(objective.loss.detach())
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
        self.sae.after()
        aux, least_activation = (
            None if tensor is None else tensor[None] for tensor in (objective.aux_loss, objective.least_kept)
        )
        sums = PositionSums(*(total[None] for total in objective.sums))
        return Outcome(objective.loss.detach()[None], aux, norm[None], sums, objective.fired[None], least_activation)

    def _gradients(
        self, x: Tensor, pos: Tensor, dead: Tensor | None, target: Tensor, context: BatchContext | None
    ) -> Objective:
        """The objective and its gradients, in `accumulate` chunks of the batch."""
        objectives: list[Objective] = []
        chunks = zip(*(tensor.chunk(self.config.accumulate) for tensor in (x, pos, target)), strict=True)
        for x_chunk, pos_chunk, target_chunk in chunks:
            objective = self.sae.objective(x_chunk, pos_chunk, self.n_positions, dead, target_chunk, context)
            share = len(x_chunk) / len(x)
            (objective.loss * share).backward()
            aux = None if objective.aux_loss is None else objective.aux_loss * share
            objectives.append(replace(objective, loss=objective.loss.detach() * share, aux_loss=aux))
        return functools.reduce(Objective.add, objectives)

    @torch.no_grad()
    def _resample(self, x: Tensor, pos: Tensor, target: Tensor) -> None:
        """Let dead latents begin again as tokens of a batch, chosen in proportion to their squared error, squared."""
        if self.cohort is not None:
            self.cohort.settle()
        dead = (self.counts.idle_tokens[0] >= self.dead_after).nonzero().flatten()
        if not len(dead):
            return
        error = (target - self.sae(x, pos)).float().square().sum(1).square()
        generator = torch.Generator().manual_seed((1_000_003 * self.config.seed + self.steps_done) % 2**63)
        chosen_tokens = torch.multinomial(error.double().cpu(), len(dead), replacement=True, generator=generator).to(
            x.device
        )
        center = 0 if self.sae.center is None else self.sae.center
        directions = torch.nn.functional.normalize(x[chosen_tokens].float() - center, dim=1)
        encoder, alive = self.leaves["W_enc"].data, self.counts.idle_tokens[0] < self.dead_after
        size = 0.2 * encoder[alive].norm(dim=1).mean() if bool(alive.any()) else 0.2
        encoder[dead] = size * directions
        if "W_dec" in self.leaves:
            target_directions = target[chosen_tokens].float() - self.sae.b_dec
            self.leaves["W_dec"].data[dead] = torch.nn.functional.normalize(target_directions, dim=1)
        self.leaves["b_enc"].data[dead] = 0
        for name, moments in self.moments().items():
            if name in ("W_enc", "W_dec", "b_enc"):
                for moment in moments[:2]:
                    moment[dead] = 0
        self.counts.idle_tokens[0, dead] = 0
        if self.cohort is not None:
            self.cohort.fused.refresh()

    def _rates(self, name: str, lr: float) -> Rates:
        """Adam's settings for a parameter in this step, its gradient being clipped already."""
        beta1, beta2, step, device = self.config.beta1, self.config.beta2, self.steps_done, self.mean.device
        numbers = (lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, 1.0)
        step_size, correction, factor = (torch.full((), number, device=device) for number in numbers)
        seed = torch.full((), rounding_seed(name, step), dtype=torch.int32, device=device)
        return Rates(step_size, correction, factor, beta1, beta2, seed=seed)

    def moments(self) -> dict[str, Moments]:
        """Adam's moments by parameter, in the layout of `leaves`."""
        adam_states = {name: self.adam.state[leaf] for name, leaf in self.leaves.items() if name not in self.narrow}
        return {
            name: Moments(state["exp_avg"], state["exp_avg_sq"]) for name, state in adam_states.items()
        } | self.narrow

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The moments of all parameters and torch's step counts, as checkpoints name them."""
        tensors = {}
        for name, leaf in self.leaves.items():
            leaf_state = self.narrow[name]._asdict() if name in self.narrow else self.adam.state[leaf]
            tensors |= {f"adam.{name}.{key}": value for key, value in leaf_state.items() if value is not None}
        return tensors

    @property
    def has_news(self) -> bool:
        """Whether there were steps since the last report."""
        return self._steps > 0

    def is_finite(self) -> bool:
        """Whether every loss since the last report was. Waits for the device."""
        if self.cohort is not None:
            self.cohort.settle()
        return bool(self.counts.losses.isfinite().all())

    def report(self) -> dict[str, Any]:
        """Means since the last report. Waits for the device.

        `loss`: squared error per token (scaled activations) and L1 term; `aux_loss`: what AuxK adds to it in training;
        `fvu`: squared error over that of predicting the mean; `dead`: latents idle for `dead_after` tokens; `sparsity`:
        factor on the sparsity coefficient, of `target_l0`; `gradient_norm`: before clipping, `positions`: of each position,
        where those are asked for; `parts`: what the parts tell.
        """
        if self.cohort is not None:
            self.cohort.settle()
        sums = PositionSums(*self.counts.sums[0])
        loss, aux, norm = (self.counts.losses[0] / max(1, self._steps)).tolist()
        dead = int(self.ranks.sum_((self.counts.idle_tokens >= self.dead_after).sum()))
        figures = {
            "loss": loss,
            "aux_loss": aux,
            "fvu": fvu(sums.squared_error, self.counts.spread),
            "l0": per_token(sums.l0, sums.count),  # 0 where the first step since then failed
            "l1": per_token(sums.l1, sums.count) / self.scale,
            "dead": dead,
            "dead_fraction": dead / self.cfg.d_sae,
            "lr": self.adam.param_groups[0]["lr"],
        }
        if self.config.clip_norm is not None:
            figures["gradient_norm"] = norm
        if self.config.log_positions:
            position_means = (sums.squared_error / sums.count, sums.l0 / sums.count)
            figures["positions"] = dict(zip(("squared_error", "l0"), map(_rounded, position_means), strict=True))
        if parts := self.sae.part_reports():
            figures["parts"] = parts
        self.any_dead = dead > 0
        was_unfused, self.l0 = self.is_unfused, figures["l0"]
        if self.cohort is not None:
            self.cohort.capacity = None  # by and by other than needed
            if was_unfused:
                self.cohort.fused.refresh()
        for count in (self.counts.sums, self.counts.spread, self.counts.losses):
            count.zero_()
        self._steps = 0
        if self.config.target_l0 is not None:
            figures["sparsity"] = float(self.matching[0].exp())
        return figures

    @torch.no_grad()
    def held_out(self, batches: Sequence[Batch]) -> dict[str, float]:
        """FVU and L0 on batches of whole rows that training never sees, predicting their mean having FVU 1."""
        sums = HeldOutSums(len(self.mean), self.mean.device)
        for batch in batches:
            code = self.sae.encode_sparse(self.scaled(batch.x), batch.pos)
            sums.add(self.scaled(batch.target), self.sae.decode(code), code)
        return {"fvu": sums.fvu, "l0": sums.l0}

    def weights(self) -> dict[str, Tensor]:
        """The `state_dict` of the whole dictionary, in units of x."""
        whole_state = self.ranks.whole_state(self.sae.state_dict(), self.sae.latent_dims)
        powers = {name: self.sae.powers.get(name, 0) for name in whole_state}
        return {name: x / self.scale ** powers[name] if powers[name] else x for name, x in whole_state.items()}

    def end(self) -> SparseAutoencoder:
        """The whole dictionary, in units of x. There are no more steps after it."""
        if self.ranks.size == 1:
            self.sae.scale_(1 / self.scale)
            return self.sae
        sae = SparseAutoencoder(self.cfg)
        sae.load_state_dict(self.weights())
        return sae.to(self.mean.device)

    def state(self) -> dict[str, Tensor]:
        """Moments, counters and sums: all that the weights don't hold, of the whole dictionary."""
        if self.cohort is not None:
            self.cohort.settle()
        numbers = {
            "scale": self.scale,
            "steps_done": self.steps_done,
            "tokens_done": self.tokens_done,
            "steps": self._steps,
            "any_dead": self.any_dead,
            "l0": self.l0,
        }
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        for adam_state in self.adam.state.values():
            adam_state["step"].fill_(self.steps_done)  # the fused step doesn't count
        return tensors | self.ranks.whole_state(self._named_counts() | self._optimizer_state(), self._latent_dims)

    @property
    def _latent_dims(self) -> dict[str, int]:
        """As `SparseAutoencoder.latent_dims`, of counts and moments."""
        latent_moments = [
            name
            for name in self._optimizer_state()
            if not name.startswith("adam.b_dec") and name.split(".")[-1] != "step"
        ]
        return {"idle_tokens": 0} | {name: int(name.startswith("adam.mask.logits")) for name in latent_moments}

    def _named_counts(self) -> dict[str, Tensor]:
        """The counts, as checkpoints name them, and the mean."""
        idle_tokens, sums, spread, losses = (count[0] for count in self.counts)
        tensors = {"idle_tokens": idle_tokens, "mean": self.mean, "spread": spread, "losses": losses}
        if self.config.target_l0 is not None:
            tensors["matching"] = self.matching
        return tensors | {f"sums.{key}": value for key, value in zip(PositionSums._fields, sums, strict=True)}

    def load_state(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Go on from `state`, with the dictionary's `weights` in units of x.

        Raises UserError for moments of another kind than `config.moments`: they are not converted.
        """
        tensors = self._optimizer_state() | self._named_counts()
        kinds = {torch.bfloat16: "bfloat16", torch.int8: "8bit"}
        saved_kind = kinds.get(state["adam.W_enc.exp_avg"].dtype, "float32")
        if saved_kind != self.config.moments:
            raise UserError(
                f"train.moments: {self.config.moments} is not allowed; the checkpoint's are {saved_kind}, and "
                "are not converted"
            )
        self.sae.load_state_dict(self.ranks.own_state(weights, self.sae.latent_dims))
        self.scale = float(state["scale"])
        self.sae.scale_(self.scale)
        self.steps_done, self._steps = int(state["steps_done"]), int(state["steps"])
        self.tokens_done = int(state["tokens_done"])
        self.any_dead, self.l0 = bool(state["any_dead"]), float(state["l0"])
        for key, value in self.ranks.own_state({key: state[key] for key in tensors}, self._latent_dims).items():
            tensors[key].copy_(value)
        if self.cohort is not None:
            self.cohort.fused.refresh()


def _rounded(values: Tensor) -> list[float | None]:
    """Six digits; None where there is nothing."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


class Cohort:
    """Dictionaries of one size that train on the same batches, with one launch of each kernel for all of them.

    They have one configuration; seeds and learning rates may differ. Their parameters, moments and counts become views of
    tensors that hold them all, so that `Learner` reports and saves each as ever.
    """

    def __init__(self, learners: Sequence[Learner]):
        self.learners, first_learner = list(learners), learners[0]
        self.fused = FusedStep(
            [learner.sae for learner in learners], [learner.leaves for learner in learners],
            [learner.moments() for learner in learners], first_learner.paces, first_learner.config,
            first_learner.dtype, first_learner.ranks,
        )  # fmt: skip
        self.counts = Counts(
            *(side_by_side(counts) for counts in zip(*(learner.counts for learner in learners), strict=True))
        )
        self.capacity: int | None = None  # of codes whose size isn't known beforehand
        self._pending: Callable[[], None] | None = None
        for learner in learners:
            learner.cohort = self

    def step(self, batch: Batch) -> None:
        """One update of each on batch.x [N, D] at batch.pos [N], towards batch.target.

        Whether the code of jumprelu and relu dictionaries had room for all entries, the host looks when the next step begins
        or a report is made, and does the step again if not.
        """
        self.settle()
        first_learner = self.learners[0]
        x, target = first_learner.scaled(batch.x), first_learner.scaled(batch.target)
        dead, any_dead = None, [learner.any_dead for learner in self.learners]
        if any(any_dead):
            dead = self.counts.idle_tokens >= first_learner.dead_after
            if not all(any_dead):
                dead &= torch.tensor(any_dead)[:, None].to(x.device, non_blocking=True)
        self.fused.dense = first_learner.is_dense
        lrs = [learner.begin_step(x, batch.pos) for learner in self.learners]
        fused_step = functools.partial(
            self.fused,
            x,
            batch.pos,
            first_learner.n_positions,
            dead,
            first_learner.expected,
            lrs=lrs,
            step=first_learner.steps_done,
            target=target,
        )
        spread = (target - first_learner.mean).square().sum()
        has_unknown_size = first_learner.cfg.activation not in ("topk", "batchtopk") and first_learner.ranks.size == 1
        capacity = self.capacity if has_unknown_size else None
        self._pending = functools.partial(self._count, fused_step, fused_step(capacity=capacity), len(x), spread)
        if capacity is None:
            self.settle()

    def settle(self) -> None:
        """See to it that the last step was done and is counted."""
        count_pending, self._pending = self._pending, None
        if count_pending is not None:
            count_pending()

    def _count(self, fused_step: Callable[..., Outcome], outcome: Outcome, n: int, spread: Tensor) -> None:
        if outcome.overflow:
            outcome = fused_step(capacity=None)
            self.capacity = None
        if self.capacity is None and outcome.entries is not None and outcome.least_kept is None:
            self.capacity = math.ceil(ROOM * int(outcome.entries)) + n
        self.counts.add(n, spread, outcome)
        for learner in self.learners:
            learner.match(outcome.sums)
        if outcome.least_kept is not None:
            for learner, least_activation in zip(self.learners, outcome.least_kept, strict=True):
                learner.sae.follow(least_activation, learner.threshold_pace)


def group_into_cohorts(learners: Iterable[Learner]) -> list[Cohort | Learner]:
    """Those that can be put into cohorts, and the rest as they are; each of the list takes a step for all in it."""
    steppers: list[Cohort | Learner] = []
    groups: dict[object, list[Learner]] = {}
    for learner in learners:
        cfg, config = learner.sae.cfg, learner.config.model_copy(update={"lr": None, "seed": 0})
        is_groupable = (
            learner.cohort is not None and cfg.activation != "relu" and cfg.prefixes is None and not config.fp8
        )
        is_groupable = is_groupable and learner.ranks.size == 1
        if is_groupable and not cfg.mask.is_learned and config.target_l0 is None:
            key = repr((cfg, config, learner.scale, learner.steps_done, learner.dtype, learner.mean.device))
            groups.setdefault(key, []).append(learner)
        else:
            steppers.append(learner)
    for group in groups.values():
        steppers.append(Cohort(group) if len(group) > 1 else group[0])
    return steppers
