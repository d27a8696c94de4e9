"""The evals by name, in the order in which `all` runs them."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..engine.errors import UserError
from .collect import Evaluation

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


#: what evals read from disk where the text isn't the embedded language's -> whether there may be several
FILES = {
    "forget_questions": False,
    "retain_questions": True,
    "forget_text": False,
    "retain_text": False,
    "blimp": True,
    "senteval": True,
}


def named_files(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """NAME=PATH, by name. Raises UserError for a name that is none of `FILES`, or that is given too often."""
    found: dict[str, tuple[str, ...]] = {}
    for one in given:
        name, _, path = one.partition("=")
        if name not in FILES or not path:
            raise UserError(f"file: {one} is not allowed; give NAME=PATH, of which NAME is {', '.join(FILES)}")
        if name in found and not FILES[name]:
            raise UserError(f"file: {one} is not allowed; there is one {name} already, {found[name][0]}")
        found[name] = (*found.get(name, ()), path)
    return found


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

    controls = {} if evaluation.random is None else {"random": evaluation.random}
    return core(evaluation.stream, evaluation.sae, controls)


def _sparse_probing(evaluation: Evaluation) -> dict[str, Any]:
    from .sparse_probing import sparse_probing

    return sparse_probing(evaluation, list(evaluation.sets) or None)


def _positions(evaluation: Evaluation) -> dict[str, Any]:
    from .fidelity import fidelity
    from .order import order_probing
    from .positions import positions
    from .slicing import slicing

    found = positions(evaluation) | {"fidelity": fidelity(evaluation), "slicing": slicing(evaluation)}
    try:
        return found | {"order_probing": order_probing(evaluation)}
    except UserError as error:
        return found | {"order_probing": {"skipped": str(error)}}
