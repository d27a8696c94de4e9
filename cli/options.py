"""What several commands share: options, settings from a file and from options, the backend."""

from pathlib import Path
from typing import Annotated, Any

import typer

PLAIN: dict[str, Any] = {
    "no_args_is_help": True, "add_completion": False, "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}  # fmt: skip

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Model = Annotated[
    str | None,
    typer.Option(help="testbed, smollm2, a hub name (google/gemma-2-2b) or a local Hugging Face folder. [testbed]"),
]
Layer = Annotated[int | None, typer.Option(help="Train on the residual stream after this layer. [the middle one]")]
Hook = Annotated[str | None, typer.Option(help="Train at this transformer_lens hook instead.")]
TEXTS = "a .txt, .jsonl, .json, .csv, .tsv or .parquet file, an .npy file of token ids, or a dataset's name or folder"
Data = Annotated[
    str | None,
    typer.Option(help=f"Text to train on: {TEXTS}. [the embedded language, for testbed]"),
]
Field = Annotated[
    str | None,
    typer.Option(help="Field with the text; a path with dots leads into structs. [text, tokens or input_ids]"),
]
Split = Annotated[str | None, typer.Option(help="Split of the dataset in --data. [train]")]
Subset = Annotated[str | None, typer.Option(help="Subset (configuration) of the dataset in --data. [the only one]")]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE|MODULE",
        help="Python file or module with parts of your own; its code runs. May be repeated.",
    ),
]
FOLDERS = (
    "A run folder, a checkpoint, a folder of SAELens, dictionary_learning, sparsify, Gemma Scope or Llamascopium (or the "
    "file of weights in it), or one on the hub: OWNER/REPOSITORY/FOLDER."
)


def merge(settings: dict[str, Any], options_by_section: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings of a file, with the options that were given on top."""
    from ..engine.config import section

    merged = dict(settings)
    for name, options in options_by_section.items():
        merged[name] = section(settings, name) | {key: value for key, value in options.items() if value is not None}
    return merged


def check_backend() -> None:
    """A wrong TEMPOSAE_BACKEND, or one that can't run here, is said before anything is loaded."""
    from ..engine.errors import UserError
    from ..kernels.backend import why

    try:
        why()
    except ValueError as error:
        raise UserError(str(error)) from None
