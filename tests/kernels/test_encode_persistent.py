"""When the persistent kernel is chosen. A GPU runs it in tests/gpu/test_kernels_gpu.py; the interpreter cannot."""

import pytest
import torch
from temposae.kernels.configs import CONFIGS
from temposae.kernels.encoder_inputs import EncoderInputs

candidates = pytest.importorskip("temposae.kernels.encode_sparse.candidates")
tiles = pytest.importorskip("temposae.kernels.encode.triton")


@pytest.fixture
def chosen(monkeypatch):
    """chosen(x, mask=..., use=...) -> whether the persistent kernel would be, on a GPU of sm_90."""

    def on_a_gpu(x, *, mask=None, use=1, is_hopper=True):
        row = CONFIGS[80]
        monkeypatch.setitem(row, "encode_topk", row["encode_topk"] | dict(TMA=1, BLOCK_D=8))
        monkeypatch.setitem(row, "encode_topk_persistent", row["encode_topk_persistent"] | dict(USE=use))
        monkeypatch.setattr(candidates, "has_wgmma", lambda device: is_hopper)
        W_enc = torch.ones(32, x.shape[1], dtype=x.dtype).T
        inputs = EncoderInputs(x, W_enc, torch.zeros(32), None, mask, torch.zeros(len(x), dtype=torch.int64))
        return candidates.is_persistent(tiles.operands("encode_topk", inputs))

    return on_a_gpu


def test_it_is_off_in_the_table():
    assert {row["encode_topk_persistent"]["USE"] for row in CONFIGS.values()} == {0}


def test_only_what_it_can_compute_is_left_to_it(chosen):
    x = torch.ones(4, 16, dtype=torch.float16)
    assert chosen(x)
    assert not chosen(x, use=0)
    assert not chosen(x, is_hopper=False)
    assert not chosen(x, mask=torch.ones(1, 32, dtype=torch.bool))
    assert not chosen(x.float())
    assert not chosen(torch.ones(4, 32, dtype=torch.float16)[:, ::2][:, :12])  # rows that are not multiples of 16 bytes


def test_a_cpu_never_uses_it():
    from temposae.kernels.backend import has_wgmma

    assert not has_wgmma(torch.device("cpu"))
