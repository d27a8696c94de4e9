"""A dictionary with parts: further mechanisms at places of a `SparseAutoencoder` (`parts.Part`)."""

import math

import torch
from torch import Tensor, nn

from ..kernels.autograd import encode_dense, position_loss, reconstruct
from ..kernels.code import SparseCode
from ..kernels.masks import in_range, weights_at
from ..kernels.select import select_batch_topk, select_threshold, select_topk
from ..kernels.torch_modes import default_modes, without_autocast
from .config import SAEConfig
from .errors import UserError
from .parts import BatchView, Part
from .ranks import Ranks
from .registry import find
from .sae import BatchContext, Mask, SparseAutoencoder
from .training.objective import Objective


def dictionary(config: SAEConfig, *, seed: int = 0) -> SparseAutoencoder:
    """Make a new dictionary, of the class that its settings need."""
    return ComposedAutoencoder(config, seed=seed) if config.parts else SparseAutoencoder(config, seed=seed)


class ComposedAutoencoder(SparseAutoencoder):
    """A SparseAutoencoder with `cfg.parts`.

    If no part reads or changes all activations, topk and batchtopk are as sparse as in a plain dictionary. Otherwise the
    activations of the batch are dense [N, F]. Encoder, mask and per-position sums still use the kernels, unless a part
    changes pre-activations, which the encoder's kernel never writes.

    Parts work in the units of training, in which |x| is about sqrt(D): x * unit is in these units. In training, unit is 1.
    """

    unit: Tensor
    progress: Tensor
    powers = {**SparseAutoencoder.powers, "unit": -1}

    @default_modes()
    def __init__(self, config: SAEConfig, *, seed: int = 0):
        super().__init__(config, seed=seed)
        generator = torch.Generator().manual_seed((seed + 0x7E3705AE) % 2**63)
        self.parts = nn.ModuleList()
        for section in config.parts:
            cls = find(section["kind"])
            self.parts.append(cls(cls.Settings(**section), config, config.mask.positions, generator))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("progress", torch.ones(()))
        self._step_and_seed = 0, seed
        self._last: BatchView | None = None
        for part in self.parts_in():
            part.initialise(self, generator)

    def parts_in(self, hook: str | None = None) -> list[Part]:
        """All parts, or those that act at `hook`."""
        parts = [part for part in self.parts if isinstance(part, Part)]
        return [part for part in parts if hook is None or part.does(hook)]

    @property
    def is_dense(self) -> bool:
        """Whether a part needs all activations, so that selection comes last."""
        changes_activations = any(self.parts_in(hook) for hook in ("pre", "acts", "latents"))
        return changes_activations or any("f" in part.reads for part in self.parts_in())

    @property
    def looks_along_rows(self) -> bool:
        hooks = ("input", "pre", "acts", "latents")
        return any("rows" in part.reads and any(part.does(hook) for hook in hooks) for part in self.parts_in())

    @property
    def paces(self) -> dict[str, float]:
        parts = enumerate(self.parts_in())
        return {f"parts.{i}.{name}": pace for i, part in parts for name, pace in part.paces.items()}

    def shard(self, ranks: Ranks) -> SparseAutoencoder:
        if ranks.size > 1:
            raise UserError("sae.parts: not allowed with several processes; they don't share latents")
        return self

    def at(self, progress: float, step: int = 0, seed: int = 0) -> None:
        super().at(progress, step, seed)
        self.progress.fill_(progress)
        self._step_and_seed = step, seed

    def inputs(self, x: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor | None, Mask | None]:
        return self._inputs(self._batch_view(x, pos))

    @without_autocast()
    @torch.no_grad()
    def encode_sparse(self, x: Tensor, pos: Tensor | None = None) -> SparseCode:
        if not self.is_dense:
            return super().encode_sparse(x, pos)
        batch = self._batch_view(x, pos)
        f = self._latents(batch) / self.unit
        if self.cfg.activation == "topk":
            return select_topk(f, min(self.k, self.cfg.d_sae))
        return select_threshold(f, 0.0 if self.cfg.activation == "relu" else self.threshold.expand(self.cfg.d_sae))

    def _code(self, x: Tensor, pos: Tensor | None) -> SparseCode:
        if not self.is_dense:
            return super()._code(x, pos)
        code = self.encode_sparse(x, pos)
        if not torch.is_grad_enabled():
            return code
        return self._gather_values(self._latents(self._batch_view(x, pos)) / self.unit, code)

    @without_autocast()
    def latents_of(self, x: Tensor, pos: Tensor) -> Tensor:
        """f [N, F] of further activations, in units of training. Differentiable. batchtopk keeps the N k largest."""
        f = self._latents(self._batch_view(x / self.unit.to(x.dtype), pos))
        return f if self.cfg.activation == "relu" else self._select(f).to_dense()

    @without_autocast()
    def objective(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None = None, target: Tensor | None = None,
        batch_context: BatchContext | None = None,
    ) -> Objective:  # fmt: skip
        """The objective of a plain dictionary, with per-position weights w and v and the parts' penalties:

        loss = sum_p w_p squared_error_p / N + l1_coefficient * sum_p v_p l1_p / N (relu) + AuxK (others) + penalties
        """
        step, seed = self._step_and_seed
        batch = self._batch_view(x, pos)
        batch.n_positions, batch.training, batch.step, batch.seed = n_positions, True, step, seed
        batch.pos = in_range(batch.pos, n_positions)
        batch.target = target = x if target is None else target
        if batch_context is not None:
            batch.row, batch.attribute, batch.second = batch_context  # pyright: ignore[reportAttributeAccessIssue]
        aux: SparseCode | None = None
        code: SparseCode | Tensor
        if self.is_dense:
            code = self._latents(batch)
            if self.cfg.activation != "relu":
                code, aux = self._select(code), self._aux_code(code, dead)
        else:
            x_in, mask_rows, mask = self._inputs(batch)
            if self.cfg.activation == "relu":
                code = batch.acts = encode_dense(x_in, self.W_enc, self.b_enc, self.center, mask, mask_rows)
            else:
                code, aux = self._encode_topk(x_in, mask, mask_rows, dead)
        if isinstance(code, SparseCode):
            batch.code = code
            if self.is_dense:
                batch.f = code.to_dense()
            error, batch.residual = reconstruct(code, self.W_dec, self.b_dec, target)
        else:
            batch.f = code
            error = target - torch.addmm(self.b_dec.to(x.dtype), code.to(x.dtype), self.W_dec.to(x.dtype))
            batch.residual = error
        sums = position_loss(error, code, pos, n_positions)
        batch.count, batch.squared_error, batch.l1, _ = sums
        loss = self._weighted_sum(batch) / len(x)
        for part in self.parts_in("penalty"):
            term = part.penalty(batch)
            loss = loss if term is None else loss + term
        self._last = batch
        return self._with_aux(loss, sums, code, batch.residual, target, aux, dead)

    @torch.no_grad()
    def after(self) -> None:
        """Show the parts the step just taken."""
        batch, self._last = self._last, None
        if batch is not None:
            for part in self.parts_in("after"):
                part.after(batch)

    def part_reports(self) -> dict[str, dict[str, object]]:
        return {part.kind: report for part in self.parts_in() if (report := part.report())}

    def _batch_view(self, x: Tensor, pos: Tensor | None) -> BatchView:
        if pos is None:
            raise UserError(f"pos: needed, because this dictionary has {self.looks_at_positions}")
        x = x.reshape(-1, x.shape[-1]) * self.unit.to(x.dtype)
        return BatchView(self, x, pos.reshape(-1).long(), self.cfg.mask.positions, float(self.progress))

    def _inputs(self, batch: BatchView) -> tuple[Tensor, Tensor | None, Mask | None]:
        x = batch.x
        for part in self.parts_in("input"):
            x = part.input(x.float(), batch).to(x.dtype)
        return super().inputs(x / self.unit.to(x.dtype), batch.pos)

    def _latents(self, batch: BatchView) -> Tensor:
        """[N, F] after the mask, in units of training."""
        x, mask_rows, mask = self._inputs(batch)
        pre_parts = self.parts_in("pre")
        if pre_parts:
            centred = x if self.center is None else x - self.center.to(x.dtype)
            pre = torch.addmm(self.b_enc.to(x.dtype), centred, self.W_enc.to(x.dtype)).float() * self.unit
            for part in pre_parts:
                pre = part.pre(pre, batch)
            f = torch.relu(pre)
        else:
            # those parts come before the mask
            encoder_mask = (None, None) if self.parts_in("acts") else (mask, mask_rows)
            f = encode_dense(x, self.W_enc, self.b_enc, self.center, *encoder_mask).float() * self.unit
            mask = mask if encoder_mask[0] is None else None
        for part in self.parts_in("acts"):
            f = part.acts(f, batch)
        batch.acts = f
        if mask is not None and mask_rows is not None:
            f = f * weights_at(mask, mask_rows)
        for part in self.parts_in("latents"):
            f = part.latents(f, batch)
        return f

    def _select(self, f: Tensor) -> SparseCode:
        with torch.no_grad():
            if self.cfg.activation == "topk":
                code = select_topk(f, min(self.k, self.cfg.d_sae))
            else:
                code = select_batch_topk(f, len(f) * min(self.k, self.cfg.d_sae))
        return self._gather_values(f, code)

    def _aux_code(self, f: Tensor, dead: Tensor | None) -> SparseCode | None:
        k = self.aux_k(dead)
        if k == 0 or dead is None:
            return None
        with torch.no_grad():
            code = select_topk(f * dead, k)
        return self._gather_values(f * dead, code)

    def _gather_values(self, f: Tensor, code: SparseCode) -> SparseCode:
        flat_indices = code.rows * self.cfg.d_sae + code.live(code.indices)
        return code.with_values(code.live(f.reshape(-1)[flat_indices]))

    def _weighted_sum(self, batch: BatchView) -> Tensor:
        weights = [part.weigh(batch) for part in self.parts_in("weigh")]
        error_weights = math.prod(factor for factor, _ in weights if factor is not None)  # 1 without weights
        l1_weights = math.prod(factor for _, factor in weights if factor is not None)
        batch.weights = error_weights if isinstance(error_weights, Tensor) else None
        error, l1 = (batch.squared_error * error_weights).sum(), batch.l1
        if self.cfg.activation != "relu":
            return error
        if batch.penalised is not None:
            l1 = batch.penalised.sum(1)
            l1_weights = l1_weights[batch.pos] if isinstance(l1_weights, Tensor) else 1
        return error + self.sparsity_coefficient * (l1 * l1_weights).sum()
