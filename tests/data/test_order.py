"""The order of tasks: for any number of processes, resumed, and in evaluation."""

from __future__ import annotations

from itertools import islice

import pytest
from torch.utils.data.distributed import DistributedSampler

from mend_lightning.data.order import ResumableLoader, TaskDataset, TaskOrder

SIZE, GLOBAL_BATCH = 22, 4


class EchoSampler:
    """Stands in for a TaskSampler: a task is its own key."""

    def __len__(self) -> int:
        return SIZE

    def group(self, epoch: int, index: int, edits_at_once: int, limit: int | None) -> tuple[int, int]:
        return epoch, index


def training_order(rank: int = 0, world_size: int = 1, seed: int = 0, epoch: int = 0) -> TaskOrder:
    order = TaskOrder(SIZE, GLOBAL_BATCH // world_size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
    order.set_epoch(epoch)
    return order


def loader(workers: int = 0) -> ResumableLoader:
    """One process with batches of four: five whole batches an epoch."""
    dataset = TaskDataset(EchoSampler())
    return ResumableLoader(
        dataset, batch_size=GLOBAL_BATCH, sampler=training_order(), collate_fn=list, num_workers=workers
    )


def epochs(loader: ResumableLoader, first: int, count: int) -> list[list[tuple[int, int]]]:
    """Batches of several epochs; the Trainer tells the sampler the epoch."""
    found = []
    for epoch in range(first, first + count):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def chunks(keys: list, size: int) -> list[list]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size, epoch):
    alone = chunks(list(training_order(epoch=epoch)), GLOBAL_BATCH)
    each = [
        chunks(list(training_order(r, world_size, epoch=epoch)), GLOBAL_BATCH // world_size) for r in range(world_size)
    ]
    together = [[key for part in parts for key in part] for parts in zip(*each)]
    assert together == alone
    assert len(alone) == SIZE // GLOBAL_BATCH


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_takes_no_task_twice_and_only_whole_batches(world_size):
    orders = [training_order(rank, world_size) for rank in range(world_size)]
    keys = [key for order in orders for key in order]
    assert len(keys) == len(set(keys)) == 20
    assert {len(order) for order in orders} == {20 // world_size}
    assert all(len(order) == len(list(order)) for order in orders)


def test_epochs_and_seeds_have_orders_of_their_own():
    def indices(**settings):
        return [index for _, index in training_order(**settings)]

    assert indices() == indices()
    assert indices() != sorted(indices())
    assert indices(epoch=1) != indices()
    assert indices(seed=1) != indices()
    assert {epoch for epoch, _ in training_order(epoch=7)} == {7}


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_repeats_none_and_loses_none(size, world_size):
    orders = [TaskOrder(size, 3, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    for order in orders:
        order.set_epoch(5)
    assert sorted(key for order in orders for key in order) == [(0, index) for index in range(size)]
    assert all(len(order) == len(list(order)) for order in orders)


def test_too_few_tasks_for_a_batch():
    order = TaskOrder(3, batch_size=2, shuffle=True, world_size=2)
    assert (len(order), list(order)) == (0, [])


def test_lightning_takes_it_for_a_distributed_sampler():
    assert isinstance(training_order(), DistributedSampler)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [1, 3, 4])
def test_resumed_in_mid_epoch(taken, workers):
    expected = epochs(loader(), first=2, count=3)
    before = loader(workers)
    before.sampler.set_epoch(2)
    batches = iter(before)
    given = list(islice(batches, taken))
    state = before.state_dict()
    del batches
    after = loader(workers)
    after.load_state_dict(state)
    assert after.sampler.epoch == 2
    assert given + list(after) + epochs(after, 3, 2) == expected


def test_resumed_twice_in_one_epoch():
    expected, given, state = epochs(loader(), 0, 1), [], None
    for _ in range(5):
        one = loader()
        if state:
            one.load_state_dict(state)
        given.append(next(iter(one)))
        state = one.state_dict()
    assert given == expected


def test_resumed_at_the_end_of_an_epoch():
    """Whether the loader knows that it is at the end, or has just given out its last batch."""
    expected = epochs(loader(), 0, 3)
    for finished in (True, False):
        before = loader()
        batches = iter(before)
        given = list(batches) if finished else list(islice(batches, 5))
        after = loader()
        after.load_state_dict(before.state_dict())
        assert after.sampler.epoch == 1
        assert given + list(after) + epochs(after, 2, 1) == expected


def test_an_epoch_left_early_after_a_resumption_moves_only_itself():
    """With `limit_train_batches` the Trainer stops asking; the next epoch begins at its beginning."""
    after = loader()
    after.load_state_dict({"epoch": 0, "batches": 2})
    batches = iter(after)
    assert next(batches) == epochs(loader(), 0, 1)[2]
    assert epochs(after, 1, 1) == epochs(loader(), 1, 1)


def test_state_before_the_first_batch():
    one = loader()
    state = one.state_dict()
    other = loader()
    other.load_state_dict(state)
    assert list(other) == epochs(loader(), 0, 1)
