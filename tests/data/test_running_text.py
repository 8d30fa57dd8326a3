"""Generation data: targets without a stop, rephrases that lose their beginning, paragraphs as unrelated inputs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers.bases import REMARKS, small_tokenizer, state_copy, tiny_base
from tokenizers import processors

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.records import read_records
from mend_lightning.data.running_text import as_question, drop_prefix
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.errors import ConfigError, NoStopWarning, TruncationWarning
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import RUNNING_TEXT as RUNNING

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)

FILE = Path(__file__).parents[1] / "assets" / "formats" / "wikitext.jsonl"
PROMPT, TARGET = "The river rises in the hills", " and runs west for ninety"


def tokenizers() -> dict:
    """One that ends nothing, one that ends every text with EOS, one that begins every text with it."""
    plain, ending, beginning = small_tokenizer(), small_tokenizer("encoder_decoder"), small_tokenizer()
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    return {"plain": plain, "ending": ending, "beginning": beginning}


@pytest.mark.parametrize("name", ["plain", "ending", "beginning"])
def test_nothing_ends_a_running_text(name):
    tokenizer = tokenizers()[name]
    encoder = Encoder(tokenizer, RUNNING)
    expected = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    assert encoder.target_ids(PROMPT, TARGET) == expected
    pair = encoder.pair(PROMPT, TARGET)
    whole = tokenizer(PROMPT + TARGET, add_special_tokens=False)["input_ids"]
    front = [1] if name == "beginning" else []
    assert pair["input_ids"] == [*front, *whole[:-1]]
    assert [label for label in pair["labels"] if label != -100] == expected


def test_the_same_with_an_encoder_decoder():
    tokenizer = small_tokenizer("encoder_decoder")
    encoder = Encoder(tokenizer, RUNNING, "encoder_decoder", decoder_start_token_id=0)
    assert encoder.pair(PROMPT, TARGET)["labels"] == tokenizer(TARGET.strip(), add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_eos_will_do():
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    assert Encoder(tokenizer, RUNNING).target_ids(PROMPT, TARGET)


def test_a_paragraph_is_predicted_from_its_first_word_on():
    """The original labels every token of it and shifts: all but the first are predicted."""
    tokenizer = small_tokenizer()
    for record in read_records(FILE):
        first, rest = as_question(record.text)
        assert first + rest == record.text and " " not in first
        pair = Encoder(tokenizer, RUNNING).pair(first, rest)
        ids = tokenizer(record.text)["input_ids"]
        length = len(tokenizer(first)["input_ids"])
        assert pair["input_ids"] == ids[:-1]
        assert pair["labels"] == [-100] * (length - 1) + ids[length:]


@pytest.mark.parametrize("max_length", [8, 20])
def test_a_long_paragraph_loses_its_end(max_length):
    tokenizer = small_tokenizer()
    text = read_records(FILE)[0].text
    full = Encoder(tokenizer, RUNNING, max_length=1000).pair(*as_question(text))
    with pytest.warns(TruncationWarning, match=rf"running texts that do not fit into max_length \({max_length} tok"):
        cut = Encoder(tokenizer, RUNNING, max_length=max_length).pair(*as_question(text))
    assert len(cut["input_ids"]) == max_length - 1
    assert cut["input_ids"] == full["input_ids"][: max_length - 1]
    assert cut["labels"] == full["labels"][: max_length - 1]


def test_a_paragraph_that_is_read_with_a_decoder_loses_its_end():
    encoder = Encoder(small_tokenizer("encoder_decoder"), RUNNING, "encoder_decoder", 8, decoder_start_token_id=0)
    with pytest.warns(TruncationWarning):
        assert len(encoder.pair(*as_question(read_records(FILE)[0].text))["labels"]) == 7


def test_a_prefix_of_up_to_half_the_words_is_dropped():
    words = PROMPT.split()
    seen = {drop_prefix(random.Random(i), PROMPT) for i in range(200)}
    assert seen == {" ".join(words[dropped:]) for dropped in range(len(words) // 2 + 1)}
    assert drop_prefix(random.Random(0), "word") == "word"


def test_prefixes_are_drawn_anew_in_every_epoch_and_repeat():
    records = read_records(FILE)
    draws = [TaskSampler(records, rephrases=2).task(epoch, 0).rephrases for epoch in range(12)]
    assert len(set(draws)) > 4
    assert all(records[0].prompt.endswith(rephrase) for pair in draws for rephrase in pair)
    assert draws == [TaskSampler(records, rephrases=2).task(epoch, 0).rephrases for epoch in range(12)]
    # A record that brings rephrases uses those.
    assert TaskSampler(records).task(0, 2).rephrases == ("the building stood empty for ten years",)


def test_unrelated_inputs_are_other_records_paragraphs():
    records = read_records(FILE)
    sampler = TaskSampler(records, locality=2)
    for index, record in enumerate(records):
        texts = {prompt + rest for prompt, rest in sampler.task(0, index).locality}
        assert texts == {other.text for other in records if other is not record}


@pytest.mark.parametrize("settings", [{"stop": ""}, {"target": " {target}"}])
def test_a_format_that_would_put_something_in_between(settings):
    data = EditDataModule(FILE, **{"target": "{target}", "stop": None, **settings})
    with pytest.raises(ConfigError, match=r'Set data\.target to "\{target\}" and data\.stop to null'):
        data.sampler("train")


def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_generated_text_has_the_length_asked_for():
    """Not even EOS ends it, and each answer has its own length."""
    tokenizer = small_tokenizer()
    model = tiny_base("gpt2", tokenizer)
    encoder = Encoder(tokenizer, RUNNING)
    prompts = [PROMPT, "The city"]
    expected = [greedy(model, encoder.prompt_ids(prompt), 10) for prompt in prompts]
    # The first token of both is one that would end an answer.
    for config in (model.config, model.generation_config):
        config.eos_token_id = [expected[0][0], expected[1][1]]
    answers = generate_answers(model, encoder, prompts, lengths=[10, 7])
    assert answers == [tokenizer.decode(expected[0]).strip(), tokenizer.decode(expected[1][:7]).strip()]
    free = generate_answers(model, encoder, prompts[:1], max_new_tokens=5)
    assert free == [tokenizer.decode(expected[0][:5]).strip()]


def test_an_encoder_decoder_generates_the_length_asked_for():
    tokenizer = small_tokenizer("encoder_decoder")
    model = tiny_base("t5", tokenizer)
    encoder = Encoder.for_model(model, tokenizer, RUNNING)
    ids = torch.tensor([encoder.prompt_ids(PROMPT)])
    decoded = [0]
    for _ in range(6):
        decoded.append(int(model(input_ids=ids, decoder_input_ids=torch.tensor([decoded])).logits[0, -1].argmax()))
    model.generation_config.eos_token_id = decoded[2]
    expected = tokenizer.decode(decoded[1:], skip_special_tokens=True).strip()
    assert generate_answers(model, encoder, [PROMPT], lengths=[6]) == [expected]


def test_training_and_evaluation_on_generation_data(mend, trainer):
    """Exact match of generated text is the teacher-forced match of its tokens: the same number of tokens, no end."""
    texts = {"target": "{target}", "stop": None, "max_length": 200}
    data = EditDataModule(FILE, validation=FILE, test=FILE, batch_size=3, locality=2, eval_locality=2, **texts)
    module = mend("gpt2")
    module.configure_model()
    before = state_copy(module.editor)
    trainer(max_steps=4).fit(module, data)
    assert all(not torch.equal(value, before[name]) for name, value in module.editor.named_parameters())
    runner = trainer()
    runner.test(module, data, verbose=False)
    metrics = {name.removeprefix("test/"): float(value) for name, value in runner.callback_metrics.items()}
    assert metrics["generated_exact_match"] == metrics["edit_success"]
    assert "perplexity_drawdown" in metrics and metrics["locality_kl"] >= 0


def test_questions_without_a_stop_give_a_warning(facts):
    data = EditDataModule(facts / "train.jsonl", stop=None)
    with pytest.warns(NoStopWarning, match='nothing ends an answer.*such as "#", arrives as null'):
        data.sampler("train")
