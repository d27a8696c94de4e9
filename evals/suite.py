"""The evals by name, in the order in which `all` runs them."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.files import digest, digest_of_folder
from .collect import Evaluation
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


def named_files(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """NAME=PATH, by name. Raises UserError for a name that is none of `FILES`, or that is given too often."""
    found: dict[str, tuple[str, ...]] = {}
    for one in given:
        name, _, path = one.partition("=")
        if name not in FILES or not path:
            raise UserError(f"file: {one} is not allowed; give NAME=PATH, of which NAME is {', '.join(FILES)}")
        if name in found and not FILES[name][1]:
            raise UserError(f"file: {one} is not allowed; there is one {name} already, {found[name][0]}")
        found[name] = (*found.get(name, ()), path)
    return found


def given_to(name: str, sets: Sequence[str], files: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What the eval `name` reads of these labelled sets and files, as it was given -> the digest of what lies there."""
    if name == "sparse_probing":
        paths = {source: stored_at(source) for source in sets}
    else:
        mine = [kind for kind, (reader, _) in FILES.items() if reader == name]
        paths = {f"{kind}={path}": Path(path).expanduser() for kind in mine for path in files.get(kind, ())}
    return {given: None if path is None or not path.exists() else _digest(path) for given, path in paths.items()}


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
    from .core import CE_ROWS, ROWS, core

    controls = {} if evaluation.random is None else {"random": evaluation.random}
    rows, ce_rows = evaluation.rows(ROWS), evaluation.rows(CE_ROWS)
    return core(evaluation.stream, evaluation.sae, controls, rows=rows, ce_rows=ce_rows, neurons=evaluation.neurons)


def _sparse_probing(evaluation: Evaluation) -> dict[str, Any]:
    from .sparse_probing import sparse_probing

    return sparse_probing(evaluation, list(evaluation.sets) or None)


def _positions(evaluation: Evaluation) -> dict[str, Any]:
    from .fidelity import fidelity
    from .order import order_probing
    from .positions import positions
    from .slicing import slicing

    found = positions(evaluation, evaluation.reference) | {
        "fidelity": fidelity(evaluation),
        "slicing": slicing(evaluation),
    }
    try:
        return found | {"order_probing": order_probing(evaluation)}
    except UserError as error:
        return found | {"order_probing": {"skipped": str(error)}}
