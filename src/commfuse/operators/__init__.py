"""What is computed: one folder per family, and the one list of all operators."""

from __future__ import annotations

from ..spec.model import Operator
from .moe_distribute.spec_combine import COMBINE_V2
from .moe_distribute.spec_dispatch import DISPATCH_V2

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (DISPATCH_V2, COMBINE_V2)}
