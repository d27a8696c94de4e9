"""The evals by name, in the order in which `all` runs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..engine.config import SAEConfig
from ..engine.errors import UserError, shown
from ..engine.storage.files import digest, digest_of_folder
from ..engine.storage.path_names import expand_path
from ..engine.stream import ActivationStream
from ..engine.stream.token_rows import TestbedRows
from .evaluation import Evaluation
from .labelled import stored_at

Eval = Callable[[Evaluation], dict[str, Any]]

#: name -> the module and the function in it; imported when they are needed
EVALS = {
    "core": ("suite", "_core"),
    "sparse_probing": ("suite", "_sparse_probing"),
    "positions": ("suite", "_positions"),
    "ground_truth": ("ground_truth", "ground_truth"),
    "unlearning": ("unlearning", "unlearning"),
    "scr": ("scr_tpp", "scr"),
    "tpp": ("scr_tpp", "tpp"),
    "clusters": ("clusters", "clusters"),
    "absorption": ("absorption", "absorption"),
}


#: what is read from disk where the text isn't the embedded language's -> the eval that reads it, and whether several may be
FILES = {
    "forget_questions": ("unlearning", False),
    "retain_questions": ("unlearning", True),
    "forget_text": ("unlearning", False),
    "retain_text": ("unlearning", False),
    "blimp": ("positions", True),
    "senteval": ("positions", True),
}


#: eval -> what it lacks
Needs = Callable[["EvalRequest"], dict[str, str]]


@dataclass(frozen=True)
class EvalRequest:
    """What an eval is asked to be measured on."""

    stream: ActivationStream
    sae: SAEConfig
    sets: Sequence[str]
    files: Mapping[str, Sequence[str]]

    @property
    def has_labels(self) -> bool:
        """Whether the text is the embedded language, which knows the labels of every token."""
        return isinstance(self.stream.text, TestbedRows)


def _labels_of_tokens(request: EvalRequest) -> dict[str, str]:
    if request.has_labels:
        return {}
    return {
        "": f"{request.stream.text.name} has no labels; it is measured on the embedded language alone (model: testbed)"
    }


def _no_tokenizer(request: EvalRequest) -> dict[str, str]:
    if request.stream.model.tokenizer is not None:
        return {}
    return {"": f"{request.stream.model.name} has no tokenizer, and this eval reads text"}


def _labelled_texts(request: EvalRequest) -> dict[str, str]:
    if lacking := _no_tokenizer(request):
        return lacking
    if not request.has_labels and not request.sets:
        return {
            "": f"{request.stream.text.name} has no labels; give labelled texts, --set FILE?text=COLUMN&label=COLUMN (.csv "
            "or .jsonl), or a published set, --set fancyzhx/ag_news?path=FOLDER"
        }
    return _absent({source: stored_at(source) for source in request.sets}, "set")


def _questions(request: EvalRequest) -> dict[str, str]:
    if lacking := _no_tokenizer(request):
        return lacking
    if request.sae.d_out is not None:
        return {"": "a transcoder is not allowed; unlearning changes the activations that were encoded"}
    names = [name for name, (reader, _) in FILES.items() if reader == "unlearning"]
    missing = [name for name in names if name not in request.files]
    if missing and (len(missing) < len(names) or not request.has_labels):
        options = " ".join(f"--file {name}=PATH" for name in missing)
        return {
            "": f"{request.stream.text.name} says nothing of what to forget; give questions and text to forget and to "
            f"retain, such as WMDP-bio's and MMLU's: {options}"
        }
    if not missing and not getattr(request.stream.model.tokenizer, "chat_template", None):
        return {
            "": f"{request.stream.model.name} has no chat template; multiple-choice questions need an instruction-tuned "
            "model"
        }
    return _absent({path: expand_path(path, "file") for name in names for path in request.files.get(name, ())}, "file")


def _tasks_of_order(request: EvalRequest) -> dict[str, str]:
    paths = [path for name in ("blimp", "senteval") for path in request.files.get(name, ())]
    if paths and (lacking := _no_tokenizer(request)):
        return lacking
    absent = _absent({path: expand_path(path, "file") for path in paths}, "file")
    if not paths and not request.has_labels:
        name = request.stream.text.name
        absent["order probing"] = f"{name} has no tasks of its own; give --file blimp=PATH or --file senteval=PATH"
    return absent


def _absent(paths: Mapping[str, Path | None], option: str) -> dict[str, str]:
    gone = [argument for argument, path in paths.items() if path is not None and not path.exists()]
    return {"": f"--{option} {gone[0]} does not exist"} if gone else {}


#: what an eval needs of model, text and dictionary; evals that aren't here need a text, and nothing else
NEEDS: dict[str, Needs] = {
    "sparse_probing": _labelled_texts,
    "positions": _tasks_of_order,
    "ground_truth": _labels_of_tokens,
    "unlearning": _questions,
    "scr": _labels_of_tokens,
    "tpp": _labels_of_tokens,
}


def missing_inputs(
    name: str, stream: ActivationStream, sae: SAEConfig, sets: Sequence[str], files: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """What keeps the eval `name` ("") or a part of it from being measured, with the option that would supply what is
    missing; empty if nothing does. Looks at no activation, so that it can be said before anything is collected."""
    return NEEDS[name](EvalRequest(stream, sae, sets, files)) if name in NEEDS else {}


def named_files(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """NAME=PATH, by name. Raises UserError for a name that is none of `FILES`, or that is given too often."""
    files: dict[str, tuple[str, ...]] = {}
    for option in options:
        name, _, path = option.partition("=")
        if name not in FILES or not path:
            raise UserError(f"file: {option} is not allowed; give NAME=PATH, of which NAME is {', '.join(FILES)}")
        if name in files and not FILES[name][1]:
            raise UserError(f"file: {option} is not allowed; there is one {name} already, {files[name][0]}")
        files[name] = (*files.get(name, ()), path)
    return files


def check_there(sets: Sequence[str], files: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError for labelled texts and files that aren't there."""
    for name, path in ((name, path) for name, paths in files.items() for path in paths):
        if not expand_path(path, f"--file {name}").exists():
            raise UserError(f"--file {name}: {shown(path)} is not allowed; it does not exist")
    for source in sets:
        if (path := stored_at(source)) is not None and not path.exists():
            raise UserError(f"--set: {shown(source)} is not allowed; {path} does not exist")


def input_digests(name: str, sets: Sequence[str], files: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What the eval `name` reads of these labelled sets and files, as it was given -> the digest of what lies there."""
    if name == "sparse_probing":
        paths = {source: stored_at(source) for source in sets}
    else:
        kinds = [kind for kind, (reader, _) in FILES.items() if reader == name]
        paths = {f"{kind}={path}": expand_path(path, "file") for kind in kinds for path in files.get(kind, ())}
    return {argument: None if path is None or not path.exists() else _digest(path) for argument, path in paths.items()}


def _digest(path: Path) -> str:
    return digest_of_folder(path) if path.is_dir() else digest(path)


def load_eval(name: str) -> Eval:
    """The eval of this name. Raises UserError if there is none."""
    if name not in EVALS:
        raise UserError(f"eval: {name} is not allowed; there are {', '.join(EVALS)} and all")
    module, function = EVALS[name]
    try:
        return getattr(import_module(f".{module}", __package__), function)
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "scipy"):
            raise
        raise UserError(f"eval: {name} needs {error.name}; pip install 'temposae[evals]'") from None


def _core(evaluation: Evaluation) -> dict[str, Any]:
    from .core import core
    from .held_out import HeldOut

    controls = {} if evaluation.random is None else {"random": evaluation.random}
    stream, neurons = evaluation.stream, evaluation.neurons
    rows, ce_rows = (max(1, most // evaluation.share) for most in (evaluation.sizes.rows, evaluation.sizes.ce_rows))
    latents = [evaluation.sae.cfg.d_sae] * (1 + len(controls)) + [evaluation.sae.cfg.d_in] * neurons
    held_out = evaluation.once(
        f"core {stream.model.hooks} {rows} {ce_rows}", lambda: HeldOut(stream, rows, ce_rows, latents)
    )
    return core(stream, evaluation.sae, controls, neurons=neurons, held_out=held_out)


def _sparse_probing(evaluation: Evaluation) -> dict[str, Any]:
    from .sparse_probing import sparse_probing

    return sparse_probing(evaluation, list(evaluation.sets) or None)


def _positions(evaluation: Evaluation) -> dict[str, Any]:
    from .fidelity import fidelity
    from .positions import positions
    from .slicing import slicing
    from .word_order import order_probing

    result = positions(evaluation, evaluation.reference) | {
        "fidelity": fidelity(evaluation),
        "slicing": slicing(evaluation),
    }
    request = EvalRequest(evaluation.stream, evaluation.sae.cfg, evaluation.sets, evaluation.files)
    why = _tasks_of_order(request).get("order probing")
    return result | {"order_probing": order_probing(evaluation) if why is None else {"skipped": why}}
