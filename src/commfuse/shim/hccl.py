"""The process-group backend "hccl": gloo on the CPU, under the name that scripts ask for.

A group's communicator name is torch's own ``group.group_name``, which every commfuse operator takes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d


class ProcessGroupHCCL:
    """The holder of `Options`. Groups are made by ``dist.init_process_group`` and ``dist.new_group`` alone."""

    class Options:
        """What scripts give as ``pg_options``: kept, and without effect on a group of this machine."""

        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.hccl_config: dict[str, Any] = {}
            self.op_timeout = timedelta(minutes=30)
            self.global_ranks_in_group: list[int] = []
            self.group_id = ""


def is_hccl_available() -> bool:
    """Return True."""
    return True


def install() -> None:
    """Add the backend to torch.distributed, and `get_hccl_comm_name` to its groups."""
    dist.Backend.register_backend("hccl", _create, extended_api=True, devices=["npu", "cpu"])
    names: Any = dist
    names.is_hccl_available = is_hccl_available
    names.ProcessGroup.get_hccl_comm_name = _group_name
    backend: Any = _distributed_c10d.Backend
    backend.get_hccl_comm_name = _backend_name


def _create(shape: Any, pg_options: Any) -> dist.ProcessGroupGloo:
    """Make the gloo group that stands for one hccl group; called by torch, which fills ``shape``."""
    group = dist.ProcessGroupGloo(shape.store, shape.group_rank, shape.group_size, shape.timeout)
    group.options.group_name = shape.group_id
    group.options.global_ranks_in_group = shape.global_ranks_in_group
    group._set_sequence_number_for_group()
    return group


def _group_name(self: dist.ProcessGroup, rank: int) -> str:
    """Return the group's name. ``rank`` is a global rank in some scripts, one in the group in others: it is not looked at."""
    return self.group_name


def _backend_name(self: Any, rank: int) -> str:
    """Return the name of the group that this backend serves; ``rank`` is not looked at."""
    return str(self.options.group_name)
