"""Training steps of other libraries through their own code. With `own`, they have their own defaults."""

import contextlib
import io
import itertools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..engine.accelerate import accelerate
from .data import seed_of
from .training_job import (
    DEAD,
    LONG_RUN,
    AnyDictionary,
    ProviderRun,
    ProviderUnavailable,
    TrainingJob,
    autocast,
    fixes_l0,
    let_die,
    mean_l0,
    sae_config,
)


def sparsify(job: TrainingJob) -> ProviderRun:
    """eai-sparsify's SparseCoder, in the order of its Trainer.fit. Its own optimizer is signum in a schedule-free wrapper.

    AuxK is off by default. Here its weight is 1 / 32, as in Gao et al. On a GPU the forward pass always uses bf16 autocast.
    """
    if job.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify reads it when it is imported
    library = load("sparsify")
    n, d, f, k = job.shape
    torch.manual_seed(seed_of("weights", job.seed))
    autoencoder = library.SparseCoder(d, library.SparseCoderConfig(num_latents=f, k=k), job.device, torch.float32)
    autoencoder.b_dec.data = job.tokens.mean.clone()
    if job.accelerated:
        accelerate(autoencoder)
    if job.auxk:
        let_die(autoencoder.encoder.weight)
    if job.own:
        inner = load("sparsify.sign_sgd").SignSGD(autoencoder.parameters(), lr=5e-3 / (f / 2**14) ** 0.5)
        optimizer: Any = load("schedulefree").ScheduleFreeWrapper(inner, momentum=0.95)
        optimizer.train()
    else:
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=job.lr, fused=True)
    idle = torch.zeros(f, device=job.device, dtype=torch.long)
    fired = torch.zeros(f, device=job.device, dtype=torch.bool)
    dead_after = 10_000_000

    def step(i: int) -> None:
        if job.auxk:
            idle[DEAD] = dead_after + 1
        x = job.tokens.wide[i % len(job.tokens.wide)]
        with matmul_precision("high"):  # as in its fit()
            autoencoder.set_decoder_norm_to_unit_norm()
            dead = idle > dead_after if job.auxk else None
            out = autoencoder(x, total_variance=(x - x.mean(0)).pow(2).sum(), dead_mask=dead)
            fired[out.latent_indices.flatten()] = True
            float(out.fvu.detach())
            if job.auxk:
                float(out.auxk_loss.detach())
            (out.fvu + out.auxk_loss / 32 if job.auxk else out.fvu).backward()
            autoencoder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
        idle.add_(n)
        idle[fired] = 0
        fired.zero_()

    def reconstruct(x: Tensor) -> Tensor:
        if job.own:
            optimizer.eval()  # the saved weights are an average
        x_hat = autoencoder(x).sae_out
        if job.own:
            optimizer.train()
        return x_hat

    dtype = "bf16" if torch.device(job.device).type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    name, dictionary = "signum" if job.own else "Adam", sparsify_dictionary(autoencoder)
    return ProviderRun(step, reconstruct, name, dtype, None, job.aux_k, dictionary=dictionary)


def sparsify_dictionary(autoencoder: Any) -> AnyDictionary:
    """sparsify's coder, whose own code is a list of latents and activations."""

    def encode(x: Tensor) -> Tensor:
        code = autoencoder.encode(x)
        return x.new_zeros(len(x), autoencoder.num_latents).scatter(1, code.top_indices, code.top_acts)

    return AnyDictionary(encode, lambda f: f @ autoencoder.W_dec + autoencoder.b_dec, lambda: autoencoder.W_dec)


def sae_lens(job: TrainingJob) -> ProviderRun:
    """SAELens' training SAE in its SAETrainer, which always clips at 1."""
    library = load("sae_lens")
    n, d, f, k = job.shape
    defaults = sae_config(job)
    name, sizes, headline_sizes = {
        "topk": ("TopK", dict(k=k), {}),
        "batchtopk": ("BatchTopK", dict(k=float(k)), {}),
        "jumprelu": ("JumpReLU", {}, dict(l0_coefficient=defaults.l0_coefficient * d)),
        "relu": ("Standard", {}, dict(l1_coefficient=defaults.l1_coefficient)),
    }[job.activation]
    sizes |= {} if job.own else headline_sizes
    torch.manual_seed(seed_of("weights", job.seed))
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
    dictionary = sae_lens_dictionary(sae)
    return ProviderRun(step, sae, optimizer_name(trainer.optimizer), dtype, 1.0, job.aux_k, l0, dictionary)


def sae_lens_dictionary(sae: Any) -> AnyDictionary:
    """SAELens' training dictionary, as its own benchmark evaluates it."""

    def encode(x: Tensor) -> Tensor:
        f = sae.encode(x)
        return f.to_dense() if f.is_sparse else f

    return AnyDictionary(encode, sae.decode, lambda: sae.W_dec)


def dictionary_learning(job: TrainingJob) -> ProviderRun:
    """The `update` of dictionary_learning's trainer, which always clips at 1, except for ReLU. JumpReLU's target L0 is K."""
    skip_init("dictionary_learning", unless="nnsight")
    k = job.shape.K
    module, name, sizes, headline_settings = {
        "topk": ("top_k", "TopKTrainer", dict(k=k), {}),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer", dict(k=k), {}),
        "jumprelu": ("jumprelu", "JumpReluTrainer", {}, dict(target_l0=float(k), sparsity_warmup_steps=0)),
        "relu": (
            "standard", "StandardTrainer", {}, dict(l1_penalty=sae_config(job).l1_coefficient, sparsity_warmup_steps=0),
        ),
    }[job.activation]  # fmt: skip
    settings: dict[str, Any] = dict(activation_dim=job.shape.D, dict_size=job.shape.F, steps=LONG_RUN, **sizes)
    settings |= dict(layer=0, lm_name="none", seed=seed_of("weights", job.seed), device=job.device)
    settings |= {} if job.own else dict(lr=job.lr, warmup_steps=0, **headline_settings)
    torch.manual_seed(seed_of("weights", job.seed))  # not all trainers set the seed
    trainer = getattr(load(f"dictionary_learning.trainers.{module}"), name)(**settings)
    if job.accelerated:
        accelerate(trainer)
    if job.auxk:
        let_die(trainer.ae.encoder.weight)
    if not job.own:
        fuse(trainer.optimizer)
    narrow = not job.own and job.dtype == "bf16"
    xs = [x.bfloat16() for x in job.tokens.wide] if narrow else job.tokens.wide
    count = itertools.count()  # at step 0 it sets the bias

    def step(i: int) -> None:
        if job.auxk:
            trainer.num_tokens_since_fired[DEAD] = trainer.dead_feature_threshold
        with autocast(job, narrow):
            trainer.update(next(count), xs[i % len(xs)])

    def encode(x: Tensor) -> Tensor:
        # as in training; the inference threshold follows slowly
        return trainer.ae.encode(x, **({"use_threshold": False} if job.activation == "batchtopk" else {}))

    def reconstruct(x: Tensor) -> Tensor:
        return trainer.ae.decode(encode(x)) if job.activation == "batchtopk" else trainer.ae(x)

    dictionary = AnyDictionary(encode, trainer.ae.decode, lambda: trainer.ae.decoder.weight.T)
    dtype, clip = "bf16" if narrow else "fp32", None if job.activation == "relu" else 1.0
    l0 = None if fixes_l0(job.activation) else lambda x: mean_l0(trainer.ae.encode(x))
    return ProviderRun(step, reconstruct, optimizer_name(trainer.optimizer), dtype, clip, job.aux_k, l0, dictionary)


def faster(build: Callable[[TrainingJob], ProviderRun]) -> Callable[[TrainingJob], ProviderRun]:
    """A library's training step after `temposae.accelerate`."""
    return lambda job: build(job._replace(accelerated=True))


def load(module: str) -> Any:
    """Import a module without its output and warnings. Raises ProviderUnavailable if it is not installed."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise ProviderUnavailable(f"{package} is not installed")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(module)


def skip_init(package: str, unless: str) -> None:
    """Let modules of `package` be imported without its __init__, if that needs the missing package `unless`."""
    spec = find_spec(package) if package not in sys.modules and find_spec(unless) is None else None
    if spec is not None:
        sys.modules[package] = bare = types.ModuleType(package)
        bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations or ())


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Make an Adam that has not stepped yet use torch's fused step."""
    for group in optimizer.param_groups:
        group["fused"] = True


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    return name if optimizer.param_groups[0].get("fused") else f"{name} (unfused)"


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
