"""What the evals share: texts run through the model once, their activations with rows and positions, and their codes.

An autoencoder is a dictionary, or what stands beside one as a control: anything with `encode_sparse`, `decode` and `W_dec`.
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
from .row_budget import Sizes

CHUNK = 4096  # tokens that are encoded at once
CODES = 2**25  # dense activations of latents that are held at once while tokens are encoded
LABELLED = HELD_OUT + 1_000_000  # evals with labels read documents from this one on; `core` reads those before


Shared = TypeVar("Shared")


class Autoencoder(Protocol):
    """Latents of activations x [n, D] at pos [n], and back. W_dec [F, D]: what each latent adds to the activation."""

    @property
    def W_dec(self) -> Tensor: ...
    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode: ...
    def decode(self, f: SparseCode) -> Tensor: ...


class Neurons:
    """Control `lm_neurons`: the model's own D activations as latents, of each token the k largest in absolute value."""

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu"):
        self.W_dec, self.k = torch.eye(d, device=device), min(k, d)

    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode:
        indices = x.abs().topk(self.k, dim=1).indices
        return SparseCode(x.gather(1, indices), indices.int(), x.shape[1])

    def decode(self, f: SparseCode) -> Tensor:
        return f.to_dense()


class Mean:
    """Control `mean`: one latent, which is on at every token and stands for the mean activation [D]."""

    def __init__(self, mean: Tensor):
        self.W_dec = mean[None]

    def encode_sparse(self, x: Tensor, pos: Tensor) -> SparseCode:
        return SparseCode(x.new_ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32, device=x.device), 1)

    def decode(self, f: SparseCode) -> Tensor:
        return self.W_dec.to(f.values.device).expand(f.n_tokens, -1)


@dataclass
class TextActivations:
    """R rows of text, and what the model has at the hook on the n of their tokens that are kept, row after row.

    `tokens` and `kept` [R, T]; `x` float32 [n, D]; `pos` and `row` int64 [n]: place in the row, and which of the R it is.
    `labels`: name -> int16 [R, T], -1 where it does not apply, of the embedded language. `source`: whole rows of which
    these are some tokens, and which of theirs, bool.
    """

    tokens: Tensor
    kept: Tensor
    x: Tensor
    pos: Tensor
    row: Tensor
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    source: "tuple[TextActivations, Tensor] | None" = None
    _codes: dict[int, tuple[Autoencoder, SparseCode]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mean(self) -> Tensor:
        """[D], of all kept tokens."""
        return self.x.double().mean(0).float()

    def label(self, name: str) -> Tensor:
        """A label of each kept token, int64 [n]."""
        return torch.from_numpy(self.labels[name]).long()[self.kept.cpu()]

    def of_rows(self, name: str) -> Tensor:
        """A label that a row has one value of, int64 [R]: the largest of its tokens'."""
        return torch.from_numpy(self.labels[name]).long().amax(1)

    def code(self, autoencoder: Autoencoder) -> SparseCode:
        """An autoencoder's code of all n tokens, ragged, worked out once."""
        if id(autoencoder) not in self._codes:
            if self.source is not None and getattr(autoencoder, "looks_along_rows", False):
                whole, chosen = self.source
                code = of_tokens(whole.code(autoencoder), chosen)
            else:
                chunks = in_rows(self.pos, self.x, self.pos, latents=len(autoencoder.W_dec))
                code = joined([autoencoder.encode_sparse(x, pos) for x, pos in chunks])
            self._codes[id(autoencoder)] = autoencoder, code
        return self._codes[id(autoencoder)][1]

    def only(self, inside: Tensor) -> "TextActivations":
        """Those of the tokens that are `inside`, bool [R, T]. A dictionary that looks along rows still sees the others."""
        chosen = inside[self.kept].to(self.x.device)
        return TextActivations(
            self.tokens, inside & self.kept, self.x[chosen], self.pos[chosen], self.row[chosen], source=(self, chosen)
        )

    def forget(self) -> None:
        """Let go of all codes."""
        self._codes.clear()

    def pooled(self, autoencoder: Autoencoder | None) -> Tensor:
        """Each latent's mean over the kept tokens of a row, float32 [R, F]; without an autoencoder, the activations' [R, D].

        Latents are summed some rows at a time, since the code of all tokens may be hundreds of times as large.
        """
        counts = torch.bincount(self.row, minlength=len(self)).clamp_min(1)[:, None]
        if autoencoder is None:
            return sum_by(self.row, self.x, len(self)) / counts
        F = len(autoencoder.W_dec)
        sums = self.x.new_zeros(len(self), F)
        for row, code in self._codes_by_rows(autoencoder):
            first, n = int(row[0]), int(row[-1]) - int(row[0]) + 1
            where = (row[code.rows] - first) * F + code.indices
            sums[first : first + n] = sum_by(where, code.values, n * F).view(n, F)
        return sums / counts

    def _codes_by_rows(self, autoencoder: Autoencoder) -> Iterator[tuple[Tensor, SparseCode]]:
        """The row of each token [n], and these tokens' code, ragged; of all tokens at once where that is at hand."""
        if id(autoencoder) in self._codes or (
            self.source is not None and getattr(autoencoder, "looks_along_rows", False)
        ):
            yield self.row, self.code(autoencoder)
            return
        for x, pos, row in in_rows(self.pos, self.x, self.pos, self.row, latents=len(autoencoder.W_dec)):
            if len(row):
                yield row, joined([autoencoder.encode_sparse(x, pos)])


def in_rows(pos: Tensor, *tensors: Tensor, latents: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of tokens [n, ...] at pos [n], rows one after the other, in chunks of whole rows, since a dictionary may look
    along the row: of about `CHUNK` tokens, fewer where they have so many `latents` that their code needs room."""
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
    """Run the model over rows of text and keep what is at the stream's hook, of the tokens that training takes."""
    batches = []
    with progress_bar("collecting activations", total=total, unit="rows") as bar:
        for rows in texts:
            batches.append(_read(stream, rows))
            bar.advance(len(rows))
    if not any(len(x) for _, _, x in batches):
        raise UserError("data: no text holds a token to evaluate on")
    return _concatenated(batches)


def collected_rows(stream: ActivationStream, rows: TokenRows) -> TextActivations:
    """The same of a few rows, which may hold no token that is kept."""
    return _concatenated([_read(stream, rows)])


def _read(stream: ActivationStream, rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and kept [B, T], and x [n, D] of what is kept."""
    read, kept = stream.read(rows)
    return rows.tokens, kept.cpu(), next(iter(read.values()))[kept].float()


def _concatenated(batches: list[tuple[Tensor, Tensor, Tensor]]) -> TextActivations:
    tokens, kept, x = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    row, pos = kept.nonzero(as_tuple=True)
    return TextActivations(tokens, kept, x, pos.to(x.device), row.to(x.device))


def padded(ids: Sequence[Sequence[int]], stream: ActivationStream) -> Iterator[TokenRows]:
    """Token ids of texts as rows, which are padded behind to the longest text, `rows_per_forward` at a time."""
    length = torch.tensor([len(text_ids) for text_ids in ids])
    tokens = torch.full((len(ids), int(length.max())), getattr(stream.model.tokenizer, "pad_token_id", None) or 0)
    for row, text_ids in zip(tokens, ids, strict=True):
        row[: len(text_ids)] = torch.tensor(text_ids, dtype=torch.long)
    number, size = torch.arange(len(ids)), stream.config.rows_per_forward
    document = torch.where(torch.arange(tokens.shape[1]) < length[:, None], number[:, None], -1)
    return (
        TokenRows(*batch) for batch in zip(*(t.split(size) for t in (tokens, length, document, number)), strict=True)
    )


def joined(codes: list[SparseCode]) -> SparseCode:
    """Codes of one dictionary on tokens one after the other, as one ragged code of their entries above or below zero."""
    counts, values, indices = [], [], []
    for code in codes:
        used = (code.live(code.values) != 0).flatten()
        counts.append(torch.bincount(code.rows.flatten()[used], minlength=code.n_tokens))
        values.append(code.values.flatten()[used])
        indices.append(code.indices.flatten()[used])
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return SparseCode(torch.cat(values), torch.cat(indices), codes[0].n_latents, offsets)


def of_tokens(code: SparseCode, chosen: Tensor) -> SparseCode:
    """A ragged code of the tokens that are `chosen`, bool [n]."""
    assert code.offsets is not None
    counts = code.offsets.diff()[chosen]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = chosen[code.rows]
    return SparseCode(code.values[entries], code.indices[entries], code.n_latents, offsets)


def fitted(name: str, dictionary: Dictionary, stream: ActivationStream) -> UnitDecoder:
    """A dictionary as evals take it: on the model's device, with decoder rows of norm 1.

    Raises UserError for one that is not for the stream's activations.
    """
    cfg, model = dictionary.cfg, stream.model
    dims = (cfg.d_in,) if cfg.d_out is None else (cfg.d_in, cfg.d_out)
    if dims != tuple(model.widths.values()):
        widths = " and ".join(f"{hook} has width {width}" for hook, width in model.widths.items())
        raise UserError(f"{name}: d_in = {' and d_out = '.join(map(str, dims))} does not fit; {widths} in {model.name}")
    cfg.mask.check_context(stream.positions)
    return unit_decoder(dictionary).to(model.device)


class Evaluation:
    """A dictionary, its controls, and the texts that they are measured on. Dictionaries are read with decoder rows of norm 1
    (`UnitDecoder`).

    `controls` are `random` (the control trained beside the dictionary), `lm_neurons` and `mean`. Whatever is drawn at random
    follows from `seed` and from what it is drawn for, never from what was evaluated before. `sets` are labelled texts for
    sparse probing, `files` by name what unlearning and order probing read (`suite.FILES`). `share`: evals look at one in so
    many of the rows that they look at otherwise, and `sizes` says how many those are at most. `reference`: a dictionary with
    which `positions` compares. With `neurons` False, `lm_neurons` is left out, which says nothing of a dictionary that
    another one has not said.
    """

    def __init__(
        self,
        stream: ActivationStream,
        sae: Dictionary,
        random: Dictionary | None,
        seed: int = 0,
        sets: Sequence[str] = (),
        files: Mapping[str, Sequence[str]] | None = None,
        *,
        share: int = 1,
        reference: Dictionary | None = None,
        neurons: bool = True,
        sizes: Sizes | None = None,
    ):
        self.stream, self.seed, self.sets = stream, seed, tuple(sets)
        self.files, self.share, self.neurons = files or {}, share, neurons
        device = stream.model.device
        self.sae = unit_decoder(sae).to(device)
        self.random = None if random is None else unit_decoder(random).to(device)
        self.reference = None if reference is None else unit_decoder(reference).to(device)
        self.sizes = sizes or Sizes()
        self._shared: dict[str, Any] = {}

    def of(
        self,
        sae: Dictionary,
        random: Dictionary | None,
        reference: Dictionary | None = None,
        sizes: Sizes | None = None,
    ) -> "Evaluation":
        """The same texts, questions and seed for another dictionary; codes of this one are forgotten."""
        evaluation = Evaluation(
            self.stream, sae, random, self.seed, self.sets, self.files,
            share=self.share, reference=reference, neurons=self.neurons, sizes=sizes or self.sizes,
        )  # fmt: skip
        evaluation._shared = self._shared
        for shared in evaluation._shared.values():
            if isinstance(shared, TextActivations):
                shared.forget()
        return evaluation

    def once(self, name: str, make: Callable[[], Shared]) -> Shared:
        """What `make` gives, made once for all dictionaries that are measured on these texts."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def rows(self, rows: int) -> int:
        """How many rows to look at in place of `rows`: no more than `sizes` allows, and one in `share` of those."""
        most = rows if self.sizes.other_rows is None else min(rows, self.sizes.other_rows)
        return max(1, most // self.share)

    @property
    def is_testbed(self) -> bool:
        """Whether the text is the embedded language, of which every token's labels are known."""
        return isinstance(self.stream.text, TestbedRows)

    def generator(self, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose, the same whenever they are asked for."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def labelled(self, rows: int) -> TextActivations:
        """Held-out documents of the embedded language with their labels, always the first `rows`, or this evaluation's
        `share` of them; collected once.

        Raises UserError for another text.
        """
        rows = self.rows(rows)
        if not isinstance(self.stream.text, TestbedRows):
            raise UserError(f"data: {self.stream.text.name} has no labels; this is measured on the embedded language")
        text, size = self.stream.text, self.stream.config.rows_per_forward

        def make() -> TextActivations:
            texts = (text.documents(LABELLED + start, min(size, rows - start)) for start in range(0, rows, size))
            collected = collect(self.stream, texts, rows)
            labels = text.language.labels(LABELLED, rows)
            collected.labels = {name: values[:, : collected.tokens.shape[1]] for name, values in labels.items()}
            return collected

        return self.once(f"labelled {rows}", make)

    def autoencoders(self, collected: TextActivations, *, mean: bool = True) -> dict[str, Autoencoder]:
        """The dictionary, as `sae`, and its controls, by name; `mean`, which is on everywhere and tells nothing apart, only
        where asked for."""
        autoencoders: dict[str, Autoencoder] = {"sae": self.sae}
        if self.random is not None:
            autoencoders["random"] = self.random
        if self.neurons:
            autoencoders["lm_neurons"] = Neurons(collected.x.shape[1], self.sae.cfg.k, collected.x.device)
        return autoencoders | ({"mean": Mean(collected.mean)} if mean else {})
