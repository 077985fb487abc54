"""Ranks that MPI starts; needs mpi4py and an MPI (the extra `bench`)."""

from __future__ import annotations

import json
import os

import pytest
import torch.distributed as dist

from commfuse.cli.bench import mpi
from commfuse.cli.bench.mpi import MpiMissingError, MpiRanks
from commfuse.ranks import RankFailedError

from .commands import here


@pytest.fixture(scope="module")
def there() -> mpi.Mpi:
    try:
        return mpi.find()
    except MpiMissingError as missing:
        pytest.skip(str(missing))


def about(rank: int) -> tuple[int, int, int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, dist.get_rank(), len(os.sched_getaffinity(0))


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_ranks_are_mpis_and_torchs_and_bound_to_nothing(there: mpi.Mpi) -> None:
    cores = len(os.sched_getaffinity(0))
    with MpiRanks(3, there) as ranks:
        pids = ranks.pids
        assert ranks.run(about) == [(rank, 3, rank, cores) for rank in range(3)]
    assert all(map(gone, pids))


def test_a_rank_that_fails_ends_all(there: mpi.Mpi) -> None:
    ranks = MpiRanks(2, there)
    pids = ranks.pids
    with pytest.raises(RankFailedError, match="on purpose"):
        ranks.run(fail_on_one, deadline=30)
    assert all(map(gone, pids))


def test_a_launcher_that_starts_nothing_is_told(tmp_path: object) -> None:
    broken = mpi.Mpi(version="none", launcher="/bin/false")
    with pytest.raises(RankFailedError, match="mpiexec did not start 2 ranks"):
        MpiRanks(2, broken)


def test_all_methods_in_one_launch(there: mpi.Mpi, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "2", "--hidden", "16", "--topk", "2", "--experts", "4", "--seconds", "0.01", "--rounds", "1")
    found = json.loads(here(capsys, "bench", *sizes, "--json").out)
    assert found["passed"]
    for launch in found["launches"]:
        assert launch["mpi"] == there.version
        assert [row["name"] for row in launch["methods"] if row["microseconds"] is None] == []


def test_why_there_is_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_VERSION", "import mpi4py_that_is_not_there as mpi4py")
    with pytest.raises(MpiMissingError, match="No module named 'mpi4py_that_is_not_there'; pip install 'commfuse\\[bench\\]'"):
        mpi.find()
