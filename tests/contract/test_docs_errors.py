"""The worked example of docs/errors.md: a rank is killed, and the others go on with right results."""

from __future__ import annotations

import os
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse.ranks import RankFailedError, Ranks

pytest.importorskip("commfuse._core")

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def lose_a_rank(rank: int, source: str, folder: str) -> None:
    """One step of all three; then rank 2 is killed, and the others write what the next step gave them and what they were told."""
    example: dict[str, Any] = {}
    exec(source, example)
    group = dist.group.WORLD.group_name
    with commfuse.config.override(backend="cpu", timeout=20):
        first = example["step"](rank, group)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        second = example["step_of_whoever_is_left"](rank, group)
        found = first.tolist(), second.tolist(), commfuse.alive(group)
    Path(folder, f"{rank}.tmp").write_bytes(pickle.dumps(found))
    Path(folder, f"{rank}.tmp").rename(Path(folder, str(rank)))


def test_the_example_goes_on_without_the_dead(tmp_path: Path) -> None:
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1]
    with Ranks(3) as ranks, pytest.raises(RankFailedError, match="rank 2:\nthe process ended"):
        ranks.run(lose_a_rank, source, str(tmp_path), deadline=60)
    for rank in (0, 1):
        doubled = torch.full((2, 8), 2 * (rank + 1.0)).tolist()
        assert pickle.loads((tmp_path / str(rank)).read_bytes()) == (doubled, doubled, (0, 1))
