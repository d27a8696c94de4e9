"""An SAE in plain torch, and the same through torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.config import SAEConfig
from .data import seed_of
from .training_job import DEAD, ProviderRun, TrainingJob, autocast, fixes_l0, let_die, mean_l0, sae_config


class Jump(torch.autograd.Function):
    """Activations above their latent's threshold, and their number, with straight-through gradients for the threshold from
    activations within bandwidth / 2 of it."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        is_open = acts > threshold
        return acts * is_open, is_open.sum().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (acts, threshold), (df, dl0) = ctx.saved_tensors, grads
        near = (acts > 0) & ((acts - threshold).abs() < ctx.bandwidth / 2)
        return df * (acts > threshold), -((threshold * df + dl0) * near).sum(0) / ctx.bandwidth, None


class Dense(nn.Module):
    """An SAE in plain torch: dense pre-activations, topk, scatter, dense decoder, and the loss of
    `SparseAutoencoder.objective`. Decoder rows have unit norm, and their gradients no radial part.

    `dead` [F]: the latents for AuxK. They are fixed, not counted.
    """

    dead: Tensor

    def __init__(self, config: SAEConfig, device: str, dead: Tensor | None = None):
        super().__init__()
        rows = nn.functional.normalize(torch.randn(config.d_sae, config.d_in, device=device), dim=1)
        self.config = config
        self.W_enc, self.W_dec = nn.Parameter(rows.T.contiguous()), nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, device=device))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(config.d_sae, device=device))
        self.has_aux = dead is not None
        if dead is not None:
            self.register_buffer("dead", dead)

    def acts(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def keep(self, acts: Tensor) -> tuple[Tensor, Tensor | float]:
        """The selected activations of acts [N, F], and the penalty on them, summed over tokens."""
        c = self.config
        if c.activation == "relu":
            return acts, c.l1_coefficient * acts.float().sum()
        if c.activation == "jumprelu":
            f, l0 = Jump.apply(acts, self.threshold, c.bandwidth * c.d_in**0.5)  # pyright: ignore[reportGeneralTypeIssues]
            return f, c.l0_coefficient * c.d_in * l0
        flat, k = (acts.flatten()[None], len(acts) * c.k) if c.activation == "batchtopk" else (acts, c.k)
        top = flat.topk(k, dim=1, sorted=False)
        return torch.zeros_like(flat).scatter(1, top.indices, top.values).view_as(acts), 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(self.acts(x))[0] @ self.W_dec + self.b_dec

    def l0(self, x: Tensor) -> float:
        return mean_l0(self.keep(self.acts(x))[0])

    def loss(self, x: Tensor) -> Tensor:
        acts = self.acts(x)
        f, penalty = self.keep(acts)
        residual = x - f @ self.W_dec - self.b_dec
        loss = residual.float().square().sum() + penalty
        return (loss + self.aux_loss(x, acts, residual.detach()) if self.has_aux else loss) / len(x)

    def aux_loss(self, x: Tensor, acts: Tensor, residual: Tensor) -> Tensor:
        top = acts.where(self.dead, -torch.inf).topk(self.config.aux_k, dim=1, sorted=False)
        error = residual - torch.zeros_like(acts).scatter(1, top.indices, top.values) @ self.W_dec
        spread, residual_spread = ((y - y.mean(0)).float().square().sum() for y in (x, residual))
        return self.config.aux_coefficient * spread / residual_spread * error.float().square().sum()

    @torch.no_grad()
    def project(self) -> None:
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def normalise(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        if self.config.activation == "jumprelu":
            self.threshold.clamp_min_(0)


def plain_torch(job: TrainingJob, prepare: Callable[[Any], Any] = lambda function: function) -> ProviderRun:
    """`Dense` with autograd, autocast for bfloat16 products, and torch's fused Adam."""
    torch.manual_seed(seed_of("weights", job.seed))
    dead = torch.zeros(job.shape.F, dtype=torch.bool, device=job.device)
    dead[DEAD] = True
    sae = Dense(sae_config(job), job.device, dead if job.auxk else None)
    if job.auxk:
        let_die(sae.W_enc.T)
    rates = [{"params": [p], "lr": job.lr} for p in sae.parameters()]
    with torch.no_grad():
        sae.b_dec.copy_(job.tokens.mean)
        if job.activation == "jumprelu":  # start and learning rate of thresholds as in temposae: they scale with |x|
            total = min(4 * job.shape.K, job.shape.F) * job.shape.N
            largest = sae.acts(job.tokens.wide[0]).flatten().topk(total, sorted=False).values
            sae.threshold.fill_(float(largest[largest > 0].min()))
            rates = [r | {"lr": job.lr * job.shape.D**0.5} if r["params"][0] is sae.threshold else r for r in rates]
    adam = torch.optim.Adam(rates, fused=True)
    loss, project, normalise = map(prepare, (sae.loss, sae.project, sae.normalise))

    def step(i: int) -> None:
        adam.zero_grad()
        with autocast(job):
            batch_loss = loss(job.tokens.wide[i % len(job.tokens.wide)])
        batch_loss.backward()
        project()
        if job.clip is not None:
            nn.utils.clip_grad_norm_(sae.parameters(), job.clip)
        adam.step()
        normalise()

    return ProviderRun(step, sae, "Adam", job.dtype, job.clip, job.aux_k, None if fixes_l0(job.activation) else sae.l0)


def compiled_torch(job: TrainingJob) -> ProviderRun:
    """`plain_torch` with loss, projection and renormalisation through torch.compile."""
    torch.compiler.reset()
    return plain_torch(job, torch.compile)
