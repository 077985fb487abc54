"""``python -m model [NAME ...]``: search the scenarios and print what was found."""

from __future__ import annotations

import sys
import time

from .scenarios import SCENARIOS


def main(names: list[str]) -> int:
    """Print a line for each scenario and the way to each violation; return whether there was one."""
    num_wrong = 0
    for scenario in [SCENARIOS[name] for name in names or SCENARIOS]:
        begin = time.perf_counter()
        found = scenario.search()
        seconds = time.perf_counter() - begin
        sizes = f"{found.num_states:9,} states {found.num_ends:6,} ends {seconds:6.1f} s"
        print(f"{scenario.name:30} {sizes}  {found.violation or 'holds'}", flush=True)
        for label in found.trace:
            print(f"    {label}")
        num_wrong += bool(found.violation)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
