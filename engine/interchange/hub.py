"""Dictionaries on the Hugging Face hub: fetched by name, and put there with a model card."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import RunConfig, SAEConfig
from ..errors import UserError

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?")
MARKS = ("checkpoint.json", "cfg.json", "config.json", "params.npz")  # of which a dictionary's folder has one


def is_name(path: str) -> bool:
    """Whether it may be OWNER/REPOSITORY[/FOLDER][@REVISION]."""
    return NAME.fullmatch(path) is not None and not path.startswith((".", "~"))


def fetch(name: str) -> Path:
    """The folder of a dictionary on the hub, copied here (or found in the cache), without what lies beside or below it.

    Raises UserError where there is none, naming folders of the repository that have one, or no way to get it.
    """
    from huggingface_hub import HfApi, snapshot_download

    found = NAME.fullmatch(name)
    assert found is not None
    repo, folder, revision = found["repo"], PurePosixPath(found["folder"] or "."), found["revision"]
    try:
        files = [PurePosixPath(file) for file in HfApi().list_repo_files(repo, revision=revision)]
        here = [file for file in files if file.parent == folder]
        if not any(file.name in MARKS for file in here):
            others = sorted({str(file.parent) for file in files if file.name in MARKS} - {"."})
            told = f"; there are {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}" if others else ""
            raise UserError(f"sae: {name} is no dictionary's folder on the hub{told}")
        patterns = [re.sub(r"([*?[])", r"[\1]", str(file)) for file in here]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns)) / folder
    except UserError:
        raise
    except Exception as error:  # its errors are of httpx, OSError and ValueError, by turns
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"sae: {name} is no folder here, and can't be had from the hub ({why})") from None


def upload(folder: Path, name: str, card: str, *, private: bool = False) -> str:
    """Put the files of a folder, with a model card, to OWNER/REPOSITORY[/FOLDER], which is made if it is not there; returns
    its address. Raises UserError if the hub refuses."""
    from huggingface_hub import HfApi

    found = NAME.fullmatch(name)
    if found is None or found["revision"]:
        raise UserError(f"to: {name!r} is not allowed; it must be OWNER/REPOSITORY or OWNER/REPOSITORY/FOLDER")
    hub = HfApi()
    try:
        hub.create_repo(found["repo"], private=private, exist_ok=True)
        (folder / "README.md").write_text(card)
        done: Any = hub.upload_folder(repo_id=found["repo"], folder_path=folder, path_in_repo=found["folder"])
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"to: {name} can't be written on the hub ({why})") from None
    return str(getattr(done, "repo_url", done))


def card(name: str, to: str, sae: SAEConfig, run: RunConfig | None, scores: dict[str, Any] | None) -> str:
    """A model card: what the dictionary is, where it was trained, how well it does (`scores`: core's), how to load it."""
    stream = run.stream if run else None
    front: dict[str, Any] = {"library_name": to, "tags": ["sparse-autoencoder", "interpretability", "temposae"]}
    if stream is not None and "/" in stream.model:
        front["base_model"] = stream.model
    facts: dict[str, Any] = {
        "kind": "transcoder" if sae.d_out else "sparse autoencoder", "activation": sae.activation, "d_in (D)": sae.d_in,
        "d_sae (F)": sae.d_sae, "d_out": sae.d_out, "k": sae.k if sae.activation in ("topk", "batchtopk") else None,
        "prefixes (Matryoshka)": sae.prefixes and ", ".join(map(str, sae.prefixes)),
        "mask over positions": None if sae.mask.kind == "none" else f"{sae.mask.kind}, {sae.mask.positions} positions",
        "parts": ", ".join(one["kind"] for one in sae.parts) or None,
        "model": stream and stream.model, "hook": stream and stream.hook, "target": stream and stream.target,
        "text": stream and stream.data, "tokens": f"{run.train.tokens:,}" if run and run.train.tokens else None,
    }  # fmt: skip
    named = {
        "explained_variance": "explained variance",
        "ce_recovered": "CE recovered",
        "l0": "L0",
        "dead_fraction": "dead",
    }
    controls = (scores or {}).get("controls", {}).get("random", {})
    rows = [
        f"| {label} | {_number(scores[key])} | {_number(controls.get(key))} |"
        for key, label in named.items()
        if scores is not None and key in scores
    ]
    loads = {
        "saelens": f'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{Path(name).name}")  # a copy of this folder',
        "dictionary_learning": "from dictionary_learning.utils import load_dictionary\n\n"
        f'sae, config = load_dictionary("{Path(name).name}", device="cpu")  # a copy of this folder',
        "sparsify": f'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub("{name}")',
    }
    blocks = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# {name}",
        "| | |\n| :-- | :-- |\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value),
        "| on held-out text | dictionary | random control |\n| :-- | --: | --: |\n" + "\n".join(rows) if rows else "",
        f'```python\nimport temposae\n\nsae = temposae.load("{name}")\n```',
        f"```python\n{loads[to]}\n```" if to in loads else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
