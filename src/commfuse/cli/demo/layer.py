"""The layer of the demo: its sizes, and the seeded tensors that it is made of.

Any process can make any part alone: the same layer and the same name always give the same numbers. Only inputs are made here. What
is computed from them is written twice, independently: in `rank`, over processes, and in `one_process`.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from importlib import resources

import torch

HIDDEN = 7168  # DeepSeek-V3's
TOP_K = 8
INNER = 256  # thin, so that the demo stays quick
SHARED = "shared expert"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes of one layer and how its rows travel. Expert j lives on rank j // experts_per_rank."""

    ranks: int
    tokens: int  # per rank
    experts: int
    int8_rows: bool
    seed: int

    @property
    def experts_per_rank(self) -> int:
        """MoE experts that one rank holds."""
        return self.experts // self.ranks

    @property
    def all_tokens(self) -> int:
        """Tokens of all ranks together."""
        return self.ranks * self.tokens


@dataclass(frozen=True, kw_only=True)
class Gated:
    """The weights of one gated MLP, bfloat16: gate and up [INNER, HIDDEN], down [HIDDEN, INNER]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def words(layer: Layer, rank: int) -> list[str]:
    """Return the rank's tokens as text: its piece of the shipped text, which starts anew at its end."""
    text = (resources.files("commfuse") / "data" / "demo.txt").read_text(encoding="utf-8").lower()
    found = re.findall(r"[a-z]+|[^a-z\s]", text)
    first = rank * layer.tokens
    return [found[i % len(found)] for i in range(first, first + layer.tokens)]


def token_rows(layer: Layer, rank: int) -> torch.Tensor:
    """Return the rank's rows [tokens, HIDDEN] bfloat16: per word a random embedding, and a weak code of its position; RMS 1."""
    rows = torch.stack([_embedding(layer, word) for word in words(layer, rank)])
    position = torch.arange(rank * layer.tokens, (rank + 1) * layer.tokens, dtype=torch.float32)
    wavelength = 10_000 ** (torch.arange(HIDDEN) // 2 * 2 / HIDDEN)
    angle = position[:, None] / wavelength
    rows += 0.25 * torch.where(torch.arange(HIDDEN) % 2 == 0, angle.sin(), angle.cos())
    return (rows * rows.square().mean(1, keepdim=True).rsqrt()).bfloat16()


def router_weight(layer: Layer) -> torch.Tensor:
    """Return the router's weight [experts, HIDDEN], float64."""
    return torch.randn(layer.experts, HIDDEN, generator=_generator(layer, "router"), dtype=torch.float64) / math.sqrt(HIDDEN)


def gated_weights(layer: Layer, name: str) -> Gated:
    """Return the weights of the expert ``name``, which is `SHARED` or what `expert_name` gives."""
    generator = _generator(layer, name)
    return Gated(
        gate=_uniform((INNER, HIDDEN), generator),
        up=_uniform((INNER, HIDDEN), generator),
        down=_uniform((HIDDEN, INNER), generator),
    )


def expert_name(expert: int) -> str:
    """Return the name under which MoE expert ``expert`` has its weights."""
    return f"expert {expert}"


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Uniform bfloat16 numbers, of which a product with ``shape[1]`` summands keeps the size; from int8, which is made quickest."""
    numbers = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    return numbers.bfloat16() / (127 / math.sqrt(3) * math.sqrt(shape[1]))


def _embedding(layer: Layer, word: str) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=_generator(layer, f"word {word}"))


def _generator(layer: Layer, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{layer.seed} {name}".encode()))
