"""Batches of edits whose rows are about equally long: their order, and that little of them is padding."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from helpers.bases import FORMATS, small_tokenizer
from helpers.questions import write_questions

from mend_lightning.data import buckets
from mend_lightning.data.buckets import TaskLengths
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.order import ResumableLoader, TaskDataset, TaskOrder
from mend_lightning.data.records import read_records
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.errors import TokenizerError
from mend_lightning.models.inputs.encoder import Encoder

pytest_plugins = ["helpers.bases"]
SIZE, GLOBAL_BATCH = 103, 4


class EchoSampler:
    """Stands in for a TaskSampler: a task is its own key."""

    def __len__(self) -> int:
        return SIZE

    def group(self, epoch: int, index: int, edits_at_once: int, limit: int | None) -> tuple[int, int]:
        return epoch, index


def length(key: tuple[int, int]) -> tuple[int, int]:
    """Other ones each epoch, as the draws are."""
    draw = random.Random(str(key))
    return draw.randint(8, 40), draw.randint(8, 40)


@pytest.fixture
def asked(monkeypatch) -> list[list]:
    """What lengths were asked for, in stretches of about eight batches."""
    monkeypatch.setattr(buckets, "BATCHES_AT_ONCE", 8)
    return []


def order(asked: list, rank: int = 0, world_size: int = 1, seed: int = 0, epoch: int = 0) -> TaskOrder:
    def lengths(keys):
        asked.append(list(keys))
        return [length(key) for key in keys]

    found = TaskOrder(SIZE, GLOBAL_BATCH // world_size, True, seed, rank, world_size, lengths=lengths)
    found.set_epoch(epoch)
    return found


def chunks(keys: list, size: int) -> list[list]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def test_global_batches_do_not_depend_on_the_number_of_processes(asked):
    for epoch in (0, 3):
        alone = chunks(list(order(asked, epoch=epoch)), GLOBAL_BATCH)
        for world_size in (2, 4):
            ranks = [list(order(asked, rank, world_size, epoch=epoch)) for rank in range(world_size)]
            together = zip(*(chunks(keys, GLOBAL_BATCH // world_size) for keys in ranks))
            assert [[key for part in parts for key in part] for parts in together] == alone


def test_every_task_once_and_what_is_left_over_as_without_buckets(asked):
    plain = TaskOrder(SIZE, GLOBAL_BATCH, True)
    keys = list(order(asked))
    assert len(keys) == len(set(keys)) == len(order(asked)) == 100
    assert set(keys) == set(plain) and keys != list(plain)


def test_epochs_and_seeds_have_batches_of_their_own(asked):
    def batches(**settings) -> list[frozenset]:
        return [frozenset(index for _, index in keys) for keys in chunks(list(order(asked, **settings)), GLOBAL_BATCH)]

    first = batches()
    assert first == batches()
    for other in (batches(epoch=1), batches(seed=1)):
        # Not only in another order.
        assert len(set(first) & set(other)) < 3


def test_batches_are_alike_in_length_and_come_in_random_order(asked):
    def slots(keys: list, which: int) -> int:
        return sum(max(length(key)[which] for key in batch) * len(batch) for batch in chunks(keys, GLOBAL_BATCH))

    keys = list(order(asked))
    for which, most in ((0, 1.2), (1, 1.35)):
        real = sum(length(key)[which] for key in keys)
        assert slots(keys, which) < most * real < slots(list(TaskOrder(SIZE, GLOBAL_BATCH, True)), which)
    # By one length alone the batches of a stretch would come from the shortest to the longest.
    by_one = TaskOrder(SIZE, GLOBAL_BATCH, True, lengths=lambda keys: [(length(key)[0], 0) for key in keys])
    longest = [max(length(key)[0] for key in batch) for batch in chunks(list(by_one), GLOBAL_BATCH)]
    rises = sum(a < b for a, b in zip(longest, longest[1:]))
    assert 0.25 < rises / len(longest) < 0.75


def test_lengths_are_asked_for_as_they_are_needed(asked):
    keys = order(asked)
    assert not asked
    first = list(islice(keys, GLOBAL_BATCH))
    assert len(asked) == 1 and set(first) < set(asked[0])
    # Four stretches of six or seven batches; of a resumed epoch those before the place are not asked for.
    assert len(list(keys)) == 100 and [len(keys) for keys in asked[1:]] == [24, 24, 24, 28]
    later = order(asked := [])
    later.first_batch = 13
    assert list(later) == list(keys)[13 * GLOBAL_BATCH :] and len(asked) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_in_mid_epoch(asked, workers):
    def loader(workers: int = 0) -> ResumableLoader:
        dataset = TaskDataset(EchoSampler())
        return ResumableLoader(
            dataset, batch_size=GLOBAL_BATCH, sampler=order(asked, epoch=2), collate_fn=list, num_workers=workers
        )

    expected = list(loader())
    assert expected == chunks(list(order(asked, epoch=2)), GLOBAL_BATCH)
    before = loader(workers)
    given = list(islice(before, 9))
    after = loader(workers)
    after.load_state_dict(before.state_dict())
    assert given + list(after) == expected


@pytest.mark.parametrize("kind", ["causal", "encoder_decoder", "classifier"])
def test_lengths_are_those_of_the_rows(kind, facts):
    """Up to what stands around every question, which may cost its first word a token more."""
    records = read_records(facts / ("claims_train.jsonl" if kind == "classifier" else "train.jsonl"))
    sampler = TaskSampler(records, rephrases=2, locality=3)
    encoder = Encoder(small_tokenizer(kind), FORMATS[kind], kind, 400, decoder_start_token_id=0)
    for edits_at_once in (1, 2):
        keys = [(epoch, index) for epoch in (0, 1) for index in range(len(sampler) // edits_at_once)]
        found = TaskLengths(sampler, encoder, edits_at_once)(keys)
        around = set()
        for key, (longest, edit) in zip(keys, found):
            tasks = sampler.group(*key, edits_at_once)
            edits = [encoder.pair(task.prompt, task.target) for task in tasks]
            others = [encoder.pair(text, task.target) for task in tasks for text in task.rephrases]
            others += [encoder.pair(*pair) for task in tasks for pair in task.locality]
            around.add(max(len(row["input_ids"]) for row in edits) - edit)
            around.add(max(len(row["input_ids"]) for row in edits + others) - longest)
        assert max(around) - min(around) <= (kind == "causal") and len(set(found)) > 3


def test_a_text_is_tokenized_once(facts, monkeypatch):
    tokenized: list[str] = []
    counts = Encoder.token_counts
    monkeypatch.setattr(
        Encoder, "token_counts", lambda encoder, texts: tokenized.extend(texts) or counts(encoder, texts)
    )
    lengths = TaskLengths(
        TaskSampler(read_records(facts / "train.jsonl")), Encoder(small_tokenizer(), FORMATS["causal"])
    )
    keys = [(0, index) for index in range(16)]
    first = lengths(keys)
    assert len(tokenized) == len(set(tokenized)) > 16
    assert lengths(keys) == first and len(tokenized) == len(set(tokenized))
    monkeypatch.setattr(buckets, "MOST_COUNTED", 1)
    # Forgotten, and counted again.
    assert lengths(keys) == first and len(tokenized) == 2 * len(set(tokenized))


def test_a_text_that_no_tokenizer_reads():
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        Encoder(small_tokenizer()).token_counts(["fine", "\ud800"])


def padding(batches: list, name: str) -> float:
    masks = [getattr(batch, name).inputs["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_the_batches_of_data(tmp_path):
    """Same tasks, same draws; less padding."""
    settings = {**write_questions(tmp_path), "tokenizer": small_tokenizer(), "rephrases": 2, "locality": 1}
    bucketed, plain = (
        list(EditDataModule(**settings, bucket_by_length=which).train_dataloader()) for which in (True, False)
    )
    tasks = [{text for batch in batches for text in batch.texts} for batches in (bucketed, plain)]
    assert tasks[0] == tasks[1] and len(bucketed) == len(plain) == 50
    assert all(len(batch) == 8 for batch in bucketed)
    for name, most in (("z_edit", 0.4), ("x_in", 0.7), ("x_out", 0.7)):
        assert padding(bucketed, name) < most * padding(plain, name)
