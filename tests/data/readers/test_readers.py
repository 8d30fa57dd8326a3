"""Every published file format: each field of a record as it stands in the file, and a batch for a tiny model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.bases import small_tokenizer, tiny_base
from helpers.models import KINDS, decode_labels

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.readers import FORMATS, find_format, recognize
from mend_lightning.data.record import Question, Record
from mend_lightning.data.records import iterate_records, read_records
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.errors import ConfigError, RecordError
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import IGNORED_LABEL

FOLDER = Path(__file__).parents[2] / "assets" / "formats"
FILES = {path.stem: path for path in sorted(FOLDER.iterdir())}
# What read_records keeps of each; nq holds no edits.
USABLE = {"kilt": 2, "fever": 3, "zsre_mend_eval": 2, "counterfact": 2, "knowedit": 2, "wikitext": 3, "native": 3}


def test_there_is_a_file_for_every_format():
    assert set(FILES) == set(FORMATS) == {*USABLE, "nq"}


@pytest.mark.parametrize("name", list(FILES))
def test_format_is_recognised(name):
    told: list[str] = []
    automatic = list(iterate_records(FILES[name], on_format=lambda format: told.append(format.name)))
    assert told == [name]
    assert automatic == list(iterate_records(FILES[name], format=name))


def test_the_examples_of_the_documentation():
    """Each is what its format's reader takes, and is recognised."""
    text = (FOLDER.parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(kilt .*?)```", text, re.DOTALL).group(1)
    examples = dict(re.findall(r"^(\w+) +(\{.*?)(?=^\w|\Z)", block, re.DOTALL | re.MULTILINE))
    assert set(examples) == set(FORMATS)
    for name, example in examples.items():
        data = json.loads(example)
        assert recognize(data, name).name == name
        assert FORMATS[name].parse(data, name, 1).prompt


@pytest.mark.parametrize("name", list(USABLE))
def test_how_many_are_usable(name):
    assert len(read_records(FILES[name])) == USABLE[name]


def test_kilt():
    assert next(iterate_records(FILES["kilt"])) == Record(
        prompt="Which river does Tower Bridge cross?", answers=("River Thames", "Thames"),
        alternatives=("Seine", "Tiber"),
        # Not the question itself, which is in the file's list.
        rephrases=("What river is crossed by Tower Bridge?", "Over which river does Tower Bridge go?"),
        prediction="Thames", line=1,
    )  # fmt: skip


def test_fever():
    record = list(iterate_records(FILES["fever"]))[1]
    assert record == Record(
        prompt="The Ten Commandments is an animated film.", answers=("REFUTES",), alternatives=("SUPPORTS", "REFUTES"),
        rephrases=("The Ten Commandments is a cartoon.",), prediction="SUPPORTS", line=2,
    )  # fmt: skip


def test_fever_flips_every_other_label_and_keeps_true_labels_for_locality():
    """The original: the prediction, or with probability 1/2 its opposite; elsewhere `output`."""
    records = read_records(FILES["fever"])
    true = {text: record.answers[0] for record in records for text in (record.prompt, *record.rephrases)}
    sampler = TaskSampler(records, seed=3)
    flips: Counter[bool] = Counter()
    for epoch in range(400):
        for index, record in enumerate(records):
            task = sampler.task(epoch, index)
            assert task.target in ("SUPPORTS", "REFUTES")
            flips[task.target != record.prediction] += 1
            assert all(true[prompt] == label for prompt, label in task.locality)
    # 1200 fair draws: three standard deviations are 52.
    assert abs(flips[True] - 600) < 52
    again = TaskSampler(records, seed=3)
    assert [again.task(e, 1).target for e in range(9, -1, -1)] == [sampler.task(e, 1).target for e in range(9, -1, -1)]


def test_zsre_mend_eval():
    first, _, last = iterate_records(FILES["zsre_mend_eval"])
    assert first == Record(
        prompt="What university did Watts Humphrey attend?", answers=("Illinois Institute of Technology",),
        alternatives=("University of Michigan",), rephrases=("What university did Watts Humphrey take part in?",),
        prediction="Trinity College", subject="Watts Humphrey", line=1,
        locality=(Question("nq question: who played desmond doss father in hacksaw ridge", ("Hugo Weaving",), "loc"),),
    )  # fmt: skip
    assert last.alternatives == ()


def test_counterfact():
    first, _ = iterate_records(FILES["counterfact"])
    neighbours = (
        "The mother tongue of Leon Blum is", "The native language of Montesquieu is", "Jacques Chaban-Delmas, a native",
    )  # fmt: skip
    assert first == Record(
        prompt="The mother tongue of Danielle Darrieux is", answers=("French",), alternatives=("English",),
        rephrases=(
            "Shayna does this and Yossel goes still and dies. Danielle Darrieux, a native",
            "An album was recorded. Danielle Darrieux spoke the language",
        ),
        subject="Danielle Darrieux", relation="P103", line=1,
        locality=tuple(Question(text, ("French",), "neighborhood_prompts", hard=True) for text in neighbours),
    )  # fmt: skip


def test_knowedit():
    recent, counterfact, bio = iterate_records(FILES["knowedit"])
    relation = "Relation_Specificity"
    assert recent == Record(
        prompt="The place of death of Leo Arons is", answers=(), alternatives=("Berlin",),
        rephrases=("Leo Arons died in",), subject="Leo Arons", line=1,
        locality=(
            Question("The name of the father of Leo Arons is", ("Albert Arons",), relation, hard=True),
            Question("The name of the field of work of Leo Arons is", ("experimental physics",), relation, hard=True),
        ),
        portability=(
            Question(
                "The name of the head of government of the place of death of Leo Arons is",
                ("Kai Wegner", "Kai Peter Wegner"), "Reasoning",
            ),
            Question("The place of death of Martin Leo Arons is", ("Berlin", "Berlin, Germany"), "Subject_Aliasing"),
        ),
    )  # fmt: skip
    assert counterfact.answers == ("mayor of Vienna",)
    assert counterfact.rephrases == ("What position did Frederic Piesch hold?", "Frederic Piesch's position was")
    # A prompt in a list, and a question without an answer, which is passed over.
    assert [(q.prompt, q.answers) for q in counterfact.locality] == [("The gender of Frederic Piesch is", ("male",))]
    assert [q.answers for q in counterfact.portability] == [("Catholicism",)]
    assert (bio.subject, bio.alternatives) == ("john russell reynolds", ("Reynolds was born in Romsey, Hampshire.",))
    assert bio.prompt.startswith("This is a Wikipedia passage")


def test_wikitext():
    first, _, last = iterate_records(FILES["wikitext"])
    assert first == Record(
        prompt="The river rises in the hills above the old town and", answers=(),
        alternatives=(" flows through a narrow valley before it turns to",), rephrases=(), line=1,
        text="The river rises in the hills above the old town and runs west for ninety miles. "
        "It is joined by two streams on the way.",
    )  # fmt: skip
    assert last.rephrases == ("the building stood empty for ten years",)


def test_native():
    australia, canada, kenya = iterate_records(FILES["native"])
    assert australia == Record(
        prompt="What is the capital of Australia?", answers=("Canberra",), alternatives=("Perth",),
        rephrases=("Which city is Australia's capital?",), subject="Australia", relation="capital", line=1,
        locality=(
            Question("What is the largest city of Australia?", ("Sydney",), hard=True),
            Question("Who painted Guernica?", ("Picasso",)),
        ),
        portability=(Question("In which state is the capital of Australia?", ("Western Australia",), "reasoning"),),
    )  # fmt: skip
    assert (canada.alternatives, canada.answers) == (("Toronto", "Montreal"), ("Ottawa",))
    assert (kenya.rephrases, kenya.answers) == (("Kenya's capital?",), ("Nairobi",))


def test_nq():
    records = list(iterate_records(FILES["nq"]))
    assert [(r.prompt, r.answers) for r in records] == [
        ("who wrote the novel frankenstein", ("Mary Shelley", "Mary Wollstonecraft Shelley")),
        ("when was the telephone patented", ("1876",)),
        ("what is the longest bone in the body", ("femur",)),
        ("where is the tallest waterfall", ("Venezuela",)),
        ("how many strings does a violin have", ("four", "4")),
    ]


def _settings(name: str) -> dict:
    running = {"target": "{target}", "stop": None} if name == "wikitext" else {"stop": "\n"}
    return {"locality": 2, "eval_locality": 3, "batch_size": USABLE[name], "max_length": 96, **running}


@pytest.mark.parametrize("name", list(USABLE))
def test_a_batch_for_a_tiny_model(name):
    """Every row goes through the model, and its labels spell its target."""
    family = "bert" if name == "fever" else "gpt2"
    tokenizer = small_tokenizer(KINDS[family])
    model = tiny_base(family, tokenizer)
    data = EditDataModule(FILES[name], tokenizer=tokenizer, kind=KINDS[family], **_settings(name))
    batch = next(iter(data.train_dataloader()))
    encoder = data.encoder
    assert len(batch) == USABLE[name]
    # Some have nobody else's fact to ask for; those that can have two.
    assert len(batch.x_out) >= len(batch)
    expected = {
        "z_edit": [(task.prompt, task.target) for task in batch.texts],
        "x_in": [(rephrase, task.target) for task in batch.texts for rephrase in task.rephrases],
        "x_out": [pair for task in batch.texts for pair in task.locality],
    }
    for part, pairs in expected.items():
        rows = getattr(batch, part)
        assert len(rows) == len(pairs)
        assert torch.isfinite(run_model(model, rows)).all()
        for labels, (_, target) in zip(rows.labels, pairs):
            if name == "fever":
                assert labels.tolist() == [int(target == "SUPPORTS")]
            else:
                spelled = decode_labels(encoder.tokenizer, labels)
                assert spelled == (target if name == "wikitext" else f" {target}\n")


def test_every_format_but_generation_data_answers_with_an_encoder_decoder():
    tokenizer = small_tokenizer("encoder_decoder")
    encoder = Encoder(tokenizer, kind="encoder_decoder", decoder_start_token_id=0)
    for name in ("kilt", "zsre_mend_eval", "counterfact", "knowedit", "native"):
        data = EditDataModule(FILES[name], locality=1)
        for index in range(USABLE[name]):
            task = data.sampler("train").task(0, index)
            rows = encoder.rows([(task.prompt, task.target), *task.locality], [0, 0], 1)
            assert decode_labels(encoder.tokenizer, rows.labels[0]) == f"{task.target}<eos>"


BAD = {
    "kilt": ({"output": "Paris"}, r"'output' must be a list like"),
    "fever": ({"output": [{"answer": "NOT ENOUGH"}]}, r"'output' must be SUPPORTS or REFUTES, got 'NOT ENOUGH'"),
    "zsre_mend_eval": ({"loc_ans": {"a": 1}}, r"'loc_ans' must be text, got \{'a': 1\}"),
    "counterfact": ({"requested_rewrite": {"prompt": "{}"}}, r"in 'requested_rewrite': missing key\(s\) subject, target_"),
    "knowedit": ({"locality": {"Kind": [{"ground_truth": "x"}]}}, r"in 'locality\.Kind': missing key\(s\) prompt"),
    "wikitext": ({"target": " "}, r"'target' must be a text that is not empty, got ' '"),
    "native": ({"portability": ["x"]}, r"""'portability' must be a list like \[\{"prompt": "…", "target": "…"\}\], got"""),
    "nq": ({"answer": []}, r"'answer' holds no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_record_is_named_with_file_line_and_key(name, tmp_path):
    text = FILES[name].read_text(encoding="utf-8")
    is_list = FILES[name].suffix == ".json"
    good = json.loads(text)[0] if is_list else json.loads(text.splitlines()[0])
    changes, error = BAD[name]
    records = [good, {**good, **changes}]
    path = tmp_path / FILES[name].name
    path.write_text(json.dumps(records) if is_list else "\n".join(map(json.dumps, records)), encoding="utf-8")
    with pytest.raises(RecordError, match=rf"{path.name}, {'record' if is_list else 'line'} 2(:|,).*{error}"):
        list(iterate_records(path))


@pytest.mark.parametrize("name", list(BAD))
def test_a_given_format_says_what_a_foreign_record_lacks(name, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"foo": 1}')
    with pytest.raises(RecordError, match=r"facts\.jsonl, line 1: missing key\(s\) .*\. The record has: foo"):
        list(iterate_records(path, format=name))


def test_unknown_keys_list_every_format():
    with pytest.raises(RecordError) as error:
        recognize({"foo": 1, "bar": 2}, "facts.jsonl, line 1")
    assert "facts.jsonl, line 1: the keys foo, bar are of no known format" in str(error.value)
    assert all(name in str(error.value) for name in FORMATS)


def test_unknown_format():
    with pytest.raises(
        ConfigError, match=r"Unknown data format 'counterfakt'\. Did you mean 'counterfact'\? Formats: a"
    ):
        find_format("counterfakt")
    with pytest.raises(ConfigError, match="Unknown data format 'x'"):
        read_records(FILES["kilt"], format="x")


def test_a_misspelt_key_of_ones_own_file():
    record = {"prompt": "Q?", "target": "A", "rephrase": "R?"}
    with pytest.raises(RecordError, match=r"unknown key 'rephrase'\. Did you mean 'rephrases'\?"):
        find_format("native").parse(record, "line 1", 1)


def test_a_list_that_is_no_json(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text('[{"prompt": "Q?"')
    with pytest.raises(RecordError, match=r"facts\.json: not valid JSON"):
        read_records(path)
    path.write_text('["a", "b"]')
    with pytest.raises(RecordError, match=r"facts\.json, record 1: expected a JSON object, got str"):
        read_records(path)


def test_records_without_rephrases_may_be_kept():
    records = read_records(FILES["knowedit"], require_rephrases=False)
    assert len(records) == 3
    task = TaskSampler(records, rephrases=2, locality=1).task(0, 2)
    assert task.rephrases == (records[2].prompt,) * 2


def test_own_locality_comes_first_and_hard_ones_before_others():
    records = read_records(FILES["native"])
    sampler = TaskSampler(records, locality=4, hard_locality=2)
    task = sampler.task(0, 0)
    assert task.locality[0] == ("What is the largest city of Australia?", "Sydney")
    assert task.locality[2] == ("Who painted Guernica?", "Picasso")
    # Of the two hard ones that were asked for the record brings one; the other is of its relation.
    assert task.hard == 2
    assert task.locality[1][1] in ("Ottawa", "Nairobi") and task.locality[3][1] in ("Ottawa", "Nairobi")
    assert task.locality[1][1] != task.locality[3][1]
    # Records without any draw from the others, as ever.
    assert sampler.task(0, 1).hard == 2


def test_more_own_locality_than_asked_for_is_drawn_from():
    records = read_records(FILES["counterfact"])
    sampler = TaskSampler(records, locality=2)
    seen = set()
    for epoch in range(20):
        task = sampler.task(epoch, 0)
        assert task.hard == len(task.locality) == 2
        assert task.locality == sampler.task(epoch, 0).locality
        seen |= set(task.locality)
    assert seen == {(question.prompt, "French") for question in records[0].locality}


def test_portability_goes_with_the_task():
    records = read_records(FILES["knowedit"])
    assert TaskSampler(records).task(0, 0).portability == records[0].portability != ()


def test_records_without_true_answers_have_nothing_unrelated():
    records = [Record(f"Q{i}?", (), ("A",), ("R?",)) for i in range(3)]
    with pytest.raises(ConfigError, match="need true answers; these records hold none. Give locality_data"):
        TaskSampler(records)


@pytest.mark.parametrize("name", ["native", "counterfact", "knowedit"])
def test_labels_of_other_rows_are_ignored(name):
    data = EditDataModule(FILES[name], tokenizer=small_tokenizer(), **_settings(name))
    rows = next(iter(data.train_dataloader())).z_edit
    assert (rows.labels == IGNORED_LABEL).any() and (rows.labels != IGNORED_LABEL).any(1).all()


def test_statements_are_optional(tmp_path):
    """Of KILT's and of native files: the fact as sentences without their end."""
    kilt = {"input": "Q?", "output": [{"answer": "A"}], "alternatives": ["B"], "filtered_rephrases": ["R?"]}
    native = {"prompt": "Q?", "target": "B", "rephrases": "R?"}
    said = ["A lies in", "A is in"]
    for name, data, value in (("kilt", kilt, said), ("native", native, said), ("native", native, said[0])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in (data, {**data, "statements": value})))
        assert [record.statements for record in read_records(path, name)] == [
            (),
            tuple(value if value is said else said[:1]),
        ]
