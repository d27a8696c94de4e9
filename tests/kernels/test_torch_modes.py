"""What a caller has set in torch changes no result, and is as it was afterwards."""

import contextlib
import itertools
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import temposae as ts
import torch
from temposae.engine.stream import LanguageModel
from temposae.kernels.torch_modes import default_modes, flushes_denormals
from torch import Tensor

D, F = 32, 96


@contextlib.contextmanager
def setting(put: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def errors_for_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "default float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "warnings are errors": errors_for_warnings,
    "float32 products": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "denormals": lambda: setting(torch.set_flush_denormal, True, False),
}
MAIN = ("autocast", "inference_mode", "default float64", "device meta")


def modes() -> dict[str, Any]:
    """Everything that a call must leave as it is."""
    return {
        "gradients": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "flushes": flushes_denormals(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "anomalies": torch.is_anomaly_enabled(),
        "precision": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads(),
        "filters": list(warnings.filters), "torch": torch.get_rng_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        "random": random.getstate(),
    }  # fmt: skip


def leaves_alone(work: Callable[[], Any], *, but: str = "") -> Any:
    before = modes()
    found = work()
    after = modes()
    assert [name for name in before if before[name] != after[name] and name != but] == []
    return found


def first(work: Callable[[], Any]) -> Any:
    """As `leaves_alone`, where libraries may be imported, which add warnings filters of their own."""
    return leaves_alone(work, but="filters")


X = torch.randn(3000, D, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    D, D, generator=torch.Generator().manual_seed(1)
)
POS = torch.arange(len(X)) % 16
KINDS: dict[str, dict[str, Any]] = {
    "topk": {}, "batchtopk": {}, "relu": {}, "jumprelu": {}, "matryoshka": {"prefixes": (32, F)},
    "parts": {"parts": ({"kind": "decoder_separation"}, {"kind": "layer_norm"})},
}  # fmt: skip


def trained(kind: str, x: Any = X) -> dict[str, Any]:
    """All tensors and figures of a run on activations in hand."""
    cfg = ts.SAEConfig(d_in=D, d_sae=F, k=4, aux_k=8, activation=kind if not KINDS[kind] else "topk", **KINDS[kind])
    run = ts.train(
        {"x": x, "pos": POS}, cfg, ts.TrainConfig(tokens=2560, batch=256, log_every_steps=4, dead_after_tokens=512)
    )
    found: dict[str, Any] = {}
    for name, sae in (("sae", run.sae), ("random", run.random)):
        if sae is not None:
            found |= {f"{name}.{key}": value for key, value in sae.state_dict().items()}
    timeless = [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in run.metrics]
    return found | {"metrics": timeless, "held_out": run.held_out}


def same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            same(found[name], value, f"{where}.{name}")
    elif isinstance(expected, Tensor):
        assert not found.is_inference(), where
        assert (found.dtype, found.device) == (expected.dtype, expected.device), where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@cache
def alone(kind: str) -> dict[str, Any]:
    return first(lambda: trained(kind))


CASES = [*itertools.product(["topk"], SURROUNDINGS), *itertools.product(list(KINDS)[1:], MAIN)]


@pytest.mark.parametrize(("kind", "surroundings"), CASES)
def test_training_is_the_same_whatever_surrounds_it(kind, surroundings):
    expected = alone(kind)
    with SURROUNDINGS[surroundings]():
        found = leaves_alone(lambda: trained(kind))
    same(found, expected)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_training_is_the_same_in_a_thread_and_on_inference_tensors(kind):
    expected = alone(kind)
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(leaves_alone(lambda: trained(kind))))
    thread.start()
    thread.join()
    same(found[0], expected)
    with torch.inference_mode():
        x = X.clone()
    same(trained(kind, x), expected)


def studied(folder: Any) -> dict[str, Any]:
    """A model, a stream, two dictionaries on it and what is measured of them, all made within the surroundings."""
    stream = ts.ActivationStream(
        ts.StreamConfig(buffer_tokens=2048, rows_per_forward=16),
        model=LanguageModel("testbed", device="cpu"),
        tokens=2048,
    )
    settings = ts.TrainConfig(tokens=2048, batch=256, control=False)
    sizes = {f"F{size}": ts.RunConfig(sae=ts.SAEConfig(d_in=128, d_sae=size, k=4), train=settings) for size in (64, 96)}
    runs = ts.train_together(stream, sizes)
    ts.save(runs["F64"].sae, folder / "saved")
    sae = ts.load(folder / "saved")
    shown = ts.dashboard(sae, stream=stream, count=2, rows=4)
    core = ts.evaluate(sae, "core", stream=stream, rows=4)["core"]
    return {
        "batch": stream.next(16).x, "buffer": stream.sample().x, "sae": dict(sae.state_dict()),
        "other": dict(runs["F96"].sae.state_dict()), "core": {k: v for k, v in core.items() if k != "seconds"},
        "shown": shown["latents"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict[str, Any]:
    return first(lambda: studied(tmp_path_factory.mktemp("study")))


@pytest.mark.parametrize("surroundings", MAIN)
def test_a_study_is_the_same_whatever_surrounds_it(study, surroundings, tmp_path):
    with SURROUNDINGS[surroundings]():
        found = leaves_alone(lambda: studied(tmp_path))
    same(found, study)


def used(sae: ts.SparseAutoencoder, x: Tensor, pos: Tensor) -> dict[str, Tensor]:
    """What it gives, and gradients where they are wanted; the backward pass runs within the surroundings, too."""
    found = {"f": sae.encode(x, pos), "x_hat": sae(x, pos), "values": sae.encode_sparse(x, pos).values}
    found["decoded"] = sae.decode(found["f"].detach())
    sae.zero_grad()
    if torch.is_grad_enabled():
        (sae(x, pos) - x).square().sum().backward()
        found |= {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_computes_in_the_dtype_of_x_under_autocast(kind, dtype):
    cfg = ts.SAEConfig(d_in=D, d_sae=F, k=4, activation=kind if not KINDS[kind] else "topk", **KINDS[kind])
    settings = ts.TrainConfig(tokens=1024, batch=256, control=False)
    sae, x, pos = ts.train({"x": X, "pos": POS}, cfg, settings).sae, X[:50].to(dtype), POS[:50]
    expected = used(sae, x, pos)
    for name in ("autocast", "autocast float16", "default float64", "device meta"):
        with SURROUNDINGS[name]():
            found = used(sae, x, pos)
        same(found, expected)
    assert expected["x_hat"].dtype == dtype
    with torch.no_grad():
        assert not sae(x, pos).requires_grad
    with torch.inference_mode():
        assert sae(x, pos).is_inference()


def test_ops_compute_in_the_dtype_of_x_under_autocast():
    draw = torch.Generator().manual_seed(0)
    W, b = torch.randn(D, F, generator=draw), torch.randn(F, generator=draw)

    def gradients() -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (X[:40], W, b, W.T.contiguous(), torch.zeros(D))]
        x, W_enc, b_enc, W_dec, b_dec = leaves
        values, indices = ts.ops.encode_topk(x, W_enc, b_enc, 4)
        x_hat = ts.ops.decode(values, indices, W_dec, b_dec)
        ts.ops.position_loss(x - x_hat, torch.zeros(40, dtype=torch.int64), 1)[0].sum().backward()
        return [x_hat.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    expected = gradients()
    for name in ("autocast", "autocast float16"):
        with SURROUNDINGS[name]():
            found = gradients()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_modes_are_as_they_were_after_an_error():
    @default_modes()
    def fail() -> None:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).device.type == "cpu"
        assert flushes_denormals()
        raise ValueError("wrong")

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        before = modes()
        with pytest.raises(ValueError, match="wrong"):
            fail()
        assert modes() == before
