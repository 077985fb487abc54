"""Equality of results: bitwise where bits are promised, otherwise within the tolerance of the dtype."""

from __future__ import annotations

import torch

# Relative and absolute bounds for results of a matrix product, whose order of summation is free. Two float32 sums of the same terms
# differ in their last bits. Rounded to a half type, that is one unit in the last place at most: the relative bound. A sum that cancels
# keeps the errors of its terms: the absolute bound, for terms near 1 and inner widths up to some hundreds.
MATMUL_TOLERANCE = {
    torch.bfloat16: (2**-7, 2**-14),
    torch.float16: (2**-10, 2**-14),
    torch.float32: (2**-17, 2**-14),
    torch.float64: (2**-46, 2**-43),
    torch.int32: (0.0, 0.0),
    torch.int8: (0.0, 0.0),
}


def difference(name: str, expected: torch.Tensor | None, actual: torch.Tensor | None, rows: int | None = None) -> str:
    """Return '' if ``actual`` equals ``expected`` bit for bit in its first ``rows`` entries along dim 0 (None: all), else what differs.

    NaN equals NaN, whatever its payload; shapes and dtypes must be equal in full.
    """
    if expected is None or actual is None:
        return "" if expected is actual else f"{name}: expected {_kind(expected)}, got {_kind(actual)}"
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{name}: expected {_kind(expected)}, got {_kind(actual)}"
    wanted, got = expected[:rows], actual[:rows]
    same = (wanted == got) | ((wanted != wanted) & (got != got))
    if wanted.is_floating_point():
        same &= (torch.signbit(wanted) == torch.signbit(got)) | (wanted != wanted)
    return _first_wrong(name, wanted, got, ~same)


def outside(name: str, expected: torch.Tensor, actual: torch.Tensor, bounds: tuple[float, float]) -> str:
    """Return '' if ``|actual - expected| <= absolute + relative * |expected|`` everywhere, else what differs; ``bounds`` is both."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{name}: expected {_kind(expected)}, got {_kind(actual)}"
    relative, absolute = bounds
    close = torch.isclose(actual.double(), expected.double(), rtol=relative, atol=absolute, equal_nan=True)
    return _first_wrong(name, expected, actual, ~close)


def _first_wrong(name: str, expected: torch.Tensor, actual: torch.Tensor, wrong: torch.Tensor) -> str:
    count = int(wrong.sum())
    if not count:
        return ""
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{name}: {count} of {wrong.numel()} values differ; the first at {place}: "
        f"expected {expected[place].item()!r}, got {actual[place].item()!r}"
    )


def _kind(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
