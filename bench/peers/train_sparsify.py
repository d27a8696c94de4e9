"""sparsify: train a dictionary on the output of a small model. Arguments: N D F K STEPS."""

import os
import sys
import tempfile
from time import perf_counter

import torch
from transformers import GPT2Config, GPT2LMHeadModel

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
from sparsify import SparseCoderConfig, TrainConfig, Trainer

N, D, F, K, STEPS = map(int, sys.argv[1:] or (1024, 512, 4096, 32, 30))
device, starts, context = "cuda" if torch.cuda.is_available() else "cpu", [], 128
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=context, n_embd=D, n_layer=0, n_head=1)).to(device)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * N // context

    def __getitem__(self, i):
        if i % (N // context) == 0:
            if device == "cuda":
                torch.cuda.synchronize()
            starts.append(perf_counter())
        return {"input_ids": torch.randint(0, 64, (context,))}


with tempfile.TemporaryDirectory() as folder:
    sae = SparseCoderConfig(num_latents=F, k=K)
    config = TrainConfig(
        sae, batch_size=N // context, hookpoints=["ln_f"], log_to_wandb=False, save_dir=folder, run_name="run"
    )
    trainer = Trainer(config, Rows(), model)
    trainer.fit()
gaps = torch.tensor(starts[3:], dtype=torch.float64).diff()
print(f"step: {1e3 * gaps.median():.3f} ms")
