"""Providers of a training step: temposae, plain torch, torch.compile of it, and other libraries through their own code.

A provider is a function from a `TrainingJob` to a `ProviderRun`. With `own` it uses its own defaults. For the headline it
uses torch's fused Adam at the job's constant learning rate, and matrix products in the job's dtype. What a library does in
every step (waiting for the loss, clipping, counting dead latents) it also does here.

With AuxK, every fourth latent is dead: its encoder row starts so small that no token selects it, and before every step the
trainer's count of idle tokens is set to say so. For the headline, AuxK gives D / 2 of them to each token, as in the
libraries, and coefficients of L1 and L0 are temposae's defaults where a loss has the same term.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.cohort import group_into_cohorts
from ..engine.config import TrainConfig
from ..engine.learner import Learner
from ..engine.sae import SparseAutoencoder
from ..kernels.code import SparseCode
from ..kernels.encode_sparse import encode_topk
from .data import DTYPES, POSITIONS, seed_of
from .libraries import dictionary_learning, faster, sae_lens, sparsify
from .torch_baseline import compiled_torch, plain_torch
from .training_job import (
    ACTIVATIONS,
    DEAD,
    LONG_RUN,
    AnyDictionary,
    ProviderRun,
    TrainingJob,
    fixes_l0,
    let_die,
    sae_config,
)


def make_learner(job: TrainingJob, seed: int = 0) -> Learner:
    """A new dictionary in the learner that `temposae train` uses. With `own`, it has `TrainConfig`'s defaults."""
    n = job.shape.N
    settings: dict[str, Any] = dict(tokens=n * LONG_RUN, batch=n, control=False)
    if not job.own:
        dtype = str(DTYPES[job.dtype]).removeprefix("torch.")
        settings |= dict(lr=job.lr, warmup=0.0, decay=0.0, clip_norm=job.clip, dtype=dtype)
    sae = SparseAutoencoder(sae_config(job), seed=seed_of("weights", seed)).to(job.device)
    if job.auxk:
        let_die(sae.W_enc.T)
    return Learner(sae, TrainConfig(**settings), job.tokens.mean, job.tokens.mean_norm, POSITIONS)


def temposae(job: TrainingJob) -> ProviderRun:
    """The training step of `temposae train`. With `own`, it has the defaults, which clip gradients."""
    learners = [make_learner(job, job.seed + number) for number in range(job.dictionaries)]
    batches = job.tokens.batches
    learner, cohorts = learners[0], group_into_cohorts(learners)
    sae, scale = learner.sae, learner.scale
    # before the first step, so that FVU before and after training can be compared
    sae.initialise_threshold(learner.scaled(batches[0].x), batches[0].pos)
    for seed_learner in learners:
        seed_learner.any_dead = job.auxk

    def step(i: int) -> None:
        if job.auxk:
            for seed_learner in learners:
                seed_learner.counts.idle_tokens[:, DEAD] = seed_learner.dead_after
        for cohort in cohorts:
            cohort.step(batches[i % len(batches)])

    def encode(x: Tensor) -> SparseCode:
        if job.activation == "batchtopk":  # as in training; the inference threshold follows slowly
            return encode_topk(x * scale, sae.W_enc, sae.b_enc, sae.cfg.k, center=sae.b_dec, across_batch=True)[0]
        return sae.encode_sparse(x * scale)

    def l0(x: Tensor) -> float:
        code = encode(x)
        return int((code.live(code.values) > 0).sum()) / len(x)

    return ProviderRun(
        step=step,
        reconstruct=lambda x: sae.decode(encode(x)) / scale,
        optimizer="Adam",
        dtype=next(name for name, dtype in DTYPES.items() if dtype == learner.dtype),
        clip=learner.config.clip_norm,
        aux_k=min(sae.cfg.aux_k, job.n_dead),
        l0=None if fixes_l0(job.activation) else l0,
        dictionary=AnyDictionary(
            lambda x: encode(x).to_dense(), lambda f: sae.decode(f) / scale, lambda: sae.W_dec.detach()
        ),
    )


class Provider(NamedTuple):
    """`own`: whether its defaults differ from the headline's settings. `package`: the package of its version.

    Providers of TopK or BatchTopK also have AuxK.
    """

    build: Callable[[TrainingJob], ProviderRun]
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
    """Version of every provider's package and of triton. None if it is not installed."""
    package_versions: dict[str, str | None] = {}
    for package in ("triton", *(provider.package for provider in PROVIDERS.values())):
        try:
            package_versions[package] = version(package)
        except PackageNotFoundError:
            package_versions[package] = None
    return package_versions
