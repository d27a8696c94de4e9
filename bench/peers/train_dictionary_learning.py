"""dictionary_learning: train a TopK dictionary on random activations. Arguments: N D F K STEPS."""

import sys
from contextlib import nullcontext
from time import perf_counter

import torch
from dictionary_learning.trainers.top_k import TopKTrainer

N, D, F, K, STEPS = map(int, sys.argv[1:] or (1024, 512, 4096, 32, 30))
device, starts = "cuda" if torch.cuda.is_available() else "cpu", []
batches = [torch.randn(N, D, device=device) for _ in range(4)]
trainer = TopKTrainer(
    steps=STEPS, activation_dim=D, dict_size=F, k=K, layer=0, lm_name="none", warmup_steps=0, seed=0, device=device,
)  # fmt: skip
for step in range(STEPS):
    if device == "cuda":
        torch.cuda.synchronize()
    starts.append(perf_counter())
    with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
        trainer.update(step, batches[step % 4])
gaps = torch.tensor(starts[3:], dtype=torch.float64).diff()
print(f"step: {1e3 * gaps.median():.3f} ms")
