"""`mend-lightning make-generation-data`: what it makes, against a plain loop, and that a broken run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.bases import REMARKS, small_tokenizer, tiny_base
from helpers.commandline import assert_says, call
from transformers import GPT2LMHeadModel

from mend_lightning.cli.commands import make_generation_data
from mend_lightning.cli.generation_data.continuations import sample_continuations
from mend_lightning.cli.generation_data.passages import first_tokens, paragraphs, passages, split_of
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.records import read_records
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import RUNNING_TEXT as RUNNING

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)

FOLDER = Path(__file__).parents[2] / "assets" / "facts"


@pytest.fixture
def text(tmp_path) -> Path:
    """Sixteen paragraphs of the questions and answers that the tiny model knows, two of them alike, and short lines."""
    lines = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = ["\n".join(f"Q: {q}\nA: {r['output'][0]['answer']}" for q in r["filtered_rephrases"]) for r in lines]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*parts, parts[0], "A heading"]), encoding="utf-8")
    return path


@pytest.fixture
def make(text, base_folder, tmp_path):
    """Runs the command on the text with a tiny model; `make(folder, *options)`."""

    def make(folder: str, *options):
        lengths = ("--prompt_tokens", 12, "--new_tokens", 4, "--min_words", 20, "--batch_size", 3)
        where = ("--base", base_folder("gpt2"), "--dtype", "float32", "--out", tmp_path / folder)
        return call("make-generation-data", text, *where, *lengths, *options)

    return make


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def test_paragraphs():
    text = "= Title =\n\n one two three four \n five six seven eight\nshort\n\n a b\nc d\n\nÄ b c d\n\na  b c d\n\n"
    assert paragraphs(text, min_words=4) == ["one two three four", "five six seven eight", "a b c d", "Ä b c d"]
    assert paragraphs(text, min_words=4, ascii_only=True) == ["one two three four", "five six seven eight", "a b c d"]


def test_prompts_are_whole_words_and_within_their_tokens():
    tokenizer = small_tokenizer()
    whole = "Q: On what continent can the city of Ålesund be found? Europe, naturally."
    for count in range(1, 60):
        start = first_tokens(tokenizer, whole, count)
        assert whole.startswith(start)
        assert start == whole or whole[len(start)] == " " or not start
        assert len(tokenizer(start)["input_ids"]) <= count or not start
        # The next word does not fit.
        longer = whole[: whole.find(" ", len(start) + 1)] if " " in whole[len(start) + 1 :] else whole
        assert start == whole or len(tokenizer(longer)["input_ids"]) >= count


def test_passages_go_on_behind_their_prompt():
    tokenizer = small_tokenizer()
    long, short = "What is the capital of France and of Spain and of Italy?", "What is it?"
    (passage,) = passages([long, short], tokenizer, prompt_tokens=6, new_tokens=4, max_tokens=11)
    assert long.startswith(passage.prompt) and long.startswith(passage.paragraph)
    assert len(tokenizer(passage.paragraph)["input_ids"]) <= 11


def test_splits_do_not_depend_on_the_order():
    texts = [f"text {i}" for i in range(40)]
    splits = dict(zip(texts, split_of(texts, 0.1, 0.2, seed=1)))
    assert [list(splits.values()).count(name) for name in ("train", "validation", "test")] == [28, 4, 8]
    assert splits == dict(zip(texts[::-1], split_of(texts[::-1], 0.1, 0.2, seed=1)))
    assert splits != dict(zip(texts, split_of(texts, 0.1, 0.2, seed=2)))
    assert set(split_of(texts, 0, 0.2, seed=1)) == {"train", "test"}


def sampled(model, tokenizer, prompt: str, tokens: int, temperature: float, seed: int) -> list[int]:
    """Slow truth: the whole sequence anew for every token, the plain softmax without special tokens."""
    ids = tokenizer(prompt)["input_ids"]
    torch.manual_seed(seed)
    for _ in range(tokens):
        logits = model(torch.tensor([ids])).logits[0, -1] / temperature
        logits[tokenizer.all_special_ids] = -torch.inf
        ids = [*ids, int(torch.multinomial(logits.softmax(-1)[None], 1))]
    return ids[-tokens:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_continuations_are_samples_of_the_models_own_distribution(base_folder, temperature):
    model = GPT2LMHeadModel.from_pretrained(base_folder("gpt2")).eval()
    tokenizer = small_tokenizer()
    encoder = Encoder(tokenizer, RUNNING)
    kept = 0
    for seed in range(12):
        prompt = "Q: In which country is"
        expected = sampled(model, tokenizer, prompt, 5, temperature, seed)
        (text,) = sample_continuations(model, encoder, [prompt], 5, temperature, seed)
        again = tokenizer(tokenizer.decode(expected))["input_ids"]
        kept += text is not None
        assert text == (tokenizer.decode(expected) if again == expected else None)
    assert kept >= 3, "some survive, or nothing was compared"


def test_sampling_leaves_the_random_numbers_alone():
    tokenizer = small_tokenizer()
    model = tiny_base("gpt2", tokenizer)
    state = torch.get_rng_state()
    sample_continuations(model, Encoder(tokenizer, RUNNING), ["Q: Where"], 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_gets_no_slice():
    """Of a slice torch makes a product for each row, with a copy of the head for each."""
    tokenizer = small_tokenizer()
    model = tiny_base("gpt2", tokenizer)
    head, contiguous = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, args, __: contiguous.append(args[0].is_contiguous()))
    sample_continuations(model, Encoder(tokenizer, RUNNING), ["Q: Where", "Q: Who was it"], 3)
    assert contiguous == [True] * 3 and not head._forward_pre_hooks


def test_the_set(make, text, tmp_path):
    said = make("out")
    assert said.code == 0, said.err
    made = files(tmp_path / "out")
    assert list(made) == ["about.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    about = json.loads(made["about.json"])
    assert about["passages"] == 16, "the one that stands there twice counts once"
    tokenizer = small_tokenizer()
    source = " ".join(text.read_text(encoding="utf-8").split())
    seen = []
    for split, count in about["records"].items():
        records = [json.loads(line) for line in made[f"{split}.jsonl"].splitlines()]
        assert len(records) == count >= 2
        for record in records:
            assert record["paragraph"] in source and record["paragraph"].startswith(record["prompt"])
            assert len(tokenizer(record["prompt"])["input_ids"]) <= 12
            whole = tokenizer(record["prompt"] + record["target"])["input_ids"]
            assert len(whole) == len(tokenizer(record["prompt"])["input_ids"]) + 4
        seen += [record["paragraph"] for record in records]
    assert len(set(seen)) == len(seen) == sum(about["records"].values())
    assert f"{len(seen)} records" in said.out and f"{16 - len(seen)} of 16 continuations were left out" in said.out
    # It is what training reads.
    texts = {"target": "{target}", "stop": None, "tokenizer": tokenizer}
    data = EditDataModule(tmp_path / "out" / "train.jsonl", batch_size=2, **texts)
    assert len(next(iter(data.train_dataloader()))) == 2
    # Once more: nothing to do, and nothing is touched.
    again = make("out")
    assert again.code == 0 and "holds this set already" in again.out
    assert files(tmp_path / "out") == made


def test_every_way_of_breaking_off_resumes_to_the_same_set(make, tmp_path, monkeypatch):
    assert make("whole").code == 0
    expected = files(tmp_path / "whole")
    real, calls = sample_continuations, []

    def until_third(*arguments):
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(make_generation_data, "sample_continuations", until_third)
    said = make("out")
    assert said.code == 130 and "2 of 6 batches are kept; start again to resume." in said.out
    assert list(files(tmp_path / "out")) == ["unfinished.jsonl"]
    # As if it had been killed while it wrote the third batch.
    with (tmp_path / "out" / "unfinished.jsonl").open("a") as file:
        file.write('[{"prompt": "half a li')
    said = make("out")
    assert said.code == 0 and "Going on after 2 of 6 batches" in said.out
    assert len(calls) == 3 + 4, "finished batches are not sampled again"
    assert files(tmp_path / "out") == expected


def test_killed_before_anything_was_written(make, tmp_path):
    assert make("whole").code == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.jsonl").write_text('{"text": "te')
    assert make("out").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_settings_are_refused(make, tmp_path):
    assert make("out").code == 0
    assert_says(make("out", "--seed", 1).err, r"out was made with other settings \(seed: 0, now 1\)")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "unfinished.jsonl").write_text('{"text": "text.txt"}\n[]\n')
    assert_says(make("part").err, r"unfinished.jsonl was made with other settings \(text_sha256: None, now")
    assert (tmp_path / "part" / "unfinished.jsonl").read_text() == '{"text": "text.txt"}\n[]\n'


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--new_tokens", 0), "must be at least 1"),
        (("--temperature", 0), "temperature above 0"),
        (("--max_tokens", 15), "A prompt and its target have 16 tokens; max_tokens is 15"),
        (("--validation", 0.6, "--test", 0.4), "must leave something for train"),
        (("--min_words", 10000), "0 of 0 paragraphs gave a record, too few for train"),
    ],
)
def test_settings_that_cannot_work(make, options, error):
    said = make("out", *options)
    assert said.code == 1
    assert_says(said.err, error)


def test_a_model_that_continues_nothing(text, base_folder, tmp_path):
    said = call("make-generation-data", text, "--base", base_folder("t5"), "--out", tmp_path / "out")
    assert_says(said.err, "is no causal language model")
    missing = call("make-generation-data", tmp_path / "none.txt", "--base", "none", "--out", tmp_path / "out")
    assert_says(missing.err, "cannot be read as UTF-8 text")


def test_records_are_read_as_generation_data(make, tmp_path):
    assert make("out").code == 0
    records = read_records(tmp_path / "out" / "train.jsonl", format="wikitext")
    assert all(record.text and record.alternatives and not record.rephrases for record in records)
