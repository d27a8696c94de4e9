"""Shared by all tests: threads, Triton on the CPU, and how close is close."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

# Before torch loads OpenMP: with a test worker on every core, threads that spin while they wait cost milliseconds each time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from temposae.bench.launches import speed_up_interpreter
from torch import Tensor

from .closeness import assert_close

#: modules of tests that take longest; they come first, so that several workers end at about the same time
LONGEST = {
    "test_quick", "test_kill", "test_accelerate_twins", "test_aot", "test_run_campaign", "test_run_evals", "test_runs",
    "test_documented_runs", "test_adam", "test_encode_sparse", "test_cli", "test_train",
}  # fmt: skip

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell; processes of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when it is first imported. Without a GPU its interpreter runs the kernels; `-m gpu` compiles them.
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["TRITON_INTERPRET"] = "1"
        speed_up_interpreter()
        round_to_fp8_in_interpreter()


def round_to_fp8_in_interpreter() -> None:
    """Round float32 to e4m3 as GPUs do, to the nearest, ties to even. Triton's interpreter rounds ties up and loses carries
    into the exponent."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if source.is_fp32() and target.is_fp8e4nv():
            return torch.tensor(data).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", name="assert_close")
def the_comparison() -> Callable[..., None]:
    return assert_close


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors from torch.empty hold NaN (floating) or -1 (integers), so that an element nobody writes shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -1)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture(scope="session")
def testbed():
    """The embedded language model, on the CPU. It remembers what it gave for the last few batches of text, since most tests
    train on the same ones."""
    from temposae.engine.stream import LanguageModel

    model = LanguageModel("testbed", device="cpu")
    read, known = model._read, dict[tuple, dict[str, Tensor]]()

    def remembered(tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        key = (tuple(hooks), id(model._reader), model.attention, tokens.shape, tokens.cpu().numpy().tobytes())
        found = known.pop(key, None) or read(tokens, hooks)
        known[key] = found
        if len(known) > 60:
            known.pop(next(iter(known)))
        return {name: x.clone() for name, x in found.items()}

    model._read = remembered
    return model


@pytest.fixture
def stream_of(testbed) -> Callable:
    """stream_of(seed=0, **settings): a stream with a small buffer over the embedded model."""
    from temposae.engine.config import StreamConfig
    from temposae.engine.stream import ActivationStream

    def make(seed: int = 0, **settings) -> ActivationStream:
        config = StreamConfig(**{"buffer_tokens": 4096, "rows_per_forward": 16, **settings})
        return ActivationStream(config, model=testbed, seed=seed)

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of 1 to 400 tokens, longer than a row and shorter."""
    from temposae.engine.testbed.language import Language

    language = Language()
    return [
        " ".join(" ".join(language.document(3 * i + j).text for j in range(3)).split()[: 1 + 17 * i % 397])
        for i in range(300)
    ]


@pytest.fixture(autouse=True)
def no_parts_left():
    """Parts that a test registers are gone after it: messages list all that are known."""
    yield
    if (registry := sys.modules.get("temposae.engine.registry")) is not None:
        for kind in [kind for kind, cls in registry._PARTS.items() if not cls.__module__.startswith("temposae.")]:
            del registry._PARTS[kind]
        for module in [module for module in registry._ENTRY_POINTS if not module.startswith("temposae.")]:
            del registry._ENTRY_POINTS[module]
    for name in [name for name in sys.modules if name.startswith("temposae_plugin_")]:
        del sys.modules[name]
