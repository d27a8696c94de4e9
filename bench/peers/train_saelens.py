"""SAELens: train a TopK dictionary on random activations. Arguments: N D F K STEPS."""

import sys
from time import perf_counter

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

N, D, F, K, STEPS = map(int, sys.argv[1:] or (1024, 512, 4096, 32, 30))
device, starts = "cuda" if torch.cuda.is_available() else "cpu", []


def activations():
    batches = [torch.randn(N, D, device=device) for _ in range(4)]
    while True:
        if device == "cuda":
            torch.cuda.synchronize()
        starts.append(perf_counter())
        yield batches[len(starts) % 4]


config = SAETrainerConfig(
    total_training_samples=N * STEPS, train_batch_size_samples=N, device=device, lr=1e-4, lr_end=1e-4,
    save_final_checkpoint=False, autocast=device == "cuda",
)  # fmt: skip
sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, device=device))
trainer = SAETrainer(config, sae, activations())
trainer.fit()
gaps = torch.tensor(starts[3:], dtype=torch.float64).diff()
print(f"step: {1e3 * gaps.median():.3f} ms")
