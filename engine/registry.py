"""Registry of parts by kind.

A package registers its parts with an entry point of the group `temposae.parts` that names their module. temposae's own
parts are registered in the same way:

    [project.entry-points."temposae.parts"]
    temposae = "temposae.variants"

These modules are imported when an unknown kind is first looked up. All other parts come from plugins (see `plugins`).
"""

from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from typing import Any, TypeVar

from .errors import UserError, near, shown
from .plugins import UnknownPart, source

OWN, GROUP = "temposae", "temposae.parts"  # entry point of temposae's own parts, and the group of all entry points
PartClass = type[Any]  # of parts.Part, whose module imports this one
P = TypeVar("P", bound=PartClass)
_PARTS: dict[str, PartClass] = {}
_ENTRY_POINTS: dict[str, str] = {}  # module -> the entry point that it belongs to


def part(kind: str) -> Callable[[P], P]:
    """Register a class of parts under a name, as a decorator. Raises UserError for the name of a part of temposae.

    @part("half")
    class Half(Part):
        def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
            return acts / 2
    """

    def registered(cls: P) -> P:
        previous = _PARTS.get(kind, cls)
        if previous.__module__ != cls.__module__ and (is_own(previous) or is_own(cls)):
            external = cls if is_own(previous) else previous
            name = f"{external.__module__}.{external.__name__}"
            raise UserError(f"sae.parts: {kind} is temposae's own; {name} needs another name")
        cls.kind = kind
        _PARTS[kind] = cls
        return cls

    return registered


def find(kind: str) -> PartClass:
    """Return the part of this kind. Raises UserError, with similar names, if there is none."""
    if not isinstance(kind, str):
        raise UserError(f"sae.parts.kind: {shown(kind)} is not allowed; it must be the name of a part")
    if kind not in _PARTS:
        installed()
    if kind in _PARTS:
        return _PARTS[kind]
    if OWN not in _ENTRY_POINTS.values():
        raise UserError(
            f"sae.parts: {shown(kind)} is not known; temposae's own parts are not registered, so install temposae again "
            "(pip install -e . in a checkout)"
        )
    raise UnknownPart(kind, near(kind, sorted(_PARTS)))


def installed() -> dict[str, PartClass]:
    """Import the parts of all installed packages and return all registered parts by kind."""
    for entry_point in _read_entry_points():
        known_kinds = set(_PARTS)
        entry_point.load()
        for kind in _PARTS.keys() - known_kinds:  # some are defined elsewhere in the package
            _ENTRY_POINTS.setdefault(_PARTS[kind].__module__, entry_point.name)
    return dict(_PARTS)


def is_own(cls: PartClass) -> bool:
    """Whether temposae's own entry point defines this part."""
    return _entry_point(cls) == OWN


def _read_entry_points() -> EntryPoints:
    points = entry_points(group=GROUP)
    _ENTRY_POINTS.update({entry_point.module: entry_point.name for entry_point in points})
    return points


def _entry_point(cls: PartClass) -> str | None:
    """Return the name of the entry point whose module or package defines a part. None for a plugin."""
    if not _ENTRY_POINTS:
        _read_entry_points()
    module = f"{cls.__module__}."
    return next((name for package, name in _ENTRY_POINTS.items() if module.startswith(f"{package}.")), None)


def plugins_of(sae: Any) -> tuple[str, ...]:
    """Return the plugins that define the parts of a dictionary's settings. Parts of installed packages need none."""
    plugin_parts = [cls for settings in sae.parts if _entry_point(cls := find(settings["kind"])) is None]
    return tuple(dict.fromkeys(plugin for cls in plugin_parts if (plugin := source(cls)) is not None))


def complete_settings(parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Fill in the defaults of parts' settings. Raises UserError for unknown parts and settings."""
    completed, kinds = [], set[str]()
    for part_settings in parts:
        if "kind" not in part_settings or not all(isinstance(key, str) for key in part_settings):
            raise UserError(f"sae.parts: {shown(part_settings)} is not allowed; it must be a section with a kind")
        cls = find(part_settings["kind"])
        if cls.kind in kinds:
            raise UserError(f"sae.parts: {cls.kind} is not allowed twice")
        kinds.add(cls.kind)
        completed.append(cls.Settings(**part_settings).model_dump())
    return tuple(completed)


def check(sae: Any) -> None:
    """Raise ValueError for parts that conflict with the dictionary's other settings."""
    for part_settings in sae.parts:
        cls = find(part_settings["kind"])
        try:
            if sae.d_sae < cls.least_latents:
                allowed = f"it must be at least {cls.least_latents}"
                raise ValueError(f"d_sae: {sae.d_sae} is not allowed with {cls.kind}; {allowed}")
            cls.check(cls.Settings(**part_settings), sae)
        except ValueError as error:
            is_part_setting = str(error).partition(":")[0] in cls.Settings.model_fields
            raise ValueError(f"parts.{cls.kind}.{error}" if is_part_setting else str(error)) from None


def reads(sae: Any) -> dict[str, str]:
    """Map each thing that the parts need besides x and pos (`Part.reads`) to the first part that needs it."""
    kind_by_need: dict[str, str] = {}
    parts = sae.get("parts") if isinstance(sae, dict) else sae.parts
    for part_settings in parts if isinstance(parts, list | tuple) else ():  # `complete_settings` refuses other types
        if isinstance(part_settings, dict) and isinstance(kind := part_settings.get("kind"), str):
            for need in find(kind).reads:
                kind_by_need.setdefault(need, kind)
    return kind_by_need
