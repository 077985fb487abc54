"""The names that scripts touch, one row each: there, without effect, or refused with the reason.

`npu`, the packages in ``site``, a test and the table in ``docs/shim.md`` all read these rows. Operators have no row: the
look-alike has exactly those that commfuse has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

PRESENT, NOTHING, REFUSED = "present", "does nothing", "refused"


@dataclass(frozen=True, kw_only=True)
class Name:
    """One name: its full ``path``, its ``kind`` (`PRESENT`, `NOTHING` or `REFUSED`), and what to know about it."""

    path: str
    kind: str
    note: str = ""

    @property
    def owner(self) -> str:
        """The path of the module or class that has the name."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


def _rows(kind: str, owner: str, names: str, note: str) -> tuple[Name, ...]:
    return tuple(Name(path=f"{owner}.{name}", kind=kind, note=note) for name in names.split())


_NO_GRAPH = "there is no device to record a graph on; call the function directly or use torch.compile"
_NO_TRANSFER = "it would redirect torch.cuda; write .npu() or device='npu'"
_NO_PROFILER = "use torch.profiler.profile, which sees commfuse's operators too"
_NO_AUTOCAST = "use torch.autocast('cpu', dtype=...), which is where the tensors are"

ROWS: tuple[Name, ...] = (
    # tensors and modules
    *_rows(PRESENT, "torch.Tensor", "npu", "a copy on the CPU, which is this device's memory; so is .to('npu')"),
    *_rows(PRESENT, "torch.Tensor", "is_npu", "True for every CPU tensor; .device says cpu"),
    *_rows(NOTHING, "torch.Tensor", "pin_memory", "returns the tensor itself"),
    *_rows(PRESENT, "torch.nn.Module", "npu", "parameters and buffers as by Tensor.npu, in place"),
    *_rows(NOTHING, "torch.accelerator", "synchronize", "operations are finished when they return"),
    # torch.npu
    *_rows(PRESENT, "torch.npu", "set_device current_device device", "remembered only; any index from 0"),
    *_rows(PRESENT, "torch.npu", "device_count", "8 with COMMFUSE_PRODUCT=A2, otherwise 16"),
    *_rows(PRESENT, "torch.npu", "get_soc_version", "220 with COMMFUSE_PRODUCT=A2, otherwise 250"),
    *_rows(PRESENT, "torch.npu", "is_available is_initialized is_bf16_supported", "True"),
    *_rows(PRESENT, "torch.npu", "get_device_name get_device_properties", "say that this is commfuse on the CPU"),
    *_rows(PRESENT, "torch.npu", "mem_get_info", "free and total bytes of the host"),
    *_rows(PRESENT, "torch.npu", "memory_allocated memory_reserved", "resident bytes of this process"),
    *_rows(PRESENT, "torch.npu", "max_memory_allocated max_memory_reserved", "largest resident bytes of this process"),
    *_rows(PRESENT, "torch.npu", "manual_seed manual_seed_all seed seed_all initial_seed", "of torch's CPU generator"),
    *_rows(PRESENT, "torch.npu", "get_rng_state set_rng_state", "of torch's CPU generator"),
    *_rows(PRESENT, "torch.npu", "Event", "measures time; is reached at once"),
    *_rows(PRESENT, "torch.npu", "Stream current_stream default_stream stream", "one order of execution, the program's"),
    *_rows(PRESENT, "torch.npu", "config", "takes any attribute, as allow_internal_format; without effect"),
    *_rows(NOTHING, "torch.npu", "synchronize", "operations are finished when they return"),
    *_rows(NOTHING, "torch.npu", "init set_stream set_compile_mode set_option", ""),
    *_rows(NOTHING, "torch.npu", "empty_cache ipc_collect set_per_process_memory_fraction", ""),
    *_rows(NOTHING, "torch.npu", "reset_peak_memory_stats reset_max_memory_allocated", "the peak is the process's"),
    *_rows(REFUSED, "torch.npu", "NPUGraph graph make_graphed_callables", _NO_GRAPH),
    *_rows(REFUSED, "torch.npu", "amp", _NO_AUTOCAST),
    # torch_npu
    *_rows(PRESENT, "torch_npu", "npu", "the same module as torch.npu"),
    *_rows(PRESENT, "torch_npu", "__version__", "torch's version followed by +commfuse"),
    *_rows(PRESENT, "torch_npu._C._distributed_c10d", "ProcessGroupHCCL", "for its Options, to be given as pg_options"),
    *_rows(PRESENT, "torch_npu.distributed", "ProcessGroupHCCL is_hccl_available", ""),
    *_rows(PRESENT, "torch_npu.dynamo", "torchair", "the same package as torchair"),
    *_rows(NOTHING, "torch_npu", "npu_format_cast npu_format_cast_", "returns the tensor: there is one memory format"),
    *_rows(PRESENT, "torch_npu", "get_npu_format", "2, which is ND, for every tensor"),
    *_rows(REFUSED, "torch_npu", "profiler", _NO_PROFILER),
    *_rows(REFUSED, "torch_npu.contrib", "transfer_to_npu", _NO_TRANSFER),
    # torch.distributed
    *_rows(PRESENT, "torch.distributed.ProcessGroup", "get_hccl_comm_name", "torch's group_name; the rank is not looked at"),
    *_rows(PRESENT, "torch.distributed", "is_hccl_available", "True"),
    # torchair
    *_rows(PRESENT, "torchair", "get_npu_backend", "the aot_eager backend of torch.compile; the configuration is not used"),
    *_rows(PRESENT, "torchair", "CompilerConfig", "takes any attribute at any depth; without effect"),
)

_BY_PATH = {row.path: row for row in ROWS}


def missing(owner: str, name: str, known: Iterable[str] = ()) -> AttributeError:
    """Return the error for a name that ``owner`` does not have: the reason of its row, or the nearest names there are.

    ``known``: names that exist besides those of the rows. An AttributeError, so that ``hasattr`` says no.
    """
    row = _BY_PATH.get(f"{owner}.{name}")
    if row is not None and row.kind == REFUSED:
        return AttributeError(f"{row.path}: not offered by commfuse's look-alike; {row.note}")
    rows = (row.name for row in ROWS if row.owner == owner and row.kind != REFUSED and not row.name.startswith("_"))
    there = sorted({*known, *rows})
    near = difflib.get_close_matches(name, there, n=3) or there
    return AttributeError(f"{owner} (commfuse's look-alike) has no {name!r}; there are {', '.join(near)}")


def render_table() -> str:
    """Return the rows as a Markdown table, names with the same kind and note on one line."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for row in ROWS:
        together.setdefault((row.owner, row.kind, row.note), []).append(row.name)
    lines = ["| where | names | here | notes |", "|---|---|---|---|"]
    for (owner, kind, note), names in together.items():
        lines.append(f"| `{owner}` | {', '.join(f'`{name}`' for name in names)} | {kind} | {note} |")
    return "\n".join(lines) + "\n"
