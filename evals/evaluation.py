"""What the evals share: activations of texts with their rows and positions, and codes, each computed once.

An autoencoder is a dictionary or a control: anything with `encode_sparse`, `decode` and `W_dec`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.token_rows import TestbedRows
from ..engine.testbed.language import HELD_OUT
from ..engine.unit_decoder import Dictionary, UnitDecoder, unit_decoder
from ..kernels.code import SparseCode
from ..kernels.numerics import sum_by
from .held_out import SavedEffects
from .judge import Answers
from .kept_sets import KeptSets
from .row_budget import Sizes

CHUNK = 4096  # tokens encoded at once
CODES = 2**25  # latent activations in memory at once during encoding
PROTOCOLS = OWN, SAEBENCH = "temposae", "saebench"  # of the evals in `BY_PROTOCOL`
BY_PROTOCOL = ("mdl", "meta_structure", "tpp", "scr")
LABELLED = HELD_OUT + 1_000_000  # first document of evals with labels; `core` reads earlier ones


Shared = TypeVar("Shared")


def check_protocol(name: str) -> None:
    """Raise UserError for a name that is not in `PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name} is not allowed; it must be {' or '.join(PROTOCOLS)}")


class Autoencoder(Protocol):
    """Encodes activations x [n, D] at pos [n] into latents, and decodes them. W_dec [F, D]: the latents' directions."""

    @property
    def W_dec(self) -> Tensor: ...
    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode: ...
    def decode(self, f: SparseCode) -> Tensor: ...


class Neurons:
    """Control `lm_neurons`: the model's own D activations as latents, the k largest by absolute value per token."""

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu"):
        self.W_dec, self.k = torch.eye(d, device=device), min(k, d)

    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode:
        indices = x.abs().topk(self.k, dim=1).indices
        return SparseCode(x.gather(1, indices), indices.int(), x.shape[1])

    def decode(self, f: SparseCode) -> Tensor:
        return f.to_dense()


class Mean:
    """Control `mean`: one latent that is active at every token and decodes to the mean activation [D]."""

    def __init__(self, mean: Tensor):
        self.W_dec = mean[None]

    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode:
        return SparseCode(x.new_ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32, device=x.device), 1)

    def decode(self, f: SparseCode) -> Tensor:
        return self.W_dec.to(f.values.device).expand(f.n_tokens, -1)


@dataclass
class TextActivations:
    """R rows of text, and the model's activations at the hook on the n kept tokens, row after row.

    `tokens` and `kept` [R, T]; `x` float32 [n, D]; `pos` and `row` int64 [n], position in the row and number of the row.
    `labels`: labels of the embedded language by name, int16 [R, T], -1 where a label does not apply. `source`: the whole
    rows that these tokens were taken from, and bool [n of the source] that selects them.
    """

    tokens: Tensor
    kept: Tensor
    x: Tensor
    pos: Tensor
    row: Tensor
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    source: "tuple[TextActivations, Tensor] | None" = None
    _codes: dict[int, tuple[Autoencoder, SparseCode]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokens: Tensor, kept: Tensor, x: Tensor) -> "TextActivations":
        """From tokens and kept [R, T], and the activations x [n, D] of the kept tokens."""
        row, pos = kept.nonzero(as_tuple=True)
        return cls(tokens, kept, x, pos.to(x.device), row.to(x.device))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mean(self) -> Tensor:
        """Mean activation [D] of all kept tokens."""
        return (torch.stack([part.double().sum(0) for part in self.x.split(CHUNK)]).sum(0) / len(self.x)).float()

    def label(self, name: str) -> Tensor:
        """One label of each kept token, int64 [n]."""
        return torch.from_numpy(self.labels[name]).long()[self.kept.cpu()]

    def row_label(self, name: str) -> Tensor:
        """One label per row, int64 [R]: the maximum over its tokens."""
        return torch.from_numpy(self.labels[name]).long().amax(1)

    def code(self, autoencoder: Autoencoder) -> SparseCode:
        """The autoencoder's ragged code of all n tokens, computed once."""
        if id(autoencoder) not in self._codes:
            if (source := self._source_for(autoencoder)) is not None:
                code = of_tokens(source[0].code(autoencoder), source[1])
            else:
                chunks = in_rows(self.pos, self.x, self.pos, latents=len(autoencoder.W_dec))
                code = joined([autoencoder.encode_sparse(x, pos) for x, pos in chunks])
            self._codes[id(autoencoder)] = autoencoder, code
        return self._codes[id(autoencoder)][1]

    def only(self, inside: Tensor) -> "TextActivations":
        """Keep only the tokens `inside`, bool [R, T]. A dictionary that looks along rows still sees the others."""
        chosen = inside[self.kept].to(self.x.device)
        return TextActivations(
            self.tokens, inside & self.kept, self.x[chosen], self.pos[chosen], self.row[chosen], source=(self, chosen)
        )

    def forget(self) -> None:
        """Free all codes."""
        self._codes.clear()

    def pooled(self) -> Tensor:
        """Mean activation over the kept tokens of each row, float32 [R, D]."""
        return sum_by(self.row, self.x, len(self)) / torch.bincount(self.row, minlength=len(self)).clamp_min(1)[:, None]

    def _source_for(self, autoencoder: Autoencoder) -> "tuple[TextActivations, Tensor] | None":
        return self.source if getattr(autoencoder, "looks_along_rows", False) else None

    def codes_by_rows(self, autoencoder: Autoencoder) -> Iterator[tuple[Tensor, SparseCode]]:
        """Rows [n] and ragged code of tokens, a few rows at a time; all at once if the code is computed already."""
        if id(autoencoder) in self._codes or self._source_for(autoencoder) is not None:
            yield self.row, self.code(autoencoder)
            return
        for x, pos, row in in_rows(self.pos, self.x, self.pos, self.row, latents=len(autoencoder.W_dec)):
            if len(row):
                yield row, joined([autoencoder.encode_sparse(x, pos)])


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 per token, float64 [n], of x [n, D] and y [n, D] or [D], without a float64 copy of either."""
    starts = range(0, len(x), CHUNK)
    parts = [(x[i : i + CHUNK] - (y if y.ndim == 1 else y[i : i + CHUNK])).double().square().sum(1) for i in starts]
    return torch.cat(parts)


def chunks(x: Tensor, code: SparseCode) -> Iterator[tuple[Tensor, SparseCode]]:
    """Split activations [n, D] and their ragged code into parts of `CHUNK` tokens."""
    assert code.offsets is not None
    for start in range(0, len(x), CHUNK):
        offsets = code.offsets[start : start + CHUNK + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        part = SparseCode(code.values[entries], code.indices[entries], code.n_latents, offsets - offsets[0])
        yield x[start : start + CHUNK], part


def in_rows(pos: Tensor, *tensors: Tensor, latents: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of tokens [n, ...] at pos [n] into chunks of whole rows, because a dictionary may look along the row.
    A chunk has about `CHUNK` tokens, fewer if the dictionary has many `latents`."""
    chunk = min(CHUNK, CODES // max(1, latents))
    begins = torch.cat([pos.new_ones(1, dtype=torch.bool), pos.diff() <= 0]).nonzero().flatten().cpu()
    ends = torch.cat([begins[1:], torch.tensor([len(pos)])])
    sizes, first = [], 0
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if end - first > chunk and begin > first:
            sizes.append(begin - first)
            first = begin
    sizes.append(len(pos) - first)
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


@torch.no_grad()
def collect(stream: ActivationStream, texts: Iterable[TokenRows], total: int | None = None) -> TextActivations:
    """Run the model over rows of text; keep the activations at the stream's hook of tokens that training would use."""
    batches = []
    with progress_bar("collecting activations", total=total, unit="rows") as bar:
        for rows in texts:
            batches.append(collected_rows(stream, rows))
            bar.advance(len(rows))
    if not any(len(batch.x) for batch in batches):
        raise UserError("data: no text has a token to evaluate on")
    columns = ((batch.tokens, batch.kept, batch.x) for batch in batches)
    return TextActivations.of(*(torch.cat(tensors) for tensors in zip(*columns, strict=True)))


def collected_rows(stream: ActivationStream, rows: TokenRows) -> TextActivations:
    """Like `collect`, for a few rows, which may have no token that is kept."""
    read, kept = stream.read(rows)
    return TextActivations.of(rows.tokens, kept.cpu(), next(iter(read.values()))[kept].float())


def padded(ids: Sequence[Sequence[int]], stream: ActivationStream) -> Iterator[TokenRows]:
    """Token ids of texts as rows padded at the end to the longest text, `rows_per_forward` at a time."""
    length, pad = torch.tensor(list(map(len, ids))), getattr(stream.model.tokenizer, "pad_token_id", None) or 0
    texts = [torch.tensor(text_ids, dtype=torch.long) for text_ids in ids]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    number, size = torch.arange(len(ids)), stream.config.rows_per_forward
    document = torch.where(torch.arange(tokens.shape[1]) < length[:, None], number[:, None], -1)
    return (
        TokenRows(*batch) for batch in zip(*(t.split(size) for t in (tokens, length, document, number)), strict=True)
    )


def joined(codes: list[SparseCode]) -> SparseCode:
    """Concatenate codes of one dictionary along tokens, as one ragged code of their nonzero entries."""
    counts, values, indices = [], [], []
    for code in codes:
        used = (code.live(code.values) != 0).flatten()
        counts.append(torch.bincount(code.rows.flatten()[used], minlength=code.n_tokens))
        values.append(code.values.flatten()[used])
        indices.append(code.indices.flatten()[used])
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return SparseCode(torch.cat(values), torch.cat(indices), codes[0].n_latents, offsets)


def of_tokens(code: SparseCode, chosen: Tensor) -> SparseCode:
    """The part of a ragged code for the `chosen` tokens, bool [n]."""
    assert code.offsets is not None
    counts = code.offsets.diff()[chosen]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = chosen[code.rows]
    return SparseCode(code.values[entries], code.indices[entries], code.n_latents, offsets)


def fitted(name: str, dictionary: Dictionary, stream: ActivationStream) -> UnitDecoder:
    """Move a dictionary to the model's device and scale its decoder rows to norm 1, as the evals expect.

    Raises UserError if it doesn't fit the stream's activations.
    """
    cfg, model = dictionary.cfg, stream.model
    dims = (cfg.d_in,) if cfg.d_out is None else (cfg.d_in, cfg.d_out)
    if dims != tuple(model.widths.values()):
        widths = " and ".join(f"{hook} has width {width}" for hook, width in model.widths.items())
        raise UserError(f"{name}: d_in = {' and d_out = '.join(map(str, dims))} does not fit; {widths} in {model.name}")
    cfg.mask.check_context(stream.positions)
    return unit_decoder(dictionary).to(model.device)


@dataclass(frozen=True)
class Reference:
    """A dictionary to compare with, and one trained by the same recipe with another seed, if there is one."""

    dictionary: Dictionary
    same_recipe: Dictionary | None = None

    def fitted(self, stream: ActivationStream) -> tuple[UnitDecoder, UnitDecoder | None]:
        """Both as `fitted` returns them."""
        other = self.same_recipe
        return fitted("reference", self.dictionary, stream), None if other is None else fitted(
            "same_recipe", other, stream
        )


Controls = Dictionary | Mapping[str, Dictionary] | None


class Evaluation:
    """A dictionary, its controls, and the texts to measure them on. Decoder rows have norm 1 (`UnitDecoder`).

    Controls are those trained beside the dictionary, `lm_neurons` and `mean`. `controls` has the former by name, or is the
    random one alone. Random draws depend on `seed` and their purpose alone, never on what was evaluated before. `sets` are
    labelled texts for sparse probing, SCR and TPP, `files` (by name, see `suite.FILES`) the inputs of unlearning and order
    probing. Evals read at most the rows that `sizes` allows, divided by `share`. `positions` compares with `reference`.
    `neurons` False leaves out `lm_neurons`, which is the same for all dictionaries at a hook.
    """

    def __init__(
        self,
        stream: ActivationStream,
        sae: Dictionary,
        controls: Controls,
        seed: int = 0,
        sets: Sequence[str] = (),
        files: Mapping[str, Sequence[str]] | None = None,
        *,
        share: int = 1,
        reference: Reference | None = None,
        neurons: bool = True,
        sizes: Sizes | None = None,
    ):
        self.stream, self.seed, self.sets = stream, seed, tuple(sets)
        self.files, self.share, self.neurons = files or {}, share, neurons
        device = stream.model.device
        self.sae = unit_decoder(sae).to(device)
        if not isinstance(controls, Mapping):
            controls = {} if controls is None else {"random": controls}
        self.controls = {name: unit_decoder(control).to(device) for name, control in controls.items()}
        self.reference = reference
        self.sizes = sizes or Sizes()
        self._shared: dict[str, Any] = {}
        self.saved: SavedEffects | None = None  # where `core` continues
        self.kept_sets: KeptSets | None = None  # where `sae_probes` does
        self.answers: Answers | None = None  # of the judge that `autointerp` asks
        self.protocol = OWN  # one of `PROTOCOLS`

    @property
    def random(self) -> UnitDecoder | None:
        """The random control, if there is one."""
        return self.controls.get("random")

    def of(
        self, sae: Dictionary, controls: Controls, reference: Reference | None = None, sizes: Sizes | None = None
    ) -> "Evaluation":  # fmt: skip
        """An evaluation of another dictionary with the same texts, questions and seed; frees this one's codes."""
        evaluation = Evaluation(
            self.stream, sae, controls, self.seed, self.sets, self.files,
            share=self.share, reference=reference, neurons=self.neurons, sizes=sizes or self.sizes,
        )  # fmt: skip
        evaluation._shared, evaluation.protocol = self._shared, self.protocol
        for shared in evaluation._shared.values():
            if isinstance(shared, TextActivations):
                shared.forget()
        return evaluation

    def once(self, name: str, make: Callable[[], Shared]) -> Shared:
        """The result of `make`, computed once for all dictionaries measured on these texts."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def rows(self, rows: int) -> int:
        """`rows` limited by `sizes` and divided by `share`, at least 1."""
        most = rows if self.sizes.other_rows is None else min(rows, self.sizes.other_rows)
        return max(1, most // self.share)

    @property
    def is_testbed(self) -> bool:
        """Whether the text is the embedded language, whose tokens have known labels."""
        return isinstance(self.stream.text, TestbedRows)

    def generator(self, purpose: str) -> np.random.Generator:
        """Random generator for one purpose, always in the same initial state."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def labelled(self, rows: int) -> TextActivations:
        """The first `self.rows(rows)` held-out documents of the embedded language with their labels, collected once.

        Raises UserError for another text.
        """
        rows, text, size = self.rows(rows), self.stream.text, self.stream.config.rows_per_forward
        if not isinstance(text, TestbedRows):
            raise UserError(f"data: {text.name} has no labels; this eval needs the embedded language (model: testbed)")

        def make() -> TextActivations:
            texts = (text.documents(LABELLED + start, min(size, rows - start)) for start in range(0, rows, size))
            collected = collect(self.stream, texts, rows)
            labels = text.language.labels(LABELLED, rows)
            collected.labels = {name: values[:, : collected.tokens.shape[1]] for name, values in labels.items()}
            return collected

        return self.once(f"labelled {rows}", make)

    def autoencoders(self, collected: TextActivations, *, mean: bool = True) -> dict[str, Autoencoder]:
        """The dictionary (`sae`) and its controls by name; `mean`, which can't separate anything, is optional."""
        autoencoders: dict[str, Autoencoder] = {"sae": self.sae, **self.controls}
        if self.neurons:
            autoencoders["lm_neurons"] = Neurons(collected.x.shape[1], self.sae.cfg.k, collected.x.device)
        return autoencoders | ({"mean": Mean(collected.mean)} if mean else {})
