"""The evals by name, in the order of `temposae eval all`, and the inputs that they need."""

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
from .chosen_sets import sets_read
from .entity_facts import NO_FACTS
from .evaluation import Evaluation
from .judge import NO_JUDGE, Judge
from .labelled import BIOS, stored_at
from .multiple_choice import NO_CHAT_TEMPLATE, NOTHING_TO_FORGET
from .probe_sets import is_probe_set, probe_sets, source_digests, why_not_there

Eval = Callable[[Evaluation], dict[str, Any]]

#: name -> module and function, imported on demand
EVALS = {
    "core": ("suite", "_core"),
    "sparse_probing": ("sparse_probing", "sparse_probing"),
    "sae_probes": ("sae_probes", "sae_probes"),
    "positions": ("suite", "_positions"),
    "ground_truth": ("ground_truth", "ground_truth"),
    "unlearning": ("unlearning", "unlearning"),
    "clusters": ("clusters", "clusters"),
    "absorption": ("absorption", "absorption"),
    "mdl": ("mdl", "mdl"),
    "meta_structure": ("meta_structure", "meta_structure"),
    "ravel": ("ravel", "ravel"),
    "tpp": ("scr_tpp", "tpp"),
    "scr": ("scr_tpp", "scr"),
}

#: evals that ask a judge; `all` includes them if one is given
JUDGED = {"autointerp": ("autointerp", "autointerp")}

#: name of an input file (--file NAME=PATH) -> the eval that reads it, and whether several are allowed
FILES = {
    "forget_questions": ("unlearning", False),
    "retain_questions": ("unlearning", True),
    "forget_text": ("unlearning", False),
    "retain_text": ("unlearning", False),
    "blimp": ("positions", True),
    "senteval": ("positions", True),
    "ravel": ("ravel", True),
}


@dataclass(frozen=True)
class EvalRequest:
    """What an eval is to be measured on."""

    stream: ActivationStream
    sae: SAEConfig
    sets: Sequence[str]
    files: Mapping[str, Sequence[str]]
    judge: Judge | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the text is the embedded language, whose tokens have known labels."""
        return isinstance(self.stream.text, TestbedRows)


def _needs_labels(request: EvalRequest) -> str | None:
    if request.has_labels:
        return None
    return (
        f"{request.stream.text.name} has no labels; this eval needs the embedded language (train with --model testbed)"
    )


def _needs_tokenizer(request: EvalRequest) -> str | None:
    if request.stream.model.tokenizer is not None:
        return None
    return f"{request.stream.model.name} has no tokenizer, and this eval reads text"


def _needs_labelled_texts(request: EvalRequest) -> str | None:
    if (reason := _needs_tokenizer(request)) is not None:
        return reason
    sets = sets_read("sparse_probing", request.sets)
    if not request.has_labels and not sets:
        return (
            f"{request.stream.text.name} has no labels; give labelled texts, --set FILE?text=COLUMN&label=COLUMN (.csv or "
            ".jsonl), or a published set, --set fancyzhx/ag_news?path=FOLDER"
        )
    return _missing({source: stored_at(source) for source in sets}, "set")


def _needs_probe_sets(request: EvalRequest) -> str | None:
    if (reason := _needs_tokenizer(request)) is not None:
        return reason
    if request.stream.model.name == "testbed":
        return "the embedded model reads only its own language; this eval needs a model of English (--model)"
    return why_not_there(sets_read("sae_probes", request.sets))


def _needs_classes(request: EvalRequest, name: str) -> str | None:
    if not (sources := sets_read(name, request.sets)):
        if request.has_labels:
            return None
        text = request.stream.text.name
        if name == "tpp":
            return f"{text} has no labels; give labelled texts, --set FILE?text=COLUMN&label=COLUMN, or a published set"
        lack = "no set has a second label" if request.sets else f"{text} has no labels"
        return (
            f"{lack}; give --set FILE?text=COLUMN&label=COLUMN&attribute=COLUMN or --set {BIOS}_class_set1?path=FOLDER"
        )
    if (reason := _needs_tokenizer(request)) is not None:
        return reason
    return _missing({source: stored_at(source) for source in sources}, "set")


def _needs_questions(request: EvalRequest) -> str | None:
    if (reason := _needs_tokenizer(request)) is not None:
        return reason
    if request.sae.d_out is not None:
        return "a transcoder is not allowed; unlearning changes the activations that were encoded"
    names = [name for name, (reader, _) in FILES.items() if reader == "unlearning"]
    missing = [name for name in names if name not in request.files]
    if missing and (len(missing) < len(names) or not request.has_labels):
        options = " ".join(f"--file {name}=PATH" for name in missing)
        return f"{request.stream.text.name} {NOTHING_TO_FORGET}: {options}"
    if not missing and not getattr(request.stream.model.tokenizer, "chat_template", None):
        return f"{request.stream.model.name} {NO_CHAT_TEMPLATE}"
    return _missing({path: expand_path(path, "file") for name in names for path in request.files.get(name, ())}, "file")


def _order_files(request: EvalRequest) -> list[str]:
    return [path for name in ("blimp", "senteval") for path in request.files.get(name, ())]


def _needs_order_files(request: EvalRequest) -> str | None:
    paths = _order_files(request)
    if paths and (reason := _needs_tokenizer(request)) is not None:
        return reason
    return _missing({path: expand_path(path, "file") for path in paths}, "file")


def _needs_order_tasks(request: EvalRequest) -> str | None:
    return None if request.has_labels or _order_files(request) else _needs_tokenizer(request)


def _needs_autoencoder(request: EvalRequest) -> str | None:
    if request.sae.d_out is not None:
        return "a transcoder is not allowed; mdl compares the reconstruction with the activations that were encoded"
    return None


def _needs_facts(request: EvalRequest) -> str | None:
    if request.sae.d_out is not None:
        return "a transcoder is not allowed; RAVEL changes the activations that were encoded"
    paths = request.files.get("ravel", ())
    if not paths:
        return None if request.has_labels else f"{request.stream.text.name} {NO_FACTS}"
    return _needs_tokenizer(request) or _missing({path: expand_path(path, "file") for path in paths}, "file")


def _needs_judge(request: EvalRequest) -> str | None:
    return _needs_tokenizer(request) if request.judge is not None else NO_JUDGE


def _missing(paths: Mapping[str, Path | None], option: str) -> str | None:
    missing = (argument for argument, path in paths.items() if path is not None and not path.exists())
    return next((f"--{option} {argument} does not exist" for argument in missing), None)


#: eval -> parts that need more than a text ("": all of it) -> function that returns why it can't be measured, or None
NEEDS: dict[str, dict[str, Callable[[EvalRequest], str | None]]] = {
    "sparse_probing": {"": _needs_labelled_texts},
    "sae_probes": {"": _needs_probe_sets},
    "positions": {"": _needs_order_files, "order probing": _needs_order_tasks},
    "ground_truth": {"": _needs_labels},
    "unlearning": {"": _needs_questions},
    "mdl": {"": _needs_autoencoder},
    "ravel": {"": _needs_facts},
    "tpp": {"": lambda request: _needs_classes(request, "tpp")},
    "scr": {"": lambda request: _needs_classes(request, "scr")},
    "autointerp": {"": _needs_judge},
}


def missing_inputs(
    name: str, stream: ActivationStream, sae: SAEConfig, sets: Sequence[str], files: Mapping[str, Sequence[str]],
    judge: Judge | None = None,
) -> dict[str, str]:  # fmt: skip
    """Parts of the eval `name` ("" for all of it) that can't be measured -> the reason, with the option that supplies what
    is missing. Reads no activations, so it can be called before anything is collected."""
    request = EvalRequest(stream, sae, sets, files, judge)
    reasons = {part: needs(request) for part, needs in NEEDS.get(name, {}).items()}
    return {part: reason for part, reason in reasons.items() if reason is not None}


def named_files(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse NAME=PATH options. Raises UserError for a name not in `FILES`, or given too often."""
    files: dict[str, tuple[str, ...]] = {}
    for option in options:
        name, _, path = option.partition("=")
        if name not in FILES or not path:
            raise UserError(f"file: {option} is not allowed; give NAME=PATH with one of the names {', '.join(FILES)}")
        if name in files and not FILES[name][1]:
            raise UserError(f"file: {option} is not allowed; give {name} once, it is {files[name][0]} already")
        files[name] = (*files.get(name, ()), path)
    return files


def check_there(sets: Sequence[str], files: Mapping[str, Sequence[str]], names: Sequence[str] = ()) -> None:
    """Raise UserError for labelled texts and files that don't exist, and for data sets that none of the evals `names`
    reads."""
    for name, path in ((name, path) for name, paths in files.items() for path in paths):
        if not expand_path(path, f"--file {name}").exists():
            raise UserError(f"--file {name}: {shown(path)} is not allowed; it does not exist")
    for source in sets:
        if is_probe_set(source):
            if names and "sae_probes" not in names:
                raise UserError(f"--set: {shown(source)} is not allowed with eval {names[0]}; only sae_probes reads it")
            probe_sets([source])
        elif list(names) == ["sae_probes"]:
            allowed = "quick, all, or a name such as 24_headline_isiran"
            raise UserError(f"--set: {shown(source)} is not allowed with eval sae_probes; it must be {allowed}")
        elif (path := stored_at(source)) is not None and not path.exists():
            raise UserError(f"--set: {shown(source)} is not allowed; {path} does not exist")


def input_digests(name: str, sets: Sequence[str], files: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """Digests of the labelled sets and files that the eval `name` reads, by the argument that gave them."""
    if name == "sae_probes":
        return source_digests(sets_read(name, sets))
    if name in ("sparse_probing", "tpp", "scr"):
        paths = {source: stored_at(source) for source in sets_read(name, sets)}
    else:
        kinds = [kind for kind, (reader, _) in FILES.items() if reader == name]
        paths = {f"{kind}={path}": expand_path(path, "file") for kind in kinds for path in files.get(kind, ())}
    digests: dict[str, str | None] = dict.fromkeys(paths)
    for argument, path in paths.items():
        if path is not None and path.exists():
            digests[argument] = digest_of_folder(path) if path.is_dir() else digest(path)
    return digests


def every_eval(judge: Judge | None) -> list[str]:
    """The names that `all` stands for."""
    return list(EVALS if judge is None else EVALS | JUDGED)


def load_eval(name: str) -> Eval:
    """Import the eval of this name. Raises UserError if there is none."""
    known = EVALS | JUDGED
    if name not in known:
        raise UserError(f"eval: {name} is not allowed; it must be {', '.join(known)} or all")
    module, function = known[name]
    try:
        return getattr(import_module(f".{module}", __package__), function)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("sklearn", "scipy"):
            raise
        raise UserError(f"eval: {name} needs {package}; pip install 'temposae[evals]'") from None


def _core(evaluation: Evaluation) -> dict[str, Any]:
    from .core import core
    from .held_out import HeldOut

    controls = evaluation.controls
    stream, neurons = evaluation.stream, evaluation.neurons
    rows, ce_rows = (max(1, most // evaluation.share) for most in (evaluation.sizes.rows, evaluation.sizes.ce_rows))
    latents = [evaluation.sae.cfg.d_sae] * (1 + len(controls)) + [evaluation.sae.cfg.d_in] * neurons
    held_out = evaluation.once(
        f"core {stream.model.hooks} {rows} {ce_rows}", lambda: HeldOut(stream, rows, ce_rows, latents)
    )
    return core(stream, evaluation.sae, controls, neurons=neurons, held_out=held_out, saved=evaluation.saved)


def _positions(evaluation: Evaluation) -> dict[str, Any]:
    from .fidelity import fidelity
    from .positions import positions
    from .slicing import slicing
    from .word_order import order_probing

    result = positions(evaluation, evaluation.reference)
    result |= {"fidelity": fidelity(evaluation), "slicing": slicing(evaluation)}
    request = EvalRequest(evaluation.stream, evaluation.sae.cfg, evaluation.sets, evaluation.files)
    if (reason := _needs_order_tasks(request)) is not None:
        return result | {"order_probing": {"skipped": reason}}
    try:
        return result | {"order_probing": order_probing(evaluation)}
    except UserError as error:
        if _order_files(request):
            raise
        return result | {"order_probing": {"skipped": str(error)}}  # the text has too few words to exchange
