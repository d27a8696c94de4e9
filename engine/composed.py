"""A dictionary composed of parts: what `SparseAutoencoder` does, with further mechanisms on the way (`parts.Part`)."""

from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..kernels.code import SparseCode
from ..kernels.masks import weights_at
from ..kernels.select import select_batch_topk, select_threshold, select_topk
from .ambient import own_dtypes, own_modes
from .config import SAEConfig
from .errors import UserError
from .functions import encode_dense, encode_topk, position_loss, reconstruct
from .parts import Part, Seen, build
from .ranks import Ranks
from .sae import Beside, Mask, Objective, SparseAutoencoder, has_fired, least_kept


def dictionary(config: SAEConfig, *, seed: int = 0) -> SparseAutoencoder:
    """A new dictionary, of the kind that its settings need."""
    return ComposedAutoencoder(config, seed=seed) if config.parts else SparseAutoencoder(config, seed=seed)


class ComposedAutoencoder(SparseAutoencoder):
    """A SparseAutoencoder with `cfg.parts`.

    As long as no part looks at all activations or changes them, topk and batchtopk take the sparse way of a plain
    dictionary, without anything [N, F]. Otherwise activations are dense, [N, F] of the batch: encoder, mask and per-position
    sums still go through the kernels, unless a part changes pre-activations, which the encoder's kernel never writes.

    Parts work in the units of training, in which |x| is about sqrt(D); `unit` is what takes x there, and 1 in training.
    """

    unit: Tensor
    progress: Tensor
    powers = {**SparseAutoencoder.powers, "unit": -1}

    @own_modes()
    def __init__(self, config: SAEConfig, *, seed: int = 0):
        super().__init__(config, seed=seed)
        generator = torch.Generator().manual_seed((seed + 0x7E3705AE) % 2**63)
        self.parts = nn.ModuleList(build(config, generator))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("progress", torch.ones(()))
        self.step_of = 0, seed
        self._last: Seen | None = None
        for part in self.parts_in():
            part.initialise(self, generator)

    def parts_in(self, hook: str | None = None) -> list[Part]:
        """All, or those that have something to do in `hook`."""
        found = [part for part in self.parts if isinstance(part, Part)]
        return [part for part in found if hook is None or part.does(hook)]

    @property
    def is_dense(self) -> bool:
        """Whether a part needs all activations, so that nothing is selected beforehand."""
        inside = any(self.parts_in(hook) for hook in ("pre", "acts", "latents"))
        return inside or any("f" in part.reads for part in self.parts_in())

    @property
    def looks_along_rows(self) -> bool:
        places = ("input", "pre", "acts", "latents")
        return any("rows" in part.reads and any(part.does(place) for place in places) for part in self.parts_in())

    @property
    def paces(self) -> dict[str, float]:
        named = (
            {f"parts.{i}.{name}": pace for name, pace in part.paces.items()} for i, part in enumerate(self.parts_in())
        )
        return dict(chain.from_iterable(one.items() for one in named))

    def part(self, ranks: Ranks) -> SparseAutoencoder:
        return self if ranks.size == 1 else self._refuse_ranks()

    def _refuse_ranks(self) -> NoReturn:
        raise UserError("sae.parts: not allowed with several processes; they don't share latents")

    def at(self, progress: float, step: int = 0, seed: int = 0) -> None:
        super().at(progress, step, seed)
        self.progress.fill_(progress)
        self.step_of = step, seed

    def inputs(self, x: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor | None, Mask | None]:
        return self._inputs(self._seen(x, pos))

    @own_dtypes()
    @torch.no_grad()
    def encode_sparse(self, x: Tensor, pos: Tensor | None = None) -> SparseCode:
        if not self.is_dense:
            return super().encode_sparse(x, pos)
        seen = self._seen(x, pos)
        f = self._latents(seen) / self.unit
        if self.cfg.activation == "topk":
            return select_topk(f, min(self.k, self.cfg.d_sae))
        return select_threshold(f, 0.0 if self.cfg.activation == "relu" else self.threshold.expand(self.cfg.d_sae))

    def _code(self, x: Tensor, pos: Tensor | None) -> SparseCode:
        if not self.is_dense:
            return super()._code(x, pos)
        code = self.encode_sparse(x, pos)
        if not torch.is_grad_enabled():
            return code
        return self._values_of(self._latents(self._seen(x, pos)) / self.unit, code)

    @own_dtypes()
    def latents_of(self, x: Tensor, pos: Tensor) -> Tensor:
        """f [N, F] of further activations, in the units of training; differentiable. Selected as in training: batchtopk
        keeps the N k largest of these."""
        f = self._latents(self._seen(x / self.unit.to(x.dtype), pos))
        return f if self.cfg.activation == "relu" else self._selected(f).to_dense()

    @own_dtypes()
    def objective(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None = None, target: Tensor | None = None,
        beside: Beside | None = None,
    ) -> Objective:  # fmt: skip
        """As that of a plain dictionary, with per-position weights w and v and the parts' penalties:

        loss = sum_p w_p squared_error_p / N + l1_coefficient * sum_p v_p l1_p / N (relu) + AuxK (others) + penalties
        """
        step, seed = self.step_of
        seen = self._seen(x, pos)
        seen.n_positions, seen.training, seen.step, seen.seed = n_positions, True, step, seed
        seen.target = target = x if target is None else target
        if beside is not None:
            seen.row, seen.attribute, seen.second = beside
        code = aux = None
        if self.is_dense:
            f = self._latents(seen)
            if self.cfg.activation != "relu":
                code = self._selected(f)
                aux = self._aux_code(f, dead)
        elif self.cfg.activation == "relu":
            x_in, rows, weights = self._inputs(seen)
            f = seen.acts = encode_dense(x_in, self.W_enc, self.b_enc, self.center, weights, rows)
        else:
            x_in, rows, weights = self._inputs(seen)
            code, aux = encode_topk(
                x_in, self.W_enc, self.b_enc, self.center, weights, rows, k=self.k, aux_k=self.aux_k(dead),
                aux_latents=dead, across_batch=self.cfg.activation == "batchtopk",
            )  # fmt: skip
            f = None
        if code is None:
            assert f is not None
            seen.f = f
            seen.residual = target - torch.addmm(self.b_dec.to(x.dtype), f.to(x.dtype), self.W_dec.to(x.dtype))
            sums = position_loss(seen.residual, f, pos, n_positions)
            fired, least = (f.detach() > 0).any(0), None
        else:
            seen.code, seen.f = code, code.to_dense() if f is not None else None
            error, seen.residual = reconstruct(code, self.W_dec, self.b_dec, target)
            sums = position_loss(error, code, pos, n_positions)
            fired = has_fired(code)
            least = least_kept(code)[0] if self.cfg.activation == "batchtopk" else None
        seen.count, seen.squared_error, seen.l1, seen.l0 = sums
        loss = self._weighted(seen) / len(x)
        for part in self.parts_in("penalty"):
            term = part.penalty(seen)
            loss = loss if term is None else loss + term
        aux_loss = None
        if aux is not None and dead is not None:
            left, _ = reconstruct(aux, self.W_dec, torch.zeros_like(self.b_dec), seen.residual.detach())
            aux_loss = self.aux_weight(target, seen.residual, dead) * left.sum()
            loss, aux_loss = loss + aux_loss, aux_loss.detach()
        self._last = seen
        return Objective(loss, sums._replace(squared_error=sums.squared_error.detach()), fired, aux_loss, least)

    @torch.no_grad()
    def after(self) -> None:
        """Let the parts look at the step just taken."""
        seen, self._last = self._last, None
        if seen is not None:
            for part in self.parts_in("after"):
                part.after(seen)

    def part_reports(self) -> dict[str, dict[str, object]]:
        found = {part.kind: part.report() for part in self.parts_in("report")}
        return {kind: line for kind, line in found.items() if line}

    def _seen(self, x: Tensor, pos: Tensor | None) -> Seen:
        if pos is None:
            raise UserError(
                f"pos: needed, because this dictionary has parts ({', '.join(part.kind for part in self.parts_in())})"
            )
        x = x.reshape(-1, x.shape[-1])
        return Seen(
            self, x * self.unit.to(x.dtype), pos.reshape(-1).long(), self.cfg.mask.positions, float(self.progress)
        )

    def _inputs(self, seen: Seen) -> tuple[Tensor, Tensor | None, Mask | None]:
        x = seen.x
        for part in self.parts_in("input"):
            x = part.input(x.float(), seen).to(x.dtype)
        return super().inputs(x / self.unit.to(x.dtype), seen.pos)

    def _latents(self, seen: Seen) -> Tensor:
        """[N, F] after the mask, in units of training."""
        x, rows, weights = self._inputs(seen)
        inside = self.parts_in("pre")
        if inside:
            centred = x if self.center is None else x - self.center.to(x.dtype)
            pre = torch.addmm(self.b_enc.to(x.dtype), centred, self.W_enc.to(x.dtype)).float() * self.unit
            for part in inside:
                pre = part.pre(pre, seen)
            f = torch.relu(pre)
        else:
            early = weights if not self.parts_in("acts") else None
            f = encode_dense(x, self.W_enc, self.b_enc, self.center, early, rows if early is not None else None)
            f = f.float() * self.unit
            weights = None if early is not None else weights
        for part in self.parts_in("acts"):
            f = part.acts(f, seen)
        seen.acts = f
        if weights is not None and rows is not None:
            f = f * weights_at(weights, rows)
        for part in self.parts_in("latents"):
            f = part.latents(f, seen)
        return f

    def _selected(self, f: Tensor) -> SparseCode:
        """The kept ones of f [N, F], differentiable."""
        with torch.no_grad():
            if self.cfg.activation == "topk":
                code = select_topk(f, min(self.k, self.cfg.d_sae))
            else:
                code = select_batch_topk(f, len(f) * min(self.k, self.cfg.d_sae))
        return self._values_of(f, code)

    def _aux_code(self, f: Tensor, dead: Tensor | None) -> SparseCode | None:
        k = self.aux_k(dead)
        if k == 0 or dead is None:
            return None
        with torch.no_grad():
            code = select_topk(f * dead, k)
        return self._values_of(f * dead, code)

    def _values_of(self, f: Tensor, code: SparseCode) -> SparseCode:
        where = code.rows * self.cfg.d_sae + code.live(code.indices)
        return code.with_values(code.live(f.reshape(-1)[where]))

    def _weighted(self, seen: Seen) -> Tensor:
        """Sum of squared error and of the L1 term over the batch, each by its weights."""
        assert seen.squared_error is not None
        assert seen.l1 is not None
        by_error, by_l1 = None, None
        for part in self.parts_in("weigh"):
            of_error, of_l1 = part.weigh(seen)
            by_error = of_error if by_error is None else by_error if of_error is None else by_error * of_error
            by_l1 = of_l1 if by_l1 is None else by_l1 if of_l1 is None else by_l1 * of_l1
        seen.weights = by_error
        error = seen.squared_error if by_error is None else seen.squared_error * by_error
        if self.cfg.activation != "relu":
            return error.sum()
        if seen.penalised is None:
            l1 = (seen.l1 if by_l1 is None else seen.l1 * by_l1).sum()
        else:
            of_token = seen.penalised.sum(1)
            l1 = (of_token if by_l1 is None else of_token * by_l1[seen.pos]).sum()
        return error.sum() + self.pressure * self.cfg.l1_coefficient * l1
