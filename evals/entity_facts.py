"""Prompts about attributes of entities, for RAVEL: facts of the embedded language, or a JSON file.

    {"entities": {"Paris": {"country": "France", "continent": "Europe"}, "Lima": {...}, ...},
     "templates": {"country": ["%s is a city in the country of", ...], "continent": [...]}}

A file has one kind of entity. Each template has one %s for the entity and ends before the value. An entity needs the value
of at least one attribute. RAVEL's own files for a kind of entity, `..._entity_attributes.json` and
`..._attribute_to_prompts.json`, are the two objects.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.storage.path_names import expand_path
from ..engine.stream import ActivationStream
from ..engine.testbed.language import PAD, Language

NO_FACTS = "has no facts about entities; give --file ravel=PATH, a JSON file of entities and templates"


@dataclass(frozen=True)
class Prompts:
    """P prompts: `tokens` [P, T] padded at the end, `length` [P], and the position `place` [P] at which the entity's
    activation is exchanged. `answer` [P] is the first token of the value, and `attribute` [P] the number of its name in
    `names`, as (kind of entity, attribute)."""

    tokens: Tensor
    length: Tensor
    place: Tensor
    answer: Tensor
    attribute: Tensor
    names: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def only(self, numbers: Tensor) -> "Prompts":
        """Select prompts by number or by bool [P]."""
        columns = ("tokens", "length", "place", "answer", "attribute")
        return replace(self, **{name: getattr(self, name)[numbers] for name in columns})

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[list[int], int, int, tuple[str, str]]],
        pad: int,
        names: tuple[tuple[str, str], ...],
    ) -> "Prompts":
        """From token ids, place, answer and name of each."""
        longest = max((len(ids) for ids, *_ in prompts), default=0)
        tokens = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids, *_ in prompts], dtype=torch.int64)
        columns = [(len(ids), place, answer, names.index(name)) for ids, place, answer, name in prompts]
        length, place, answer, attribute = torch.tensor(columns, dtype=torch.int64).view(-1, 4).unbind(1)
        return cls(tokens.view(len(prompts), longest), length, place, answer, attribute, names)


def language_prompts(language: Language, start: int) -> Prompts:
    """Every fact of the embedded language in both phrasings. The place is the last token: its model reads the entity in
    layer 0, so exchanging activations of the entity's own token after any layer changes no answer."""
    prompts = []
    for words, fact in language.fact_prompts(start):
        ids = [language.token_id[word] for word in words]
        prompts.append((ids, len(ids) - 1, language.token_id[fact.object], (fact.domain, fact.relation)))
    return Prompts.of(prompts, PAD, tuple(dict.fromkeys(name for *_, name in prompts)))


def file_prompts(paths: Sequence[str], stream: ActivationStream) -> Prompts:
    """Every template with every entity of the files. The place is the entity's last token.

    Prompts longer than the model's context are left out, and those whose entity has no token of its own. Raises UserError
    for a file in another format.
    """
    prompts, names = [], []
    for path in paths:
        kind = Path(path).stem
        entities, templates = _read(path)
        names += [(kind, attribute) for attribute in templates]
        for entity, values in entities.items():
            for attribute in values.keys() & templates.keys():
                for template in templates[attribute]:
                    before, _, after = template.partition("%s")
                    found = _tokens(stream, before + entity, after, values[attribute])
                    if found is not None:
                        prompts.append((*found, (kind, attribute)))
    order = {name: i for i, name in enumerate(names)}
    prompts.sort(key=lambda prompt: (order[prompt[3]], prompt[0]))  # sets of strings have no order of their own
    return Prompts.of(prompts, getattr(stream.model.tokenizer, "pad_token_id", None) or 0, tuple(names))


def _tokens(stream: ActivationStream, before: str, after: str, value: str) -> tuple[list[int], int, int] | None:
    """Token ids of a prompt, the place of the entity's last token, and the first token of the value."""
    tokenizer = stream.model.tokenizer
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and stream.config.bos is not False else []

    def ids(text: str) -> list[int]:
        return bos + tokenizer(text, add_special_tokens=False)["input_ids"]

    entity, prompt, whole = ids(before), ids(before + after), ids(f"{(before + after).rstrip()} {value.strip()}")
    fits = len(whole) <= stream.model.context and len(whole) > len(prompt) > len(bos)
    if not fits or prompt[: len(entity)] != entity or whole[: len(prompt)] != prompt:
        return None
    return prompt, len(entity) - 1, whole[len(prompt)]


def _read(path: str) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    file, form = expand_path(path, "file"), 'an object with "entities" and "templates" (docs/evals.md)'
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"ravel: {path} can't be read ({error.strerror}); give a JSON file, {form}") from None
    except ValueError as error:
        raise UserError(f"ravel: {path} is not JSON ({error}); it must be {form}") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), dict) for key in ("entities", "templates")
    ):
        raise UserError(f"ravel: {path} is not allowed; it must be {form}")
    for problem in _problems(content["entities"], content["templates"]):
        raise UserError(f"ravel: {path}: {problem}")
    return content["entities"], content["templates"]


def _problems(entities: Mapping[str, Any], templates: Mapping[str, Any]) -> Iterator[str]:
    if len(templates) < 2:
        yield "templates: at least two attributes are needed, one to change and one to keep"
    for attribute, texts in templates.items():
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) and t.count("%s") == 1 for t in texts)
        ):
            yield f"templates: {attribute!r} is not allowed; it must be a list of texts with one %s each"
    for entity, values in entities.items():
        if not isinstance(values, dict) or not all(isinstance(v, str) and v.strip() for v in values.values()):
            yield f"entities: {entity!r} is not allowed; it must be an object of attributes and their values as texts"
        elif not values.keys() & templates.keys():
            yield f"entities: {entity!r} has no attribute with a template"
