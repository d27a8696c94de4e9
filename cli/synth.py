"""`temposae synth`: train on a synthetic world, whose features are known, and score against them."""

from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from ..engine.errors import check_known
from ..engine.storage.files import write_json
from .arguments import App
from .options import PLAIN, GrowingJsonFile, JsonFile, Plugin, Resume, check_backend, merge
from .train import settings_to_resume, start

synth_app = App(**(PLAIN | {"no_args_is_help": False}), invoke_without_command=True)
Preset = Annotated[
    str, Option(help="small (1,024 features, minutes on a CPU) or synthsaebench (the published world and recipe).")
]


@synth_app.callback()
def synth(
    context: Context,
    preset: Preset = "small",
    config: Annotated[
        Path | None,
        Option(help="YAML file as for `temposae train`, over the preset; the world's settings are in stream.world."),
    ] = None,
    activation: Annotated[str | None, Option(help="topk, batchtopk, relu or jumprelu. [default: batchtopk]")] = None,
    d_sae: Annotated[int | None, Option(help="F, the number of latents. [default: the preset's]")] = None,
    k: Annotated[int | None, Option(help="Latents kept per token. [default: the preset's]")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate. [default: the preset's]")] = None,
    tokens: Annotated[int | None, Option(help="Samples to train on. [default: the preset's]")] = None,
    seed: Annotated[int | None, Option(help="Seed of weights and samples. [default: 0]")] = None,
    out: Annotated[Path | None, Option(help="Run folder to create. [default: runs/world-DATE-TIME]")] = None,
    resume: Resume = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Train on a world of known features and score against them.

    Trains a dictionary and its random control and prints how well both recover the world's features: F1, MCC, uniqueness
    and R2 as SynthSAEBench defines them, and the share of recovered features of each kind.
    """
    if context.invoked_subcommand is not None:
        return
    from ..engine.config import read_yaml
    from ..engine.ranks import Ranks
    from ..engine.sweep import expand
    from ..engine.synthetic.presets import preset as settings_by_name

    check_backend()
    chosen = settings_by_name(preset)
    options: dict[str, dict[str, Any]] = {
        "sae": {"activation": activation, "d_sae": d_sae, "k": k},
        "train": {"lr": lr, "tokens": tokens, "seed": seed},
    }
    if resume:
        settings = settings_to_resume(out, config, options)
    else:
        settings = expand(merge(_over(chosen, read_yaml(config) if config else {}), options))
    start(settings, out, resume, Ranks.start(), json_file)


@synth_app.command()
def bench(
    preset: Preset = "small",
    seeds: Annotated[int, Option(min=1, max=1000, help="Number of seeds, from 0.")] = 3,
    kind: Annotated[
        list[str] | None, Option(help="batchtopk, matryoshka, jumprelu, relu, topk. Repeatable. [default: all]")
    ] = None,
    library: Annotated[list[str] | None, Option(help="temposae or sae_lens. Repeatable. [default: both]")] = None,
    tokens: Annotated[
        int | None, Option(min=1, max=10**12, help="Samples per dictionary. [default: the preset's]")
    ] = None,
    json_file: GrowingJsonFile = None,
) -> None:
    """Train every kind of dictionary beside SAELens and score them.

    Prints F1, MCC, uniqueness, R2, dead latents and seconds, beside the random control and the published table. The preset
    small takes about 20 minutes on 2 cores with SAELens and synthsaebench about a day of a GPU, by estimate.
    """
    check_backend()
    from ..bench import synthetic as suite

    for name in library or ():
        check_known("library", name, suite.LIBRARIES)
    results = suite.measure(
        preset,
        suite.cells(preset, seeds, kind, tokens),
        libraries=library or suite.LIBRARIES,
        done=suite.read(json_file, preset),
        keep=lambda results: write_json(json_file, results),
    )
    write_json(json_file, results)
    print(suite.table(results), end="")


@synth_app.command()
def positions(
    seeds: Annotated[int, Option(min=1, max=1000, help="Number of seeds, from 0.")] = 3,
    kind: Annotated[
        list[str] | None,
        Option(
            help="range_adapters, one_adapter, ranges, soft, cold_soft, position_embedding or random, beside plain. "
            "Repeatable. [default: all]"
        ),
    ] = None,
    tokens: Annotated[int | None, Option(min=1, max=10**12, help="Samples per dictionary. [default: 100000]")] = None,
    json_file: GrowingJsonFile = None,
) -> None:
    """Train plain and position-aware dictionaries where positions matter and where they don't.

    In one world, nine in ten features fire in one of four intervals of positions only. The other has no positions. Prints
    the share of recovered features, F1, MCC and R2 over seeds, and differences from the plain dictionary. Takes about a
    minute of one CPU core.
    """
    check_backend()
    from ..bench import synthetic_positions as suite

    results = suite.measure(
        seeds, kind, tokens, done=suite.read(json_file), keep=lambda results: write_json(json_file, results)
    )
    write_json(json_file, results)
    print(suite.table(results), end="")


def _over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with `changes` on top, section by section."""
    merged = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _over(merged[name], value) if both else value
    return merged
