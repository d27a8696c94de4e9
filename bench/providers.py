"""Who trains the dictionary: temposae, plain torch, torch.compile of that, and other libraries through their own code.

Each provider is a function from a `Job` to a `Trainee`. With `own` it runs as its users run it by default; else, for the
headline, with torch's fused Adam at the job's learning rate, which stays constant, and products in the job's dtype. What a
library does in every step (waiting for the loss, clipping, counting dead latents) it also does here.
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

from ..engine.config import SAEConfig, TrainConfig
from ..engine.optim import Learner
from ..engine.sae import SparseAutoencoder
from .data import DTYPES, POSITIONS, Shape, Tokens

LONG_RUN = 100_000  # steps that learning-rate schedules are told of: what is measured lies far from their end


class Absent(Exception):
    """A provider that can't run here; the message says why in one line."""


class Job(NamedTuple):
    """What a provider is to train: `dtype` "fp32" or "bf16" is that of products; parameters and moments are float32.

    `clip`: largest gradient norm, or None, for the providers that leave the choice.
    """

    shape: Shape
    device: str
    dtype: str
    lr: float
    tokens: Tokens
    own: bool = False
    clip: float | None = None


@dataclass
class Trainee:
    """`step(i)` trains on batch i; `reconstruct(x)` gives x_hat [N, D] for x [N, D] float32.

    `aux_k`: how many dead latents take part in the measured steps. None do: nothing has had the time to die.
    """

    step: Callable[[int], Any]
    reconstruct: Callable[[Tensor], Tensor]
    optimizer: str
    dtype: str
    clip: float | None
    aux_k: int = 0


def make_learner(job: Job) -> Learner:
    """What `temposae train` steps with, on a new dictionary. Own: `TrainConfig`'s defaults."""
    n, d, f, k = job.shape
    settings: dict[str, Any] = dict(tokens=n * LONG_RUN, batch=n, control=False)
    if not job.own:
        dtype = str(DTYPES[job.dtype]).removeprefix("torch.")
        settings |= dict(lr=job.lr, warmup=0.0, decay=0.0, clip_norm=job.clip, dtype=dtype)
    sae = SparseAutoencoder(SAEConfig(d_in=d, d_sae=f, k=k)).to(job.device)
    return Learner(sae, TrainConfig(**settings), job.tokens.mean, job.tokens.mean_norm, POSITIONS)


def temposae(job: Job) -> Trainee:
    """The training step that `temposae train` runs, on tokens as its stream gives them. Own: its defaults, which clip."""
    learner, batches = make_learner(job), job.tokens.batches
    return Trainee(
        step=lambda i: learner.step(batches[i % len(batches)]),
        reconstruct=lambda x: learner.sae(x * learner.scale) / learner.scale,
        optimizer="Adam",
        dtype=next(name for name, dtype in DTYPES.items() if dtype == learner.dtype),
        clip=learner.config.clip_norm,
    )


class Dense(nn.Module):
    """The TopK SAE as one writes it in plain torch: pre-activations, topk, scatter, a dense product back.

    loss = sum (x - x_hat)^2 / N. Tied start, decoder rows of unit norm, their gradient without its radial part.
    """

    def __init__(self, shape: Shape, device: str):
        super().__init__()
        rows = nn.functional.normalize(torch.randn(shape.F, shape.D, device=device), dim=1)
        self.k = shape.K
        self.W_enc, self.W_dec = nn.Parameter(rows.T.contiguous()), nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(shape.F, device=device))
        self.b_dec = nn.Parameter(torch.zeros(shape.D, device=device))

    def forward(self, x: Tensor) -> Tensor:
        acts = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        top = acts.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(acts).scatter(1, top.indices, top.values) @ self.W_dec + self.b_dec

    def loss(self, x: Tensor) -> Tensor:
        return (x - self(x)).float().square().sum() / len(x)

    @torch.no_grad()
    def project(self) -> None:
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def normalise(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def plain_torch(job: Job, prepare: Callable[[Any], Any] = lambda function: function) -> Trainee:
    """`Dense` with ordinary autograd, autocast where products are to be bfloat16, and torch's fused Adam."""
    torch.manual_seed(0)
    sae = Dense(job.shape, job.device)
    with torch.no_grad():
        sae.b_dec.copy_(job.tokens.mean)
    adam = torch.optim.Adam(sae.parameters(), lr=job.lr, fused=True)
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

    return Trainee(step, sae, "Adam", job.dtype, job.clip)


def compiled_torch(job: Job) -> Trainee:
    """`plain_torch` with its loss (forward and backward), projection and renormalisation through torch.compile."""
    torch.compiler.reset()
    return plain_torch(job, torch.compile)


def sparsify(job: Job) -> Trainee:
    """eai-sparsify's SparseCoder in the order of its Trainer.fit. Own: signum under a schedule-free wrapper, the default.

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
    if job.own:
        inner = load("sparsify.sign_sgd").SignSGD(coder.parameters(), lr=5e-3 / (f / 2**14) ** 0.5)
        optimizer: Any = load("schedulefree").ScheduleFreeWrapper(inner, momentum=0.95)
        optimizer.train()
    else:
        optimizer = torch.optim.Adam(coder.parameters(), lr=job.lr, fused=True)
    idle = torch.zeros(f, device=job.device, dtype=torch.long)
    fired = torch.zeros(f, device=job.device, dtype=torch.bool)

    def step(i: int) -> None:
        x = job.tokens.wide[i % len(job.tokens.wide)]
        with matmul_precision("high"):  # as its fit() sets it
            coder.set_decoder_norm_to_unit_norm()
            out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
            fired[out.latent_indices.flatten()] = True
            float(out.fvu.detach())
            out.fvu.backward()
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
    return Trainee(step, reconstruct, "signum" if job.own else "Adam", dtype, None)


def sae_lens(job: Job) -> Trainee:
    """SAELens' TopKTrainingSAE in its SAETrainer, which always clips at 1. Own: its defaults of Adam, lr and dtype."""
    library = load("sae_lens")
    n, d, f, k = job.shape
    torch.manual_seed(0)
    sae = library.TopKTrainingSAE(library.TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k, device=job.device))
    settings: dict[str, Any] = dict(total_training_samples=n * LONG_RUN, train_batch_size_samples=n, device=job.device)
    settings |= dict(lr_end=3e-5) if job.own else dict(lr=job.lr, lr_end=job.lr, autocast=job.dtype == "bf16")
    config = load("sae_lens.config").SAETrainerConfig(**settings)
    trainer = library.SAETrainer(config, sae, data_provider=iter(job.tokens.wide))
    if not job.own:
        fuse(trainer.optimizer)

    def step(i: int) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(job.tokens.wide[i % len(job.tokens.wide)])
        trainer.n_training_steps += 1

    return Trainee(step, sae, optimizer_name(trainer.optimizer), "fp32" if job.own else job.dtype, 1.0)


def dictionary_learning(job: Job) -> Trainee:
    """dictionary_learning's TopKTrainer.update, which always clips at 1. Own: its Adam, lr, warm-up and dtype."""
    skip_init("dictionary_learning", unless="nnsight")
    settings: dict[str, Any] = dict(activation_dim=job.shape.D, dict_size=job.shape.F, k=job.shape.K, steps=LONG_RUN)
    settings |= dict(layer=0, lm_name="none", seed=0, device=job.device)
    settings |= {} if job.own else dict(lr=job.lr, warmup_steps=0)
    trainer = load("dictionary_learning.trainers.top_k").TopKTrainer(**settings)
    if not job.own:
        fuse(trainer.optimizer)
    narrow = not job.own and job.dtype == "bf16"
    xs = [x.bfloat16() for x in job.tokens.wide] if narrow else job.tokens.wide
    count = itertools.count()  # step 0 sets the bias

    def step(i: int) -> None:
        with autocast(job, narrow):
            trainer.update(next(count), xs[i % len(xs)])

    dtype = "bf16" if narrow else "fp32"
    return Trainee(step, trainer.ae, optimizer_name(trainer.optimizer), dtype, 1.0)


class Provider(NamedTuple):
    """`own`: whether its defaults differ from the headline's settings. `package`: where its version is looked up."""

    build: Callable[[Job], Trainee]
    own: bool
    package: str


PROVIDERS = {
    "temposae": Provider(temposae, True, "temposae"),
    "eai-sparsify": Provider(sparsify, True, "eai-sparsify"),
    "SAELens": Provider(sae_lens, True, "sae-lens"),
    "dictionary_learning": Provider(dictionary_learning, True, "dictionary-learning"),
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
