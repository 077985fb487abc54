"""What does not fit or does not come: the same error on every rank, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import commfuse
from commfuse import config
from commfuse.ranks import RankFailedError, Ranks
from tests.conftest import RunRanks

from . import core, layer  # noqa: F401 - skips where the core is not built

pytestmark = pytest.mark.alone


def round_trip(rank: int, world_size: int, seed: int = 0) -> bool:
    out = layer.dispatch(rank, world_size, seed)
    return torch.equal(layer.combine(rank, world_size, out, out[0] * 2, seed), layer.expected(rank, seed=seed))


def told(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except commfuse.CommfuseError as error:
        return type(error).__name__, str(error)
    return "", ""


def on_both(rank: int, what: str) -> list[tuple[str, str]]:
    """The same fault on the cpu backend, then on portable; a right round trip after each."""
    found = []
    for backend in ("cpu", "portable"):
        with mock.patch.object(layer, "EXPERTS", 9), config.override(backend=backend, poison=True):
            assert round_trip(rank, 3)
            found.append(told(lambda: FAULTS[what](rank)))
            assert round_trip(rank, 3, seed=1)
    return found


def bad_ids(rank: int) -> None:
    ids = layer.inputs(rank)[1]
    ids[1, 0] = 99 if rank == 1 else ids[1, 0]
    layer.dispatch(rank, 3, expert_ids=ids)


def all_refuse(rank: int) -> None:
    layer.dispatch(rank, 3, quant_mode=1)


def other_dtype(rank: int) -> None:
    x = layer.inputs(rank)[0]
    layer.dispatch(rank, 3, x=x.half() if rank == 2 else x)


def other_operator(rank: int) -> None:
    out = layer.dispatch(rank, 3)
    if rank == 0:
        layer.dispatch(rank, 3)
    else:
        layer.combine(rank, 3, out, out[0])


def other_counts(rank: int) -> None:
    out = layer.dispatch(rank, 3)
    if rank == 1:
        out[4][3:] += 1
    layer.combine(rank, 3, out, out[0])


def other_triplets(rank: int) -> None:
    out = layer.dispatch(rank, 3)
    if rank == 2:
        out[2][1] += 1
    layer.combine(rank, 3, out, out[0])


FAULTS: dict[str, Callable[[int], None]] = {
    function.__name__: function for function in (bad_ids, all_refuse, other_dtype, other_operator, other_counts, other_triplets)
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_read_the_same_on_every_rank_and_backend(run_ranks: RunRanks, what: str) -> None:
    replies = run_ranks(3, on_both, what)
    kinds = {kind for reply in replies for kind, _ in reply}
    assert kinds in ({"ArgumentError"}, {"MismatchError"})
    assert len({text for reply in replies for _, text in reply}) == 1


def uneven(rank: int) -> tuple[str, str]:
    with config.override(backend="cpu"):
        found = told(lambda: layer.dispatch(rank, 2, num_tokens=4 + rank))
        assert round_trip(rank, 2)
        return found


def test_batches_of_different_sizes_need_global_bs(run_ranks: RunRanks) -> None:
    for kind, text in run_ranks(2, uneven):
        assert kind == "MismatchError"
        assert "BS (global_bs is 0): 4 on rank 0 of 2; 5 on rank 1 of 2" in text


def late(rank: int) -> tuple[str, str, float]:
    with config.override(backend="cpu"):
        assert round_trip(rank, 2)
        if rank == 1:
            time.sleep(1.2)
        begin = time.monotonic()
        with config.override(timeout=0.5):
            kind, text = told(lambda: layer.dispatch(rank, 2))
        return kind, text, time.monotonic() - begin


def test_a_late_rank_is_named_on_both_sides() -> None:
    with Ranks(2) as ranks:
        (kind, text, seconds), (other_kind, other_text, _) = ranks.run(late)
    assert (kind, other_kind) == ("ExchangeError", "ExchangeError")
    assert 0.5 <= seconds < 1.1
    assert "rank 1 (pid " in text
    assert "did not come in time; awaited for 0.5" in text
    assert "its arguments and rows of call 3; it has entered 2 calls of this group, the last one npu_moe_" in text
    assert "the group has been given up (found by rank 0" in other_text
    assert "rank 1 (pid " in other_text


def victim(rank: int, where: str) -> None:
    if rank == 1 and where == "before a call":
        os.kill(os.getpid(), signal.SIGKILL)
    out = layer.dispatch(rank, 3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    layer.combine(rank, 3, out, out[0])


def survivor(rank: int, folder: str, where: str) -> None:
    with mock.patch.object(layer, "EXPERTS", 9), config.override(backend="cpu"):
        assert round_trip(rank, 3)
        begin = time.monotonic()
        kind, text = told(lambda: victim(rank, where))
        seconds = time.monotonic() - begin
        again, same = told(lambda: round_trip(rank, 3))
    found = {"kind": kind, "text": text, "again": again, "same": same, "seconds": seconds}
    Path(folder, str(rank)).write_text(json.dumps(found))


@pytest.mark.parametrize("where", ["before a call", "between dispatch and combine"])
def test_a_killed_rank_ends_the_others_calls_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    segments = set(os.listdir("/dev/shm"))
    ranks = Ranks(3)
    pids = ranks.pids
    with pytest.raises(RankFailedError, match="rank 1:\nthe process ended"):
        ranks.run(survivor, str(tmp_path), where)
    for rank in (0, 2):
        found = json.loads(Path(tmp_path, str(rank)).read_text())
        assert (found["kind"], found["again"]) == ("ExchangeError", "ExchangeError")
        assert f"rank 1 (pid {pids[1]}) has ended" in found["text"]
        assert f"rank 1 (pid {pids[1]}) has ended" in found["same"]
        assert "npu_moe_distribute_" in found["text"]
        assert found["seconds"] < 1
    assert set(os.listdir("/dev/shm")) <= segments
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def on_another_host(rank: int) -> tuple[str, str]:
    with config.override(backend="cpu", host=f"host {rank}"):
        return told(lambda: layer.dispatch(rank, 2))


def test_ranks_on_different_hosts_are_told_so() -> None:
    with Ranks(2) as ranks:
        for kind, text in ranks.run(on_another_host):
            assert kind == "BackendError"
            assert "rank 0, cpu: the ranks are on different hosts; this one is on" in text
            assert "host 1" in text


def from_two_threads(rank: int) -> tuple[str, str]:
    from commfuse import groups
    from commfuse.backends.cpu import domain

    with config.override(backend="cpu"):
        assert round_trip(rank, 2)
        group = groups.resolve(layer.common(rank, 2)["group_ep"])
        turns = domain.of(group).turns
        assert turns.enter()
        found = told(lambda: layer.dispatch(rank, 2))
        turns.leave()
        assert round_trip(rank, 2)
        return found


def test_a_second_thread_is_refused(run_ranks: RunRanks) -> None:
    for kind, text in run_ranks(2, from_two_threads):
        assert kind == "GroupError"
        assert "another thread is in a call of group" in text


def carry_on(rank: int, folder: str) -> None:
    """Rank 1 of 4 is killed within a call; the others find out, leave it out with elastic_info, and go on."""
    with config.override(backend="cpu"):
        assert round_trip(rank, 4)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        kind, _ = told(lambda: round_trip(rank, 4))
        table = [1, 3, 0, 6, 0, -1, 1, 2, 0, 2, 3, -1]
        left = {"elastic_info": torch.tensor(table, dtype=torch.int32)}
        right = []
        for seed in range(5):
            ids = layer.inputs(rank, seed=seed)[1] % 6
            ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % 5) % 6
            out = layer.dispatch(rank, 4, seed, expert_ids=ids, **left)
            x = layer.combine(rank, 4, out, out[0].mul_(2), seed, expert_ids=ids, **left)
            right.append(torch.equal(x, layer.expected(rank, seed=seed)))
    Path(folder, str(rank)).write_text(json.dumps({"kind": kind, "right": right}))


def test_survivors_carry_on_without_the_killed_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1:\nthe process ended"):
        Ranks(4).run(carry_on, str(tmp_path))
    for rank in (0, 2, 3):
        found = json.loads(Path(tmp_path, str(rank)).read_text())
        assert found == {"kind": "ExchangeError", "right": [True] * 5}
