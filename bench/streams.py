"""What a stream costs beside its language model: harvesting, the ring buffer, and training 1, 8 and 32 dictionaries."""

import tempfile
import time
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
from ..engine.errors import UserError
from ..engine.learner import Learner
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream, LanguageModel, TokenRows
from ..engine.stream.model_loading import load
from ..engine.stream.model_source import ModelSource, is_text
from ..engine.stream.token_rows import RowSource, TestbedRows, TextRows
from ..kernels.torch_modes import default_modes
from .results import about, markdown
from .timing import synchronise

DICTIONARIES = (1, 8, 32)
GEMMA = "gemma-2-2b-shaped"  # random weights, made here


class Sizes(NamedTuple):
    """Language model and layer (None: the middle one), dictionaries of F latents that keep K, `batch` tokens a step; rows of
    `context` tokens, `rows` of them a forward pass; tokens in the buffer; and how often everything takes its turn (training
    at most three times)."""

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
    """The sizes of a preset, with another model at its middle layer where one is given."""
    if preset not in PRESETS:
        raise UserError(f"preset: {preset!r} is not allowed; there are {', '.join(PRESETS)}")
    preset_sizes = PRESETS[preset]
    return preset_sizes if model is None else preset_sizes._replace(model=model, layer=None)


@default_modes()
def measure(bench_sizes: Sizes, *, device: str) -> dict[str, Any]:
    """Time everything in turns. What is compared stands side by side in a round, and the median over rounds counts.

        harvest_ratio    time of the bare model loop / time of `ModelSource.next` on the same rows
        buffer_overhead  time of `stream.next` / time of `ModelSource.next`, both for a row of text, - 1
        end_to_end       by number of dictionaries: time of `ModelSource.next` / time of training, both for a row of text
        batch_over_sum   the same: time of training / (`ModelSource.next` for as many rows + as many steps alone)

    The bare loop is a plain transformers model with one hook, which ends the pass there, and with the stream's kind of
    attention. Its rows are made beforehand; harvesting makes its own. Returns what the bench's JSON holds, the first three
    at the top as well.

    Raises UserError for a model that can't be loaded or that transformers doesn't have by itself.
    """
    tune_host()
    turns = 3 * (bench_sizes.rounds + len(DICTIONARIES) * _few(bench_sizes.rounds))
    with folder_of(bench_sizes.model, device) as name, progress_bar("streams", total=turns, unit="turns") as bar:
        figures = _measured(bench_sizes._replace(model=name), device, bar)
    ratios = {key: figures[key] for key in ("harvest_ratio", "buffer_overhead", "end_to_end")}
    return about(device) | {"streams": {"model": bench_sizes.model} | figures} | ratios


def _measured(bench_sizes: Sizes, device: str, bar: ProgressBar) -> dict[str, Any]:
    model = LanguageModel(bench_sizes.model, layer=bench_sizes.layer, device=device)
    bench_sizes = bench_sizes._replace(context=min(bench_sizes.context, model.context))
    bare = BareModel(bench_sizes.model, model)
    config = StreamConfig(
        model=bench_sizes.model,
        hook=model.hook,
        context=bench_sizes.context,
        rows_per_forward=bench_sizes.rows,
        buffer_tokens=bench_sizes.buffer,
    )
    stream = ActivationStream(config, model=model, rows=text_of(bench_sizes.context, model))
    source_rows, bare_rows = (text_of(bench_sizes.context, model) for _ in range(2))
    source = ModelSource(model, source_rows, bench_sizes.context, bench_sizes.rows)
    bare.check(model, text_of(bench_sizes.context, model).next(bench_sizes.rows))
    batches = max(1, bench_sizes.buffer // 2 // bench_sizes.batch)  # of one permutation

    def harvest() -> int:
        return sum(len(source.next() or ()) for _ in range(passes))

    def serve() -> int:
        return sum(len(stream.next(bench_sizes.batch)) for _ in range(batches))

    rows = stream.counts["rows"]
    serve()  # fills the buffer
    rows = stream.counts["rows"]
    serve()
    passes = max(1, round((stream.counts["rows"] - rows) / bench_sizes.rows))
    harvest()
    _skip(bare_rows, passes * bench_sizes.rows, bench_sizes.rows)
    bare.read(bare_rows.next(bench_sizes.rows).tokens)
    source.next()

    tokens: list[int] = []
    times: dict[str, list[float]] = {"bare": [], "harvest": [], "stream": []}  # seconds a row
    for round_index in range(bench_sizes.rounds):
        token_batches = [bare_rows.next(bench_sizes.rows).tokens for _ in range(passes)]
        calls: dict[str, Callable[[], Any]] = {
            "bare": lambda token_batches=token_batches: [bare.read(token_batch) for token_batch in token_batches],
            "harvest": lambda: tokens.append(harvest()),
            "stream": serve,
        }
        for name in _order(calls, round_index):
            times[name].append(_timed(calls[name], stream if name == "stream" else passes * bench_sizes.rows, device))
            bar.advance(1)
    tokens_per_row = sum(tokens) / len(tokens) / passes / bench_sizes.rows
    figures: dict[str, Any] = {
        "harvest_ratio": _ratio(times["bare"], times["harvest"]),
        "buffer_overhead": _ratio(times["stream"], times["harvest"]) - 1,
        "end_to_end": {},
        "batch_over_sum": {},
        "tokens_per_s": {name: tokens_per_row / median(values) for name, values in times.items()},
        "step_ms": {},
    }
    for count in DICTIONARIES:
        cohorts = _dictionaries(count, bench_sizes, stream)
        batch = stream.next(bench_sizes.batch).clone()

        def train(cohorts: Any = cohorts) -> None:
            for _ in range(batches):
                fresh = stream.next(bench_sizes.batch)
                for cohort in cohorts:
                    cohort.step(fresh)

        def steps(cohorts: Any = cohorts, batch: Any = batch) -> None:
            for _ in range(batches):
                for cohort in cohorts:
                    cohort.step(batch)

        for cohort in cohorts:  # what is compiled or allocated once is done
            for _ in range(2):
                cohort.step(batch)
        calls = {"train": train, "steps": steps, "harvest": harvest}
        ratios, sums, step_times, train_times = [], [], [], []
        for round_index in range(_few(bench_sizes.rounds)):
            took: dict[str, float] = {}
            rows_read = 0
            for name in _order(calls, round_index):
                rows = stream.counts["rows"]
                took[name] = _timed(calls[name], None, device)
                rows_read = max(rows_read, stream.counts["rows"] - rows)
                bar.advance(1)
            model_alone = took["harvest"] * rows_read / (passes * bench_sizes.rows)
            ratios.append(model_alone / took["train"])
            sums.append(took["train"] / (model_alone + took["steps"]))
            step_times.append(1e3 * took["steps"] / batches)
            train_times.append(batches * bench_sizes.batch / took["train"])
        figures["end_to_end"][str(count)] = median(ratios)
        figures["batch_over_sum"][str(count)] = median(sums)
        figures["step_ms"][str(count)] = median(step_times)
        figures["tokens_per_s"][f"train {count}"] = median(train_times)
    settings = bench_sizes._asdict() | {"hook": model.hook, "attention": model.attention, "reader": model.reader}
    settings |= {"D": model.d_model, "passes": passes, "batches": batches}
    return {key: value for key, value in settings.items() if key != "model"} | figures


def table(result: dict[str, Any]) -> str:
    """Markdown: what was measured on what, a line for each ratio."""
    s = result["streams"]
    lines = [("", "ratio", "tokens/s")]
    rate = {name: f"{value:,.0f}" for name, value in s["tokens_per_s"].items()}
    lines += [
        ("bare model loop", "1", rate["bare"]),
        ("harvest / bare", f"{s['harvest_ratio']:.3f}", rate["harvest"]),
        ("buffer, extra time / harvest", f"{s['buffer_overhead']:.3f}", rate["stream"]),
    ]
    lines += [
        (f"training {count} / harvest", f"{value:.3f}", rate[f"train {count}"])
        for count, value in s["end_to_end"].items()
    ]
    lines += [
        (f"a batch for {count} / (model + steps alone)", f"{value:.3f}", "")
        for count, value in s["batch_over_sum"].items()
    ]
    sizes = ", ".join(f"{name} = {s[name]}" for name in ("D", "F", "K", "batch", "context"))
    return "\n".join([f"{result['device']}; {s['hook']} of {s['model']}; {sizes}", "", *markdown(lines)]) + "\n"


class BareModel:
    """A plain transformers model with a hook at one layer that ends the pass: the least that harvesting could take."""

    class _Stop(Exception):
        pass

    def __init__(self, name: str, like: LanguageModel):
        plain: Any = load(name, like.dtype)[1]
        layer = like.hook.removeprefix("blocks.").removesuffix(".hook_resid_post")
        if plain is None or not layer.isdecimal():
            raise UserError(f"model: {name} is not allowed; transformers doesn't have {like.hook} by itself")
        self.device, self.model = like.device, plain.to(like.device)
        self.model.set_attn_implementation(like.attention)
        stacks = (m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == like.n_layers)
        next(stacks)[int(layer)].register_forward_hook(self._catch)
        self.value = torch.empty(0)

    def _catch(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output
        raise self._Stop

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """The residual stream [B, T, D] after the layer."""
        with suppress(self._Stop):
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        return self.value

    def check(self, model: LanguageModel, rows: TokenRows) -> None:
        """That both give the same. Raises RuntimeError if not: then they can't be compared."""
        is_token = is_text(rows).to(self.device)
        ours, theirs = model.activations(rows.tokens)[is_token].float(), self.read(rows.tokens)[is_token].float()
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < 2e-2:
            raise RuntimeError(f"the bare loop's activations differ from the stream's by {error:.1%}")


class RandomDocuments:
    """Endless documents of random token ids, `length` in each."""

    name = "random tokens"

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def read(self, start: int = 0) -> Iterator[np.ndarray]:
        while True:
            yield np.random.default_rng(start).integers(3, self.vocabulary, self.length)
            start += 1


def text_of(context: int, model: LanguageModel) -> RowSource:
    """Rows for a model: the embedded language for its own, random tokens for others."""
    if model.name == "testbed":
        return TestbedRows(context)
    return TextRows(RandomDocuments(model.vocabulary, context), model.tokenizer, context, vocabulary=model.vocabulary)


def _few(rounds: int) -> int:
    return min(3, rounds)


def _skip(text: RowSource, rows: int, at_once: int) -> None:
    for _ in range(0, rows, at_once):
        text.next(at_once)


def _order(calls: dict[str, Any], round_index: int) -> list[str]:
    """Nobody always comes first."""
    names = list(calls)
    round_index %= len(names)
    return names[round_index:] + names[:round_index]


def _timed(call: Callable[[], Any], rows: int | ActivationStream | None, device: str) -> float:
    """Seconds of a call, for each of `rows`, or of those that the stream reads in it. By a clock: on a GPU the stream has a
    queue of its own."""
    before = rows.counts["rows"] if isinstance(rows, ActivationStream) else 0
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    seconds = time.perf_counter() - began
    if isinstance(rows, ActivationStream):
        rows = max(1, rows.counts["rows"] - before)
    return seconds / (rows or 1)


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    """Of what stood side by side in each round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def _dictionaries(count: int, bench_sizes: Sizes, stream: ActivationStream) -> list[Cohort]:
    x = stream.sample().x
    mean, norm = x.float().mean(0), float(x.float().norm(dim=1).mean())
    config = SAEConfig(d_in=stream.d_in, d_sae=bench_sizes.F, k=bench_sizes.K)
    learners = []
    for seed in range(count):
        settings = TrainConfig(tokens=10**9, batch=bench_sizes.batch, control=False, seed=seed)
        sae = SparseAutoencoder(config, seed=seed).to(x.device)
        learners.append(Learner(sae, settings, mean, norm, stream.positions))
    return group_into_cohorts(learners)


@contextmanager
def folder_of(model: str, device: str) -> Iterator[str]:
    """The name by which a model is loaded; one of Gemma-2-2B's shape is made first, on a GPU, and given as a folder."""
    if model != GEMMA:
        yield model
        return
    if torch.device(device).type != "cuda":
        raise UserError(f"model: {GEMMA} is not allowed on {device}; it is made where there is a GPU")
    with tempfile.TemporaryDirectory() as folder:
        gemma(Path(folder), device)
        yield folder


def gemma(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16, **changes: int) -> None:
    """Put a model of Gemma-2-2B's shape (with `changes`) and random weights into a folder, and a tokenizer for it."""
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
