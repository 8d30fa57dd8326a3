"""The running statistics against Welford's rows one by one, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from helpers.reference import Welford

from mend_lightning.editors.normalizer import EPSILON, RunningNormalizer, merge_moments, moments

WIDTH = 4


def row_by_row(*batches: torch.Tensor) -> Welford:
    welford = Welford(WIDTH)
    for row in torch.cat(batches).double():
        welford.add(row)
    return welford


def some_rows(count: int, shift: float = 3.0) -> torch.Tensor:
    return torch.randn(count, WIDTH) * torch.tensor([1.0, 1e-3, 10.0, 1.0]) + shift


def check(normalizer: RunningNormalizer, expected: Welford) -> None:
    assert int(normalizer.count) == expected.count
    torch.testing.assert_close(normalizer.mean.double(), expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalizer.std.double(), expected.std(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [1, 0, 30], [0, 2], [20, 3, 1, 0, 7]])
def test_any_batches_are_the_rows_one_by_one(sizes):
    normalizer, batches = RunningNormalizer(WIDTH), [some_rows(size) for size in sizes]
    for batch in batches:
        normalizer.update(batch)
    expected = row_by_row(*batches)
    check(normalizer, expected)
    rows = some_rows(6)
    normalized = torch.stack([(row - expected.mean) / (expected.std() + EPSILON) for row in rows.double()])
    torch.testing.assert_close(normalizer(rows).double(), normalized, rtol=2e-3, atol=2e-3)


def test_matches_torch_on_all_rows_at_once():
    rows = torch.randn(50, WIDTH)
    normalizer = RunningNormalizer(WIDTH)
    for batch in rows.split(7):
        normalizer.update(batch)
    torch.testing.assert_close(normalizer.mean, rows.mean(0))
    torch.testing.assert_close(normalizer.std, rows.std(0, unbiased=True))


def test_merge_is_symmetric_and_exact():
    one, two = (torch.randn(size, WIDTH, dtype=torch.float64) for size in (3, 8))
    for parts in ((one, two), (two, one)):
        count, mean, m2 = merge_moments(*moments(parts[0]), *moments(parts[1]))
        rows = torch.cat(parts)
        assert int(count) == 11
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(m2, (rows - rows.mean(0)).square().sum(0))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (3, 0)])
def test_merge_with_nothing(sizes):
    parts = [torch.randn(size, WIDTH) for size in sizes]
    count, mean, m2 = merge_moments(*moments(parts[0]), *moments(parts[1]))
    assert int(count) == sum(sizes)
    expected = moments(torch.cat(parts))
    torch.testing.assert_close((mean, m2), (expected[1], expected[2]))


@pytest.mark.parametrize("count", [0, 1])
def test_rows_pass_unchanged_before_two_were_seen(count):
    normalizer, rows = RunningNormalizer(WIDTH), some_rows(3)
    normalizer.update(some_rows(count))
    assert torch.equal(normalizer(rows), rows)


def test_empty_update_changes_nothing():
    normalizer = RunningNormalizer(WIDTH)
    normalizer.update(some_rows(5))
    before = copy.deepcopy(normalizer.state_dict())
    normalizer.update(torch.empty(0, WIDTH))
    assert all(torch.equal(value, before[name]) for name, value in normalizer.state_dict().items())


def test_unit_that_never_varied():
    """A dead unit that fires at last is centred; the original's division by 1e-7 can be asked for."""
    rows = some_rows(5)
    rows[:, 2] = 0.5
    outputs = {}
    for kind in ("center", "original"):
        normalizer = RunningNormalizer(WIDTH, kind)
        normalizer.update(rows)
        outputs[kind] = normalizer(rows + 1)
    torch.testing.assert_close(outputs["center"][:, 2], torch.ones(5))
    torch.testing.assert_close(outputs["original"][:, 2], torch.full((5,), 1 / EPSILON))
    torch.testing.assert_close(outputs["center"][:, [0, 1, 3]], outputs["original"][:, [0, 1, 3]])


def test_count_beyond_two_to_the_24():
    """There float32 cannot count on: 2^24 + 1 is 2^24."""
    normalizer = RunningNormalizer(WIDTH)
    normalizer.update(some_rows(4))
    normalizer.count.fill_(2**24)
    for _ in range(3):
        normalizer.update(some_rows(1))
    assert int(normalizer.count) == 2**24 + 3
    mean = normalizer.mean.clone()
    normalizer.update(torch.full((2**14, WIDTH), 1e4))
    assert (normalizer.mean > mean).all()


def test_update_does_not_ask_for_gradients():
    normalizer, rows = RunningNormalizer(WIDTH), some_rows(4).requires_grad_()
    normalizer.update(rows)
    assert not any(buffer.requires_grad for buffer in normalizer.buffers())
    normalizer(rows).sum().backward()
    torch.testing.assert_close(rows.grad, (1 / (normalizer.std + EPSILON)).expand(4, -1))


def test_resumed_statistics_continue():
    batches = [some_rows(size) for size in (3, 4, 5)]
    uninterrupted, before, after = (RunningNormalizer(WIDTH) for _ in range(3))
    for batch in batches:
        uninterrupted.update(batch)
    for batch in batches[:2]:
        before.update(batch)
    after.load_state_dict(before.state_dict())
    after.update(batches[2])
    assert set(after.state_dict()) == {"count", "mean", "m2"}
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name


# Rows of each of two ranks, update by update: as many, more, none, and nobody any.
RANK_SIZES = [(3, 3), (1, 6), (0, 4), (0, 0), (5, 0)]


def rows_of_rank(update: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * update + rank)
    return torch.randn(RANK_SIZES[update][rank], WIDTH, generator=generator) + 2


def update_on_a_rank(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    normalizer = RunningNormalizer(WIDTH)
    for update in range(len(RANK_SIZES)):
        normalizer.update(rows_of_rank(update, rank))
    torch.save(normalizer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    # Forked: importing torch anew takes longer than all else.
    torch.multiprocessing.start_processes(update_on_a_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    normalizer = RunningNormalizer(WIDTH)
    normalizer.load_state_dict(states[0])
    updates = range(len(RANK_SIZES))
    check(normalizer, row_by_row(*(rows_of_rank(update, rank) for update in updates for rank in range(2))))
