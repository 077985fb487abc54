"""What tests of single calls need of the round trips in `commfuse.checking`."""

from __future__ import annotations

from commfuse.checking.moe_distribute import experts, golden, groups_of

__all__ = ["experts", "golden", "groups_of"]
