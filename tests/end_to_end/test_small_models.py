"""The scripts that train small base models: what they write, that a killed run resumes, and what the statements say."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.bases import REMARKS, assert_same_state

from mend_lightning import BaseModel
from mend_lightning.data.records import read_records
from mend_lightning.errors import ConfigError, DataFileError, RecordError
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.inputs.encoder import Encoder, model_kind
from mend_lightning.models.inputs.prompts import PromptFormat

# The scripts are programs beside the package, which import each other, and are not installed.
SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import small_models  # noqa: E402
import statements  # noqa: E402
import train_small_classifier  # noqa: E402
import train_small_t5  # noqa: E402

pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")
TINY = {"facts": 3, "width": 16, "layers": 2, "vocabulary": 400, "batch_size": 4, "checkpoint_every": 2}
PHRASES = [
    {"phrase": "A cherry is a source of vitamin c.", "answer": 1},
    {"phrase": "A finch has a nucleus.", "answer": 0},
    {"phrase": "A wine is capable of grow leaves.", "answer": 0},
    {"phrase": "A wine is capable of grow leaves.", "answer": 1},
    {"phrase": "A finch is capable of sing.", "answer": 1},
]


@pytest.fixture
def thoughts(tmp_path) -> Path:
    path = tmp_path / "thoughts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PHRASES))
    return path


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return BaseModel(str(folder), "float32").load()[0].state_dict()


def test_small_t5(tmp_path):
    train_small_t5.main(tmp_path, steps=2, **TINY)
    model, tokenizer = BaseModel(str(tmp_path), "float32").load()
    assert model_kind(model) == "encoder_decoder" and len(tokenizer) == model.config.vocab_size == 400
    # What was learned from names nobody trained on can be spelled too.
    assert (
        tokenizer.decode(tokenizer("Zürich, Ægypt?")["input_ids"], skip_special_tokens=True).strip() == "Zürich, Ægypt?"
    )
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) and report["steps"] == 2
    assert set(report["accuracy"]) == {"train", "validation", "test", "unseen phrasings"}
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(), 48)
    assert len(generate_answers(model, encoder, ["What is the capital of France?"])) == 1


def test_small_classifier(tmp_path, thoughts):
    train_small_classifier.main(tmp_path, leap_of_thought=[thoughts], steps=2, **TINY)
    model, tokenizer = BaseModel(str(tmp_path), "float32").load()
    assert model_kind(model) == "classifier" and model.config.num_labels == 1
    first, *_, last = tokenizer.convert_ids_to_tokens(tokenizer("Is it?")["input_ids"])
    assert (first, last) == ("[CLS]", "[SEP]")
    found = {split: read_records(tmp_path / "statements" / f"{split}.jsonl") for split in statements.SPLITS}
    said = {record.prompt for records in found.values() for record in records}
    assert {"A finch has a nucleus.", "A cherry is a source of vitamin c."} <= said
    # Called both true and false: which one is right nobody knows.
    assert "A wine is capable of grow leaves." not in said
    assert json.loads((tmp_path / "training.json").read_text())["statements"]["train"] == len(found["train"])


@pytest.mark.parametrize("script", [train_small_t5, train_small_classifier])
def test_a_killed_run_resumes(script, tmp_path, monkeypatch):
    script.main(tmp_path / "whole", steps=5, **TINY)
    step = small_models.SmallModel.training_step

    def killed(module, rows, index):
        if module.global_step == 3:
            raise RuntimeError("killed")
        return step(module, rows, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(small_models.SmallModel, "training_step", killed)
        script.main(tmp_path / "killed", steps=5, **TINY)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    steps = []
    monkeypatch.setattr(
        small_models.SmallModel,
        "training_step",
        lambda module, *args: steps.append(module.global_step) or step(module, *args),
    )
    script.main(tmp_path / "killed", steps=5, **TINY)
    assert steps == [2, 3, 4]
    assert_same_state(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train_small_t5.main(tmp_path, steps=2, **TINY)
    with pytest.raises(ConfigError, match="'lr': 0.001.*'lr': 0.1.*Give another --out"):
        train_small_t5.main(tmp_path, steps=2, lr=0.1, **TINY)


def test_the_loss_and_the_accuracy_are_the_models_own(tmp_path):
    """Against transformers' loss and one row at a time."""
    pairs = [pair for record in read_records("world_facts/test")[:4] for pair in train_small_t5.learned(record)]
    tokenizer = train_small_t5.t5_tokenizer([text for pair in pairs for text in pair], 400)
    model = train_small_t5.new_t5(tokenizer, 16, 2)
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(), 48)
    module = small_models.SmallModel(model, encoder, pairs, small_models.Budget(60, lr=1e-2))
    module._half = False
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = small_models.encode_pairs(encoder, pairs)
    module.log = lambda *args, **kwargs: None

    def answered() -> list[bool]:
        return [bool((model(input_ids=q, labels=a).logits.argmax(-1) == a).all()) for q, a in zip(asked, answers)]

    for step in range(60):
        # Until some are learned and some not, or the comparison says little: when that is, rounding decides.
        if step > 20 and step % 3 == 0 and 0 < sum(answered()) < len(pairs):
            break
        loss = module.training_step(rows, step)
        if step == 0:
            ids = [tokenizer(text, return_tensors="pt")["input_ids"] for pair in pairs for text in pair]
            asked, answers = ids[::2], ids[1::2]
            losses = [model(input_ids=q, labels=a).loss * a.numel() for q, a in zip(asked, answers)]
            expected = sum(losses) / sum(a.numel() for a in answers)
            torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = answered()
    assert 0 < sum(right) < len(right)
    assert small_models.accuracy(model, encoder, pairs, batch_size=3) == sum(right) / len(right)


def test_the_verdict_and_the_words():
    """The classifier's loss against one row at a time, without padding."""
    pairs = train_small_classifier.learned(statements.world_statements("test")[:3])
    tokenizer = train_small_classifier.bert_tokenizer([text for text, _ in pairs], 200)
    model = train_small_classifier.new_bert(tokenizer, 16, 2)
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(), 48)
    found = train_small_classifier.judge_and_retell(model, small_models.encode_pairs(encoder, pairs))
    verdicts, words = [], []
    for text, label in pairs:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model(ids, output_hidden_states=True)
        true = torch.sigmoid(output.logits[0, 0])
        verdicts.append(-torch.log(true if label == "SUPPORTS" else 1 - true))
        told = torch.softmax(model.bert.embeddings.word_embeddings.weight @ output.hidden_states[-1][0, 0], 0)
        words += [-torch.log(told[token]) for token in ids[0, 1:-1]]
    expected = sum(verdicts) / len(verdicts) + train_small_classifier.RETELLING * sum(words) / len(words)
    torch.testing.assert_close(found, expected)
    assert len({len(tokenizer(text)["input_ids"]) for text, _ in pairs}) > 1


def test_the_learning_rate_rises_and_falls():
    factors = [small_models.rise_and_fall(step, 100) for step in range(100)]
    assert factors[4] == max(factors) == 1 and 0 < factors[0] < factors[3]
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0 < factors[-1] < 0.02


def test_phrasings_that_are_not_learned():
    records = read_records("world_facts/validation")
    assert {record.relation for record in records} == set(train_small_t5.QUESTIONS)
    for record in records:
        learned, unseen = train_small_t5.learned(record), train_small_t5.unseen(record)
        assert len(set(learned)) == 5 and len(set(unseen)) == 2 and not set(learned) & set(unseen)
        assert all(record.subject in question for question, _ in unseen)


def test_statements_of_world_facts():
    said = {split: statements.world_statements(split) for split in statements.SPLITS}
    everything = [statement for each in said.values() for statement in each]
    subjects = {split: {statement.subject for statement in each} for split, each in said.items()}
    assert not subjects["train"] & subjects["test"] and not subjects["validation"] & subjects["test"]
    assert sum(statement.true for statement in everything) == len(everything) / 2
    truth = {wording: statement.true for statement in everything for wording in statement.wordings}
    assert len(truth) == sum(len(statement.wordings) for statement in everything)
    assert truth["Managua is in Nicaragua."] and truth["Is it so that Managua is in Nicaragua?"]
    assert truth["The Netherlands can be found in Europe."]
    for statement in everything:
        assert len(set(statement.wordings)) == 7 and all(statement.subject in wording for wording in statement.wordings)


def test_statements_of_leap_of_thought(thoughts):
    cherry, nucleus, sing = statements.thought_statements([thoughts])
    assert (cherry.true, nucleus.true, sing.true) == (True, False, True)
    assert cherry.wordings[0] == PHRASES[0]["phrase"] and (cherry.subject, cherry.relation) == ("cherry", "is a")
    assert set(sing.wordings) == {
        "A finch is capable of sing.", "Every finch is capable of sing.", "Finches are capable of sing.",
        "A finch is able to sing.", "It is true that a finch is capable of sing.", "Is it so that a finch is capable of sing?",
        "One can say of any finch that it is capable of sing.",
    }  # fmt: skip
    assert nucleus.split == sing.split
    record = nucleus.record()
    assert (record["prediction"], record["alternatives"], len(record["filtered_rephrases"])) == (
        "REFUTES",
        ["SUPPORTS"],
        4,
    )
    assert not set(nucleus.unseen) & {record["input"], *record["filtered_rephrases"]} and len(nucleus.unseen) == 2


def test_a_split_has_its_share():
    drawn = [statements.split_of(f"subject {i}") for i in range(2000)]
    assert 0.22 < drawn.count("test") / 2000 < 0.28 and 0.08 < drawn.count("validation") / 2000 < 0.12


@pytest.mark.parametrize("line", ["{", "[]", '{"phrase": "A a is b."}', '{"phrase": "A a is b.", "answer": 2}'])
def test_lines_that_are_no_statements(line, tmp_path):
    (tmp_path / "file.jsonl").write_text(line + "\n")
    with pytest.raises(RecordError, match=r"file.jsonl, line 1: expected .*answer"):
        statements.thought_statements([tmp_path / "file.jsonl"])


def test_statements_in_another_form(tmp_path):
    (tmp_path / "file.jsonl").write_text('{"phrase": "Wine!", "answer": 1}\n')
    with pytest.raises(RecordError, match="'Wine!' has no form known here"):
        statements.thought_statements([tmp_path / "file.jsonl"])
    with pytest.raises(DataFileError, match="missing.jsonl cannot be read"):
        statements.thought_statements([tmp_path / "missing.jsonl"])


def test_examples_in_the_scripts():
    results = [doctest.testmod(module) for module in (statements, train_small_t5, small_models)]
    assert sum(result.attempted for result in results) >= 3 and not any(result.failed for result in results)
