"""Which backend runs, with which launch configuration, and why."""

import subprocess
import sys
import warnings

import pytest
import torch
from temposae.kernels import adam, backend, decode, encode, encode_sparse, loss, select, weight_grad
from temposae.kernels.backend import choose, config_row, decided, dispatch_rates, has_fp8, why
from temposae.kernels.configs import CONFIGS, DISPATCH_RATES
from temposae.kernels.cost import Cost

X = torch.ones(2, 3)


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend that tensors are on an H100 with triton installed."""
    monkeypatch.delenv("TEMPOSAE_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_device", lambda tensors: torch.device("cuda"))
    monkeypatch.setattr(backend, "_arch", lambda device: 90)
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_argument_beats_environment_beats_device(monkeypatch):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "nonsense")
    assert why("encode", X, backend="torch") == ("torch", "the backend argument says so")
    monkeypatch.setenv("TEMPOSAE_BACKEND", "torch")
    assert why("encode", X) == ("torch", "TEMPOSAE_BACKEND says so")
    for automatic in ("", "auto"):
        monkeypatch.setenv("TEMPOSAE_BACKEND", automatic)
        assert choose("encode", X) == "torch"


def test_a_name_that_is_no_backend_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^TEMPOSAE_BACKEND is 'cuda'; allowed: torch, triton, auto$"):
        choose("encode", X)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("encode", X, backend="triton") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"asks for triton for encode, but on cpu .*TRITON_INTERPRET=1"):
        choose("encode", X, backend="triton")


def test_triton_is_refused_where_it_cannot_run(monkeypatch, on_gpu):
    with pytest.raises(ValueError, match="take float32, float16 and bfloat16, not float64"):
        choose("encode", X.double(), backend="triton")
    assert choose("encode", X.double()) == "torch"
    monkeypatch.setattr(backend, "_arch", lambda device: 75)
    assert why("encode", X) == ("torch", "sm_75 is older than sm_80")
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        choose("encode", X, backend="triton")


def test_cuda_tensors_go_where_the_cost_model_says(on_gpu):
    costs = dict(torch=Cost(0, 100), triton=Cost(0, 200))
    assert choose("encode", X) == "triton"
    assert choose("encode", X, cost=lambda name: costs[name]) == "torch"
    with decided("triton"):
        assert choose("encode", X, cost=lambda name: costs[name]) == "triton"
        assert choose("encode", X, backend="torch") == "torch"
    assert choose("encode", X, cost=lambda name: costs[name]) == "torch"
    costs["torch"] = Cost(0, 300)
    assert choose("encode", X, cost=lambda name: costs[name]) == "triton"


@pytest.mark.parametrize(
    "cost",
    [
        lambda **k: encode.cost(8192, 2304, 16384, **k),
        lambda **k: encode_sparse.cost(8192, 2304, 16384, **k),
        lambda **k: adam.cost(8192, 2304, 16384, 8192 * 64, **k),
        lambda **k: select.cost(8192, 16384, 64, **k),
        lambda **k: decode.cost(8192, 2304, 16384, 8192 * 64, **k),
        lambda **k: weight_grad.cost(8192, 2304, 16384, 8192 * 64, **k),
        lambda **k: loss.cost(8192, 2304, 8192 * 64, 1024, **k),
    ],
    ids=["encode", "encode_topk", "adam", "select", "decode", "weight_grad", "loss"],
)
def test_torch_never_moves_fewer_bytes(cost):
    for itemsize in (2, 4):
        assert cost(itemsize=itemsize, backend="torch").bytes >= cost(itemsize=itemsize, backend="triton").bytes > 0
        assert cost(itemsize=itemsize, backend="torch").flops == cost(itemsize=itemsize, backend="triton").flops


def test_an_unknown_gpu_takes_the_nearest_lower_row_and_says_so_once():
    config_row.cache_clear()
    with pytest.warns(UserWarning, match=r"no launch configurations for sm_89; using those of sm_80"):
        assert config_row(89) == CONFIGS[80]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_row(89) == CONFIGS[80]
        assert config_row(100) == CONFIGS[100]
    with pytest.raises(ValueError, match="sm_75 is older than sm_80"):
        config_row(75)


def test_a_gpu_without_rates_takes_the_nearest(monkeypatch, on_gpu):
    fast_torch = DISPATCH_RATES[90]._replace(flops_per_s={"torch": {4: 2e12}, "triton": {4: 1e12}})
    monkeypatch.setitem(DISPATCH_RATES, 120, fast_torch)
    assert dispatch_rates(120) is dispatch_rates(121) is fast_torch
    assert dispatch_rates(80) is dispatch_rates(100) is DISPATCH_RATES[90]
    costs = dict(torch=Cost(90, 0), triton=Cost(50, 0))
    assert choose("encode", X, cost=lambda name: costs[name]) == "triton"
    monkeypatch.setattr(backend, "_arch", lambda device: 120)
    assert choose("encode", X, cost=lambda name: costs[name]) == "torch"


def test_fp8_needs_sm_89(monkeypatch):
    assert has_fp8(torch.device("cpu"))
    for arch in (80, 89, 90):
        monkeypatch.setattr(backend, "_arch", lambda device, arch=arch: arch)
        assert has_fp8(torch.device("cuda")) == (arch >= 89)


def test_every_row_has_every_op_with_powers_of_two():
    for row in CONFIGS.values():
        assert row.keys() == CONFIGS[80].keys()
        for op, config in row.items():
            assert config.keys() == CONFIGS[80][op].keys()
            blocks = [v for k, v in config.items() if k.startswith("BLOCK")]
            if op == "encode_topk_persistent":  # its tile is three blocks of rows, each with an accumulator of its own
                blocks[0] //= 3
            assert all(v & (v - 1) == 0 for v in blocks)


def test_the_package_works_without_triton():
    program = """
import sys; sys.modules["triton"] = None
import importlib.util; find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from temposae.kernels.autograd import encode_topk
from temposae.kernels.backend import why
encode_topk(torch.ones(2, 3), torch.ones(3, 4), torch.ones(4), k=2)
print(why()[1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "triton is not installed" in run.stdout
