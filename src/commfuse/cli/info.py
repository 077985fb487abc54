"""``commfuse info``: versions, cores, backends with their reasons, the C++ core, and every setting with its value."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__, backends, config, groups, shim
from ..errors import CommfuseError
from . import machine, terminal
from .arguments import add_json

NOT_BUILT = (
    "install a C++17 compiler (Debian, Ubuntu: apt-get install g++), then install commfuse again from its sources "
    "(in a clone: make clean install). Without the core everything runs, on the portable backend."
)
NOT_LOADED = "install commfuse again with this Python and on this machine (in a clone: make clean install)"


@dataclass(frozen=True, kw_only=True)
class InForce:
    """A setting as this process has it."""

    name: str
    value: str
    variable: str
    from_variable: bool
    default: str
    allowed: str
    meaning: str
    error: str  # why the variable's value is refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Print what there is; 1 if a variable has a value that is refused."""
    settings = [in_force(setting) for setting in config.SETTINGS]
    facts = {"versions": versions(), "cores": cores(), "backends": why_not(), "core": core(), "torch_npu": shim.real_torch_npu()}
    if args.json:
        terminal.print_json({"command": "info", **facts, "settings": [vars(setting) for setting in settings]})
    else:
        _draw(facts, settings, terminal.console())
    return 1 if any(setting.error for setting in settings) else 0


def versions() -> dict[str, str]:
    """Return what is installed, by name."""
    return {
        "commfuse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cores() -> dict[str, float | None]:
    """Return how many cores this process may use, and why."""
    return {"affinity": machine.affinity_cores(), "cgroup_quota": machine.quota_cores(), "usable": machine.cores()}


def why_not() -> dict[str, list[str]]:
    """Return for every backend the reasons why it cannot run here, asked for a group of this process alone."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        members = groups.resolve(dist.group.WORLD)
        return {name: backend.why_not(members) for name, backend in backends.BACKENDS.items()}
    finally:
        if own:
            dist.destroy_process_group()


def core() -> dict[str, Any]:
    """Return whether the C++ core is there, and if not, why and what to do."""
    if importlib.util.find_spec("commfuse._core") is None:
        return {"built": False, "reason": "not built", "remedy": NOT_BUILT}
    try:
        importlib.import_module("commfuse._core")
    except ImportError as error:
        return {"built": False, "reason": str(error), "remedy": NOT_LOADED}
    return {"built": True, "reason": "", "remedy": ""}


def in_force(setting: config.Setting) -> InForce:
    """Return the setting's value in this process, or why there is none."""
    value, error = "", ""
    try:
        value = _written(config.get(setting.name))
    except CommfuseError as refused:
        error = str(refused)
    return InForce(
        name=setting.name,
        value=value,
        variable=setting.variable,
        from_variable=setting.variable in os.environ,
        default=setting.default,
        allowed=setting.allowed,
        meaning=setting.meaning,
        error=error,
    )


def _written(value: Any) -> str:
    """The value as one would write it into the variable."""
    if isinstance(value, config.Product):
        return f"{value.name},warn" if value.warn else value.name
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _draw(facts: dict[str, Any], settings: list[InForce], out: Console) -> None:
    rows = {name: Text(text) for name, text in facts["versions"].items()}
    rows["product"] = Text(_product_text(settings))
    rows["cores"] = Text(_cores_text(facts["cores"]))
    rows["C++ core"] = _core_text(facts["core"])
    rows["torch_npu"] = Text(
        f"the real one can be imported: {facts['torch_npu']}"
        if facts["torch_npu"]
        else "none; `commfuse run` gives scripts a look-alike"
    )
    _section("This installation", rows, out)
    _section("Backends", {name: _backend_text(name, reasons) for name, reasons in facts["backends"].items()}, out)
    out.print(terminal.title("Settings"), terminal.indented(_settings_table(settings)), sep="\n")


def _section(title: str, rows: dict[str, Text], out: Console) -> None:
    table = terminal.facts()
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(terminal.title(title), terminal.indented(table), sep="\n")


def _product_text(settings: list[InForce]) -> str:
    found = next(setting for setting in settings if setting.name == "product")
    return f"the rules of {found.value or 'none: ' + found.error} are in force"


def _cores_text(found: dict[str, float | None]) -> str:
    quota = "no cgroup quota" if found["cgroup_quota"] is None else f"cgroup quota {found['cgroup_quota']:g}"
    return f"{found['usable']:g} usable (affinity mask {found['affinity']}, {quota})"


def _core_text(found: dict[str, Any]) -> Text:
    if found["built"]:
        return Text("built", style="green")
    return Text.assemble((found["reason"], "yellow"), f": {found['remedy']}")


def _backend_text(name: str, reasons: list[str]) -> Text:
    if reasons:
        return Text.assemble(("no: ", "yellow"), "; ".join(reasons))
    before = backends.AUTOMATIC[: backends.AUTOMATIC.index(name)] if name in backends.AUTOMATIC else None
    when = ", when named" if before is None else f", taken where {' and '.join(before)} cannot" if before else ", taken by itself"
    return Text.assemble(("can run", "green"), when)


def _settings_table(settings: list[InForce]) -> Table:
    table = Table("variable", "value", "meaning", box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for setting in settings:
        table.add_row(Text(setting.variable, no_wrap=True), _value_text(setting), _meaning_text(setting))
    return table


def _value_text(setting: InForce) -> Text:
    if setting.error:
        return Text("refused", style="red")
    return Text(setting.value, style="bold" if setting.from_variable else "")


def _meaning_text(setting: InForce) -> Text:
    if setting.error:
        return Text(setting.error, style="red")
    changed = "" if setting.value == setting.default else f"; default: {setting.default}"
    return Text.assemble(setting.meaning, (f"\nallowed: {setting.allowed}{changed}", "dim"))
