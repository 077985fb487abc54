"""Row kernels and keys through the bindings, against torch and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .core import _core, address, every_variant, using

DTYPES = {torch.bfloat16: _core.BF16, torch.float16: _core.FP16, torch.float32: _core.F32}
TERM = np.dtype([("address", np.uint64), ("weight", np.float32), ("kind", np.uint32)])


@pytest.fixture(params=every_variant())
def variant(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_adds_in_order_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 133, generator=generator).to(dtype)
    weights = torch.rand(4, 3, generator=generator)
    terms = np.zeros((4, 4), TERM)  # one column more than there are rows to add: kind 0 is skipped
    terms["address"][:, :3] = rows.data_ptr() + np.arange(12).reshape(4, 3) * rows.stride(0) * rows.itemsize
    terms["weight"][:, :3], terms["kind"][:, :3] = weights.numpy(), _core.TERM_ROW
    expected = torch.zeros(4, 133)
    for k in range(3):
        expected = expected + rows.view(4, 3, 133)[:, k].float() * weights[:, k : k + 1]
    out, wide = torch.empty(4, 133, dtype=dtype), torch.empty(4, 133)
    _core.combine_rows(DTYPES[dtype], False, address(terms), 4, 4, 133, out.data_ptr(), 133 * out.itemsize)
    _core.combine_rows(DTYPES[dtype], True, address(terms), 4, 4, 133, wide.data_ptr(), 133 * 4)
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(wide, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantise_is_the_published_formula(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 77, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    x[1], x[3, 5] = 0, torch.nan
    q, scales = torch.empty(5, 77, dtype=torch.int8), torch.empty(5)
    _core.quantise_rows(DTYPES[dtype], 77, 5, x.data_ptr(), 77 * x.itemsize, 5, q.data_ptr(), scales.data_ptr())
    factor = 127 / x.float().abs().amax(dim=1, keepdim=True)
    for row in (0, 2, 4):
        assert torch.equal(q[row], (x[row].float() * factor[row]).round().to(torch.int8))
        assert scales[row] == 1 / factor[row]
    assert not q[1].any()
    assert scales[1] == 0
    assert not q[3].any()
    assert scales[3].isnan()


@pytest.mark.usefixtures("variant")
def test_blocks_of_eight_go_there_and_back() -> None:
    x = torch.tensor([[1, -2, 0.5, 3.5, -0.25, 0, 2.75, -3, 5]], dtype=torch.float16)
    q, scales, back = torch.empty(1, 9, dtype=torch.int8), torch.empty(1, 2, dtype=torch.float16), torch.empty_like(x)
    _core.pack_rows(_core.FP16, x.data_ptr(), 1, 9, q.data_ptr(), scales.data_ptr())
    _core.unpack_rows(_core.FP16, q.data_ptr(), scales.data_ptr(), 1, 9, back.data_ptr())
    assert q.tolist() == [[36, -73, 18, 127, -9, 0, 100, -109, 127]]
    assert scales.tolist() == [[pytest.approx(0.02756, abs=1e-5), pytest.approx(5 / 127, abs=1e-4)]]
    expected = [0.992, -2.012, 0.496, 3.5, -0.248, 0, 2.756, -3.004, 5]
    assert back[0].tolist() == pytest.approx(expected, abs=2e-3)


def test_gather_checks_every_index_first() -> None:
    rows, out = np.arange(12, dtype=np.int16).reshape(4, 3), np.full((3, 3), -1, np.int16)
    index = np.array([3, -1, 0], np.int32)
    _core.gather_rows(address(out), 6, address(rows), rows.nbytes, 6, address(index), 3, 6)
    assert out.tolist() == [[9, 10, 11], [-1, -1, -1], [0, 1, 2]]
    index[2] = 4
    with pytest.raises(_core.CoreError, match="row 4 of 4"):
        _core.gather_rows(address(out), 6, address(rows), rows.nbytes, 6, address(index), 3, 6)
    with pytest.raises(_core.CoreError, match="dtype 3"):
        _core.pack_rows(3, 0, 0, 0, 0, 0)


def test_variants_are_chosen_by_name() -> None:
    assert _core.kernels_name() == every_variant()[-1]
    with pytest.raises(_core.CoreError, match="'mmx'"):
        _core.choose_kernels("mmx")


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[npt.NDArray[np.int32]], int, int]:
    """Ids of each rank [rows, width], distinct in a row; keys per rank; width."""
    num_ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    width = draw(st.integers(1, min(3, num_ranks * per_rank)))
    row = st.permutations(range(num_ranks * per_rank)).map(lambda keys: keys[:width])
    ids = [np.array(draw(st.lists(row, max_size=5)), np.int32).reshape(-1, width) for _ in range(num_ranks)]
    return ids, per_rank, width


def sources_of(arrays: list[npt.NDArray[Any]]) -> _core.Sources:
    sources = _core.Sources(len(arrays))
    for source, array in enumerate(arrays):
        sources.set(source, address(array), array.nbytes)
    return sources


@given(routing=routings())
@settings(max_examples=60, deadline=None)
def test_rows_are_placed_and_found_again(routing: tuple[list[npt.NDArray[np.int32]], int, int]) -> None:
    ids, per_rank, width = routing
    num_ranks, num_keys = len(ids), len(ids) * per_rank
    keys = [np.empty_like(one) for one in ids]
    check = _core.KeyCheck(width, num_keys, num_keys, num_keys)
    for raw, out in zip(ids, keys, strict=True):
        assert check.run(address(raw), len(raw), len(raw), 0, address(out)) == 0
    rows = [np.arange(len(one), dtype=np.float32) + 100 * rank for rank, one in enumerate(ids)]
    counts, tags, placed = [], [], []
    for me in range(num_ranks):
        sort = _core.KeySort(width, num_keys, me * per_rank, (me + 1) * per_rank)
        total = sort.run(sources_of(keys))
        counts.append(np.empty(sort.num_counts, np.int32))
        tags.append(np.empty((total, 3), np.int32))
        placed.append(np.empty(total, np.float32))
        sort.write_running_counts(address(counts[me]))
        sort.write_tags(address(tags[me]))
        sort.place(sources_of(rows), address(placed[me]), placed[me].nbytes, 4, 4, False)
        expected = sorted(
            (key, source, token, column)
            for source, one in enumerate(ids)
            for (token, column), key in np.ndenumerate(one)
            if key // per_rank == me
        )
        assert tags[me].tolist() == [list(tag) for _, *tag in expected]
        assert placed[me].tolist() == [rows[source][token] for _, source, token, _ in expected]
    owners, slots = np.divmod(np.arange(num_keys), per_rank)
    for me in range(num_ranks):
        plan = _core.TermPlan(width, width, num_ranks, me, owners.tolist(), slots.tolist())
        terms, weights = np.zeros((len(ids[me]), width), TERM), np.ones(ids[me].shape, np.float32)
        there, tagged, stored = sources_of(counts), sources_of(tags), sources_of(placed)
        mine = address(keys[me]), len(ids[me]), address(weights)
        assert plan.run(*mine, there, tagged, stored, 4, 4, address(terms), width) == 0
        out = np.zeros(len(ids[me]), np.float32)
        _core.combine_rows(_core.F32, False, address(terms), len(out), width, 1, address(out), 4)
        assert out.tolist() == [width * row for row in rows[me]]


def test_key_faults_name_the_pair() -> None:
    out = np.zeros(8, np.int32)
    check = _core.KeyCheck(2, 4, 6, 8, [4, 5])
    assert check.out_width == 4
    assert check.run(address(np.array([0, 4], np.int32)), 1, 1, 0, address(out)) == _core.KEY_OUT_OF_RANGE
    assert (check.bad_pair, check.bad_key) == (1, 4)
    assert check.run(address(np.array([0, 1, 7, 7], np.int32)), 2, 2, 0, address(out)) == _core.KEY_DUPLICATE
    assert (check.bad_pair, check.bad_key) == (3, 7)
    mask = np.array([[True, True], [True, False]])
    assert check.run(address(np.array([0, 1, 7, 7], np.int32)), 2, 2, address(mask), address(out)) == 0
    assert out.tolist() == [0, 1, 4, 5, -1, -1, 4, 5]
