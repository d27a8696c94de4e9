"""Time a stream against its language model: harvesting, the ring buffer, and training 1, 8 and 32 dictionaries."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.cohort import Cohort, group_into_cohorts
from ..engine.config import SAEConfig, StreamConfig, TrainConfig
from ..engine.errors import UserError, check_known
from ..engine.learner import Learner
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream, Batch, LanguageModel, TokenRows
from ..engine.stream.model_loading import load
from ..engine.stream.model_source import ModelSource, is_text
from ..engine.stream.partial_model import AllHooksRead, HookValues
from ..engine.stream.token_rows import RowSource, TestbedRows, TextRows
from ..kernels.torch_modes import default_modes
from .results import about, markdown
from .timing import synchronise

DICTIONARIES = (1, 8, 32)
TRAINING_ROUNDS = 3  # at most
GEMMA = "gemma-2-2b-shaped"  # made here, with random weights


class Sizes(NamedTuple):
    """Language model and layer (None: the middle one), latents F and K of a dictionary, tokens per step and per row, rows in
    a forward pass, tokens in the buffer, and rounds."""

    model: str
    layer: int | None
    F: int
    K: int
    batch: int
    context: int
    rows: int
    buffer: int
    rounds: int


PRESETS = {
    "tiny": Sizes("testbed", None, 64, 4, 256, 64, 8, 2048, 2),
    "cpu": Sizes("testbed", None, 1024, 16, 1024, 128, 32, 16384, 45),
    "gpu": Sizes(GEMMA, 12, 16384, 64, 8192, 1024, 16, 262144, 7),
}


def sizes(preset: str, model: str | None = None) -> Sizes:
    """The sizes of a preset, optionally with another model at its middle layer."""
    check_known("preset", preset, PRESETS)
    preset_sizes = PRESETS[preset]
    return preset_sizes if model is None else preset_sizes._replace(model=model, layer=None)


@default_modes()
def measure(sizes: Sizes, *, device: str) -> dict[str, Any]:
    """Time all parts of a stream in turns. Ratios are taken within a round, and their medians over rounds are returned.

        harvest_ratio    time of the bare model loop / time of `ModelSource.next` on the same rows
        buffer_overhead  time of `stream.next` / time of `ModelSource.next`, both per row of text, - 1
        end_to_end       per number of dictionaries: time of `ModelSource.next` / time of training, both per row of text
        batch_over_sum   likewise: time of training / (`ModelSource.next` for as many rows + as many steps alone)

    The bare loop is a plain transformers model with the stream's kind of attention and one hook, which ends the pass. Its
    rows are made beforehand, while harvesting makes its own. Returns the contents of the bench's JSON file. The first three
    ratios are also at its top level.

    Raises UserError for a model that cannot be loaded or that transformers does not have.
    """
    tune_host()
    turns = 3 * (sizes.rounds + len(DICTIONARIES) * min(TRAINING_ROUNDS, sizes.rounds))
    with folder_of(sizes.model, device) as name, progress_bar("streams", total=turns, unit="turns") as bar:
        race = StreamRace(sizes._replace(model=name), device, bar)
        figures = race.reading()
        for count in DICTIONARIES:
            for key, value in race.training(count).items():
                figures[key][f"train {count}" if key == "tokens_per_s" else str(count)] = value
    ratios = {key: figures[key] for key in ("harvest_ratio", "buffer_overhead", "end_to_end")}
    return about(device) | {"streams": race.settings() | {"model": sizes.model} | figures} | ratios


class StreamRace:
    """A stream, its model source alone and a bare transformers loop, which take turns. Each turn reads as many rows."""

    def __init__(self, sizes: Sizes, device: str, bar: ProgressBar):
        self.device, self.bar = device, bar
        self.model = model = LanguageModel(sizes.model, layer=sizes.layer, device=device)
        self.sizes = sizes = sizes._replace(context=min(sizes.context, model.context))
        self.bare = BareModel(sizes.model, model)
        config = StreamConfig(
            model=sizes.model,
            hook=model.hook,
            context=sizes.context,
            rows_per_forward=sizes.rows,
            buffer_tokens=sizes.buffer,
        )
        stream_rows, source_rows, self.bare_rows, checked_rows = (text_of(sizes.context, model) for _ in range(4))
        self.stream = ActivationStream(config, model=model, rows=stream_rows)
        self.source = ModelSource(model, source_rows, sizes.context, sizes.rows)
        self.bare.check(model, checked_rows.next(sizes.rows))
        self.batches = max(1, sizes.buffer // 2 // sizes.batch)  # of one permutation of the buffer
        self.serve()  # fills the buffer
        rows = self.stream.counts["rows"]
        self.serve()
        self.passes = max(1, round((self.stream.counts["rows"] - rows) / sizes.rows))
        self.rows_per_turn = self.passes * sizes.rows
        self.harvest()
        for _ in range(self.passes):  # the same rows as harvesting from here on
            self.bare_rows.next(sizes.rows)
        self.bare.read(self.bare_rows.next(sizes.rows).tokens)
        self.source.next()

    def harvest(self) -> int:
        """Run the model source. Returns the number of tokens."""
        return sum(len(self.source.next() or ()) for _ in range(self.passes))

    def serve(self) -> None:
        """Take a permutation of the buffer from the stream."""
        for _ in range(self.batches):
            self.stream.next(self.sizes.batch)

    def reading(self) -> dict[str, Any]:
        """Time bare loop, harvesting and stream. The figures of training are still empty."""
        tokens: list[int] = []
        times: dict[str, list[float]] = {"bare": [], "harvest": [], "stream": []}  # seconds per row
        for round_index in range(self.sizes.rounds):
            token_batches = [self.bare_rows.next(self.sizes.rows).tokens for _ in range(self.passes)]
            calls: dict[str, Callable[[], Any]] = {
                "bare": lambda token_batches=token_batches: [self.bare.read(batch) for batch in token_batches],
                "harvest": lambda: tokens.append(self.harvest()),
                "stream": self.serve,
            }
            for name in _order(calls, round_index):
                seconds, stream_rows = self._turn(calls[name])
                times[name].append(seconds / (max(1, stream_rows) if name == "stream" else self.rows_per_turn))
        tokens_per_row = sum(tokens) / len(tokens) / self.passes / self.sizes.rows
        return {
            "harvest_ratio": _median_ratio(times["bare"], times["harvest"]),
            "buffer_overhead": _median_ratio(times["stream"], times["harvest"]) - 1,
            "end_to_end": {},
            "batch_over_sum": {},
            "tokens_per_s": {name: tokens_per_row / median(values) for name, values in times.items()},
            "step_ms": {},
        }

    def training(self, count: int) -> dict[str, float]:
        """Time training `count` dictionaries on the stream, their steps alone, and harvesting."""
        cohorts = self._cohorts(count)
        batch = self.stream.next(self.sizes.batch).clone()

        def step(batch: Batch) -> None:
            for cohort in cohorts:
                cohort.step(batch)

        for _ in range(2):  # the first steps compile and allocate
            step(batch)
        calls: dict[str, Callable[[], Any]] = {
            "train": lambda: [step(self.stream.next(self.sizes.batch)) for _ in range(self.batches)],
            "steps": lambda: [step(batch) for _ in range(self.batches)],
            "harvest": self.harvest,
        }
        figures = defaultdict[str, list[float]](list)
        for round_index in range(min(TRAINING_ROUNDS, self.sizes.rounds)):
            seconds: dict[str, float] = {}
            rows_read = 0
            for name in _order(calls, round_index):
                seconds[name], rows = self._turn(calls[name])
                rows_read = max(rows_read, rows)
            model_alone = seconds["harvest"] * rows_read / self.rows_per_turn
            figures["end_to_end"].append(model_alone / seconds["train"])
            figures["batch_over_sum"].append(seconds["train"] / (model_alone + seconds["steps"]))
            figures["step_ms"].append(1e3 * seconds["steps"] / self.batches)
            figures["tokens_per_s"].append(self.batches * self.sizes.batch / seconds["train"])
        return {key: median(values) for key, values in figures.items()}

    def settings(self) -> dict[str, Any]:
        model = {"hook": self.model.hook, "attention": self.model.attention, "reader": self.model.reader}
        return self.sizes._asdict() | model | {"D": self.model.d_model, "passes": self.passes, "batches": self.batches}

    def _turn(self, call: Callable[[], Any]) -> tuple[float, int]:
        """Seconds of a call, and the rows that the stream read in it. By a clock: on a GPU the stream has its own queue."""
        rows = self.stream.counts["rows"]
        synchronise(self.device)
        began = time.perf_counter()
        call()
        synchronise(self.device)
        seconds = time.perf_counter() - began
        self.bar.advance(1)
        return seconds, self.stream.counts["rows"] - rows

    def _cohorts(self, count: int) -> list[Cohort]:
        x = self.stream.sample().x
        mean, norm = x.float().mean(0), float(x.float().norm(dim=1).mean())
        config = SAEConfig(d_in=self.stream.d_in, d_sae=self.sizes.F, k=self.sizes.K)
        learners = []
        for seed in range(count):
            settings = TrainConfig(tokens=10**9, batch=self.sizes.batch, control=False, seed=seed)
            sae = SparseAutoencoder(config, seed=seed).to(x.device)
            learners.append(Learner(sae, settings, mean, norm, self.stream.positions))
        return group_into_cohorts(learners)


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown, one line per ratio."""
    figures = result["streams"]
    rates = {name: f"{value:,.0f}" for name, value in figures["tokens_per_s"].items()}
    lines = [
        ("", "ratio", "tokens/s"),
        ("bare model loop", "1", rates["bare"]),
        ("harvest / bare", f"{figures['harvest_ratio']:.3f}", rates["harvest"]),
        ("buffer, extra time / harvest", f"{figures['buffer_overhead']:.3f}", rates["stream"]),
    ]
    for count, ratio in figures["end_to_end"].items():
        lines.append((f"training {count} / harvest", f"{ratio:.3f}", rates[f"train {count}"]))
    for count, ratio in figures["batch_over_sum"].items():
        lines.append((f"a batch for {count} / (model + steps alone)", f"{ratio:.3f}", ""))
    sizes = ", ".join(f"{name} = {figures[name]}" for name in ("D", "F", "K", "batch", "context"))
    return "\n".join(
        [f"{result['device']}; {figures['hook']} of {figures['model']}; {sizes}", "", *markdown(lines), ""]
    )


class BareModel:
    """A plain transformers model whose hook at one layer ends the pass: the least work that harvesting can take."""

    def __init__(self, name: str, like: LanguageModel):
        plain: Any = load(name, like.dtype)[1]
        layer = like.hook.removeprefix("blocks.").removesuffix(".hook_resid_post")
        if plain is None or not layer.isdecimal():
            raise UserError(f"model: {name} is not allowed; transformers alone cannot read {like.hook}")
        self.device, self.model = like.device, plain.to(like.device)
        self.model.set_attn_implementation(like.attention)
        stacks = (m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == like.n_layers)
        self.output = HookValues([like.hook])
        catch = lambda _, args, output: self.output.put(like.hook, output[0] if isinstance(output, tuple) else output)
        next(stacks)[int(layer)].register_forward_hook(catch)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """The residual stream [B, T, D] after the layer."""
        with suppress(AllHooksRead):
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        (value,) = self.output.values.values()
        return value

    def check(self, model: LanguageModel, rows: TokenRows) -> None:
        """Raise RuntimeError unless this model and the stream's give the same activations."""
        is_token = is_text(rows).to(self.device)
        harvested, bare = model.activations(rows.tokens)[is_token].float(), self.read(rows.tokens)[is_token].float()
        error = float((harvested - bare).norm() / bare.norm())
        if not error < 2e-2:
            raise RuntimeError(f"the bare loop's activations differ from the stream's by {error:.1%}")


class RandomDocuments:
    """Endless documents of `length` random token ids."""

    name = "random tokens"

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def read(self, start: int = 0) -> Iterator[np.ndarray]:
        while True:
            yield np.random.default_rng(start).integers(3, self.vocabulary, self.length)
            start += 1


def text_of(context: int, model: LanguageModel) -> RowSource:
    """Rows for a model: the embedded language for testbed, random tokens for others."""
    if model.name == "testbed":
        return TestbedRows(context)
    return TextRows(RandomDocuments(model.vocabulary, context), model.tokenizer, context, vocabulary=model.vocabulary)


def _order(calls: dict[str, Any], round_index: int) -> list[str]:
    """The names of the calls, rotated so that each comes first in turn."""
    names = list(calls)
    first = round_index % len(names)
    return names[first:] + names[:first]


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


@contextmanager
def folder_of(model: str, device: str) -> Iterator[str]:
    """The name under which a model can be loaded. A model of Gemma-2-2B's shape is written to a temporary folder first."""
    if model != GEMMA:
        yield model
        return
    if torch.device(device).type != "cuda":
        raise UserError(f"model: {GEMMA} is not allowed on {device}; it needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        gemma(Path(folder), device)
        yield folder


def gemma(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16, **changes: int) -> None:
    """Write a model of Gemma-2-2B's shape (with `changes`), with random weights, and a tokenizer to a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

    shape: dict[str, Any] = {
        "num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256_000,
    }  # fmt: skip
    make: Any = Gemma2Config
    config = make(**(shape | changes))
    config.architectures = ["Gemma2ForCausalLM"]
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    vocabulary = dict.fromkeys([*special.values(), *(f"w{i}" for i in range(3, config.vocab_size))])
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
