"""A dictionary in training: its optimiser, its counts, what is reported and what is saved."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adam import Moments
from ..kernels.loss import PositionSums, count_step
from .config import SAEConfig, TrainConfig
from .errors import UserError
from .fused import Outcome
from .metrics import HeldOutSums, fvu, per_token, plain
from .ranks import ALONE, Ranks
from .registry import reads
from .run_sample import RunSample, needs_sample
from .sae import BatchContext, SparseAutoencoder
from .stream import Batch
from .training.checks import check_fp8
from .training.directions import hold_directions
from .training.schedules import annealed, default_lr, schedule
from .training.stacked_weights import LARGE

# How far `target_l0` may move log(sparsity coefficient) in a run, and how far it looks ahead, as a share of the run.
MATCHING_RANGE, MATCHING_LOOKAHEAD = 20.0, 0.1


class Counts(NamedTuple):
    """What is counted in training, for S dictionaries."""

    idle_tokens: Tensor  # int64 [S, F]: since each latent was last active
    sums: Tensor  # [S, 4, T]: `PositionSums` since the last report
    spread: Tensor  # [S]: squared distance of activations from their mean since then
    totals: Tensor  # [S, 5]: loss without AuxK, AuxK, gradient norm, positions outside of [0, T), tiles computed twice

    def add(self, n: int, spread: Tensor, outcome: Outcome) -> None:
        """Count a batch of n tokens."""
        count_step(
            *self, n=n, fired=outcome.fired, batch=outcome.sums, batch_spread=spread, loss=outcome.loss,
            aux_loss=outcome.aux_loss, norm=outcome.norm, recomputed=outcome.recomputed,
        )  # fmt: skip


class Learner:
    """A dictionary in training: its optimiser, counts and sums between two reports. A `Cohort` takes its steps.

    Activations are scaled by `scale`, the power of two nearest to sqrt(D) / mean |x|, so that one learning rate serves
    every model. A power of two can be folded into the biases and taken out again without rounding.

    A cohort sets `pending` while its last step is not counted yet, and methods that read or change the dictionary raise
    RuntimeError until `Cohort.settle` is called. `version` counts changes of the weights outside the fused step.
    """

    def __init__(
        self, sae: SparseAutoencoder, config: TrainConfig, mean: Tensor, mean_norm: float, n_positions: int,
        b_dec: Tensor | None = None, *, hook: str = "x", trained: bool = False, ranks: Ranks = ALONE,
    ):  # fmt: skip
        """`mean` is the mean of the target, and `mean_norm` the mean norm of x, the activations at `hook`. b_dec starts as
        `b_dec` or as the mean, unless the dictionary is `trained` already, in units of x. With several `ranks`, `sae` is the
        whole dictionary, and this process trains its share."""
        self.cfg: SAEConfig = sae.cfg  # for the whole dictionary, on all ranks
        self.reads, self.hook = reads(sae.cfg), hook
        sae = sae.shard(ranks).to(mean.device)
        self.sae, self.config, self.n_positions, self.ranks = sae, config, n_positions, ranks
        sae.mask.checked_later = True
        self.scale = 2.0 ** round(math.log2(math.sqrt(sae.cfg.d_in) / max(mean_norm, 1e-30)))
        self.mean = mean * self.scale
        self._is_new = not trained
        if trained:
            sae.scale_(self.scale)
        else:
            sae.initialise_bias(self.mean if b_dec is None else b_dec * self.scale)
        device = self.mean.device
        self.lr = config.lr if config.lr is not None else default_lr(self.cfg, config)
        # Adam sees W_enc as it lies in memory, [F, D]: on a CPU it is three times slower on a transposed view.
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
        self.start = sae.W_dec.detach().clone() if sae.cfg.decoder == "soft_frozen" else None  # of decoder rows
        self.paces = {name: sae.paces.get(name, 1.0) for name in self.leaves}
        groups = [
            {"params": [leaf], "pace": self.paces[name]}
            for name, leaf in self.leaves.items()
            if name not in self.narrow
        ]
        self.adam = torch.optim.Adam(groups, lr=self.lr, betas=(config.beta1, config.beta2), fused=True)
        self.dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        for group in groups:  # the state that torch would make at the first step; the fused step needs it too
            (leaf,) = group["params"]
            moments = {key: torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.zeros((), device=device), **moments}
        if config.fp8:
            check_fp8(self.cfg, device)
        self.dead_after = config.dead_after_tokens or min(10_000_000, max(config.tokens // 10, 10 * config.batch))
        idle_tokens = torch.zeros(1, sae.cfg.d_sae, dtype=torch.int64, device=device)
        sums = torch.zeros(1, len(PositionSums._fields), n_positions, device=device)
        self.counts = Counts(idle_tokens, sums, torch.zeros(1, device=device), torch.zeros(1, 5, device=device))
        self.steps_done = self.tokens_done = 0
        self._steps = 0  # since the last report
        # for `target_l0`: log of the factor on the sparsity coefficients, log(L0 / target), and how fast that moves
        self.matching = torch.zeros(3, device=device)
        # Both are updated by reports. AuxK is skipped while no latent is dead. A relu dictionary begins with half of its
        # latents active.
        self.any_dead = False
        self.l0 = float(self.cfg.d_sae if sae.cfg.activation == "relu" else sae.expected)
        self.version, self.pending = 0, False

    def batch_context(self, batch: Batch) -> BatchContext | None:
        """The fields of a batch that the dictionary's parts read, if it has any that do."""
        if not self.reads:
            return None
        second = self.scaled(batch.target) if "second" in self.reads else None
        return BatchContext(batch.row if "rows" in self.reads else None, batch.attribute, second)

    def check_settled(self) -> None:
        """Raise RuntimeError while the last step is not counted."""
        if self.pending:
            raise RuntimeError("the dictionary's last step is not counted yet: call Cohort.settle first")

    def match(self, sums: PositionSums) -> None:
        """Move the sparsity coefficients towards `target_l0` after a step:

            log c += 20 / S * max(-1, min(1, u + 0.1 S u'))

        with u = log(L0 / target) of the step, u' its change per step (a mean over about ten), and S the run's steps. Biases
        react late, and looking ahead keeps c from overshooting."""
        if self.config.target_l0 is None:
            return
        l0, steps = sums.l0.sum() / sums.count.sum(), self.config.steps
        log_c, previous, speed = self.matching
        log_ratio = (l0 / self.config.target_l0).clamp_min(1e-3).log()
        speed.lerp_((log_ratio - previous) * (self.steps_done > 1), 0.1)
        previous.copy_(log_ratio)
        log_c.add_((log_ratio + MATCHING_LOOKAHEAD * steps * speed).clamp(-1, 1) * (MATCHING_RANGE / steps))

    def scaled(self, x: Tensor) -> Tensor:
        """x in the dtype and units of training."""
        return x.to(self.dtype) * self.scale

    def begin_step(self, x: Tensor, pos: Tensor) -> float:
        """Apply the schedules to the next step, on scaled x, and count it as done. Returns its learning rate."""
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
        """Fit batchtopk's inference threshold to a sample of the run; see `needs_sample`."""
        if needs_sample(self.cfg) and (sample_batch := sample.at(self.hook)) is not None:
            self.check_settled()
            x, pos = sample_batch
            self.sae.fit_threshold(self.scaled(x), pos, self.ranks)

    @property
    def threshold_pace(self) -> float:
        """How fast batchtopk's threshold follows: a mean over the last fortieth of the run, and at most 100 batches. The
        learning rate is nearly zero there, so that the threshold fits the final dictionary."""
        return min(1.0, max(0.01, 40 / self.config.steps))

    @property
    def dead(self) -> Tensor | None:
        """The dead latents [F], for AuxK. None if there were none at the last report."""
        return (self.counts.idle_tokens >= self.dead_after)[0] if self.any_dead else None

    @property
    def expected(self) -> int:
        """About how many of this process's latents are active on a token."""
        return max(1, math.ceil(self.l0 / self.ranks.size)) if self.sae.cfg.activation == "relu" else self.sae.expected

    @property
    def resamples_now(self) -> bool:
        """Whether dead latents are resampled after the step just done."""
        interval = self.config.resample_every_steps if self.cfg.encoder == "learned" else None
        return interval is not None and self.steps_done % interval == 0

    def hold_directions(self) -> None:
        """After an update by autograd, move rows of a soft-frozen decoder back to within reach of their start."""
        if self.start is not None:
            hold_directions(self.leaves["W_dec"], self.start)

    @torch.no_grad()
    def resample(self, batch: Batch) -> None:
        """Restart dead latents from tokens of a batch, drawn with probability proportional to squared error squared."""
        self.check_settled()
        dead = (self.counts.idle_tokens[0] >= self.dead_after).nonzero().flatten()
        if not len(dead):
            return
        x, target = self.scaled(batch.x), self.scaled(batch.target)
        error = (target - self.sae(x, batch.pos)).float().square().sum(1).square()
        generator = torch.Generator().manual_seed((1_000_003 * self.config.seed + self.steps_done) % 2**63)
        chosen = torch.multinomial(error.double().cpu(), len(dead), replacement=True, generator=generator).to(x.device)
        center = 0 if self.sae.center is None else self.sae.center
        directions = torch.nn.functional.normalize(x[chosen].float() - center, dim=1)
        encoder, alive = self.leaves["W_enc"].data, self.counts.idle_tokens[0] < self.dead_after
        size = 0.2 * encoder[alive].norm(dim=1).mean() if bool(alive.any()) else 0.2
        encoder[dead] = size * directions
        if "W_dec" in self.leaves:
            target_directions = target[chosen].float() - self.sae.b_dec
            self.leaves["W_dec"].data[dead] = torch.nn.functional.normalize(target_directions, dim=1)
            self.hold_directions()
        self.leaves["b_enc"].data[dead] = 0
        for name, moments in self.moments().items():
            if name in ("W_enc", "W_dec", "b_enc"):
                for moment in moments[:2]:
                    moment[dead] = 0
        self.counts.idle_tokens[0, dead] = 0
        self.version += 1

    def moments(self) -> dict[str, Moments]:
        """Adam's moments by parameter, in the layout of `leaves`."""
        states = {name: self.adam.state[leaf] for name, leaf in self.leaves.items() if name not in self.narrow}
        return {name: Moments(state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()} | self.narrow

    def _optimizer_state(self) -> dict[str, Tensor]:
        """All moments and torch's step counts, by their names in checkpoints."""
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
        """Whether every loss since the last report is finite. Waits for the device."""
        self.check_settled()
        return bool(self.counts.totals.isfinite().all())

    def _check_positions(self) -> None:
        """Raise UserError if tokens since the last report had positions that are not allowed. On a GPU, a step does not
        check them, since that would wait for the device."""
        if outside := int(self.counts.totals[0, 3]):
            raise UserError(
                f"pos: {outside} positions since the last report are not allowed; they must lie in [0, T) = "
                f"[0, {self.n_positions})"
            )
        seen = self.counts.sums[0, 0].nonzero()
        self.cfg.mask.check_context(int(seen[-1]) + 1 if len(seen) else 0)

    def report(self) -> dict[str, Any]:
        """Means since the last report. Waits for the device.

        `loss`: squared error per token, in scaled activations, plus the sparsity penalty; `aux_loss`: what AuxK adds to it;
        `fvu`: squared error relative to predicting the mean; `dead`: latents idle for `dead_after` tokens; `sparsity`: with
        `target_l0`, the factor on the sparsity coefficient; `gradient_norm`: before clipping; `recomputed_tiles`: tiles of
        latents per token that the kernels of ragged codes computed twice, if any; `positions`: squared error and L0 per
        position, if `log_positions` is set; `parts`: figures of the parts.

        Raises UserError for positions outside of [0, T), or beyond a mask that does not allow them.
        """
        self.check_settled()
        self._check_positions()
        sums = PositionSums(*self.counts.sums[0])
        loss, aux, norm, _, recomputed = (self.counts.totals[0] / max(1, self._steps)).tolist()
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
        if recomputed:
            figures["recomputed_tiles"] = per_token(self.counts.totals[0, 4], sums.count)
        if self.config.log_positions:
            position_means = (sums.squared_error / sums.count, sums.l0 / sums.count)
            figures["positions"] = dict(zip(("squared_error", "l0"), map(plain, position_means), strict=True))
        if parts := self.sae.part_reports():
            figures["parts"] = parts
        self.any_dead, self.l0 = dead > 0, figures["l0"]
        for count in (self.counts.sums, self.counts.spread, self.counts.totals):
            count.zero_()
        self._steps = 0
        if self.config.target_l0 is not None:
            figures["sparsity"] = float(self.matching[0].exp())
        return figures

    @torch.no_grad()
    def held_out(self, batches: Sequence[Batch]) -> dict[str, float]:
        """FVU and L0 on batches of whole rows that training never sees."""
        self.check_settled()
        sums = HeldOutSums(len(self.mean), self.mean.device)
        for batch in batches:
            code = self.sae.encode_sparse(self.scaled(batch.x), batch.pos)
            sums.add(self.scaled(batch.target), self.sae.decode(code), code)
        return {"fvu": sums.fvu, "l0": sums.l0}

    def weights(self) -> dict[str, Tensor]:
        """The `state_dict` of the whole dictionary, in units of x."""
        self.check_settled()
        whole_state = self.ranks.whole_state(self.sae.state_dict(), self.sae.latent_dims)
        powers = {name: self.sae.powers.get(name, 0) for name in whole_state}
        return {name: x / self.scale ** powers[name] if powers[name] else x for name, x in whole_state.items()}

    def end(self) -> SparseAutoencoder:
        """The whole dictionary, in units of x. No step may follow."""
        self.check_settled()
        if self.ranks.size == 1:
            self.sae.mask.checked_later = False
            self.sae.scale_(1 / self.scale)
            return self.sae
        sae = SparseAutoencoder(self.cfg)
        sae.load_state_dict(self.weights())
        return sae.to(self.mean.device)

    def state(self) -> dict[str, Tensor]:
        """Moments, counts and sums of the whole dictionary: with `weights`, all that a checkpoint needs. Errors as in
        `report`."""
        self.check_settled()
        self._check_positions()
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
        """The dimension that counts latents, as `SparseAutoencoder.latent_dims`, of counts and moments."""
        latent_moments = [
            name
            for name in self._optimizer_state()
            if not name.startswith("adam.b_dec") and name.split(".")[-1] != "step"
        ]
        return {"idle_tokens": 0, "start": 0} | {
            name: int(name.startswith("adam.mask.logits")) for name in latent_moments
        }

    def _named_counts(self) -> dict[str, Tensor]:
        """The counts and the mean, by their names in checkpoints."""
        idle_tokens, sums, spread, totals = (count[0] for count in self.counts)
        tensors = {"idle_tokens": idle_tokens, "mean": self.mean, "spread": spread, "losses": totals[:3]}
        if self.config.target_l0 is not None:
            tensors["matching"] = self.matching
        if self.start is not None:
            tensors["start"] = self.start
        return tensors | {f"sums.{key}": value for key, value in zip(PositionSums._fields, sums, strict=True)}

    def load_state(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Continue from a `state`, with the dictionary's `weights` in units of x.

        Raises UserError if its moments are of another kind than `config.moments`. They are not converted.
        """
        self.check_settled()
        tensors = self._optimizer_state() | self._named_counts()
        kinds = {torch.bfloat16: "bfloat16", torch.int8: "8bit"}
        large = next(name for name in LARGE if name in self.leaves)
        saved_kind = kinds.get(state[f"adam.{large}.exp_avg"].dtype, "float32")
        if saved_kind != self.config.moments:
            raise UserError(
                f"train.moments: {self.config.moments} is not allowed; the checkpoint's are {saved_kind}, and are not "
                "converted"
            )
        self.sae.load_state_dict(self.ranks.own_state(weights, self.sae.latent_dims))
        self.scale = float(state["scale"])
        self.sae.scale_(self.scale)
        self.steps_done, self._steps = int(state["steps_done"]), int(state["steps"])
        self.tokens_done = int(state["tokens_done"])
        self.any_dead, self.l0 = bool(state["any_dead"]), float(state["l0"])
        for key, value in self.ranks.own_state({key: state[key] for key in tensors}, self._latent_dims).items():
            tensors[key].copy_(value)
        self.version += 1
