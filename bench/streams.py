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

from ..engine.ambient import own_modes
from ..engine.config import SAEConfig, StreamConfig, TrainConfig
from ..engine.errors import UserError
from ..engine.host import tune_host
from ..engine.optim import Cohort, Learner, together
from ..engine.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream, LanguageModel, TokenRows
from ..engine.stream.live import Live, is_text
from ..engine.stream.loading import load
from ..engine.stream.text import RowSource, TestbedRows, TextRows
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
    found = PRESETS[preset]
    return found if model is None else found._replace(model=model, layer=None)


@own_modes()
def measure(given: Sizes, *, device: str) -> dict[str, Any]:
    """Time everything in turns. What is compared stands side by side in a round, and the median over rounds counts.

        harvest_ratio    time of the bare model loop / time of `Live.next` on the same rows
        buffer_overhead  time of `stream.next` / time of `Live.next`, both for a row of text, - 1
        end_to_end       by number of dictionaries: time of `Live.next` / time of training, both for a row of text
        batch_over_sum   the same: time of training / (time of `Live.next` for as many rows + time of as many steps alone)

    The bare loop is a plain transformers model with one hook, which ends the pass there, and with the stream's kind of
    attention. Its rows are made beforehand; harvesting makes its own. Returns what the bench's JSON holds, the first three
    at the top as well.

    Raises UserError for a model that can't be loaded or that transformers doesn't have by itself.
    """
    tune_host()
    turns = 3 * (given.rounds + len(DICTIONARIES) * _few(given.rounds))
    with folder_of(given.model, device) as name, progress_bar("streams", total=turns, unit="turns") as bar:
        found = _measured(given._replace(model=name), device, bar)
    ratios = {key: found[key] for key in ("harvest_ratio", "buffer_overhead", "end_to_end")}
    return about(device) | {"streams": {"model": given.model} | found} | ratios


def _measured(given: Sizes, device: str, bar: ProgressBar) -> dict[str, Any]:
    model = LanguageModel(given.model, layer=given.layer, device=device)
    given = given._replace(context=min(given.context, model.context))
    bare = Bare(given.model, model)
    config = StreamConfig(
        model=given.model,
        hook=model.hook,
        context=given.context,
        rows_per_forward=given.rows,
        buffer_tokens=given.buffer,
    )
    stream = ActivationStream(config, model=model, rows=text_of(given.context, model))
    live, again = (text_of(given.context, model) for _ in range(2))
    source = Live(model, live, given.context, given.rows)
    bare.check(model, text_of(given.context, model).next(given.rows))
    batches = max(1, given.buffer // 2 // given.batch)  # of one permutation

    def harvest() -> int:
        return sum(len(source.next() or ()) for _ in range(passes))

    def serve() -> int:
        return sum(len(stream.next(given.batch)) for _ in range(batches))

    rows = stream.counts["rows"]
    serve()  # fills the buffer
    rows = stream.counts["rows"]
    serve()
    passes = max(1, round((stream.counts["rows"] - rows) / given.rows))
    harvest()
    _skip(again, passes * given.rows, given.rows)
    bare.read(again.next(given.rows).tokens)
    source.next()

    tokens: list[int] = []
    times: dict[str, list[float]] = {"bare": [], "harvest": [], "stream": []}  # seconds a row
    for nth in range(given.rounds):
        parts = [again.next(given.rows).tokens for _ in range(passes)]
        calls: dict[str, Callable[[], Any]] = {
            "bare": lambda parts=parts: [bare.read(part) for part in parts],
            "harvest": lambda: tokens.append(harvest()),
            "stream": serve,
        }
        for name in _order(calls, nth):
            times[name].append(_timed(calls[name], stream if name == "stream" else passes * given.rows, device))
            bar.advance(1)
    a_row = sum(tokens) / len(tokens) / passes / given.rows
    found: dict[str, Any] = {
        "harvest_ratio": _ratio(times["bare"], times["harvest"]),
        "buffer_overhead": _ratio(times["stream"], times["harvest"]) - 1,
        "end_to_end": {},
        "batch_over_sum": {},
        "tokens_per_s": {name: a_row / median(values) for name, values in times.items()},
        "step_ms": {},
    }
    for count in DICTIONARIES:
        cohorts = _dictionaries(count, given, stream)
        batch = stream.next(given.batch).clone()

        def train(cohorts: Any = cohorts) -> None:
            for _ in range(batches):
                fresh = stream.next(given.batch)
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
        for nth in range(_few(given.rounds)):
            took: dict[str, float] = {}
            read = 0
            for name in _order(calls, nth):
                rows = stream.counts["rows"]
                took[name] = _timed(calls[name], None, device)
                read = max(read, stream.counts["rows"] - rows)
                bar.advance(1)
            model_alone = took["harvest"] * read / (passes * given.rows)
            ratios.append(model_alone / took["train"])
            sums.append(took["train"] / (model_alone + took["steps"]))
            step_times.append(1e3 * took["steps"] / batches)
            train_times.append(batches * given.batch / took["train"])
        found["end_to_end"][str(count)] = median(ratios)
        found["batch_over_sum"][str(count)] = median(sums)
        found["step_ms"][str(count)] = median(step_times)
        found["tokens_per_s"][f"train {count}"] = median(train_times)
    settings = given._asdict() | {"hook": model.hook, "attention": model.attention, "reader": model.reader}
    settings |= {"D": model.d_model, "passes": passes, "batches": batches}
    return {key: value for key, value in settings.items() if key != "model"} | found


def table(found: dict[str, Any]) -> str:
    """Markdown: what was measured on what, a line for each ratio."""
    s = found["streams"]
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
    return "\n".join([f"{found['device']}; {s['hook']} of {s['model']}; {sizes}", "", *markdown(lines)]) + "\n"


class Bare:
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
        kept = is_text(rows).to(self.device)
        ours, theirs = model.activations(rows.tokens)[kept].float(), self.read(rows.tokens)[kept].float()
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


def _order(calls: dict[str, Any], nth: int) -> list[str]:
    """Nobody always comes first."""
    names = list(calls)
    nth %= len(names)
    return names[nth:] + names[:nth]


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


def _ratio(one: list[float], other: list[float]) -> float:
    """Of what stood side by side in each round."""
    return median(a / b for a, b in zip(one, other, strict=True))


def _dictionaries(count: int, given: Sizes, stream: ActivationStream) -> list[Cohort | Learner]:
    x = stream.sample().x
    mean, norm = x.float().mean(0), float(x.float().norm(dim=1).mean())
    config = SAEConfig(d_in=stream.d_in, d_sae=given.F, k=given.K)
    learners = []
    for seed in range(count):
        settings = TrainConfig(tokens=10**9, batch=given.batch, control=False, seed=seed)
        sae = SparseAutoencoder(config, seed=seed).to(x.device)
        learners.append(Learner(sae, settings, mean, norm, stream.positions))
    return together(learners)


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
