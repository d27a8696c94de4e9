"""Which of the kernels' ops a documented run trains through, and what it does outside of them, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from ..engine import composed, functions
from ..engine.composed import ComposedAutoencoder, dictionary
from ..engine.config import SAEConfig
from ..engine.sae import Beside
from . import settings

#: where the engine calls an op -> the op's name
_CALLS = {
    (functions, "encode"): "encode",
    (functions, "encode_topk_op"): "encode_sparse",
    (functions, "encode_threshold"): "encode_sparse",
    (functions, "decode"): "decode",
    (functions, "reconstruct_op"): "decode",
    (functions, "weight_grad"): "weight_grad",
    (functions, "position_sums"): "loss",
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
    beside = Beside(torch.arange(rows).repeat_interleave(T), torch.arange(len(pos)) // T, x)
    with _recorded() as found:
        sae.objective(x, pos, T, beside=beside).loss.backward()
    return sorted(set(found))


def outside(run: str, activation: str) -> str:
    """What the run does without the ops that a plain dictionary has, and why; "" for nothing."""
    sae = dictionary(_config(run, activation, 8))
    if not isinstance(sae, ComposedAutoencoder):
        return ""
    inside = {place: [p.kind for p in sae.parts_in(place)] for place in ("pre", "acts", "latents")}
    reads = [p.kind for p in sae.parts_in() if "f" in p.reads]
    reasons = []
    if inside["pre"]:
        reasons.append(f"encoder: {_and(inside['pre'])} acts on pre-activations, which the kernel never writes")
    elif inside["acts"] and sae.cfg.mask.kind != "none":
        reasons.append(f"mask: applied after the encoder's kernel, since {_and(inside['acts'])} comes before it")
    if activation != "relu" and sae.is_dense:
        who = dict.fromkeys([*inside["pre"], *inside["acts"], *inside["latents"], *reads])
        reasons.append(f"selection: after all activations are there, which {_and(list(who))} needs")
    return "; ".join(reasons)


def _config(run: str, activation: str, d: int) -> SAEConfig:
    return SAEConfig(**{**settings(run)["sae"], "d_in": d, "d_sae": 256, "k": 4, "activation": activation})


def _and(names: list[str]) -> str:
    return " and ".join(names)


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
