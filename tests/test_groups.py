"""From names and ProcessGroup objects to domains: what is there, what is not, what is no more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import groups
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.conftest import RunRanks

ALONE = RoundTrip(id="alone", world_size=1, num_tokens=(3,), hidden=8)
PAIR = RoundTrip(id="pair", world_size=2, num_tokens=(3, 3), hidden=8)


def world_of_one() -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.fixture(autouse=True)
def no_group_of_others() -> None:
    """Other tests of this process keep a group of one for their own use."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    yield world_of_one()
    if dist.is_initialized():
        dist.destroy_process_group()


def dispatch(group: Any) -> torch.Tensor:
    return commfuse.npu_moe_distribute_dispatch_v2(**ALONE.dispatch_args(0), group_ep=group)[0]


def test_name_and_object_are_the_same_domain(world: dist.ProcessGroup) -> None:
    found = groups.resolve(world)
    assert groups.resolve(world.group_name) is found
    assert (found.name, found.size, found.rank, found.members) == (world.group_name, 1, 0, (0,))
    assert torch.equal(dispatch(world)[:3], dispatch(world.group_name)[:3])


def test_a_domain_among_all_is_itself_and_parts_share_its_state(world: dist.ProcessGroup) -> None:
    found = groups.resolve(world)
    assert found.among(None) is found
    assert found.among((0,)) is found
    part = found.among(())
    assert part.members == ()
    assert part.shared is found.shared


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_an_unknown_name_lists_those_there_are(world: dist.ProcessGroup, name: str) -> None:
    other = dist.new_group()
    with pytest.raises(commfuse.GroupError) as caught:
        dispatch(name)
    expected = f"group_ep: no group named {name!r} in this process; there are {world.group_name!r}, {other.group_name!r}"
    assert str(caught.value) == f"npu_moe_distribute_dispatch_v2: {expected}"


def test_an_unknown_name_without_any_group_says_what_is_missing() -> None:
    with pytest.raises(commfuse.GroupError, match=r"group_ep: no group named '0' .* none \(init_process_group was not called\)"):
        dispatch("0")


@pytest.mark.parametrize(("group", "kind"), [(0, "int"), (None, "NoneType"), (b"0", "bytes")])
def test_neither_name_nor_group(world: dist.ProcessGroup, group: Any, kind: str) -> None:
    with pytest.raises(commfuse.GroupError, match=f"group_ep: .*must be a name or a ProcessGroup, got {kind}"):
        dispatch(group)


def test_a_new_group_under_an_old_name_starts_afresh(world: dist.ProcessGroup) -> None:
    dispatch(world)
    old, name = groups.resolve(world), world.group_name
    assert old.shared
    dist.destroy_process_group()
    new = groups.resolve(world_of_one())
    assert new.name == name
    assert new is not old
    assert new.shared == {}
    assert dispatch(name).shape == (9, 8)


def test_a_destroyed_group_is_refused_by_name_and_by_object(world: dist.ProcessGroup) -> None:
    name = world.group_name
    dispatch(world)
    dist.destroy_process_group()
    with pytest.raises(commfuse.GroupError, match=f"group_ep: group {name!r} has been destroyed; make a new one"):
        dispatch(world)
    with pytest.raises(commfuse.GroupError, match=f"group_ep: no group named {name!r} in this process"):
        dispatch(name)


def test_groups_are_held_weakly() -> None:
    found = groups.resolve(world_of_one())
    dist.destroy_process_group()
    gc.collect()
    assert found.process_group() is None
    with pytest.raises(commfuse.GroupError, match=f"group {found.name!r}: its process group has been destroyed; make a new one"):
        found.gather(torch.zeros(1))


def reads(rank: int, group: dist.ProcessGroup) -> str:
    try:
        commfuse.npu_moe_distribute_dispatch_v2(**PAIR.dispatch_args(rank), group_ep=group)
    except commfuse.GroupError as error:
        return str(error)
    return ""


def destroy_one_of_two(rank: int) -> list[str]:
    first, second = dist.new_group(), dist.new_group()
    texts = [reads(rank, first), reads(rank, second)]
    dist.destroy_process_group(second)
    return [*texts, reads(rank, second), reads(rank, first)]


def test_a_destroyed_group_does_not_touch_the_others(run_ranks: RunRanks) -> None:
    for texts in run_ranks(2, destroy_one_of_two):
        assert [texts[0], texts[1], texts[3]] == [""] * 3
        assert "has been destroyed; make a new one" in texts[2]
