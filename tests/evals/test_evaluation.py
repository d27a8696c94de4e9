"""Texts in whole rows: for dictionaries that look along them, whatever part of the text an eval asks about."""

import numpy as np
import pytest
import torch
from temposae.engine.composed import dictionary
from temposae.engine.config import SAEConfig
from temposae.evals import evaluation as module
from temposae.evals.evaluation import Evaluation, TextActivations, in_rows, of_tokens
from temposae.evals.pooling import pooled_latents

D, F, R, T = 128, 64, 5, 12


def made(*parts: str):
    sae = dictionary(SAEConfig(d_in=D, d_sae=F, activation="relu", parts=[{"kind": kind} for kind in parts]))
    if parts:  # so that what was before matters
        sae.parts[0].taps.data.mul_(20)
    return sae


@pytest.fixture
def rows() -> TextActivations:
    kept = torch.ones(R, T, dtype=torch.bool)
    kept[:, 0] = False
    kept[2, 7:] = False
    row, pos = kept.nonzero(as_tuple=True)
    x = torch.randn(len(pos), D, generator=torch.Generator().manual_seed(0))
    return TextActivations(torch.zeros(R, T, dtype=torch.long), kept, x, pos, row)


@pytest.mark.parametrize("chunk", [1, 11, 12, 23, 1000])
def test_parts_are_whole_rows(rows, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = list(in_rows(rows.pos, rows.row, rows.pos))
    assert torch.equal(torch.cat([row for row, _ in parts]), rows.row)
    row_label = [set(row.tolist()) for row, _ in parts]
    assert sum(map(len, row_label)) == R  # none is in two
    for row, _ in parts:
        assert len(row) <= max(chunk, 11)
    if chunk == 23:
        assert [len(one) for one in row_label] == [2, 2, 1]


@pytest.mark.parametrize("chunk", [1, 20])
def test_codes_do_not_depend_on_how_many_rows_go_at_once(rows, chunk, monkeypatch):
    whole = made("dilated_conv")
    expected = whole.encode(rows.x, rows.pos)
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.testing.assert_close(rows.code(whole).to_dense(), expected)


@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_means_over_rows_need_no_code_of_all_tokens(rows, chunk, monkeypatch):
    """The same bits as from the whole code, which a dictionary of dense latents has no room for."""
    whole = made()
    rows.code(whole)
    expected = pooled_latents(rows, whole).toarray()
    rows.forget()
    monkeypatch.setattr(module, "CHUNK", chunk)
    np.testing.assert_array_equal(pooled_latents(rows, whole).toarray(), expected)
    assert rows._codes == {}
    dense = whole.encode(rows.x, rows.pos)
    by_row = torch.stack([dense[rows.row == r].mean(0) for r in range(R)])
    torch.testing.assert_close(torch.from_numpy(expected), by_row)


def test_some_tokens_are_seen_with_their_rows(rows):
    """Of a dictionary that looks along rows, codes of chosen tokens are those that they have among all."""
    inside = torch.zeros(R, T, dtype=torch.bool)
    inside[:, 5] = True
    some = rows.only(inside)
    chosen = rows.pos == 5
    assert torch.equal(some.x, rows.x[chosen])
    for sae in (made("dilated_conv"), made()):
        expected = sae.encode(rows.x, rows.pos)[chosen]
        torch.testing.assert_close(some.code(sae).to_dense(), expected)
    without = made("dilated_conv").encode(some.x[:1], some.pos[:1])
    assert not torch.allclose(without, made("dilated_conv").encode(rows.x, rows.pos)[chosen][:1])


def test_tokens_of_a_code(rows):
    code = rows.code(made())
    chosen = torch.arange(len(rows.x)) % 3 == 1
    found = of_tokens(code, chosen)
    assert found.n_tokens == int(chosen.sum())
    assert torch.equal(found.to_dense(), code.to_dense()[chosen])


def test_another_dictionary_is_measured_on_the_same_texts(stream_of):
    first, second = made(), made()
    evaluation = Evaluation(stream_of(), first, None, share=64)
    rows = evaluation.labelled(1024)
    assert len(rows) == 16
    rows.code(first)
    other = evaluation.of(second, None)
    assert other.labelled(1024) is rows
    assert not rows._codes  # the first one's are forgotten
    assert other.sae.sae is second
    assert (other.seed, other.share) == (evaluation.seed, 64)
    assert other.once("labelled 16", lambda: None) is rows
