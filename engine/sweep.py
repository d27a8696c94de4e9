"""Sweeps: expand one config file into the settings of several dictionaries on one stream."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from .config import Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig, section
from .errors import UserError, near, shown
from .registry import reads
from .storage.path_names import ALLOWED, check_distinct, folder_name
from .stream import LanguageModel
from .stream.cache import read_manifest
from .stream.documents import check_data
from .stream.without_model import open_own, settle

#: settings of `train` that all dictionaries of a stream share
_COMMON = ("batch", "checkpoint_every_steps", "log")
MOST = 1000  # dictionaries of a stream
_UNKNOWN = 2**20  # stands for a width that is not known yet, large enough for every setting
#: path in the file of each setting that may differ between the dictionaries of a stream
_PLACES = (
    {name: ("sae", name) for name in SAEConfig.model_fields if name != "mask"}
    | {name: ("train", name) for name in TrainConfig.model_fields if name not in _COMMON}
    | {f"mask.{name}": ("sae", "mask", name) for name in MaskConfig.model_fields}
    | {key: ("stream", key) for key in ("hook", "layer", "target", "second")}
)


def expand(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Expand the settings of a file into the sections {stream, sae, train, ...} of each dictionary, by name.

    `sweep: {k: [16, 32], lr: [1e-4, 3e-4]}` gives every combination of the lists. `dictionaries: [{k: 16}, {k: 32,
    layer: 2, name: deep}]` gives one dictionary per entry. With both, each entry is combined with each combination.
    Dictionaries may differ in the settings of sae and train (except batch, checkpoint_every_steps and log), in
    `mask.*`, and in `layer` or `hook`, `target` and `second`. Names are made from the differences (`k16_lr0.0003`)
    unless `name` is given. A file with neither section gives one dictionary, named "".
    """
    common = {key: value for key, value in settings.items() if key not in ("sweep", "dictionaries")}
    lists, entries = section(settings, "sweep"), settings.get("dictionaries")
    entries = [{}] if entries is None else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"dictionaries: {shown(entries)} is not allowed; it must be a list of sections of settings")
    for key, values in lists.items():
        _setting_path("sweep", key)
        if not isinstance(values, list) or not values:
            value = shown(values)
            raise UserError(f"sweep.{key}: {value} is not allowed; it must be a list of values, such as [{value}]")
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
                raise UserError(f"dictionaries: {min(repeated)} is also in sweep; give it in one of the two")
            if "name" in entry:
                labels = [_entry_name(entry["name"])]
            else:
                labels = [_label("dictionaries", *setting) for setting in entry_settings.items()]
            name = "_".join([*labels, *(_label("sweep", *setting) for setting in combination.items())])
            if name in expanded:
                raise UserError(f"dictionaries: {shown(name)} comes twice; give different names")
            expanded[name] = _merged(common, entry_settings | combination)
    try:
        for name in expanded if list(expanded) != [""] else ():  # a single unnamed dictionary uses the run's folder
            folder_name(name)
        check_distinct(expanded)
    except ValueError as error:
        raise UserError(f"dictionaries.{error}") from None
    return expanded


def as_file(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the sections of several dictionaries, by name, as one file that `expand` reads: shared settings in
    sections, and a list `dictionaries` with the name of each and the settings that differ.

    Raises UserError if settings differ that all dictionaries of a stream must share.
    """
    plugins = list(dict.fromkeys(plugin for run in runs.values() for plugin in run.get("plugins", ())))
    remainders: dict[str, dict[str, Any]] = {
        name: deepcopy(dict(run)) | {"plugins": plugins} for name, run in runs.items()
    }
    entries: dict[str, dict[str, Any]] = {name: {"name": name} for name in runs}
    for key, (*sections, setting) in _PLACES.items():
        holders = dict(remainders)
        for section_name in sections:
            holders = {name: holder[section_name] for name, holder in holders.items()}
        values = [(setting in holder, holder.get(setting)) for holder in holders.values()]
        if any(value != values[0] for value in values):
            for name, holder in holders.items():
                if setting in holder:
                    entries[name][key] = holder.pop(setting)
    for entry in entries.values():
        if "layer" in entry:
            entry.pop("hook", None)  # null there, and `expand` would take it in place of the layer
    shared, *others = remainders.values()
    for remainder in others:
        if section_name := next((key for key in shared | remainder if shared.get(key) != remainder.get(key)), None):
            raise UserError(
                f"dictionaries: {section_name} differs in settings that all dictionaries of a stream must share"
            )
    return shared | {"dictionaries": list(entries.values())}


def _entry_name(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"dictionaries.name: {shown(name)} is not allowed; {ALLOWED}")
    return name if isinstance(name, str) else shown(name)


def _setting_path(section: str, key: str) -> tuple[str, ...]:
    if key not in _PLACES:
        if key in _COMMON:
            raise UserError(f"{section}.{key}: not allowed; all dictionaries of a stream must share it")
        raise UserError(
            f"{section}.{key}: not a setting that may differ between dictionaries; {near(str(key), _PLACES)}"
        )
    return _PLACES[key]


def _label(section_name: str, key: str, value: Any) -> str:
    """Return what a setting contributes to the name of a dictionary that is not given one."""
    short_key = key.rpartition(".")[2]
    if isinstance(value, bool):
        return short_key if value else f"no-{short_key}"
    text = "-".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else shown(value)
    try:
        folder_name(f"x{text}" if text else "")
    except ValueError:
        raise UserError(
            f"{section_name}.{key}: {shown(value)} is not allowed; the folder's name is made from it, so it must be valid "
            "there (or list dictionaries, each with a name)"
        ) from None
    return text if isinstance(value, str) else f"{short_key}{text}"


def _merged(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `common` with the changed settings in their sections. The sections that change are copied."""
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
    """Return the stream's settings for each dictionary, and its layer if one is given."""
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
    """Complete the settings from `expand` with the model's width and layers. Returns the model, and settings by name.

    Mistakes that show without the model are refused before it is loaded. A cache, activations and a world need none.
    """
    streams, layers = read_streams(settings)
    _run_configs(settings, streams)
    first_stream = next(iter(streams.values()))
    source = open_own(first_stream)
    if source is not None:
        for name, stream in streams.items():
            with _name_in_errors(name):
                if layers[name] is not None:
                    raise UserError(f"layer: {layers[name]} is not allowed with {source.modelless}")
                streams[name] = settle(stream, source)
        return None, _run_configs(settings, streams, source.widths)
    if first_stream.cache is not None:
        manifest = read_manifest(first_stream.cache)
        for name, stream in streams.items():
            with _name_in_errors(name):
                streams[name] = manifest.settle(stream, layers[name])
        return None, _run_configs(settings, streams, manifest.hooks)
    if first_stream.data is not None:
        check_data(first_stream.data)
    model = LanguageModel(first_stream.model, attention=first_stream.attention, compile=first_stream.compile)
    hooks: list[str] = []
    for name, stream in streams.items():
        with _name_in_errors(name):
            hook_name = model.place(stream.hook, layers[name])
            stream_settings: dict[str, Any] = stream.model_dump(exclude_unset=True) | {"hook": hook_name}
            if stream.second is None and "second" in reads(section(settings[name], "sae")):
                stream_settings["second"] = _neighbour_hook(hook_name)
            streams[name] = stream = StreamConfig(**stream_settings)
            other_hooks = {key: hook for key in ("target", "second") if (hook := getattr(stream, key)) is not None}
            hooks += [hook_name, *(model.place(hook, field=f"stream.{key}") for key, hook in other_hooks.items())]
    model.use(hooks=hooks)
    return model, _run_configs(settings, streams, model.widths)


def resolve_without_model(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sections of each dictionary with the defaults that follow from the settings, a cache or an array.

    Settings that the model decides are left out unless given: sae.d_in, d_sae and d_out, and stream.rows_per_forward.
    Raises UserError for whatever `resolve` refuses before it loads the model.
    """
    streams, layers = read_streams(settings)
    first_stream = next(iter(streams.values()))
    if first_stream.world or first_stream.activations is not None or first_stream.cache is not None:
        return {name: run.model_dump(mode="json") for name, run in resolve(settings)[1].items()}
    resolved: dict[str, dict[str, Any]] = {}
    for name, run in _run_configs(settings, streams).items():
        sections = resolved[name] = run.model_dump(mode="json")
        if layers[name] is not None:
            sections["stream"]["layer"] = layers[name]
        for section_name, keys in {"stream": ("rows_per_forward",), "sae": ("d_in", "d_sae", "d_out")}.items():
            for key in set(keys) - section(settings[name], section_name).keys():
                del sections[section_name][key]
    return resolved


def _run_configs(
    settings: Mapping[str, Mapping[str, Any]],
    streams: Mapping[str, StreamConfig],
    widths: Mapping[str, int] | None = None,
) -> dict[str, RunConfig]:
    """Return the settings of each dictionary. Without `widths` [hook -> D] every width is `_UNKNOWN`."""
    configs = {}
    for name, dictionary_settings in settings.items():
        with _name_in_errors(name):
            stream = streams[name]
            hooks = [str(stream.hook)] if stream.target is None else [str(stream.hook), stream.target]
            d_in, *d_out = [_UNKNOWN if widths is None else widths[hook] for hook in hooks]
            sections = {key: value for key, value in dictionary_settings.items() if key not in ("stream", "sae")}
            sae_settings = dict(section(dictionary_settings, "sae"))
            if isinstance(mask := sae_settings.get("mask", {}), dict):
                sae_settings["mask"] = {"positions": stream.context, **mask}
            d_sae = 2**30 if widths is None else 8 * d_in  # without a width, large enough for every k
            defaults = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out[0] if d_out else None}
            configs[name] = RunConfig(stream=stream, sae=SAEConfig(**(defaults | sae_settings)), **sections)
    return configs


def _neighbour_hook(hook: str) -> str:
    """Return the same hook one layer earlier, or one layer later for the first layer."""
    match = re.fullmatch(r"(\D*)(\d+)(\..*)", hook)
    if match is None:
        raise UserError(f"stream.second: missing; {hook} names no layer, so another hook must be given")
    layer = int(match[2])
    return f"{match[1]}{layer - 1 if layer else 1}{match[3]}"


@contextmanager
def _name_in_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
