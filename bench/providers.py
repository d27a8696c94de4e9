"""Who trains the dictionary: temposae, plain torch, torch.compile of that, and other libraries through their own code.

Each provider is a function from a `Job` to a `Trainee`. With `own` it runs as its users run it by default; else, for the
headline, with torch's fused Adam at the job's learning rate, which stays constant, and products in the job's dtype. What a
library does in every step (waiting for the loss, clipping, counting dead latents) it also does here.

With AuxK, every fourth latent is dead: its encoder row starts so small that no token keeps it, and before every step the
trainer's own count of idle tokens says so again. For the headline, all give D / 2 of them to each token, as the libraries
do, and take the coefficients of L1 and L0 from temposae's defaults where their losses have the same term.
"""

import contextlib
import io
import itertools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.accelerate import accelerate
from ..engine.config import SAEConfig, TrainConfig
from ..engine.optim import Learner, together
from ..engine.sae import SparseAutoencoder
from ..kernels.code import SparseCode
from ..kernels.encode_sparse import encode_topk
from .data import DTYPES, POSITIONS, Shape, Tokens

LONG_RUN = 100_000  # steps that learning-rate schedules are told of: what is measured lies far from their end
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")
DEAD = slice(None, None, 4)  # which latents are, where AuxK is to have work


class Absent(Exception):
    """A provider that can't run here; the message says why in one line."""


class Job(NamedTuple):
    """What a provider is to train: `dtype` "fp32" or "bf16" is that of products; parameters and moments are float32.

    `clip`: largest gradient norm, or None, for the providers that leave the choice. `auxk`: with dead latents, and AuxK.
    `dictionaries`: how many temposae is to train at a time. `accelerated`: other libraries' by `temposae.accelerate`.
    """

    shape: Shape
    device: str
    dtype: str
    lr: float
    tokens: Tokens
    own: bool = False
    clip: float | None = None
    activation: str = "topk"
    auxk: bool = False
    dictionaries: int = 1
    accelerated: bool = False

    @property
    def n_dead(self) -> int:
        return len(range(self.shape.F)[DEAD]) if self.auxk else 0

    @property
    def aux_k(self) -> int:
        """Dead latents that AuxK gives to a token, by the rule that the other libraries share: at most D / 2."""
        return min(self.shape.D // 2, self.n_dead)

    def __str__(self) -> str:
        plain = self.activation == "topk" and not self.auxk
        named = str(self.shape) if plain else f"{self.shape}, {self.activation}{' with AuxK' if self.auxk else ''}"
        return named if self.dictionaries == 1 else f"{self.dictionaries} of {named}"


@dataclass
class Trainee:
    """`step(i)` trains on batch i; `reconstruct(x)` gives x_hat [N, D] for x [N, D] float32.

    `aux_k`: how many dead latents AuxK gives to a token in the measured steps. `l0(x)`: active latents a token, on average,
    where the activation does not fix it.
    """

    step: Callable[[int], Any]
    reconstruct: Callable[[Tensor], Tensor]
    optimizer: str
    dtype: str
    clip: float | None
    aux_k: int = 0
    l0: Callable[[Tensor], float] | None = None


def sae_config(job: Job) -> SAEConfig:
    """temposae's dictionary for the job. Own: `SAEConfig`'s defaults."""
    _, d, f, k = job.shape
    aux = dict(aux_k=job.aux_k) if job.auxk and not job.own else {}
    return SAEConfig(d_in=d, d_sae=f, k=min(k, f), activation=job.activation, **aux)  # pyright: ignore[reportArgumentType]


def make_learner(job: Job, seed: int = 0) -> Learner:
    """What `temposae train` steps with, on a new dictionary. Own: `TrainConfig`'s defaults."""
    n = job.shape.N
    settings: dict[str, Any] = dict(tokens=n * LONG_RUN, batch=n, control=False)
    if not job.own:
        dtype = str(DTYPES[job.dtype]).removeprefix("torch.")
        settings |= dict(lr=job.lr, warmup=0.0, decay=0.0, clip_norm=job.clip, dtype=dtype)
    sae = SparseAutoencoder(sae_config(job), seed=seed).to(job.device)
    if job.auxk:
        let_die(sae.W_enc.T)
    return Learner(sae, TrainConfig(**settings), job.tokens.mean, job.tokens.mean_norm, POSITIONS)


def temposae(job: Job) -> Trainee:
    """The training step that `temposae train` runs, on tokens as its stream gives them. Own: its defaults, which clip."""
    learners, batches = [make_learner(job, seed) for seed in range(job.dictionaries)], job.tokens.batches
    learner, steppers = learners[0], together(learners)
    sae, scale = learner.sae, learner.scale
    # before the first step too, so that what is learned is compared with where training starts
    sae.initialise_threshold(learner.scaled(batches[0].x), batches[0].pos)
    for one in learners:
        one.any_dead = job.auxk

    def step(i: int) -> None:
        if job.auxk:
            for one in learners:
                one.counts.idle_tokens[:, DEAD] = one.dead_after
        for stepper in steppers:
            stepper.step(batches[i % len(batches)])

    def encode(x: Tensor) -> SparseCode:
        if job.activation == "batchtopk":  # as in training; the threshold for later use follows slowly
            return encode_topk(x * scale, sae.W_enc, sae.b_enc, sae.cfg.k, center=sae.b_dec, across_batch=True)[0]
        return sae.encode_sparse(x * scale)

    def l0(x: Tensor) -> float:
        code = encode(x)
        return int((code.live(code.values) > 0).sum()) / len(x)

    return Trainee(
        step=step,
        reconstruct=lambda x: sae.decode(encode(x)) / scale,
        optimizer="Adam",
        dtype=next(name for name, dtype in DTYPES.items() if dtype == learner.dtype),
        clip=learner.config.clip_norm,
        aux_k=min(sae.cfg.aux_k, job.n_dead),
        l0=None if fixes_l0(job.activation) else l0,
    )


class Jump(torch.autograd.Function):
    """(acts where they exceed their latent's threshold, how many do), with straight-through gradients for the threshold from
    activations within bandwidth / 2 of it."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        is_open = acts > threshold
        return acts * is_open, is_open.sum().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (acts, threshold), (dkept, dl0) = ctx.saved_tensors, grads
        near = (acts > 0) & ((acts - threshold).abs() < ctx.bandwidth / 2)
        return dkept * (acts > threshold), -((threshold * dkept + dl0) * near).sum(0) / ctx.bandwidth, None


class Dense(nn.Module):
    """The SAE as one writes it in plain torch: pre-activations, topk, scatter, a dense product back. For the loss, see
    `SparseAutoencoder.objective`. Tied start, decoder rows of unit norm, their gradient without its radial part.

    `dead` [F]: the latents that AuxK takes, given once and not counted.
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
        """What is kept of acts [N, F], and the penalty on it, summed over tokens."""
        c = self.config
        if c.activation == "relu":
            return acts, c.l1_coefficient * acts.float().sum()
        if c.activation == "jumprelu":
            kept, l0 = Jump.apply(acts, self.threshold, c.bandwidth * c.d_in**0.5)  # pyright: ignore[reportGeneralTypeIssues]
            return kept, c.l0_coefficient * c.d_in * l0
        flat, k = (acts.flatten()[None], len(acts) * c.k) if c.activation == "batchtopk" else (acts, c.k)
        top = flat.topk(k, dim=1, sorted=False)
        return torch.zeros_like(flat).scatter(1, top.indices, top.values).view_as(acts), 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(self.acts(x))[0] @ self.W_dec + self.b_dec

    def l0(self, x: Tensor) -> float:
        return mean_l0(self.keep(self.acts(x))[0])

    def loss(self, x: Tensor) -> Tensor:
        acts = self.acts(x)
        kept, penalty = self.keep(acts)
        residual = x - kept @ self.W_dec - self.b_dec
        loss = residual.float().square().sum() + penalty
        return (loss + self.aux_loss(x, acts, residual.detach()) if self.has_aux else loss) / len(x)

    def aux_loss(self, x: Tensor, acts: Tensor, residual: Tensor) -> Tensor:
        top = acts.where(self.dead, -torch.inf).topk(self.config.aux_k, dim=1, sorted=False)
        left = residual - torch.zeros_like(acts).scatter(1, top.indices, top.values) @ self.W_dec
        spread, spread_left = ((y - y.mean(0)).float().square().sum() for y in (x, residual))
        return self.config.aux_coefficient * spread / spread_left * left.float().square().sum()

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


def plain_torch(job: Job, prepare: Callable[[Any], Any] = lambda function: function) -> Trainee:
    """`Dense` with ordinary autograd, autocast where products are to be bfloat16, and torch's fused Adam."""
    torch.manual_seed(0)
    dead = torch.zeros(job.shape.F, dtype=torch.bool, device=job.device)
    dead[DEAD] = True
    sae = Dense(sae_config(job), job.device, dead if job.auxk else None)
    if job.auxk:
        let_die(sae.W_enc.T)
    rates = [{"params": [p], "lr": job.lr} for p in sae.parameters()]
    with torch.no_grad():
        sae.b_dec.copy_(job.tokens.mean)
        if job.activation == "jumprelu":  # as temposae begins, and at its pace: thresholds are of the order of |x|
            total = min(4 * job.shape.K, job.shape.F) * job.shape.N
            largest = sae.acts(job.tokens.wide[0]).flatten().topk(total, sorted=False).values
            sae.threshold.fill_(float(largest[largest > 0].min()))
            rates = [r | {"lr": job.lr * job.shape.D**0.5} if r["params"][0] is sae.threshold else r for r in rates]
    adam = torch.optim.Adam(rates, fused=True)
    loss, project, normalise = map(prepare, (sae.loss, sae.project, sae.normalise))

    def step(i: int) -> None:
        adam.zero_grad()
        with autocast(job):
            found = loss(job.tokens.wide[i % len(job.tokens.wide)])
        found.backward()
        project()
        if job.clip is not None:
            nn.utils.clip_grad_norm_(sae.parameters(), job.clip)
        adam.step()
        normalise()

    return Trainee(step, sae, "Adam", job.dtype, job.clip, job.aux_k, None if fixes_l0(job.activation) else sae.l0)


def compiled_torch(job: Job) -> Trainee:
    """`plain_torch` with its loss (forward and backward), projection and renormalisation through torch.compile."""
    torch.compiler.reset()
    return plain_torch(job, torch.compile)


def sparsify(job: Job) -> Trainee:
    """eai-sparsify's SparseCoder in the order of its Trainer.fit. Own: signum under a schedule-free wrapper, the default.

    AuxK is off by default; if it is on, it counts 1 / 32, as in Gao et al.

    On a GPU its forward runs under bfloat16 autocast, whatever is asked for. Without Triton's GPU it needs telling so before
    it is imported.
    """
    if job.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    library = load("sparsify")
    n, d, f, k = job.shape
    torch.manual_seed(0)
    coder = library.SparseCoder(d, library.SparseCoderConfig(num_latents=f, k=k), job.device, torch.float32)
    coder.b_dec.data = job.tokens.mean.clone()
    if job.accelerated:
        accelerate(coder)
    if job.auxk:
        let_die(coder.encoder.weight)
    if job.own:
        inner = load("sparsify.sign_sgd").SignSGD(coder.parameters(), lr=5e-3 / (f / 2**14) ** 0.5)
        optimizer: Any = load("schedulefree").ScheduleFreeWrapper(inner, momentum=0.95)
        optimizer.train()
    else:
        optimizer = torch.optim.Adam(coder.parameters(), lr=job.lr, fused=True)
    idle = torch.zeros(f, device=job.device, dtype=torch.long)
    fired = torch.zeros(f, device=job.device, dtype=torch.bool)
    dead_after = 10_000_000

    def step(i: int) -> None:
        if job.auxk:
            idle[DEAD] = dead_after + 1
        x = job.tokens.wide[i % len(job.tokens.wide)]
        with matmul_precision("high"):  # as its fit() sets it
            coder.set_decoder_norm_to_unit_norm()
            dead = idle > dead_after if job.auxk else None
            out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum(), dead_mask=dead)
            fired[out.latent_indices.flatten()] = True
            float(out.fvu.detach())
            if job.auxk:
                float(out.auxk_loss.detach())
            (out.fvu + out.auxk_loss / 32 if job.auxk else out.fvu).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
        idle.add_(n)
        idle[fired] = 0
        fired.zero_()

    def reconstruct(x: Tensor) -> Tensor:
        if job.own:
            optimizer.eval()  # the weights that are kept are an average
        x_hat = coder(x).sae_out
        if job.own:
            optimizer.train()
        return x_hat

    dtype = "bf16" if torch.device(job.device).type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return Trainee(step, reconstruct, "signum" if job.own else "Adam", dtype, None, job.aux_k)


def sae_lens(job: Job) -> Trainee:
    """SAELens' training SAE in its SAETrainer, which always clips at 1. Own: its Adam, lr, dtype and coefficients."""
    library = load("sae_lens")
    n, d, f, k = job.shape
    ours = sae_config(job)
    name, sizes, same = {
        "topk": ("TopK", dict(k=k), {}),
        "batchtopk": ("BatchTopK", dict(k=float(k)), {}),
        "jumprelu": ("JumpReLU", {}, dict(l0_coefficient=ours.l0_coefficient * d)),
        "relu": ("Standard", {}, dict(l1_coefficient=ours.l1_coefficient)),
    }[job.activation]
    sizes |= {} if job.own else same
    torch.manual_seed(0)
    config = getattr(library, f"{name}TrainingSAEConfig")(d_in=d, d_sae=f, device=job.device, **sizes)
    sae = getattr(library, f"{name}TrainingSAE")(config)
    if job.auxk:
        let_die(sae.W_enc.T)
    settings: dict[str, Any] = dict(total_training_samples=n * LONG_RUN, train_batch_size_samples=n, device=job.device)
    settings |= dict(lr_end=3e-5) if job.own else dict(lr=job.lr, lr_end=job.lr, autocast=job.dtype == "bf16")
    config = load("sae_lens.config").SAETrainerConfig(**settings)
    trainer = library.SAETrainer(config, sae, data_provider=iter(job.tokens.wide))
    if job.accelerated:
        accelerate(trainer)
    if not job.own:
        fuse(trainer.optimizer)

    def step(i: int) -> None:
        if job.auxk:
            trainer.n_forward_passes_since_fired[DEAD] = trainer.cfg.dead_feature_window + 1
        trainer.maybe_reset_sparsity()
        trainer.step(job.tokens.wide[i % len(job.tokens.wide)])
        trainer.n_training_steps += 1

    dtype = "fp32" if job.own else job.dtype
    l0 = None if fixes_l0(job.activation) else lambda x: mean_l0(sae.encode(x))
    return Trainee(step, sae, optimizer_name(trainer.optimizer), dtype, 1.0, job.aux_k, l0)


def dictionary_learning(job: Job) -> Trainee:
    """The `update` of dictionary_learning's trainer, which always clips at 1, but not for ReLU. JumpReLU aims at an L0 of K.
    Own: its Adam, lr, warm-ups, dtype, coefficient of L1 and aim for L0."""
    skip_init("dictionary_learning", unless="nnsight")
    k = job.shape.K
    module, name, sizes, same = {
        "topk": ("top_k", "TopKTrainer", dict(k=k), {}),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer", dict(k=k), {}),
        "jumprelu": ("jumprelu", "JumpReluTrainer", {}, dict(target_l0=float(k), sparsity_warmup_steps=0)),
        "relu": (
            "standard", "StandardTrainer", {}, dict(l1_penalty=sae_config(job).l1_coefficient, sparsity_warmup_steps=0),
        ),
    }[job.activation]  # fmt: skip
    settings: dict[str, Any] = dict(activation_dim=job.shape.D, dict_size=job.shape.F, steps=LONG_RUN, **sizes)
    settings |= dict(layer=0, lm_name="none", seed=0, device=job.device)
    settings |= {} if job.own else dict(lr=job.lr, warmup_steps=0, **same)
    torch.manual_seed(0)  # not all of them do
    trainer = getattr(load(f"dictionary_learning.trainers.{module}"), name)(**settings)
    if job.accelerated:
        accelerate(trainer)
    if job.auxk:
        let_die(trainer.ae.encoder.weight)
    if not job.own:
        fuse(trainer.optimizer)
    narrow = not job.own and job.dtype == "bf16"
    xs = [x.bfloat16() for x in job.tokens.wide] if narrow else job.tokens.wide
    count = itertools.count()  # step 0 sets the bias

    def step(i: int) -> None:
        if job.auxk:
            trainer.num_tokens_since_fired[DEAD] = trainer.dead_feature_threshold
        with autocast(job, narrow):
            trainer.update(next(count), xs[i % len(xs)])

    def reconstruct(x: Tensor) -> Tensor:
        if job.activation == "batchtopk":  # as in training; the threshold for later use follows slowly
            return trainer.ae.decode(trainer.ae.encode(x, use_threshold=False))
        return trainer.ae(x)

    dtype, clip = "bf16" if narrow else "fp32", None if job.activation == "relu" else 1.0
    l0 = None if fixes_l0(job.activation) else lambda x: mean_l0(trainer.ae.encode(x))
    return Trainee(step, reconstruct, optimizer_name(trainer.optimizer), dtype, clip, job.aux_k, l0)


def faster(build: Callable[[Job], Trainee]) -> Callable[[Job], Trainee]:
    """A library's training step after the one line that `temposae.accelerate` takes."""
    return lambda job: build(job._replace(accelerated=True))


class Provider(NamedTuple):
    """`own`: whether its defaults differ from the headline's settings. `package`: where its version is looked up.

    Who has TopK or BatchTopK also has AuxK for it.
    """

    build: Callable[[Job], Trainee]
    own: bool
    package: str
    activations: tuple[str, ...] = ACTIVATIONS


PROVIDERS = {
    "temposae": Provider(temposae, True, "temposae"),
    "eai-sparsify": Provider(sparsify, True, "eai-sparsify", ("topk",)),
    "SAELens": Provider(sae_lens, True, "sae-lens"),
    "dictionary_learning": Provider(dictionary_learning, True, "dictionary-learning"),
    "eai-sparsify, accelerated": Provider(faster(sparsify), False, "eai-sparsify", ("topk",)),
    "SAELens, accelerated": Provider(faster(sae_lens), False, "sae-lens"),
    "dictionary_learning, accelerated": Provider(faster(dictionary_learning), False, "dictionary-learning"),
    "torch": Provider(plain_torch, False, "torch"),
    "torch.compile": Provider(compiled_torch, False, "torch"),
}


def versions() -> dict[str, str | None]:
    """Version of every package that takes part; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in ("triton", *(provider.package for provider in PROVIDERS.values())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def load(module: str) -> Any:
    """The module. What it prints and warns about on the way is its own affair. Raises Absent if it isn't installed."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(module)


def skip_init(package: str, unless: str) -> None:
    """Let modules of `package` be imported without its own __init__, if that needs `unless` and it isn't there."""
    spec = find_spec(package) if package not in sys.modules and find_spec(unless) is None else None
    if spec is not None:
        sys.modules[package] = bare = types.ModuleType(package)
        bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations or ())


def fixes_l0(activation: str) -> bool:
    """Whether a token has K active latents, by itself or on average; only then is there AuxK."""
    return activation in ("topk", "batchtopk")


def mean_l0(kept: Tensor) -> float:
    return int((kept > 0).sum()) / len(kept)


@torch.no_grad()
def let_die(W_enc: Tensor) -> None:
    """Make the dead latents' encoder rows [F, D] too small to be kept: positive, so that AuxK has something to work on."""
    W_enc[DEAD] *= 0.01


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Make an Adam that has not stepped yet a fused one."""
    for group in optimizer.param_groups:
        group["fused"] = True


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    return name if optimizer.param_groups[0].get("fused") else f"{name} (unfused)"


def autocast(job: Job, wanted: bool = True) -> torch.autocast:
    device = torch.device(job.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=wanted and job.dtype == "bf16")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
