"""Sweeps: one file of settings made into many dictionaries for one stream."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .config import Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig, section
from .errors import UserError, near, shown
from .registry import reads
from .storage.path_names import ALLOWED, check_distinct, folder_name
from .stream import LanguageModel
from .stream.arrays import open_file, settle
from .stream.cache import read_manifest
from .stream.documents import check_data

#: settings of `train` that are one for all dictionaries of a stream
_COMMON = ("batch", "checkpoint_every_steps", "log")
MOST = 1000  # dictionaries of a stream
_UNKNOWN = 2**20  # a width that is not known yet, with which all goes that goes with some width
#: where a setting that may differ between the dictionaries of a stream belongs
_PLACES = (
    {name: ("sae", name) for name in SAEConfig.model_fields if name != "mask"}
    | {name: ("train", name) for name in TrainConfig.model_fields if name not in _COMMON}
    | {f"mask.{name}": ("sae", "mask", name) for name in MaskConfig.model_fields}
    | {key: ("stream", key) for key in ("hook", "layer", "target", "second")}
)


def expand(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each dictionary by name, {stream, sae, train}, from those of a file.

    `sweep: {k: [16, 32], lr: [1e-4, 3e-4]}` stands for every combination of its lists. `dictionaries: [{k: 16}, {k: 32,
    layer: 2, name: deep}]` lists them one by one; with both, each of the list is taken in every combination. What may differ
    are the settings of sae and train (but batch, checkpoint_every_steps and log), `mask.*`, `layer` or `hook`, and `target`.
    Names follow from what differs (`k16_lr0.0003`), unless given. Without either section there is one dictionary, "".
    """
    common = {key: value for key, value in settings.items() if key not in ("sweep", "dictionaries")}
    lists, entries = section(settings, "sweep"), settings.get("dictionaries")
    entries = [{}] if entries is None else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"dictionaries: {shown(entries)} is not allowed; it must be a list of sections of settings")
    for key, values in lists.items():
        _setting_path("sweep", key)
        if not isinstance(values, list) or not values:
            shown_values = shown(values)
            raise UserError(
                f"sweep.{key}: {shown_values} is not allowed; it must be a list of values, such as [{shown_values}]"
            )
    if (count := len(entries) * math.prod(map(len, lists.values()))) > MOST:
        raise UserError(f"sweep: {count:,} dictionaries are not allowed; a stream has at most {MOST:,}")
    expanded: dict[str, dict[str, Any]] = {}
    for entry in entries:
        entry_settings = {key: value for key, value in entry.items() if key != "name"}
        for key in entry_settings:
            _setting_path("dictionaries", key)
        for values in itertools.product(*lists.values()):
            combination = dict(zip(lists, values, strict=True))
            if repeated := entry_settings.keys() & combination.keys():
                raise UserError(
                    f"dictionaries: {min(repeated)} is not allowed there and in sweep; give it in one of the two"
                )
            labels = (
                [_entry_name(entry["name"])]
                if "name" in entry
                else [_label("dictionaries", *setting) for setting in entry_settings.items()]
            )
            name = "_".join([*labels, *(_label("sweep", *setting) for setting in combination.items())])
            if name in expanded:
                raise UserError(f"dictionaries: {shown(name)} comes twice; give names that differ")
            expanded[name] = _merged(common, entry_settings | combination)
    _check_names(expanded)
    return expanded


def _check_names(names: Iterable[str]) -> None:
    """Names of dictionaries become folders. A single one without a name has the run's."""
    if list(names) == [""]:
        return
    try:
        for name in names:
            folder_name(name)
        check_distinct(names)
    except ValueError as error:
        raise UserError(f"dictionaries.{error}") from None


def _entry_name(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"dictionaries.name: {shown(name)} is not allowed; {ALLOWED}")
    return name if isinstance(name, str) else shown(name)


def _setting_path(section: str, key: str) -> tuple[str, ...]:
    if key not in _PLACES:
        if key in _COMMON:
            raise UserError(f"{section}.{key}: not allowed; it must be one for all dictionaries of a stream")
        raise UserError(f"{section}.{key}: no setting that may differ between dictionaries; {near(str(key), _PLACES)}")
    return _PLACES[key]


def _label(section_name: str, key: str, value: Any) -> str:
    """What a setting adds to the name of a dictionary that has none of its own."""
    short_key = key.rpartition(".")[2]
    if isinstance(value, bool):
        return short_key if value else f"no-{short_key}"
    text = "-".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else shown(value)
    try:
        folder_name(f"x{text}" if text else "")
    except ValueError:
        raise UserError(
            f"{section_name}.{key}: {shown(value)} is not allowed; the folder's name is made of it, and it must do for that "
            "(else list dictionaries, each with a name)"
        ) from None
    return text if isinstance(value, str) else f"{short_key}{text}"


def _merged(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`common` with the chosen settings put in their places; the sections on the way are copies."""
    merged = dict(common)
    for key, value in changes.items():
        *sections, last_key = _setting_path("dictionaries", key)
        subsection = merged
        for name in sections:
            subsection[name] = dict(section(subsection, name))
            subsection = subsection[name]
        subsection[last_key] = value
        if key in ("hook", "layer"):  # one replaces the other
            subsection.pop("layer" if key == "hook" else "hook", None)
    return merged


def read_streams(settings: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, StreamConfig], dict[str, int | None]]:
    """The stream's settings for each dictionary, and its layer, where one is given."""
    streams: dict[str, StreamConfig] = {}
    layers: dict[str, int | None] = {}
    for name, dictionary_settings in settings.items():
        with _name_in_errors(name):
            stream = section(dictionary_settings, "stream")
            layers[name] = Layer(layer=stream.get("layer")).layer
            streams[name] = StreamConfig(**{key: value for key, value in stream.items() if key != "layer"})
            if layers[name] is not None and streams[name].hook is not None:
                raise UserError("stream.hook: give a hook or a layer, not both")
    return streams, layers


def resolve(settings: Mapping[str, Mapping[str, Any]]) -> tuple[LanguageModel | None, dict[str, RunConfig]]:
    """The language model and the settings of each dictionary, those of `expand` with what the model's width and layers
    decide. All that can be refused without the model is refused before it is loaded; with a cache, which knows them too, no
    model is."""
    streams, layers = read_streams(settings)
    _without_widths(settings, streams)
    first_stream = next(iter(streams.values()))
    if first_stream.activations is not None:
        source = open_file(first_stream.activations)
        settled_streams = {}
        for name, stream in streams.items():
            with _name_in_errors(name):
                if layers[name] is not None:
                    raise UserError(f"layer: {layers[name]} is not allowed with activations, which have no model")
                settled_streams[name] = settle(stream, source)
        return None, _resolved(settings, settled_streams, source.widths)
    if first_stream.cache is not None:
        manifest = read_manifest(first_stream.cache)
        settled_streams = {}
        for name, stream in streams.items():
            with _name_in_errors(name):
                settled_streams[name] = manifest.settle(stream, layers[name])
        return None, _resolved(settings, settled_streams, manifest.hooks)
    if first_stream.data is not None:
        check_data(first_stream.data)
    model = LanguageModel(first_stream.model, attention=first_stream.attention, compile=first_stream.compile)
    hooks: dict[str, tuple[str, ...]] = {}
    for name, stream in streams.items():
        with _name_in_errors(name):
            hook_name = model.place(stream.hook, layers[name])
            stream_settings: dict[str, Any] = stream.model_dump(exclude_unset=True) | {"hook": hook_name}
            if stream.second is None and "second" in reads(section(settings[name], "sae")):
                stream_settings["second"] = _neighbour_hook(hook_name)
            streams[name] = stream = StreamConfig(**stream_settings)
            other_hooks = {key: hook for key in ("target", "second") if (hook := getattr(stream, key)) is not None}
            hooks[name] = (hook_name, *(model.place(hook, field=f"stream.{key}") for key, hook in other_hooks.items()))
    model.use(hooks=[hook for dictionary_hooks in hooks.values() for hook in dictionary_hooks])
    at_hooks = {name: stream.model_copy(update={"hook": hooks[name][0]}) for name, stream in streams.items()}
    return model, _resolved(settings, at_hooks, model.widths)


def resolve_without_model(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of each dictionary with all defaults that follow from the settings alone, or from the cache or the array
    that they name. What a model decides is left out unless it is given: sae.d_in, d_sae and d_out, and how many rows go
    through it at once. Raises UserError for what `resolve` refuses before it loads the model."""
    streams, layers = read_streams(settings)
    first_stream = next(iter(streams.values()))
    if first_stream.activations is not None or first_stream.cache is not None:
        return {name: run.model_dump(mode="json") for name, run in resolve(settings)[1].items()}
    resolved: dict[str, dict[str, Any]] = {}
    for name, run in _without_widths(settings, streams).items():
        sections = resolved[name] = run.model_dump(mode="json")
        if layers[name] is not None:
            sections["stream"]["layer"] = layers[name]
        for section_name, keys in {"stream": ("rows_per_forward",), "sae": ("d_in", "d_sae", "d_out")}.items():
            for key in set(keys) - section(settings[name], section_name).keys():
                del sections[section_name][key]
    return resolved


def _without_widths(
    settings: Mapping[str, Mapping[str, Any]], streams: Mapping[str, StreamConfig]
) -> dict[str, RunConfig]:
    """The settings of each dictionary, at hooks of a width with which all goes that goes with some width."""
    configs = {}
    for name, dictionary_settings in settings.items():
        with _name_in_errors(name):
            unknown = [_UNKNOWN] * (1 if streams[name].target is None else 2)
            configs[name] = _run_config(dictionary_settings, streams[name], *unknown)
    return configs


def _resolved(
    settings: Mapping[str, Mapping[str, Any]], streams: Mapping[str, StreamConfig], widths: Mapping[str, int]
) -> dict[str, RunConfig]:
    """The settings of each dictionary, at hooks whose widths are known."""
    configs = {}
    for name, dictionary_settings in settings.items():
        with _name_in_errors(name):
            configs[name] = _run_config(
                dictionary_settings, streams[name], *(widths[hook] for hook in streams[name].hooks)
            )
    return configs


def _run_config(settings: Mapping[str, Any], stream: StreamConfig, d_in: int, d_out: int | None = None) -> RunConfig:
    """A dictionary has 8 times as many latents as the model's width, unless its settings say how many."""
    sections = {key: value for key, value in settings.items() if key not in ("stream", "sae")}
    sae_settings = dict(section(settings, "sae"))
    if isinstance(mask := sae_settings.get("mask", {}), dict):
        sae_settings["mask"] = {"positions": stream.context, **mask}  # as long as the rows, unless it says otherwise
    # before the width is known, so many that every k fits
    defaults: dict[str, Any] = {"d_in": d_in, "d_sae": 2**30 if d_in == _UNKNOWN else 8 * d_in, "d_out": d_out}
    return RunConfig(stream=stream, sae=SAEConfig(**(defaults | sae_settings)), **sections)


def _neighbour_hook(hook: str) -> str:
    """The same hook a layer before, or of the first layer, one after."""
    match = re.fullmatch(r"(\D*)(\d+)(\..*)", hook)
    if match is None:
        raise UserError(f"stream.second: needed; {hook} names no layer, so that another hook must be given")
    layer = int(match[2])
    return f"{match[1]}{layer - 1 if layer else 1}{match[3]}"


@contextmanager
def _name_in_errors(name: str) -> Iterator[None]:
    """A mistake in one of several dictionaries begins with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
