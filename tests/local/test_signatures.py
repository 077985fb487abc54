"""Names, order, kind and defaults of the arguments, against torch_npu's published schemas."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from commfuse import local

# torch_npu 2.14; [] stands for an empty list.
PUBLISHED = """
npu_dequant_swiglu_quant(x, *, weight_scale=None, activation_scale=None, bias=None, quant_scale=None, quant_offset=None,
    group_index=None, activate_left=False, quant_mode=0, dst_type=None, round_mode=None, activate_dim=None, swiglu_mode=0,
    clamp_limit=7.0, glu_alpha=1.702, glu_bias=1.0)
npu_dynamic_quant(input, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode='pertoken', dst_type_max=0.0)
npu_grouped_matmul(x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None,
    per_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None,
    activation_quant_offset=None, split_item=0, group_type=None, group_list_type=0, act_type=0, tuning_config=None,
    output_dtype=None, x_dtype=None, weight_dtype=None, scale_dtype=None, per_token_scale_dtype=None)
npu_moe_finalize_routing(expanded_permuted_rows, skip1, skip2, bias, scales, expanded_src_to_dst_row,
    export_for_source_row, drop_pad_mode=0, k=1)
npu_moe_gating_top_k(x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=0,
    renorm=0, norm_type=0, out_flag=False, routed_scaling_factor=1.0, eps=1e-20)
npu_moe_gating_top_k_softmax(x, finished=None, k=1)
npu_moe_init_routing_v2(x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1,
    drop_pad_mode=0, expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1, active_expert_range=[],
    row_idx_type=0, x_dtype=None)
npu_moe_re_routing(tokens, expert_token_num_per_rank, *, per_token_scales=None, expert_token_num_type=1, idx_type=0,
    tokens_dtype=None)
npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False)
npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None)
npu_swiglu(input, dim=-1)
"""


def _published() -> dict[str, str]:
    return {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^(\w+)\((.*?)\)$", PUBLISHED, re.M | re.S)}


@pytest.mark.parametrize("name", local.__all__)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(local, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(plain))[1:-1].replace("active_expert_range=()", "active_expert_range=[]")
    assert text == _published()[name]


def test_all_eleven_are_there_and_sorted() -> None:
    assert list(local.__all__) == sorted(_published())


@pytest.mark.parametrize("name", local.__all__)
def test_page_has_a_row_for_every_argument(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "local.md").read_text()
    section = page.split(f"## {name}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (same|wider|narrower|refused|ignored) \|", section, re.M)
    assert [argument for argument, _ in rows] == list(inspect.signature(getattr(local, name)).parameters)


@pytest.mark.parametrize("name", local.__all__)
def test_docstring_names_every_argument(name: str) -> None:
    function = getattr(local, name)
    text = inspect.getdoc(function) or ""
    assert "Returns:" in text
    assert "Raises:" in text
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    {argument}: ", text, re.M), argument
