"""Training on a GPU: no waiting inside a step, and a dictionary as good as the CPU's."""

import pytest
import torch
from temposae.engine.cohort import Cohort, group_into_cohorts
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, Batch, LanguageModel
from temposae.engine.train import train
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(
    ("activation", "aux", "F"),
    [("topk", False, 4096), ("topk", True, 4096), ("topk", True, 1024), ("batchtopk", True, 4096),
     ("jumprelu", False, 4096), ("jumprelu", False, 8192)],
)  # fmt: skip
def test_a_step_never_waits_for_the_device(activation, aux, F):
    """Those of F = 1024 and the first jumprelu one are dense."""
    N, D, T = 512, 256, 64
    x = torch.randn(N, D, device="cuda")
    batch = Batch.of(x.bfloat16(), torch.randint(0, T, (N,), device="cuda"))
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=16, aux_k=32, activation=activation)).cuda()
    one = Learner(sae, TrainConfig(tokens=N * 10, batch=N), x.mean(0), float(x.norm(dim=1).mean()), T)
    one.any_dead = aux
    cohort = Cohort([one])
    cohort.step(batch)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        cohort.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cohort.settle()
    assert one.report()["loss"] > 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_a_step_can_be_captured_and_replayed(activation):
    """A CUDA graph of the step, replayed on other tokens, does what the step does, bit for bit."""
    N, D, F, T = 512, 256, 4096, 64
    draw = torch.Generator("cuda").manual_seed(0)
    xs = torch.randn(4, N, D, device="cuda", generator=draw).bfloat16()
    pos = torch.randint(0, T, (N,), device="cuda", dtype=torch.int32, generator=draw)
    trained = []
    for captured in (False, True):
        sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=16, activation=activation), seed=1).cuda()
        fused = Cohort([Learner(sae, TrainConfig(tokens=N * 10, batch=N), xs[0].float().mean(0), D**0.5, T)]).fused
        assert fused is not None
        capacity = None if activation in ("topk", "batchtopk") else N * 200
        sae.initialise_threshold(xs[0], pos)
        x, graph = xs[0].clone(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, as a capture wants it
            fused(x, pos, T, None, 64, capacity, lrs=[1e-3], step=1)
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            with torch.cuda.graph(graph):
                fused.run(x, pos, T, None, 64, capacity)
        for step, given in enumerate(xs[1:], 2):
            x.copy_(given)
            fused.stacked.set_rates([1e-3], step)
            if captured:
                graph.replay()
            else:
                assert not fused.run(x, pos, T, None, 64, capacity).overflow
        trained.append({name: value.clone() for name, value in sae.state_dict().items()})
    for name, expected in trained[0].items():
        assert torch.equal(trained[1][name], expected), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(activation="batchtopk"),
        dict(activation="jumprelu"),
        dict(activation="relu"),
        dict(prefixes=(500, 4096)),
        dict(mask=MaskConfig(kind="soft", positions=64)),
        dict(mask=MaskConfig(kind="ranges", positions=64)),
        dict(mask=MaskConfig(kind="gaussian", positions=64)),
    ],
    ids=lambda changes: str(*changes.values())[:30] or "topk",
)
def test_the_fused_step_equals_the_unfused_one(changes, assert_close):
    N, D, F, T = 512, 256, 4096, 64
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(300, D, generator=generator)
    made = []
    for fused in (True, False):
        sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=16, aux_k=32, **changes), seed=1).cuda()
        settings = TrainConfig(tokens=N * 10, batch=N, lr=4e-4, dtype="float32", dead_after_tokens=1)
        one = Learner(sae, settings, torch.zeros(D, device="cuda"), D**0.5, T)
        cohort = Cohort([one], fused=None if fused else False)
        assert (cohort.fused is not None) == fused
        one.any_dead, one.l0 = True, min(one.l0, F / 100)
        draw = torch.Generator().manual_seed(2)
        for _ in range(3):
            x = torch.rand(N, 300, generator=draw).pow(8) @ directions
            cohort.step(Batch.of(x, torch.randint(0, T, (N,), generator=draw)).each(Tensor.cuda))
        cohort.settle()
        made.append(one)
    first = SparseAutoencoder(made[0].sae.cfg, seed=1).cuda()
    for name, expected in made[1].sae.named_parameters():
        found, start = made[0].sae.get_parameter(name), first.get_parameter(name)
        assert_close(found - start, expected - start, 1e-3, f"change of {name}")
    assert made[0].report() == pytest.approx(made[1].report(), rel=1e-3)


@pytest.mark.parametrize("F", [1024, 8192], ids=["dense", "sparse"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_dictionaries_side_by_side_train_as_each_would_alone(activation, F, assert_close):
    N, D, T = 512, 256, 64
    directions = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    results = []
    for alone in (True, False):
        settings = dict(tokens=N * 10, batch=N, dtype="float32", dead_after_tokens=1)
        config = SAEConfig(d_in=D, d_sae=F, k=16, aux_k=32, activation=activation)
        each = [
            Learner(
                SparseAutoencoder(config, seed=seed).cuda(), TrainConfig(**settings, lr=1e-3 / seed, seed=seed),
                torch.zeros(D, device="cuda"), D**0.5, T,
            )
            for seed in (1, 2, 3)
        ]  # fmt: skip
        for one in each:
            one.any_dead = True
        cohorts = [Cohort([one]) for one in each] if alone else group_into_cohorts(each)
        assert len(cohorts) == (3 if alone else 1)
        draw = torch.Generator().manual_seed(2)
        for _ in range(3):
            x = torch.rand(N, 300, generator=draw).pow(8) @ directions
            batch = Batch.of(x, torch.randint(0, T, (N,), generator=draw)).each(Tensor.cuda)
            for cohort in cohorts:
                cohort.step(batch)
        for cohort in cohorts:
            cohort.settle()
        results.append(each)
    for one, other in zip(*results, strict=True):
        first = SparseAutoencoder(one.sae.cfg, seed=one.config.seed).cuda()
        for name, expected in one.sae.named_parameters():
            found, start = other.sae.get_parameter(name), first.get_parameter(name)
            assert_close(found - start, expected - start, 1e-3, f"change of {name}")
        assert other.report() == pytest.approx(one.report(), rel=1e-3)


def test_the_embedded_model_trains_as_on_a_cpu():
    stream = ActivationStream(StreamConfig(buffer_tokens=16384))
    assert stream.model.device.type == "cuda"
    run = train(stream, SAEConfig(d_in=128, d_sae=1024, k=16), TrainConfig(tokens=300_000, lr=8e-4))
    assert run.metrics[-1]["fvu"] < 0.03  # 0.015 on a CPU
    assert run.metrics[-1]["random"]["fvu"] > 0.2


@pytest.mark.parametrize("mode", ["tokens", "grouped", "sequences"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_a_stream_serves_what_it_does_on_a_cpu(mode, dtype):
    """Places are the very same; activations within bfloat16, although slots are filled beside other work."""
    hooks = ("blocks.0.hook_resid_post", "blocks.2.hook_mlp_out")
    config = StreamConfig(buffer_tokens=8192, rows_per_forward=16, mode=mode, buffer_dtype=dtype)
    streams = [
        ActivationStream(config, model=LanguageModel("testbed", device=device, hooks=hooks))
        for device in ("cuda", "cpu")
    ]
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(12):
        there, here = (stream.next(2048) for stream in streams)
        for _ in range(20):
            busy = busy @ busy / 50  # a step that takes its time, so that filling goes on beside it
        for name in ("pos", "token", "document", "row"):
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
        for hook in hooks:
            a, b = there.flat().acts[hook].float().cpu(), here.flat().acts[hook].float()
            assert (a - b).norm() <= 0.05 * b.norm()


def test_serving_a_batch_does_not_wait_for_the_device():
    """But for a permutation, of which there is none here."""
    stream = ActivationStream(StreamConfig(buffer_tokens=65536), model=LanguageModel("testbed", device="cuda"))
    stream.next(1024)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = stream._buffer._gather(slice(1024, 2048))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(batch) == 1024
