"""Train the embedded language model from scratch."""

import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ...kernels.torch_modes import default_modes
from ..process.cpu_memory import tune_host
from ..process.progress import progress_bar
from ..storage.files import follow_umask, write_text
from . import language as lang
from .quality import measure


def tokenizer(language: lang.Language) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the language in the `tokenizers` format. It puts `<bos>` first."""
    core = Tokenizer(models.WordLevel(language.token_id, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", lang.BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=lang.CONTEXT,
    )  # fmt: skip


def config(vocabulary: int) -> Gemma2Config:
    """Return a small Gemma-2 with 4 layers, D = 128, and 4 query and 2 key/value heads."""
    return Gemma2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=32,
        max_position_embeddings=lang.CONTEXT, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        pad_token_id=lang.PAD, bos_token_id=lang.BOS, eos_token_id=lang.EOS,
    )  # fmt: skip


@default_modes()
def train(
    out: Path, *, steps: int = 3000, batch: int = 16, lr: float = 3e-3, seed: int = 0, device: str | None = None
) -> dict:
    """Train on `steps * batch` documents, write model, tokenizer and `quality.json` to `out`, and return the quality.

    Uses AdamW (betas 0.9, 0.98; decay 0.1 on matrices) with linear warm-up over 5% of the steps and cosine decay to 5%
    of `lr`.
    """
    tune_host()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    language = lang.Language(seed=seed)
    model = Gemma2ForCausalLM(config(len(language.vocabulary))).train()
    model.to(device)  # pyright: ignore[reportArgumentType]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start_time, tokens_seen = time.monotonic(), 0
    with progress_bar("training the language model", total=steps, unit="steps") as bar:
        for step in range(steps):
            rows = torch.from_numpy(language.tokens(step * batch, batch)[0]).to(device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=lang.PAD)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            tokens_seen += rows.numel()
            bar.advance(1, loss=f"{loss.item():.3f}" if step % 20 == 0 else None)
    seconds = time.monotonic() - start_time

    model.eval().cpu()  # pyright: ignore[reportCallIssue]
    quality = measure(lambda rows: model(input_ids=rows).logits, language, lang.HELD_OUT)
    quality["training"] = {
        "steps": steps, "batch": batch, "lr": lr, "seed": seed, "tokens": tokens_seen, "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer(language).save_pretrained(out)
    follow_umask(out)
    write_text(out / "quality.json", json.dumps(quality, indent=1) + "\n")
    return quality
