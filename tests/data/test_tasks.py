"""What a task is drawn from, and that nothing but (seed, epoch, index) decides the draw."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from torch.utils.data import DataLoader

from mend_lightning import EditDataModule, load_base
from mend_lightning.data.order import TaskDataset
from mend_lightning.data.records import Record
from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.errors import ConfigError

pytest_plugins = ["helpers.bases"]
CITIES = ["Paris", "Rome", "Oslo", "Bern", "Riga", "Cairo"]


def record(subject: str, relation: str, **changes) -> Record:
    fields = dict(
        prompt=f"{relation} of {subject}?", answers=(f"true {relation} of {subject}", "another"),
        alternatives=tuple(f"{subject} {relation} {i}" for i in range(3)),
        rephrases=tuple(f"{subject}'s {relation}, {i}?" for i in range(4)), subject=subject, relation=relation,
    )  # fmt: skip
    return Record(**{**fields, **changes})


# Two facts about every subject: an unrelated fact must be about another one.
RECORDS = [record(city, relation) for city in CITIES for relation in ("country", "river")]
BY_PROMPT = {text: each for each in RECORDS for text in (each.prompt, *each.rephrases)}


def all_tasks(epochs: int = 4, **settings) -> list[EditTask]:
    sampler = TaskSampler(RECORDS, **settings)
    return [sampler.task(epoch, index) for epoch in range(epochs) for index in range(len(sampler))]


def test_what_a_task_holds():
    for index, task in enumerate(all_tasks(epochs=1, rephrases=2, locality=3)):
        source = RECORDS[index]
        assert (task.prompt, task.subject, task.relation) == (source.prompt, source.subject, source.relation)
        assert task.target in source.alternatives
        assert task.answers == source.answers
        assert set(task.rephrases) < set(source.rephrases)
        assert len(set(task.rephrases)) == 2


def test_unrelated_facts_are_true_and_about_another_subject():
    for task in all_tasks(locality=4):
        sources = [BY_PROMPT[prompt] for prompt, _ in task.locality]
        assert [answer for _, answer in task.locality] == [source.answers[0] for source in sources]
        assert all(source.subject != task.subject for source in sources)
        assert len(set(sources)) == 4


def test_hard_ones_have_the_relation_of_the_edit_and_come_first():
    for task in all_tasks(locality=4, hard_locality=2):
        sources = [BY_PROMPT[prompt] for prompt, _ in task.locality]
        assert task.hard == 2
        assert [source.relation for source in sources[:2]] == [task.relation] * 2
        assert len(set(sources)) == 4
    others = [BY_PROMPT[t.locality[3][0]].relation != t.relation for t in all_tasks(locality=4, hard_locality=2)]
    assert any(others)


def test_without_relations_no_fact_is_hard():
    records = [record(city, "") for city in CITIES]
    task = TaskSampler(records, locality=3, hard_locality=2).task(0, 0)
    assert (task.hard, len(task.locality)) == (0, 3)


def test_fewer_hard_ones_than_asked_for_are_filled_up():
    records = [*RECORDS, record("Lima", "mayor"), record("Quito", "mayor")]
    task = TaskSampler(records, locality=4, hard_locality=3).task(0, len(RECORDS))
    assert (task.hard, len(task.locality)) == (1, 4)
    assert task.locality[0][1] == "true mayor of Quito"


def test_short_lists_of_rephrases_are_gone_through_again():
    records = [record(city, "country", rephrases=("one?", "two?")) for city in CITIES]
    rephrases = TaskSampler(records, rephrases=5).task(0, 0).rephrases
    assert sorted(Counter(rephrases).values()) == [2, 3]


def test_draws_repeat():
    """In any order of calls, from any sampler, with any other sampler's draws between."""
    first, second = TaskSampler(RECORDS, locality=3), TaskSampler(RECORDS, locality=3)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(RECORDS))]
    forwards = {key: first.task(*key) for key in keys}
    backwards = {key: second.task(*key) for key in reversed(keys)}
    assert forwards == backwards


def test_draws_differ_between_epochs_and_seeds():
    def targets(epoch=0, seed=0):
        sampler = TaskSampler(RECORDS, seed=seed)
        return [(t.target, t.rephrases, t.locality) for t in (sampler.task(epoch, i) for i in range(len(RECORDS)))]

    assert targets() != targets(epoch=1)
    assert targets() != targets(seed=1)


def test_every_alternative_and_every_phrasing_has_its_turn():
    tasks = all_tasks(epochs=30)
    assert {task.target for task in tasks} == {text for each in RECORDS for text in each.alternatives}
    assert {task.locality[0][0] for task in tasks} == set(BY_PROMPT)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same(workers):
    dataset = TaskDataset(TaskSampler(RECORDS, locality=3))
    keys = [(1, index) for index in range(len(RECORDS))]
    loaders = [DataLoader(dataset, 3, sampler=keys, collate_fn=list, num_workers=count) for count in (0, workers)]
    assert list(loaders[0]) == list(loaders[1])


@pytest.mark.parametrize("records", [[RECORDS[0], RECORDS[0]], RECORDS[:2]], ids=["one_fact", "one_subject"])
def test_a_single_subject_has_nothing_unrelated(records):
    with pytest.raises(ConfigError, match=r"facts about at least two subjects; the records hold one"):
        TaskSampler(records)
    assert TaskSampler(records, locality=0).task(0, 0).locality == ()


@pytest.mark.parametrize("seed", range(20))
def test_a_pool_with_a_single_other_fact(seed):
    """However rarely it is drawn, it is found."""
    records = [*RECORDS[:1] * 12, RECORDS[-1]]
    assert len(TaskSampler(records, seed=seed).task(0, 0).locality) == 1


def test_groups_hold_every_record_once_an_epoch_and_their_unrelated_facts_are_nobodys_edit():
    sampler, seen = TaskSampler(RECORDS, rephrases=2, locality=2, hard_locality=1), []
    for epoch in (0, 1):
        groups = [sampler.group(epoch, index, 3) for index in range(len(TaskDataset(sampler, 3)))]
        seen.append([[task.prompt for task in group] for group in groups])
        assert sorted(prompt for group in seen[-1] for prompt in group) == sorted(each.prompt for each in RECORDS)
        for group in groups:
            subjects = {task.subject for task in group}
            for task in group:
                assert len(task.locality) == 2
                assert not subjects & {BY_PROMPT[prompt].subject for prompt, _ in task.locality}
    assert seen[0] != seen[1]
    again = TaskSampler(RECORDS, rephrases=2, locality=2, hard_locality=1)
    assert again.group(1, 2, 3) == sampler.group(1, 2, 3)


def test_a_limit_is_of_the_first_records_and_too_many_at_once_are_refused():
    sampler = TaskSampler(RECORDS, locality=2)
    edited = {task.prompt for index in range(len(TaskDataset(sampler, 2, 6))) for task in sampler.group(0, index, 2, 6)}
    assert edited == {record.prompt for record in RECORDS[:6]}
    with pytest.raises(
        ConfigError, match="12 edits at once leave no unrelated fact over: the set has 12 records. Lower"
    ):
        sampler.group(0, 0, 12)


def test_records_that_fill_no_group_are_left_out_and_a_group_of_one_is_the_task():
    sampler = TaskSampler(RECORDS, locality=2)
    assert len(TaskDataset(sampler, 5)) == 2
    assert sampler.group(3, 4, 1) == (sampler.task(3, 4),)


def test_several_edits_at_once_are_evaluated_on_the_first_records(facts, base_folder):
    _, tokenizer = load_base(str(base_folder("llama")), "float32")
    data = EditDataModule(test=facts / "test.jsonl", test_edits=4, edits_at_once=2, eval_locality=1, eval_hard_locality=0,
                          tokenizer=tokenizer)  # fmt: skip
    edited = {text.prompt for batch in data.test_dataloader() for text in batch.texts}
    assert edited == {record.prompt for record in data.sampler("test").records[:4]}


def test_neighbors_are_of_the_edit_s_wording_and_about_nothing_that_is_measured():
    for task in all_tasks(locality=3, hard_locality=1, contrasts=2, names={"country": CITIES, "river": CITIES}):
        relation = task.relation
        assert len(task.keep) == 2
        subjects = [prompt.removeprefix(f"{relation} of ").removesuffix("?") for prompt in task.keep]
        assert set(subjects) < set(CITIES) - {task.subject}
        assert not any(subject in prompt for subject in subjects for prompt, _ in task.locality)


def test_a_record_s_own_questions_to_keep_come_first():
    own = [record("Paris", "river", keep=("Is the Seine long?",)), *RECORDS]
    assert TaskSampler(own).task(0, 0).keep == ("Is the Seine long?",)
    with_neighbors = TaskSampler(own, contrasts=1, names={"river": CITIES}).task(0, 0).keep
    assert with_neighbors[0] == "Is the Seine long?" and len(with_neighbors) == 2


def test_without_contrasts_nothing_is_kept_and_nothing_else_drawn():
    with_neighbors = all_tasks(locality=2, contrasts=2)
    for plain, task in zip(all_tasks(locality=2), with_neighbors):
        assert plain.keep == () and plain == replace(task, keep=())


def test_edits_made_at_once_avoid_each_other_s_subjects():
    sampler = TaskSampler(RECORDS, contrasts=3, names={"country": CITIES, "river": CITIES})
    for index in range(3):
        tasks = sampler.group(0, index, 2)
        for task in tasks:
            assert not any(other.subject in question for other in tasks for question in task.keep)
