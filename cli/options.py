"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..engine import plugins
from ..engine.errors import UserError
from ..engine.storage.files import check_writable
from ..engine.storage.path_names import expand_path

PLAIN: dict[str, Any] = {
    "no_args_is_help": True, "add_completion": False, "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}  # fmt: skip


def _writable(path: Path | None) -> Path | None:
    path = None if path is None else expand_path(path, "--json")
    check_writable(path)
    return path


def _imported(names: list[str] | None) -> list[str] | None:
    plugins.use(names)
    return names


JsonFile = Annotated[Path | None, Option("--json", callback=_writable, help="Also write results to this JSON file.")]
GROWING = "Write results to this JSON file one by one, and skip those that it already holds."
GrowingJsonFile = Annotated[Path | None, Option("--json", callback=_writable, help=GROWING)]
Model = Annotated[
    str | None,
    Option(help="testbed, smollm2, a hub name (google/gemma-2-2b) or a local Hugging Face folder. [default: testbed]"),
]
Layer = Annotated[int | None, Option(help="Layer of the residual stream, from 0. [default: the middle layer]")]
Hook = Annotated[str | None, Option(help="Train on the activations at this transformer_lens hook instead.")]
TEXTS = "a .txt, .jsonl, .json, .csv, .tsv or .parquet file, an .npy file of token ids, or a dataset's name or folder"
Data = Annotated[
    str | None, Option(help=f"Text to train on: {TEXTS}. [default: the embedded language, for testbed only]")
]
Field = Annotated[str | None, Option(help="Field with the text, nested as in a.b. [default: text, tokens, input_ids]")]
Split = Annotated[str | None, Option(help="Split of the dataset in --data. [default: train]")]
Subset = Annotated[str | None, Option(help="Subset (configuration) of that dataset. [default: the only one]")]
Latents = Annotated[int | None, Option(help="F, the number of latents. [default: 2304]")]
Resume = Annotated[bool, Option("--resume", help="Continue the stopped run in --out, with its own settings.")]
Plugin = Annotated[
    list[str] | None,
    Option(
        "--plugin",
        metavar="FILE|MODULE",
        callback=_imported,
        help="Python file or module that defines parts. It is executed. Repeatable.",
    ),
]
FOLDERS = (
    "A run folder, a checkpoint, a folder or weights file of SAELens, dictionary_learning, sparsify, Gemma Scope or "
    "Llamascopium, or one on the hub: OWNER/REPOSITORY/FOLDER."
)


def merge(settings: dict[str, Any], options_by_section: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings with the options that were given on top. Options that are None were not given."""
    from ..engine.config import section

    merged = dict(settings)
    for name, options in options_by_section.items():
        merged[name] = section(settings, name) | {key: value for key, value in options.items() if value is not None}
    return merged


def check_backend() -> None:
    """Raise UserError if TEMPOSAE_BACKEND names a backend that does not exist or cannot run here."""
    from ..kernels.backend import why

    try:
        why()
    except ValueError as error:
        raise UserError(str(error)) from None
