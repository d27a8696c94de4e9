"""Download dictionaries from the Hugging Face hub, and upload them with a model card."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import SAEConfig
from ..errors import UserError
from ..process import hub_access
from .hook_metadata import Where
from .libraries import LIBRARIES

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?")
SETTINGS = {name for library in LIBRARIES.values() for name in library.settings}
FILES = {*SETTINGS, "checkpoint.json", *(name for library in LIBRARIES.values() for name in library.weights)}
MARKS = ("checkpoint.json", *SETTINGS, "params.npz", "params.safetensors")  # a dictionary's folder has one of these


def is_name(path: str) -> bool:
    """Whether a path has the form OWNER/REPOSITORY[/FOLDER][@REVISION]."""
    return NAME.fullmatch(path) is not None and not path.startswith((".", "~"))


def fetch(name: str) -> Path:
    """Download the folder of a dictionary (or find it in the cache) and the config.json above it, without other files.

    Raises UserError if there is no dictionary, naming folders that have one, or if the download fails.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = NAME.fullmatch(name)
    assert match is not None
    repo, folder, revision = match["repo"], PurePosixPath(match["folder"] or "."), match["revision"]
    folder = folder.parent if folder.name in FILES else folder  # a file stands for its folder
    hub_access.why_not()  # goes offline if the hub can't be reached, so that the calls below fail at once
    try:
        files = [PurePosixPath(file) for file in HfApi().list_repo_files(repo, revision=revision)]
        weights_folder = folder / "checkpoints"  # of early releases of Llamascopium
        folder_files = [file for file in files if file.parent in (folder, weights_folder)]
        if not any(file.name in MARKS for file in folder_files):
            folders = sorted({str(file.parent) for file in files if file.name in MARKS} - {"."})
            suggestion = f"; there are {', '.join(folders[:5])}{', ...' if len(folders) > 5 else ''}" if folders else ""
            raise UserError(f"sae: {name} is not a dictionary's folder on the hub{suggestion}")
        files_to_fetch = [*folder_files, folder.parent / "config.json"]  # sparsify's settings of a run
        patterns = [re.sub(r"([*?[])", r"[\1]", str(file)) for file in files_to_fetch]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns)) / folder
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, or an error of httpx
        raise UserError(f"sae: {name} is not a local folder and can't be downloaded ({_reason(error)})") from None


def upload(folder: Path, name: str, card: str, *, private: bool = False) -> str:
    """Upload a folder with a model card to OWNER/REPOSITORY[/FOLDER], creating the repository if necessary.

    Returns its address. Raises UserError if the hub refuses.
    """
    from huggingface_hub import HfApi

    repo, subfolder = _target(name)
    hub = HfApi()
    hub_access.why_not()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        (folder / "README.md").write_text(card)
        commit: Any = hub.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=subfolder)
    except Exception as error:
        raise UserError(f"to: {name} can't be uploaded ({_reason(error)})") from None
    return str(getattr(commit, "repo_url", commit))


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) and (obstacle := hub_access.why_not()) is not None:
        return obstacle
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _target(name: str) -> tuple[str, str | None]:
    match = NAME.fullmatch(name)
    if match is None or match["revision"]:
        raise UserError(f"to: {name!r} is not allowed; it must be OWNER/REPOSITORY or OWNER/REPOSITORY/FOLDER")
    return match["repo"], match["folder"]


def card(name: str, to: str, sae: SAEConfig, where: Where, tokens: int | None, scores: dict[str, Any] | None) -> str:
    """Return a model card: the dictionary's settings, place and tokens of training as far as known, scores of the eval
    `core`, and code that loads it in temposae and in the library `to`."""
    front: dict[str, Any] = {"library_name": to, "tags": ["sparse-autoencoder", "interpretability", "temposae"]}
    model = where.get("model") or ""
    if "/" in model and is_name(model) and not Path(model).exists():
        front["base_model"] = model
    facts: dict[str, Any] = {
        "kind": "transcoder" if sae.d_out else "sparse autoencoder", "activation": sae.activation, "d_in (D)": sae.d_in,
        "d_sae (F)": sae.d_sae, "d_out": sae.d_out, "k": sae.k if sae.activation in ("topk", "batchtopk") else None,
        "prefixes (Matryoshka)": sae.prefixes and ", ".join(map(str, sae.prefixes)),
        "mask over positions": None if sae.mask.kind == "none" else f"{sae.mask.kind}, {sae.mask.positions} positions",
        "parts": ", ".join(part["kind"] for part in sae.parts) or None,
        "model": model, "hook": where.get("hook"), "target": where.get("target"),
        "text": where.get("data"), "tokens": tokens and f"{tokens:,}",
    }  # fmt: skip
    labels = {
        "explained_variance": "explained variance", "ce_recovered": "CE recovered", "l0": "L0", "dead_fraction": "dead",
    }.items()  # fmt: skip
    scores = scores or {}
    controls = scores.get("controls", {}).get("random", {})
    score_lines = [
        f"| {label} | {_number(scores[key])} | {_number(controls.get(key))} |" for key, label in labels if key in scores
    ]
    repo, folder = _target(name)
    from_saelens = f'from_pretrained("{repo}", "{folder}")' if folder else f'load_from_disk("{Path(name).name}")'
    loading_code = {
        "saelens": f"from sae_lens import SAE\n\nsae = SAE.{from_saelens}"
        + ("" if folder else "  # a copy of this folder"),
        "dictionary_learning": "from dictionary_learning.utils import load_dictionary\n\n"
        f'sae, config = load_dictionary("{Path(name).name}", device="cpu")  # a copy of this folder',
        "sparsify": "from sparsify import SparseCoder\n\n"
        f'sae = SparseCoder.load_from_hub("{repo}"' + (f', hookpoint="{folder}")' if folder else ")"),
    }
    blocks = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# {name}",
        "| | |\n| :-- | :-- |\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value),
        "| on held-out text | dictionary | random control |\n| :-- | --: | --: |\n" + "\n".join(score_lines)
        if score_lines
        else "",
        f'```python\nimport temposae\n\nsae = temposae.load("{name}")\n```',
        f"```python\n{loading_code[to]}\n```" if to in loading_code else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
