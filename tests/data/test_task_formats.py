"""In which format the rows of a task are asked, and that nothing but (seed, epoch, index) decides it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from helpers.bases import FORMATS, small_tokenizer
from helpers.tokenizers import CHAT_TEMPLATES

from mend_lightning import EditDataModule
from mend_lightning.data.batch import collate_tasks
from mend_lightning.data.buckets import TaskLengths
from mend_lightning.data.record import Question, Record
from mend_lightning.data.task_formats import DataFormats, FormatDraw
from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.formats import NAMED, named_formats

pytest_plugins = ["helpers.bases"]
ALL = tuple(NAMED.values())
NAMES = ["own", "statement", "chat_system", "passage"]
CITIES = ["Paris", "Rome", "Oslo", "Bern", "Riga", "Cairo"]


def record(city: str, **changes) -> Record:
    fields = dict(
        prompt=f"Country of {city}?", answers=(f"land of {city}",), alternatives=("X", "Y"), subject=city,
        relation="country", rephrases=tuple(f"Where is {city}, {i}?" for i in range(4)),
        statements=tuple(f"{city} lies in {i}" for i in range(3)),
    )  # fmt: skip
    return Record(**{**fields, **changes})


RECORDS = [record(city) for city in CITIES]


def tasks(names=NAMES, training: bool = True, records=RECORDS, epochs: int = 12, **settings) -> list[EditTask]:
    settings = {"rephrases": 3, "locality": 4, "hard_locality": 2, **settings}
    sampler = TaskSampler(records, **settings, formats=FormatDraw(named_formats(names), training))
    return [sampler.task(epoch, index) for epoch in range(epochs) for index in range(len(sampler))]


def rows(task: EditTask) -> list[tuple[str, str]]:
    """(format, text) of every row."""
    keys = (task.format, *task.rephrase_formats, *task.locality_formats)
    return list(zip(keys, (task.prompt, *task.rephrases, *(text for text, _ in task.locality)), strict=True))


def with_chats(kind: str = "causal"):
    tokenizer = small_tokenizer(kind)
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    return tokenizer


def test_draws_repeat():
    assert tasks() == tasks()
    assert tasks(seed=1) != tasks()
    assert tasks(epochs=2)[: len(RECORDS)] != tasks(epochs=2)[len(RECORDS) :]


def test_formats_change_nothing_else_of_a_draw():
    """Facts, targets and what is hard are those without formats; texts are, but for statements."""
    plain = TaskSampler(RECORDS, rephrases=3, locality=4, hard_locality=2)
    for i, task in enumerate(tasks(["own", "chat", "passage"], epochs=2)):
        expected = plain.task(*divmod(i, len(RECORDS)))
        assert replace(task, format="", rephrase_formats=(), locality_formats=()) == expected
    for i, task in enumerate(tasks(["statement"], epochs=2)):
        expected = plain.task(*divmod(i, len(RECORDS)))
        assert (task.target, task.hard, task.subject) == (expected.target, expected.hard, expected.subject)
        assert [answer for _, answer in task.locality] == [answer for _, answer in expected.locality]


def test_every_format_has_its_turn_for_every_row():
    found = tasks(epochs=60)
    for keys in (
        [task.format for task in found],
        [task.rephrase_formats[0] for task in found],
        [task.locality_formats[0] for task in found],
    ):
        share = Counter(key.partition("/")[0] for key in keys)
        assert all(abs(share[name] / len(keys) - 1 / len(NAMES)) < 0.1 for name in NAMES), share
    # The edit's format says nothing about the others': each pair of the two is there.
    pairs = {tuple(key.partition("/")[0] for key in (task.format, task.rephrase_formats[0])) for task in found}
    assert pairs == {(a, b) for a in NAMES for b in NAMES}


def test_the_rows_of_a_task_are_asked_in_as_many_formats_as_there_are():
    for task in tasks():
        assert len({key.partition("/")[0] for key in task.rephrase_formats}) == 3
        assert len({key.partition("/")[0] for key in task.locality_formats}) == 4


def test_training_and_evaluation_read_other_texts():
    used = {key for task in tasks(epochs=40) for key, _ in rows(task)}
    assert used == {"own", "statement", *NAMED["chat_system"].training_keys, *NAMED["passage"].training_keys}
    assert {key for task in tasks(training=False) for key, _ in rows(task)} == set(NAMES)


def test_statements_are_the_record_s_and_a_rephrase_is_another_one_than_the_edit():
    by_answer = {record.answers[0]: record for record in RECORDS}
    seen = 0
    for task in tasks(epochs=30):
        edited = next(record for record in RECORDS if record.subject == task.subject)
        sources = [edited] * 4 + [by_answer[answer] for _, answer in task.locality]
        for (key, text), source in zip(rows(task), sources):
            questions = (source.prompt, *source.rephrases)
            assert text in (source.statements if key == "statement" else questions)
        if task.format == "statement":
            said = [text for key, text in zip(task.rephrase_formats, task.rephrases) if key == "statement"]
            assert task.prompt not in said
            seen += bool(said)
    assert seen


def test_the_only_statement_is_its_own_rephrase():
    (task, *_) = tasks(["statement"], records=[record(city, statements=(f"{city} lies in",)) for city in CITIES])
    assert {task.prompt, *task.rephrases} == {"Paris lies in"}


def test_without_statements_other_formats_are_taken():
    without = [record(city, statements=()) for city in CITIES]
    assert {key for task in tasks(["statement", "bare"], records=without) for key, _ in rows(task)} == {"bare"}
    only = tasks(["statement"], records=without)[0]
    assert {key for key, _ in rows(only)} == {"own"}
    assert only.prompt == "Country of Paris?"


def test_questions_that_a_record_brings_along_have_no_statement():
    own = (Question("River of Paris?", ("Seine",), hard=True), Question("Who?", ("Anna",)))
    found = tasks(["statement", "chat"], records=[record(city, locality=own) for city in CITIES], locality=3)
    for task in found:
        assert task.locality[0] == ("River of Paris?", "Seine") and task.locality_formats[0] == "chat"
        assert task.locality[2 if task.hard == 2 else 1] == ("Who?", "Anna")
        # What is left of the two formats for the fact of the set's own.
        assert task.locality_formats[1] == "statement"


def test_a_batch_holds_each_row_in_its_format():
    tokenizer = with_chats()
    formats = DataFormats.of(FORMATS["causal"], NAMES, None).prompt_formats(tokenizer, "causal")
    encoder = Encoder(tokenizer, FORMATS["causal"], max_length=500, formats=formats)
    batch = collate_tasks(tasks(epochs=1)[:4], encoder, edits_at_once=2)
    for name, count in (("z_edit", 4), ("x_in", 12), ("x_out", 16)):
        found = getattr(batch, name)
        assert len(found) == len(found.formats) == count
        for i, (key, pair) in enumerate(zip(found.formats, found.texts)):
            alone = Encoder(tokenizer, formats[key], max_length=500).pair(*pair)
            mask = found.inputs["attention_mask"][i].bool()
            assert found.inputs["input_ids"][i][mask].tolist() == alone["input_ids"]
            assert found.labels[i][mask].tolist() == alone["labels"]
    assert batch.x_in.part(slice(3, 5)).formats == batch.x_in.formats[3:5]


def test_lengths_count_what_a_format_puts_around_a_question():
    tokenizer = with_chats()
    formats = DataFormats.of(FORMATS["causal"], NAMES, None).prompt_formats(tokenizer, "causal")
    encoder = Encoder(tokenizer, FORMATS["causal"], max_length=500, formats=formats)
    sampler = TaskSampler(RECORDS, rephrases=2, locality=3, formats=FormatDraw(named_formats(NAMES), True))
    keys = [(epoch, index) for epoch in range(4) for index in range(len(sampler))]
    lengths = TaskLengths(sampler, encoder)(keys)
    placeholder = len(tokenizer("{input}")["input_ids"])
    for (longest, _), key in zip(lengths, keys):
        batch = collate_tasks(sampler.group(*key, 1), encoder)
        real = max(getattr(batch, name).inputs["input_ids"].shape[1] for name in ("z_edit", "x_in", "x_out"))
        assert abs(longest - placeholder - real) <= 4


def test_the_splits_of_a_data_module(facts):
    settings = {split: facts / f"{split}.jsonl" for split in ("train", "validation", "test")}
    data = EditDataModule(**settings, tokenizer=with_chats(), formats=["own", "passage"], eval_formats=["chat", "own"])
    used = {split: {data.sampler(split).task(0, i).format for i in range(5)} for split in settings}
    assert used["train"] <= {"own", *NAMED["passage"].training_keys} and used["validation"] == {"own", "chat"}
    assert used["test"] == {"chat"}
    assert set(data.encoder.formats) == {"own", "chat", *NAMED["passage"].keys}
    plain = EditDataModule(**settings, tokenizer=with_chats())
    assert plain.encoder.formats == {} and plain.sampler("train").task(0, 0).format == ""
    assert EditDataModule(**settings, formats=["bare"]).sampler("test").task(0, 0).format == "bare"


def test_formats_that_a_model_does_not_have(facts):
    data = EditDataModule(facts / "train.jsonl", tokenizer=small_tokenizer(), formats=["own", "chat"])
    with pytest.raises(ConfigError, match="has no chat template"):
        _ = data.encoder
    data = EditDataModule(facts / "train.jsonl", tokenizer=small_tokenizer(), formats=["bare"], kind="classifier")
    with pytest.raises(ConfigError, match="'bare' is not for a model of kind classifier. Formats: own"):
        _ = data.encoder


def test_running_text_has_no_other_format(tmp_path):
    (tmp_path / "wiki.jsonl").write_text(
        '{"prompt": "The river", "target": " flows", "paragraph": "The river flows."}\n'
    )
    data = EditDataModule(tmp_path / "wiki.jsonl", target="{target}", stop=None, formats=["bare"])
    with pytest.raises(ConfigError, match="running text, which is asked in no other format"):
        data.sampler("train")


def test_two_formats_of_one_name(facts):
    mine = [{"name": "mine", "prompt": text} for text in ("A {input}", "B {input}")]
    with pytest.raises(ConfigError, match=r"names each once.*\['mine', 'mine'\]"):
        EditDataModule(facts / "train.jsonl", formats=mine[:1], eval_formats=mine[1:])


def test_an_empty_list_of_formats(facts):
    with pytest.raises(ConfigError, match="at least one"):
        EditDataModule(facts / "train.jsonl", formats=[])


def test_one_draw_is_enough_for_one_format():
    task = EditTask("Q?", "A", ("R?",), (("U?", "B"),))
    found = FormatDraw(ALL[:1]).drawn(task, [()], random.Random(0))
    assert found == replace(task, format="own", rephrase_formats=("own",), locality_formats=("own",))


def asked_in(names, records=RECORDS, first: int = 3, **settings) -> dict:
    own = FORMATS["causal"]
    settings = {"rephrases": 2, "locality": 3, "hard_locality": 1, **settings}
    return DataFormats.of(own, None, names).tasks(TaskSampler(records, **settings), first)


def test_a_table_has_the_same_edits_in_every_format():
    found = asked_in(NAMES)
    assert list(found) == [0, 1, 2]
    for index, of_formats in found.items():
        assert list(of_formats) == NAMES
        for name, task in of_formats.items():
            assert {key for key, _ in rows(task)} == {name} and len(task.locality) == 3
            assert task.subject == CITIES[index]
        facts = {(task.target, task.hard, tuple(answer for _, answer in task.locality)) for task in of_formats.values()}
        assert len(facts) == 1


def test_edits_without_statements_are_passed_over_where_others_have_some():
    some = [record(city, statements=(f"{city} lies in",) if i % 2 else ()) for i, city in enumerate(CITIES)]
    found = asked_in(["own", "statement"], some)
    assert list(found) == [1, 3, 5]
    for task in (of_formats["statement"] for of_formats in found.values()):
        # Unrelated facts that have none are asked in no other format in their place.
        assert all(text.endswith("lies in") for text, _ in task.locality)
        assert len(task.locality_formats) == len(task.locality) <= 3 and task.hard <= len(task.locality)
    without = [record(city, statements=()) for city in CITIES]
    assert [list(each) for each in asked_in(["own", "statement", "bare"], without).values()] == [["own", "bare"]] * 3


@pytest.mark.parametrize("names", [None, ["own"], ["chat"], ["own", "statement"]])
def test_one_format_makes_no_table(names):
    assert asked_in(names, [record(city, statements=()) for city in CITIES]) == {}


def test_a_table_is_of_the_first_edits_that_are_tested(facts):
    settings = {split: facts / f"{split}.jsonl" for split in ("train", "test")}
    for limits, expected in (({}, 7), ({"format_edits": 4}, 4), ({"test_edits": 2}, 2)):
        data = EditDataModule(**settings, formats=["own", "bare"], **limits)
        assert list(data.format_tasks()) == list(range(expected))
