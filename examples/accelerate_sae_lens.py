"""Train SAELens' own TopK dictionary with and without `temposae.accelerate`.

pip install 'temposae[peers]'; python examples/accelerate_sae_lens.py
"""

import time

import temposae as ts
import torch
from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput


def train(accelerated: bool, steps: int, d_sae: int) -> dict[str, float]:
    """Time `steps` training steps of SAELens' code on activations of the embedded model."""
    torch.manual_seed(0)
    stream = ts.ActivationStream(ts.StreamConfig(model="testbed"), tokens=65_536)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=stream.d_in, d_sae=d_sae, k=16))
    if accelerated:
        ts.accelerate(sae)  # the one line; `ts.deaccelerate(sae)` undoes it
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    losses, began = [], 0.0
    for step in range(steps):
        began = time.perf_counter() if step == 2 else began  # two steps to warm up
        x = stream.next(1024).x.float()
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return {"ms_per_step": 1000 * (time.perf_counter() - began) / (steps - 2), "first": losses[0], "last": losses[-1]}


def main(steps: int = 40, d_sae: int = 4096) -> dict[str, dict[str, float]]:
    results = {name: train(name == "accelerated", steps, d_sae) for name in ("SAELens", "accelerated")}
    for name, figures in results.items():
        print(name, {key: round(value, 3) for key, value in figures.items()})
    return results


if __name__ == "__main__":
    main()
