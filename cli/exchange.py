"""`temposae convert` and `temposae upload`: dictionaries in other libraries' formats and on the hub."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from .options import FOLDERS, Plugin

if TYPE_CHECKING:
    from ..engine.storage.checkpoint import Checkpoint

LAYOUTS = "saelens, dictionary_learning, sparsify, gemma-scope or temposae"
Source = Annotated[Path, Argument(metavar="SRC", show_default=False, help=FOLDERS)]
Layout = Annotated[str, Option("--to", help=f"Format to write: {LAYOUTS}.")]
Which = Annotated[str, Option("--dictionary", help="Dictionary of the run: sae, or random for its random control.")]


def convert(
    source: Source,
    out: Annotated[Path, Argument(metavar="DST", show_default=False, help="Folder to create.")],
    to: Layout,
    which: Which = "sae",
    plugin: Plugin = None,
) -> None:
    """Write a dictionary in another library's format.

    Converting back gives the same weights, bit for bit. A dictionary that the library cannot represent, such as one with a
    mask over positions, is refused with the reason.
    """
    from ..engine.storage import checkpoint

    loaded = checkpoint.find(source)
    _write(loaded, which, out, to)
    sae = loaded.dictionary(which).cfg
    print(f"{out}: {sae.activation}, D = {sae.d_in}, F = {sae.d_sae}, in the format of {to}")
    if loaded.where.get("hook") is None:
        print(f"note: {source} does not say where it was trained, so neither does {out}", file=sys.stderr)


def upload(
    source: Source,
    name: Annotated[str, Argument(metavar="NAME", show_default=False, help="OWNER/REPOSITORY[/FOLDER] on the hub.")],
    to: Layout = "temposae",
    which: Which = "sae",
    private: Annotated[bool, Option("--private", help="Create a private repository.")] = False,
    plugin: Plugin = None,
) -> None:
    """Upload a dictionary to the Hugging Face hub with a model card.

    The card describes the dictionary and its training, with scores if `temposae eval core` has measured them.
    """
    from ..engine.interchange import hub
    from ..engine.storage import checkpoint
    from ..evals import result_files

    loaded = checkpoint.find(source)
    sae = loaded.dictionary(which).cfg
    scores = result_files.read(source, "core") if which == "sae" else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        _write(loaded, which, folder, to)
        print(hub.upload(folder, name, hub.card(name, to, sae, loaded.where, loaded.tokens, scores), private=private))


def _write(loaded: "Checkpoint", which: str, out: Path, to: str) -> None:
    from ..engine import interchange
    from ..engine.storage import checkpoint

    sae = loaded.dictionary(which)
    if to == "temposae":
        checkpoint.write(out, loaded.step, {"sae": (sae.cfg, sae.state_dict())}, loaded.run, massive=loaded.massive)
    else:
        interchange.write(sae, out, to, where=loaded.where, tokens=loaded.tokens)
