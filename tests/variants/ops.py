"""Which of the kernels' ops a documented run trains through, and what it does outside of them, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from temposae.campaign.documented import settings
from temposae.engine import composed
from temposae.engine.composed import ComposedAutoencoder, dictionary
from temposae.engine.config import SAEConfig
from temposae.engine.sae import BatchContext
from temposae.kernels import autograd, gradients

#: where the engine calls an op -> the op's name
_CALLS = {
    (autograd, "encode"): "encode",
    (autograd, "encode_topk_op"): "encode_sparse",
    (autograd, "encode_threshold"): "encode_sparse",
    (autograd, "decode"): "decode",
    (autograd, "reconstruct_op"): "decode",
    (gradients, "decode"): "decode",
    (gradients, "decode_values_grad"): "decode",
    (gradients, "weight_grad"): "weight_grad",
    (autograd, "position_sums"): "loss",
    (composed, "select_topk"): "select",
    (composed, "select_batch_topk"): "select",
    (composed, "select_threshold"): "select",
}


def used(run: str, activation: str) -> list[str]:
    """The ops that a training step of the run calls with this activation, found by taking one, on few numbers."""
    D, T, rows = 8, 128, 2
    sae = dictionary(_config(run, activation, D))
    pos = torch.arange(T).repeat(rows)
    x = torch.randn(len(pos), D, generator=torch.Generator().manual_seed(0))
    batch_context = BatchContext(torch.arange(rows).repeat_interleave(T), torch.arange(len(pos)) // T, x)
    with _recorded() as found:
        sae.objective(x, pos, T, batch_context=batch_context).loss.backward()
    return sorted(set(found))


def outside(run: str, activation: str) -> list[str]:
    """What the run does without the ops that a plain dictionary has, and which parts are the reason: `encoder` where they
    act on pre-activations, which the encoder's kernel never writes; `mask` where they act between encoder and mask, which
    the kernel does in one; `selection` where they need all activations, which kernels that select never write."""
    sae = dictionary(_config(run, activation, 8))
    if not isinstance(sae, ComposedAutoencoder):
        return []
    inside = {place: [part.kind for part in sae.parts_in(place)] for place in ("pre", "acts", "latents")}
    found = {"encoder": inside["pre"], "mask": [], "selection": []}
    if not inside["pre"] and sae.cfg.mask.kind != "none":
        found["mask"] = inside["acts"]
    if activation != "relu":
        reads = [part.kind for part in sae.parts_in() if "f" in part.reads]
        found["selection"] = [*inside["pre"], *inside["acts"], *inside["latents"], *reads]
    return [f"{what}: {', '.join(dict.fromkeys(parts))}" for what, parts in found.items() if parts]


def _config(run: str, activation: str, d: int) -> SAEConfig:
    return SAEConfig(**{**settings(run)["sae"], "d_in": d, "d_sae": 256, "k": 4, "activation": activation})


@contextmanager
def _recorded() -> Iterator[list[str]]:
    found: list[str] = []

    def recording(call: Any, name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return call(*args, **kwargs)

        return record

    patches = [mock.patch.object(m, call, recording(getattr(m, call), name)) for (m, call), name in _CALLS.items()]
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()
