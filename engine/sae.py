"""The dictionary: its parameters, encoder, decoder and training objective."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import autograd
from ..kernels.code import SparseCode
from ..kernels.encode_sparse import encode_threshold, encode_topk
from ..kernels.encoder_inputs import EncoderInputs
from ..kernels.loss import PositionSums
from ..kernels.masks import Mask
from ..kernels.torch_modes import default_modes, without_autocast
from . import splice
from .config import SAEConfig
from .errors import UserError
from .masks import PositionMask
from .ranks import ALONE, Ranks
from .training.objective import Objective, least_kept


class BatchContext(NamedTuple):
    """Fields of a batch besides x and pos, for a dictionary's parts; see `parts.BatchView`."""

    row: Tensor | None = None
    attribute: Tensor | None = None
    second: Tensor | None = None


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder over activations x [..., D] at positions pos [...].

        pre   = relu((x - b_dec) W_enc + b_enc)                 W_enc [D, F], b_enc [F], b_dec [D]; see `center`
        f     = pre * mask[pos]                                  f [..., F]; `SAEConfig` says which latents are kept
        x_hat = f W_dec + b_dec                                  W_dec [F, D], rows of unit norm

    Parameters are float32. The decoder starts as random unit rows, the encoder as its transpose. A transcoder has W_dec
    [F, d_out] and b_dec [d_out], does not subtract b_dec, and its encoder starts as unit rows of its own. In memory both
    matrices are latent-major: W_enc.T and W_dec are contiguous. Products run in the dtype of x, forward and backward.
    Autocast has no effect, so give x.float() for float32. `encode` returns the dense f, `encode_sparse` the same as a
    `SparseCode`. A dictionary without a mask needs no positions.

        sae = SparseAutoencoder(SAEConfig(d_in=768, d_sae=16384, k=32))
        x_hat = sae(x)  # [..., D]; sae(x, pos) with a mask
    """

    threshold: Tensor  # jumprelu: one per latent, learned; batchtopk: one for all, for inference
    #: how tensors of the state scale with x: a dictionary for factor * x has them times factor^power
    powers: Mapping[str, int] = {"b_enc": 1, "b_dec": 1, "threshold": 1}

    @default_modes()
    def __init__(self, config: SAEConfig, *, seed: int = 0):
        super().__init__()
        self.cfg = config
        generator = torch.Generator().manual_seed(seed)

        def directions(d: int) -> Tensor:
            vectors = torch.randn(config.d_sae, d, generator=generator)
            return vectors.div_(vectors.norm(dim=1, keepdim=True))

        W_dec = directions(config.d_out or config.d_in)
        self.W_dec = nn.Parameter(W_dec, requires_grad=config.decoder != "random")
        W_enc = W_dec.clone() if config.d_out is None else directions(config.d_in)
        self.W_enc = nn.Parameter(W_enc.T, requires_grad=config.encoder == "learned")
        learns_bias = config.encoder == "learned" or config.activation == "relu"
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae), requires_grad=learns_bias)
        self.b_dec = nn.Parameter(torch.zeros(config.d_out or config.d_in))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(
                torch.full((config.d_sae,), (config.initial_threshold or 0.0) * math.sqrt(config.d_in))
            )
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
        self.mask = PositionMask(config.mask, config.d_sae, generator)
        # At this step of training: the number of latents kept, and a factor on the sparsity coefficients.
        self.k = config.k
        self.pressure: float | Tensor = 1.0

    def at(self, progress: float, step: int = 0, seed: int = 0) -> None:
        """Follow schedules to `progress`, from 0 to 1, at a `step` of the run with this `seed`."""
        self.mask.at(progress)

    def after(self) -> None:
        """Called after each update, for parts that track something from step to step."""

    def part_reports(self) -> dict[str, dict[str, object]]:
        """Figures of the parts by kind, for a line of metrics."""
        return {}

    @property
    def looks_along_rows(self) -> bool:
        """Whether its output for a token depends on others of the row. It then needs whole rows, in order."""
        return False

    @property
    def paces(self) -> dict[str, float]:
        """Factors on the learning rate by parameter. Thresholds are of the order of |x| ~ sqrt(D), like their steps."""
        return {"threshold": math.sqrt(self.cfg.d_in)}

    @property
    def center(self) -> Tensor | None:
        """What is subtracted from x before the encoder [D]."""
        return self.b_dec if self.cfg.d_out is None and self.cfg.apply_b_dec_to_input else None

    @property
    def latent_dims(self) -> dict[str, int]:
        """The dimension that counts latents, for tensors of `state_dict` that have one."""
        dims = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "mask.fixed": 1, "mask.centre": 0, "mask.logits": 1}
        return dims | ({"threshold": 0} if self.cfg.activation == "jumprelu" else {})

    def shard(self, ranks: Ranks) -> "SparseAutoencoder":
        """A dictionary of this process's share of the latents: F / size of them."""
        if ranks.size == 1:
            return self
        f = self.cfg.d_sae // ranks.size
        changes: dict[str, Any] = {"d_sae": f}
        if self.cfg.prefixes is not None:
            changes["prefixes"] = tuple(min(max(0, end - ranks.rank * f), f) for end in self.cfg.prefixes)
        shard = SparseAutoencoder(self.cfg.model_copy(update=changes))
        shard.load_state_dict(ranks.own_state(self.state_dict(), self.latent_dims))
        return shard

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @without_autocast()
    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """f [..., F], in the dtype of x. Differentiable; the choice of active latents is constant."""
        return self._code(x, pos).to_dense().to(x.dtype).view(*x.shape[:-1], self.cfg.d_sae)

    def _code(self, x: Tensor, pos: Tensor | None) -> SparseCode:
        """`encode_sparse`, differentiable if gradients are enabled."""
        x, mask_rows, mask = self.inputs(x, pos)
        code = self._encoded(x, mask_rows, mask)
        if not torch.is_grad_enabled():
            return code
        return autograd.differentiable([code], x, self.W_enc, self.b_enc, self.center, mask, mask_rows)[0]

    @without_autocast()
    @torch.no_grad()
    def encode_sparse(self, x: Tensor, pos: Tensor | None = None) -> SparseCode:
        """f as a SparseCode over the flattened tokens: K entries per token for topk, else ragged. Without gradients."""
        return self._encoded(*self.inputs(x, pos))

    @torch.no_grad()
    def _encoded(self, x: Tensor, mask_rows: Tensor | None, mask: Mask | None) -> SparseCode:
        W_enc = self.W_enc.to(x.dtype)
        if self.cfg.activation == "topk":
            return encode_topk(x, W_enc, self.b_enc, self.k, center=self.center, mask=mask, pos=mask_rows)[0]
        if self.cfg.activation == "jumprelu":
            inputs = EncoderInputs(x, W_enc, self.b_enc, self.center, mask, mask_rows)
            return autograd.jumprelu_band(inputs, self.threshold, bandwidth=self.bandwidth, expected=self.expected).code
        threshold = self.threshold.expand(self.cfg.d_sae) if self.cfg.activation == "batchtopk" else None
        return encode_threshold(
            x, W_enc, self.b_enc, threshold, center=self.center, mask=mask, pos=mask_rows, expected=self.expected
        )

    @without_autocast()
    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """x_hat: [..., D] from dense f, [N, D] from a SparseCode. Differentiable."""
        if isinstance(f, SparseCode):
            return autograd.decode_sparse(f, self.W_dec.to(f.values.dtype), self.b_dec.to(f.values.dtype))
        return f @ self.W_dec.to(f.dtype) + self.b_dec.to(f.dtype)

    @without_autocast()
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x_hat [..., D] for x [..., D]. Differentiable as `encode` is. For the training loss see `objective`."""
        return self.decode(self._code(x, pos)).to(x.dtype).view(*x.shape[:-1], -1)

    def __repr__(self) -> str:
        """Sizes in a line: SparseAutoencoder(topk, D = 768, F = 16384, K = 32, 25.2M parameters, float32 on cpu)."""
        cfg = self.cfg
        d_out = "" if cfg.d_out is None else f" to {cfg.d_out}"
        fields = [cfg.activation, f"D = {cfg.d_in}{d_out}", f"F = {cfg.d_sae}"]
        fields += [f"K = {cfg.k}"] if cfg.activation in ("topk", "batchtopk") else []
        fields += [f"{cfg.decoder.replace('_', '-')} decoder"] if cfg.decoder != "learned" else []
        fields += ["random encoder"] if cfg.encoder == "random" else []
        fields += [f"mask {cfg.mask.kind}"] if cfg.mask.kind != "none" else []
        fields += [f"parts {', '.join(part_settings['kind'] for part_settings in cfg.parts)}"] if cfg.parts else []
        count = sum(parameter.numel() for parameter in self.parameters())
        size = f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.1f}k"
        fields += [f"{size} parameters", f"{str(self.W_dec.dtype).removeprefix('torch.')} on {self.W_dec.device}"]
        return f"{type(self).__name__}({', '.join(fields)})"

    @property
    def looks_at_positions(self) -> str | None:
        """What in the dictionary needs positions, in words; None if nothing does."""
        if self.cfg.parts:
            return f"parts ({', '.join(part_settings['kind'] for part_settings in self.cfg.parts)})"
        return None if self.cfg.mask.kind == "none" else f"a mask over positions ({self.cfg.mask.kind})"

    def fwd_hooks(
        self, hook: str, *, target: str | None = None, edit: Callable[[Tensor], Tensor] | None = None,
        error_term: bool = True, start: splice.Start | None = None,
    ) -> splice.Hooks:  # fmt: skip
        """Hooks that put the dictionary into a transformer_lens model: `with model.hooks(fwd_hooks=sae.fwd_hooks(hook))`.

        The activations x [B, T, D] at `hook` are replaced by x_hat, or with `edit`, by x_hat of edit(f), f [B, T, F].
        `error_term` adds the constant x - x_hat from before the edit, so that without an edit nothing changes. A transcoder
        reads at `hook` and replaces x at `target`. Values of heads [B, T, H, d_head], as at `hook_z`, are read as
        [B, T, H d_head].

        If the dictionary needs positions, those of x are `start` to `start` + T - 1. `start` is a number, or a function that
        is called for each forward pass. By default, positions continue after the tokens in a HookedTransformer's key-value
        cache, as in its `generate`, and begin at 0 without one. Raises UserError where `start` is needed: for a single token
        without a cache, as in a TransformerBridge's `generate`, and with a cache, at hooks before the first attention.
        """
        if (target is None) != (self.cfg.d_out is None):
            raise UserError("target: needed for a transcoder, and for nothing else; the hook whose value it gives")
        return splice.hooks(self, hook, target, edit, error_term, start)

    @without_autocast()
    def objective(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None = None, target: Tensor | None = None,
        batch_context: BatchContext | None = None,
    ) -> Objective:  # fmt: skip
        """Loss of a batch x [N, D] at pos [N], with gradients for every parameter. A transcoder's is of `target` [N, d_out].
        Only parts read `batch_context`.

        loss = sum_p squared_error_p / N + l1_coefficient * sum_p l1_p / N (relu)
             + aux_coefficient * (|e - e_hat|^2 / |e - mean e|^2) * |x - mean x|^2 / N (topk, batchtopk)
             + l0_coefficient * D * L0 / N (jumprelu)

        For a Matryoshka dictionary, the first term is the mean over its prefixes; `sums` are those of all latents. e is the
        residual, held constant, and e_hat its reconstruction by the `aux_k` most active of the `dead` latents [F]. x stands
        for the target in the last factor, a constant that undoes the normalisation of the first term in the source (Gao et
        al., arXiv 2406.04093). The auxiliary gradient reaches encoder and decoder.
        """
        x, mask_rows, mask = self.inputs(x, pos)
        target = x if target is None else target
        if self.cfg.activation == "relu":
            acts = autograd.encode_dense(x, self.W_enc, self.b_enc, self.center, mask, mask_rows)
            residual = target - torch.addmm(self.b_dec.to(x.dtype), acts, self.W_dec.to(x.dtype))
            sums = autograd.position_loss(residual, acts, pos, n_positions)
            loss = (sums.squared_error.sum() + self.sparsity_coefficient * sums.l1.sum()) / len(x)
            return self._with_aux(loss, sums, acts, residual, target)
        l0, aux = None, None
        if self.cfg.activation == "jumprelu":
            code, l0 = autograd.encode_jumprelu(
                x, self.W_enc, self.b_enc, self.threshold, self.center, mask, mask_rows,
                bandwidth=self.bandwidth, expected=self.expected,
            )  # fmt: skip
        else:
            code, aux = self._encode_topk(x, mask, mask_rows, dead)
        if self.cfg.prefixes is None:
            squared_error, residual = autograd.reconstruct(code, self.W_dec, self.b_dec, target)
            loss = squared_error.sum() / len(x)
        else:
            ends = torch.tensor(self.cfg.prefixes, device=x.device)
            loss, squared_error, residual = autograd.matryoshka(code, self.W_dec, self.b_dec, target, ends)
        with torch.no_grad():
            sums = autograd.position_loss(squared_error, code, pos, n_positions)
        if l0 is not None:
            loss = loss + self.sparsity_coefficient * l0 / len(x)
        return self._with_aux(loss, sums, code, residual, target, aux, dead)

    def _encode_topk(
        self, x: Tensor, mask: Mask | None, mask_rows: Tensor | None, dead: Tensor | None
    ) -> tuple[SparseCode, SparseCode | None]:
        """The code of topk or batchtopk in training, and the code of AuxK. Differentiable."""
        return autograd.encode_topk(
            x, self.W_enc, self.b_enc, self.center, mask, mask_rows,
            k=self.k, aux_k=self.aux_k(dead), aux_latents=dead, across_batch=self.cfg.activation == "batchtopk",
        )  # fmt: skip

    def _with_aux(
        self, loss: Tensor, sums: PositionSums, code: SparseCode | Tensor, residual: Tensor, target: Tensor,
        aux: SparseCode | None = None, dead: Tensor | None = None,
    ) -> Objective:  # fmt: skip
        """The objective of a batch: its loss with AuxK added, and which latents fired in its code or activations [N, F]."""
        sums = PositionSums(*(total.detach() for total in sums))
        fired = code.fired() if isinstance(code, SparseCode) else (code.detach() > 0).any(0)
        objective = Objective(loss, sums, fired)
        if isinstance(code, SparseCode) and self.cfg.activation == "batchtopk":
            objective.least_kept = least_kept(code)[0]
        if aux is not None and dead is not None:
            residual = residual.detach()
            aux_error, _ = autograd.reconstruct(aux, self.W_dec, torch.zeros_like(self.b_dec), residual)
            aux_loss = self.aux_weight(target, residual, dead) * aux_error.sum()
            objective.loss, objective.aux_loss = loss + aux_loss, aux_loss.detach()
        return objective

    @property
    def sparsity_coefficient(self) -> float | Tensor:
        """The factor of L1 per token (relu) or L0 per token (jumprelu) in the loss at this step; 0 for the others."""
        if self.cfg.activation == "relu":
            return self.pressure * self.cfg.l1_coefficient
        return self.pressure * self.cfg.l0_coefficient * self.cfg.d_in if self.cfg.activation == "jumprelu" else 0.0

    @property
    def bandwidth(self) -> float:
        return self.cfg.bandwidth * math.sqrt(self.cfg.d_in)

    @property
    def expected(self) -> int:
        """About how many latents of a token are candidates; only speed depends on it. For relu, it may be any number."""
        return min(4 * self.k, self.cfg.d_sae) if self.cfg.activation != "relu" else self.cfg.d_sae

    def aux_k(self, dead: Tensor | None) -> int:
        """How many dead latents AuxK selects per token; 0 for no AuxK."""
        return min(self.cfg.aux_k, self.cfg.d_sae) if dead is not None and self.cfg.aux_coefficient > 0 else 0

    def aux_weight(self, target: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """The factor of AuxK's squared error in the loss: aux_coefficient * |y - mean y|^2 / |e - mean e|^2 / N with y the
        target, and 0 if no latent is dead. [S] for several dictionaries, with residual [S, N, D] and dead [S, F]."""
        smallest = torch.finfo(torch.float32).tiny
        spreads = _spread(target) / _spread(residual).clamp_min(smallest)
        return self.cfg.aux_coefficient / len(target) * spreads * dead.any(-1)

    @torch.no_grad()
    def initialise_bias(self, mean: Tensor) -> None:
        """Start b_dec at a mean activation [D]. A frozen encoder subtracts the mean for good: b_enc = -mean W_enc."""
        self.b_dec.copy_(mean)
        if self.cfg.encoder == "random" and self.cfg.d_out is None:
            self.b_enc.copy_(-(mean.double() @ self.W_enc.double()))  # the same for any share of the latents

    @torch.no_grad()
    def initialise_threshold(self, x: Tensor, pos: Tensor, ranks: Ranks = ALONE) -> None:
        """Start jumprelu's thresholds where the 4 N k largest activations of x [N, D] exceed them, unless the settings have
        them. Each of the `ranks` has a share of the latents."""
        if self.cfg.activation == "jumprelu" and self.cfg.initial_threshold is None:
            start = self._threshold_for(x, pos, min(4 * self.cfg.k, self.cfg.d_sae * ranks.size), ranks)
            self.threshold.copy_(torch.where(start.isfinite(), start, 0).expand(self.cfg.d_sae))

    @torch.no_grad()
    def fit_threshold(self, x: Tensor, pos: Tensor, ranks: Ranks = ALONE, chunk: int = 1024) -> None:
        """Set batchtopk's threshold to keep k latents per token of a sample x [N, D] at pos [N]. It is the mean over about
        N / `chunk` interleaved parts of the sample."""
        if self.cfg.activation == "batchtopk" and len(x):
            stride = -(-len(x) // chunk)
            thresholds = torch.cat(
                [self._threshold_for(x[start::stride], pos[start::stride], self.k, ranks) for start in range(stride)]
            )
            if bool(thresholds.isfinite().all()):
                self.threshold.copy_(thresholds.mean())

    def _threshold_for(self, x: Tensor, pos: Tensor, k: int, ranks: Ranks) -> Tensor:
        """The threshold [1] that the N k largest activations of x [N, D] over all `ranks` exceed, infinite if none is
        positive. It lies halfway to the next smaller activation, so that rounding doesn't decide what is kept."""
        x, mask_rows, mask = self.inputs(x, pos)
        code, _ = encode_topk(
            x, self.W_enc.to(x.dtype), self.b_enc, min(k + 1, self.cfg.d_sae),
            center=self.center, mask=mask, pos=mask_rows, across_batch=True,
        )  # fmt: skip
        acts = ranks.gather(code.live(code.values)).flatten()
        acts = acts[acts > 0].sort(descending=True).values
        if not len(acts):
            return acts.new_full((1,), torch.inf)
        last_index = min(len(x) * k, len(acts)) - 1
        return acts[last_index : last_index + 2].sum(0, keepdim=True) / 2  # without a smaller one, halfway to 0

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Turn a dictionary for x into the same dictionary for factor * x, exactly if `factor` is a power of two. ReLU and
        top-k commute with positive scaling, so only biases and thresholds change."""
        if not (factor > 0 and math.isfinite(factor)):
            raise UserError(f"factor: {factor} is not allowed; it must be positive")
        for name, tensor in self.state_dict().items():
            if power := self.powers.get(name):
                tensor.mul_(factor**power)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the part of each decoder row's gradient along the row, which would only change its norm."""
        if self.W_dec.grad is not None:
            # 256 rows stay in cache
            for grad, rows in zip(self.W_dec.grad.split(256), self.W_dec.split(256), strict=True):
                grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """After an update, normalise decoder rows and make thresholds nonnegative."""
        if self.W_dec.requires_grad:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        if self.cfg.activation == "jumprelu":
            self.threshold.clamp_min_(0)

    @torch.no_grad()
    def follow(self, least_activation: Tensor | None, pace: float = 0.01) -> None:
        """After an update, move batchtopk's threshold towards the least activation kept, by a share `pace`."""
        if least_activation is not None:
            paces = torch.where(self.threshold > 0, pace, 1.0)
            self.threshold.lerp_(torch.where(least_activation.isfinite(), least_activation, self.threshold), paces)

    def inputs(self, x: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor | None, Mask | None]:
        """x as [N, D], the mask's row of each token, and the mask. Both are None without a mask."""
        if x.shape[-1] != self.cfg.d_in:
            raise UserError(f"x: width {x.shape[-1]} is not allowed; this dictionary has d_in = {self.cfg.d_in}")
        mask = self.mask.weights()
        if mask is None:
            return x.reshape(-1, self.cfg.d_in), None, None
        if pos is None:
            raise UserError(f"pos: needed, because this dictionary has a mask over positions ({self.cfg.mask.kind})")
        return x.reshape(-1, self.cfg.d_in), self.mask.rows(pos.reshape(-1)), mask


def _spread(x: Tensor) -> Tensor:
    """Sum of squares around the batch mean, as a constant; x [..., N, D]."""
    x = x.detach().float()
    return (x - x.mean(-2, keepdim=True)).square().sum((-2, -1))
