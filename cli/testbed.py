"""`temposae testbed`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from ..engine.storage.files import check_can_make, os_errors_named, write_json
from .arguments import App
from .options import PLAIN, JsonFile
from .output import figures

testbed_app = App(help="Train, measure and sample the embedded language model.", **PLAIN)


@testbed_app.command("train")
def train(
    out: Annotated[Path | None, Option(help="Folder for model and tokenizer. [default: the package's]")] = None,
    steps: Annotated[int, Option(min=1, max=10**7, help="Training steps, of 16 documents each.")] = 3000,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of the weights and the documents.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Train the embedded language model from random weights.

    Takes about 12 minutes on 2 cores, and uses a GPU if there is one.
    """
    from ..engine.stream.model_loading import TESTBED
    from ..engine.testbed.training import train as train_model

    with os_errors_named(f"--out: {out}", "give a folder to make"):
        check_can_make(out or TESTBED)
    quality = train_model(out or TESTBED, steps=steps, seed=seed)
    write_json(json_file, quality)
    figures(quality)


@testbed_app.command("quality")
def quality(json_file: JsonFile = None) -> None:
    """Measure the model: loss against entropy, facts, order, agreement."""
    from ..engine.stream.model import LanguageModel
    from ..engine.testbed.language import HELD_OUT, Language
    from ..engine.testbed.quality import measure

    quality = measure(LanguageModel("testbed").bridge, Language(), HELD_OUT)
    write_json(json_file, quality)
    figures(quality)


@testbed_app.command("sample")
def sample(
    count: Annotated[int, Option(min=1, max=10**6, help="Number of documents.")] = 3,
    start: Annotated[int, Option(min=0, max=2**40, help="Index of the first document.")] = 0,
    correlation: Annotated[float, Option(min=0, max=1, help="Correlation of topic and tone, from 0 to 1.")] = 0.5,
    json_file: JsonFile = None,
) -> None:
    """Print documents of the embedded language.

    --json also writes the labels of every token.
    """
    from ..engine.testbed.language import Language

    language = Language(correlation)
    documents = [language.document(start + i) for i in range(count)]
    for document in documents:
        print(document.text, end="\n\n")
    write_json(json_file, {"documents": [vars(document) | {"text": document.text} for document in documents]})
