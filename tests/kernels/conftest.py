"""Shapes and backends for the kernel tests.

A test that takes `shape` runs at every ordinary shape and, marked slow, at random ones (n of them with the mark
`random_shapes(n)`). One that also takes `backend` does so with the torch reference and with Triton's interpreter in small
blocks (so that small shapes have many), and at one shape in the blocks of the config table. `step_shape` is the same for
tests of whole steps, which take the table's blocks only.
"""

import os
import random
from typing import NamedTuple

import pytest
import torch
from temposae.kernels.code import SparseCode
from temposae.kernels.configs import CONFIGS
from torch import Tensor

SMALL_BLOCKS = dict(BLOCK_N=16, BLOCK_F=32, BLOCK_D=32, GROUP_N=2, BLOCK_K=4, BLOCK_E=4, BLOCK=16, BLOCK_T=4, SPLIT=8)
# The references are simple, and each is also what the kernels are checked by. With these and the marks of some tests, each
# kernel has 200 random cases and more.
RANDOM_SHAPES = {"torch": 8, "triton": 40}


class Shape(NamedTuple):
    """N tokens, width D, F latents, K kept, T positions; `generator` draws the rest, the same every time."""

    N: int
    D: int
    F: int
    K: int
    T: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(hash(tuple(self)))

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


TWO_TILES = Shape(N=5, D=270, F=33, K=1, T=3)
ORDINARY = (
    Shape(N=1, D=5, F=7, K=7, T=1),  # one token, K = F
    Shape(N=19, D=40, F=75, K=10, T=9),
    TWO_TILES,  # in the table's blocks, one latent a token
    Shape(N=11, D=16, F=64, K=20, T=40),  # more positions than tokens
)
STEPS = (ORDINARY[0], Shape(N=9, D=12, F=30, K=4, T=3))


def _random_shape(seed: int) -> Shape:
    draw = random.Random(seed)
    f = draw.randint(1, 70)
    return Shape(draw.randint(1, 20), draw.randint(1, 70), f, draw.randint(1, min(f, 30)), draw.randint(1, 20))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        _parametrize(metafunc, "shape", ORDINARY, "triton in small blocks", extra=[(TWO_TILES, "triton")])
    if "step_shape" in metafunc.fixturenames:
        _parametrize(metafunc, "step_shape", STEPS, "triton")


def _parametrize(metafunc: pytest.Metafunc, name: str, ordinary, triton: str, extra=()) -> None:
    shapes = [(shape, str(shape), ()) for shape in ordinary]
    # A step interprets a dozen kernels: fewer of them.
    few = {"torch": 2, "triton": 5}
    counts = RANDOM_SHAPES if name == "shape" else few
    mark = metafunc.definition.get_closest_marker("random_shapes")
    if mark is not None:
        counts = counts | {"triton": mark.args[0]}
    if "not slow" in metafunc.config.option.markexpr:  # thousands that need not be collected
        counts = dict.fromkeys(counts, 0)
    shapes += [
        (s, f"{seed}-{s}", pytest.mark.slow) for seed, s in enumerate(map(_random_shape, range(max(counts.values()))))
    ]
    if "backend" not in metafunc.fixturenames:
        metafunc.parametrize(name, [pytest.param(shape, id=label, marks=marks) for shape, label, marks in shapes])
        return
    cases = [
        pytest.param(shape, backend, id=f"{label}-{backend}", marks=marks)
        for nth, (shape, label, marks) in enumerate(shapes)
        for backend in ("torch", triton)
        if nth < len(ordinary) + counts[backend.split()[0]]
    ]
    cases += [pytest.param(shape, backend, id=f"{shape}-{backend}") for shape, backend in extra]
    metafunc.parametrize((name, "backend"), cases, indirect=["backend"])


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """The name to pass as `backend`, also set in the environment; outputs are poisoned."""
    name, _, small = request.param.partition(" ")
    if name == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the interpreter is off in a GPU run")
    if small:
        table = CONFIGS[min(CONFIGS)]
        for op, config in table.items():
            monkeypatch.setitem(table, op, config | {k: v for k, v in SMALL_BLOCKS.items() if k in config})
    monkeypatch.setenv("TEMPOSAE_BACKEND", name)
    return name


@pytest.fixture(params=["torch", "triton"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """For tests at one shape of their own."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=["fixed K", "ragged"])
def make_code(request: pytest.FixtureRequest):
    """make_code(shape, dtype) -> SparseCode.

    Latent 0 fires on every token, some entries are zero, some latents never fire. The ragged one has about K entries a
    token, tokens without any, and unused entries that hold NaN, fives and impossible latents.
    """

    def make(shape: Shape, dtype: torch.dtype = torch.float32) -> SparseCode:
        n, _, f, k, _ = shape
        generator = shape.generator
        values = torch.randn(n, k, generator=generator)
        values[torch.rand(n, k, generator=generator) < 0.1] = 0
        others = torch.rand(n, f - 1, generator=generator).argsort(1)[:, : k - 1] + 1
        indices = torch.cat([torch.zeros(n, 1, dtype=torch.int64), others.sort(1).values], 1).int()
        if request.param == "fixed K":
            return SparseCode(values.to(dtype), indices, f)
        keep = torch.rand(n, k, generator=generator) < 0.7
        keep[::3] = False
        unused = 12
        values = torch.cat([values[keep], torch.tensor([torch.nan, 5.0] * (unused // 2))])
        indices = torch.cat([indices[keep], torch.full((unused,), 2**31 - 1, dtype=torch.int32)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
        return SparseCode(values.to(dtype), indices, f, offsets)

    return make


@pytest.fixture(scope="session")
def dense():
    """dense(code, values=None) -> [N, F] in float64, written entry by entry."""

    def build(code: SparseCode, values: Tensor | None = None) -> Tensor:
        values = code.values if values is None else values
        out = torch.zeros(code.n_tokens, code.n_latents, dtype=torch.float64)
        k = 0 if code.offsets is not None else code.values.shape[1]
        bounds = [k * n for n in range(code.n_tokens + 1)] if code.offsets is None else code.offsets.tolist()
        entries = list(zip(code.indices.flatten().tolist(), values.flatten().tolist(), strict=True))
        for n in range(code.n_tokens):
            for latent, value in entries[bounds[n] : bounds[n + 1]]:
                out[n, latent] += value
        return out

    return build
