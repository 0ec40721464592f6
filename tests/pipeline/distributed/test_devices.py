"""The device of a rank, of GPUs that are made up: what torch.cuda would say under each binding."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed.devices import choose_device, refuse_shared_gpu
from pipeline.distributed.places import Place


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch):
    """Lets a rank see so many GPUs; the numbers of those that it took are appended to the list that is returned."""
    taken: list[torch.device] = []

    def see(count: int, uuids: tuple[str, ...] = ()) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index])
        )
        return taken

    return see


def place(rank: int, world: int = 4, local_world: int = 4) -> Place:
    return Place(rank, world, rank % local_world, "slurm", local_world)


class Ranks:
    """Stands for the other ranks of an agreement: what they would have said."""

    def __init__(self, *others: object) -> None:
        self._others = others

    def gather(self, own: object) -> list[object]:
        return [*self._others, own]


@pytest.mark.parametrize(("binding", "seen"), [("none: all of the node", 4), ("--gpus-per-task=1", 1)])
def test_each_rank_of_a_node_has_a_gpu_of_its_own(visible, binding: str, seen: int) -> None:
    taken = visible(seen)
    found = [choose_device(place(rank, 8)) for rank in range(8)]
    numbers = [0, 1, 2, 3] * 2 if seen == 4 else [0] * 8  # bound: number 0 of what it sees, another card each
    assert [device for _, device in found] == [torch.device("cuda", number) for number in numbers] == taken
    assert [own.local_rank for own, _ in found] == numbers
    assert [own.rank for own, _ in found] == list(range(8))


def test_a_node_without_gpus_computes_on_its_processor(visible) -> None:
    taken = visible(0)
    assert choose_device(place(3)) == (place(3), torch.device("cpu"))
    assert taken == []


def test_more_ranks_than_gpus_are_refused(visible) -> None:
    visible(2)
    with pytest.raises(ValueError, match="local rank 2 has no GPU, 2 visible; start at most 2 ranks per node"):
        choose_device(place(2))


def test_two_ranks_on_one_card_are_refused_by_its_serial_number(visible, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --gpu-bind both tasks may be shown the same card as their number 0."""
    monkeypatch.setattr("pipeline.distributed.devices.host_name", lambda: "node1")
    visible(1, ("GPU-b",))
    device = torch.device("cuda", 0)
    refuse_shared_gpu(place(2), device, Ranks(("node1", "GPU-a"), ("node2", "GPU-c")))
    with pytest.raises(ValueError, match=r"ranks 1 and 2 on node1 compute on one GPU \(GPU-b\); .*--gpus-per-task=1"):
        refuse_shared_gpu(place(2), device, Ranks(("node1", "GPU-a"), ("node1", "GPU-b")))


def test_ranks_on_processors_share_them(visible) -> None:
    visible(0)
    others = itertools.repeat(("node1", None), 2)
    refuse_shared_gpu(place(2), torch.device("cpu"), Ranks(*others))
