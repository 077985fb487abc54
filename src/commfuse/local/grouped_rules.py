"""The forms of a grouped product, and what is wrong with a call that has none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, Rules, readable, show

INT8, INT32 = torch.int8, torch.int32
PREFIX_SUMS, COUNTS, PAIRS = 0, 1, 2  # group_list_type
_NAME = "npu_grouped_matmul"
_SPLITS = {-1: (0, 1), 0: (2, 3), 2: (2, 3)}  # group_type -> split_item


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call; a list that is not given is empty."""

    x: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    scale: Sequence[Tensor]
    antiquant_scale: Sequence[Tensor]
    antiquant_offset: Sequence[Tensor]
    per_token_scale: Sequence[Tensor]
    group_list: Tensor | None
    group_type: int | None
    group_list_type: int
    split_item: int
    output_dtype: torch.dtype | None

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds the weights of all groups."""
        return self.weight[0].dim() == 3

    @property
    def num_groups(self) -> int:
        """Number of groups that the weights are for."""
        return self.weight[0].size(0) if self.stacked else len(self.weight)


def check(call: Call, reserved: Mapping[str, object]) -> None:
    """Raise one error with every rule that the call's form, types and shapes break."""
    rules = Rules(_NAME, x=call.x, weight=call.weight, group_list=call.group_list)
    _check_reserved(rules, reserved)
    lists = _is_list(rules, "x", call.x) & _is_list(rules, "weight", call.weight)
    if _check_form(rules, call) and lists and _check_matrices(rules, call):
        _check_types(rules, call)
        _check_lists(rules, call)
        _check_group_list(rules, call)
    rules.raise_broken()


def check_sizes(call: Call) -> None:
    """Raise if a group list disagrees with the rows of several x, where its values can be read."""
    if call.group_list is None or not readable(call.group_list):
        return
    rows = [x.size(0) for x in call.x]
    found = [stop - start for _, start, stop in segments(call.group_list, call.group_list_type, len(rows), sum(rows))]
    rules = Rules(_NAME, x=call.x, group_list=call.group_list)
    rules.need(found == rows, "rows per group in group_list", found, "{}, the rows of each x", "it may be None", rows)
    rules.raise_broken()


def segments(group_list: Tensor, list_type: int, num_groups: int, num_rows: int) -> list[tuple[int, int, int]]:
    """Return (group, first row, row past its last) in the order of the rows.

    Raises:
        ArgumentError: for sizes that are negative or pass ``num_rows``, or a group that has no weight.
    """
    rules = Rules(_NAME, group_list=group_list)
    values = group_list.tolist()
    groups = list(range(num_groups))
    if list_type == PAIRS:
        used = [count for _, count in values]
        values = values[: used.index(0) if 0 in used else None]
        groups = [group for group, _ in values]
        inside = all(0 <= group < num_groups for group in groups)
        rules.need(inside, "group_list[:, 0]", groups, "in 0..{}", "name groups that have a weight", num_groups - 1)
        values = [count for _, count in values]
    if list_type == PREFIX_SUMS:
        fits = rules.ends("group_list", values, num_rows)
    else:
        fits = rules.counts("group_list", values, num_rows)
        values = torch.tensor(values, dtype=torch.int64).cumsum(0).tolist() if fits else values
    rules.raise_broken()
    return list(zip(groups, [0, *values], values, strict=False))


def _check_reserved(rules: Rules, reserved: Mapping[str, object]) -> None:
    for name, value in reserved.items():
        if name == "act_type":
            rules.only(name, value, (None, 0), "apply the activation to the result, for instance with npu_swiglu")
        elif name.endswith("_dtype"):
            rules.only(name, value, (None,), "4-bit and 8-bit float types are not computed here")
        else:
            rules.need(_not_given(value), name, value, "None", "it is reserved in torch_npu as well")


def _is_list(rules: Rules, name: str, value: object) -> bool:
    fits = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(v, Tensor) for v in value)
    return rules.need(fits, name, value, "a list of tensors", f"pass {name}=[tensor]")


def _check_form(rules: Rules, call: Call) -> bool:
    remedy = "0 groups rows, 2 groups the summed dimension, -1 has one x per weight"
    if not rules.only("group_type", call.group_type, (-1, 0, 2), remedy):
        return False
    assert call.group_type is not None
    result = "one tensor per weight" if call.group_type == -1 else "one tensor"
    remedy = f"group_type {call.group_type} returns {result}"
    rules.only("split_item", call.split_item, _SPLITS[call.group_type], remedy)
    remedy = "0 is prefix sums, 1 is counts, 2 is pairs of group and count"
    return rules.only("group_list_type", call.group_list_type, (PREFIX_SUMS, COUNTS, PAIRS), remedy)


def _check_matrices(rules: Rules, call: Call) -> bool:
    """Check numbers and shapes of x and weight; return whether they fit together."""
    x, weight = call.x, call.weight
    x_dims = range(2, 7) if call.group_type == -1 else (2,)
    w_dims = (2, 3) if call.group_type == 0 and len(x) == len(weight) == 1 else (2,)
    fits = True
    for i, tensor in enumerate(x):
        fits &= rules.tensor(tensor, f"x[{i}]", x_dims, (*FLOATS, INT8))
    for i, tensor in enumerate(weight):
        fits &= rules.tensor(tensor, f"weight[{i}]", w_dims, (*FLOATS, INT8))
    numbers = len(x), len(weight)
    if call.group_type == 2:
        fits &= rules.need(numbers == (1, 1), "len(x), len(weight)", numbers, "1, 1", "pass them one by one")
        return fits and _same(rules, "weight[0].size(0)", weight[0].size(0), "T of x [K, T]", x[0].size(1))
    if call.group_type == -1 or len(x) > 1:
        remedy = "each x has a weight of its own"
        fits &= rules.need(len(x) == len(weight), "len(x), len(weight)", numbers, "equal", remedy)
    if not fits:
        return False
    for i, tensor in enumerate(weight):
        inner = x[i if len(x) > 1 else 0].size(-1)
        fits &= _same(rules, f"weight[{i}].size(-2)", tensor.size(-2), "K of x", inner)
        if call.group_type == 0:
            fits &= _same(rules, f"weight[{i}].size(-1)", tensor.size(-1), "N of weight[0]", weight[0].size(-1))
    return fits


def _same(rules: Rules, subject: str, found: int, meaning: str, wanted: int) -> bool:
    remedy = "a weight is [K, N]: pass a transposed view if it is stored the other way"
    return rules.need(found == wanted, subject, found, "{}, {}", remedy, wanted, meaning)


def _check_types(rules: Rules, call: Call) -> None:
    x_type, w_type = call.x[0].dtype, call.weight[0].dtype
    for name, tensors in (("x", call.x), ("weight", call.weight)):
        for i, tensor in enumerate(tensors):
            fits, remedy = tensor.dtype == tensors[0].dtype, "convert them to one type"
            rules.need(fits, f"{name}[{i}].dtype", tensor.dtype, f"that of {name}[0]", remedy)
    if x_type not in (*FLOATS, INT8) or w_type not in (*FLOATS, INT8):
        return
    quantised = w_type == INT8 and call.group_type != 2
    if x_type == INT8 and quantised:
        _check_int8(rules, call)
        return
    if quantised:
        remedy = "int8 weights need it to multiply a float x"
        rules.need(not _not_given(call.antiquant_scale), "antiquant_scale", None, "a list per weight", remedy)
    else:
        pair = show(x_type), show(w_type)
        remedy = "int8 x needs int8 weights, and group_type 2 has no int8 form"
        rules.need(x_type == w_type != INT8, "types of x and weight", pair, "the same float type", remedy)
        _absent(rules, call, ("antiquant_scale", "antiquant_offset"), "None", "they belong to int8 weights")
    rules.only("output_dtype", call.output_dtype, (None, *FLOATS), "None takes the type of x")
    _absent(rules, call, ("scale", "per_token_scale"), "None", "they belong to an int8 x")


def _absent(rules: Rules, call: Call, names: Sequence[str], allowed: str, remedy: str) -> None:
    for name in names:
        rules.need(_not_given(getattr(call, name)), name, getattr(call, name), allowed, remedy)


def _not_given(value: object) -> bool:
    return value is None or (isinstance(value, Sequence) and len(value) == 0)


def _check_int8(rules: Rules, call: Call) -> None:
    remedy = "int32 gives the plain sums; a float type needs scale"
    rules.only("output_dtype", call.output_dtype, (INT32, *FLOATS), remedy)
    if call.output_dtype == INT32:
        _absent(rules, call, ("scale", "per_token_scale"), "None with output_dtype int32", remedy)
    elif call.output_dtype in FLOATS:
        rules.need(not _not_given(call.scale), "scale", None, "a list per weight", remedy)
    _absent(rules, call, ("antiquant_scale", "antiquant_offset"), "None with int8 x", "use scale")


def _check_lists(rules: Rules, call: Call) -> None:
    int8 = call.x[0].dtype == INT8
    if call.group_type == 2:
        _absent(rules, call, ("bias",), "None with group_type 2", "add it to the result")
    else:
        _check_per_weight(rules, call, "bias", call.bias, (INT32,) if int8 else FLOATS)
    _check_per_weight(rules, call, "scale", call.scale, (torch.float32, torch.bfloat16))
    _check_per_weight(rules, call, "antiquant_scale", call.antiquant_scale, FLOATS)
    _check_per_weight(rules, call, "antiquant_offset", call.antiquant_offset, FLOATS)
    scales = call.per_token_scale
    if _not_given(scales) or not _is_list(rules, "per_token_scale", scales):
        return
    found, wanted = len(scales), len(call.x)
    if rules.equal("len(per_token_scale)", found, wanted, "one for each x"):
        for i, (scale, x) in enumerate(zip(scales, call.x, strict=True)):
            name, shape = f"per_token_scale[{i}]", tuple(x.shape[:-1])
            if rules.tensor(scale, name, (len(shape),), (torch.float32,)):
                rules.shape(name, scale, f"one per row of x[{i}]", shape)


def _check_per_weight(rules: Rules, call: Call, name: str, tensors: Sequence[Tensor], types: tuple[torch.dtype, ...]) -> None:
    if _not_given(tensors) or not _is_list(rules, name, tensors):
        return
    count = len(call.weight)
    if rules.equal(f"len({name})", len(tensors), count, "one for each weight"):
        for i, (tensor, weight) in enumerate(zip(tensors, call.weight, strict=True)):
            shape = (weight.size(0), weight.size(2)) if call.stacked else (weight.size(1),)
            if rules.tensor(tensor, f"{name}[{i}]", (len(shape),), types):
                rules.shape(f"{name}[{i}]", tensor, "(E, N)" if call.stacked else "(N,)", shape)


def _check_group_list(rules: Rules, call: Call) -> None:
    if call.group_type == -1:
        _absent(rules, call, ("group_list",), "None with group_type -1", "group_type 0 splits the rows of one x")
    elif call.group_list is None:
        remedy = "it says which rows belong to which weight"
        several = call.group_type == 0 and len(call.x) > 1
        rules.need(several, "group_list", None, "a tensor", remedy)
    elif rules.tensor(call.group_list, "group_list", (2,) if call.group_list_type == PAIRS else (1,), INDICES):
        found = call.group_list.size(-1 if call.group_list_type == PAIRS else 0)
        if call.group_list_type == PAIRS:
            rules.equal("group_list.size(1)", found, 2, "a row is a group and its count")
            single = call.group_type == 0 and len(call.x) == 1
            remedy = "pairs go with group_type 0 and one x"
            rules.need(single, "group_list_type", PAIRS, "0 or 1 here", remedy)
        elif call.group_type == 0:
            rules.equal("len(group_list)", found, call.num_groups, "one entry per weight")
