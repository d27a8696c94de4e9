"""Read settings from YAML files. Files that are too large, too deep or refer to themselves are refused while parsing.

The differences from YAML 1.1: `1e-4` is a number, numbers are decimal only (010 and 1:30 are text), keys are always
text and unique in their section, and tags are refused. Anchors, aliases and `<<` work.
"""

import re
from collections.abc import Hashable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import BaseResolver

from ..errors import UserError, in_one_line, shown

BYTES, DEPTH, NODES = 4 * 2**20, 32, 400_000  # limits of a file; NODES counts the contents of every alias
_NUMBER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)
_DIGITS = 4000  # longest integer; Python refuses 4300 digits


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file. Raises UserError with file and line if it is malformed or too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES + 1)  # bounded, because it may be /dev/zero
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"config: {path} can't be read: {getattr(error, 'strerror', error)}") from None
    if len(raw) > BYTES:
        raise UserError(f"config: {path} is too large; settings are at most {BYTES:,} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"config: {path} is not YAML: line {line} has a byte that is not UTF-8") from None
    try:
        settings = _built(path, text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"config: {path} is not YAML: line {line} has a character that is not allowed in text"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        reason = in_one_line(" ".join(sentence for sentence in (error.context, error.problem) if sentence))
        raise UserError(f"config: {path}{location} is not YAML: {reason}") from None
    if not isinstance(settings, dict):
        raise UserError(f"config: {path} must have sections (stream, sae, train, eval), not {type(settings).__name__}")
    return settings


def _built(path: Path, text: str) -> Any:
    """Build the values in a text. libyaml's parser is four times as fast. PyYAML's explains errors better."""
    with suppress(yaml.YAMLError):
        return _Builder(path, yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))).get_single_data()
    return _Builder(path, yaml.parse(text, yaml.SafeLoader)).get_single_data()


class _Builder(Composer, SafeConstructor, BaseResolver):
    """Builds values from events. Keys are text and unique in their section. Numbers match `_NUMBER`.

    Raises UserError where the file becomes too large or too deep. An alias counts as much as its anchor's contents.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "bool", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, path: Path, events: Iterator[yaml.Event]):
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        BaseResolver.__init__(self)
        self.path, self.events = path, events
        self.current: Any = next(events, None)
        self.depth = self.count = 0  # open collections, and nodes so far
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}  # nodes and levels of each complete node

    def peek_event(self) -> Any:
        return self.current

    def get_event(self) -> Any:
        event, self.current = self.current, next(self.events, None)
        return event

    def check_event(self, *kinds: type) -> bool:
        return self.current is not None and (not kinds or isinstance(self.current, kinds))

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.current
        is_alias, is_collection = isinstance(event, yaml.AliasEvent), isinstance(event, yaml.CollectionStartEvent)
        if not is_alias and event.tag not in (None, "!"):
            raise self._refused(f"the tag {shown(event.tag)[1:-1]} is not allowed; settings have none")
        if is_alias and event.anchor not in self.anchors:
            raise self._refused(f"*{event.anchor} names nothing; &{event.anchor} must come before it")
        if is_alias and self.anchors[event.anchor] not in self.sizes:
            raise self._refused(f"*{event.anchor} refers to itself; its anchor must end before it")
        earlier = self.count
        nodes, levels = self.sizes[self.anchors[event.anchor]] if is_alias else (1, 1 + is_collection)
        self.count += nodes
        if self.count > NODES:
            raise self._refused(f"it is too large; written out, settings have at most {NODES:,} values")
        if self.depth + levels > DEPTH + 1:
            raise self._refused(f"it is nested too deeply; settings have at most {DEPTH} levels")
        self.depth += is_collection
        node: Any = super().compose_node(parent, index)
        self.depth -= is_collection
        if not is_alias:
            inner = node.value if is_collection else ()
            inner = chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
            self.sizes[node] = self.count - earlier, 1 + max((self.sizes[child][1] for child in inner), default=0)
        return node

    def _refused(self, problem: str) -> UserError:
        mark = self.current.start_mark
        return UserError(f"config: {self.path}, line {mark.line + 1}, column {mark.column + 1}: {problem}")

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a setting's name must be plain text", key.start_mark)
            if key.value in names:
                reason = f"{shown(key.value)[1:-1]} comes twice in its section; it must be given once"
                raise yaml.MarkedYAMLError(None, None, reason, key.start_mark)
            names.add(key.value)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)  # merges <<
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_number(self, node: Any) -> Any:
        text = node.value.replace("_", "").lower()
        if not re.fullmatch(r"[-+]?[0-9]+", text):
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        digits = text.lstrip("+-")
        is_plain = len(digits) <= _DIGITS and (digits == "0" or digits[0] != "0")
        return int(text) if is_plain else node.value  # 010 may mean 8 or 10, so it stays text


_Builder.add_implicit_resolver("temposae:number", _NUMBER, list("-+0123456789."))
_Builder.yaml_constructors = SafeConstructor.yaml_constructors | {"temposae:number": _Builder.construct_number}
