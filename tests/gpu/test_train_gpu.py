"""Training on a GPU: no waiting inside a step, and a dictionary as good as the CPU's."""

import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.optim import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, Batch
from temposae.engine.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("aux", [False, True], ids=["plain", "auxk"])
def test_a_step_never_waits_for_the_device(aux):
    N, D, F, T = 512, 256, 4096, 64
    x = torch.randn(N, D, device="cuda")
    batch = Batch(x.bfloat16(), *(torch.randint(0, T, (N,), device="cuda", dtype=torch.int32) for _ in range(3)))
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=16, aux_k=32)).cuda()
    one = Learner(sae, TrainConfig(tokens=N * 10, batch=N), x.mean(0), float(x.norm(dim=1).mean()), T)
    one.any_dead = aux
    one.step(batch)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert one.report()["loss"] > 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_step_can_be_captured_and_replayed(activation):
    """A CUDA graph of the step, replayed on other tokens, does what the step does, bit for bit."""
    N, D, F, T = 512, 256, 4096, 64
    draw = torch.Generator("cuda").manual_seed(0)
    xs = torch.randn(4, N, D, device="cuda", generator=draw).bfloat16()
    pos = torch.randint(0, T, (N,), device="cuda", dtype=torch.int32, generator=draw)
    trained = []
    for captured in (False, True):
        sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=16, activation=activation), seed=1).cuda()
        fused = Learner(sae, TrainConfig(tokens=N * 10, batch=N), xs[0].float().mean(0), D**0.5, T).fused
        x, graph = xs[0].clone(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, as a capture wants it
            fused(x, pos, T, None, sae.expected, lr=1e-3, step=1)
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            with torch.cuda.graph(graph):
                fused.run(x, pos, T, None, sae.expected)
        for step, given in enumerate(xs[1:], 2):
            x.copy_(given)
            fused.set_rates(1e-3, step)
            if captured:
                graph.replay()
            else:
                fused.run(x, pos, T, None, sae.expected)
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
        settings = TrainConfig(tokens=N * 10, batch=N, dtype="float32", dead_after_tokens=1)
        one = Learner(sae, settings, torch.zeros(D, device="cuda"), D**0.5, T)
        assert one.fused is not None
        one.fused = one.fused if fused else None
        one.any_dead, one.l0 = True, min(one.l0, F / 100)
        draw = torch.Generator().manual_seed(2)
        for _ in range(3):
            x = torch.rand(N, 300, generator=draw).pow(8) @ directions
            others = (torch.randint(0, T, (N,), generator=draw, dtype=torch.int32).cuda() for _ in range(3))
            one.step(Batch(x.cuda(), *others))
        made.append(one)
    first = SparseAutoencoder(made[0].sae.cfg, seed=1).cuda()
    for name, expected in made[1].sae.named_parameters():
        found, start = made[0].sae.get_parameter(name), first.get_parameter(name)
        assert_close(found - start, expected - start, 1e-3, f"change of {name}")
    assert made[0].report() == pytest.approx(made[1].report(), rel=1e-3)


def test_the_embedded_model_trains_as_on_a_cpu():
    stream = ActivationStream(StreamConfig(buffer_tokens=16384))
    assert stream.model.device.type == "cuda"
    run = train(stream, SAEConfig(d_in=128, d_sae=1024, k=16), TrainConfig(tokens=300_000))
    assert run.metrics[-1]["fvu"] < 0.03  # 0.015 on a CPU
    assert run.metrics[-1]["random"]["fvu"] > 0.2
