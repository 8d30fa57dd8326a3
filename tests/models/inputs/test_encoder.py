"""Token ids and label alignment, on small real tokenizers of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import decode_labels, tiny_model
from helpers.tokenizers import TOKENIZERS, byte_level, unigram, with_bos, with_eos
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from mend_lightning.errors import ConfigError, TokenizerError, TruncationWarning
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.inputs.encoder import Encoder, model_kind
from mend_lightning.models.inputs.prompts import PromptFormat

QUESTION = PromptFormat("Q: {input}\nA:")
LINES = PromptFormat("Q: {input}\nA:", stop="\n")
PAIRS = [("What is the capital of France?", "San Francisco"), ("Where is Rome?", "Italy")]


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def unpadded(rows, index: int) -> tuple[list[int], list[int]]:
    """Input ids and labels of one row."""
    mask = rows.inputs["attention_mask"][index].bool()
    return rows.inputs["input_ids"][index][mask].tolist(), rows.labels[index].tolist()


@pytest.mark.parametrize("format", [QUESTION, LINES], ids=["eos", "newline"])
def test_causal_labels_spell_the_answer_with_its_stop(tokenizer, format):
    encoder = Encoder(tokenizer, format)
    rows = encoder.rows(PAIRS, [0, 1], 2)
    for index, (_, target) in enumerate(PAIRS):
        assert decode_labels(encoder.tokenizer, rows.labels[index]).lstrip(" ") == target + (format.stop or "<eos>")


def test_causal_label_is_the_id_after_its_input(tokenizer):
    """Inputs and the last label together are the whole text, and `labels[t]` is `ids[t + 1]`."""
    encoder = Encoder(tokenizer, QUESTION)
    rows = encoder.rows(PAIRS, [0, 1], 2)
    for index, (prompt, target) in enumerate(PAIRS):
        ids, labels = unpadded(rows, index)
        prompt_length = len(encoder.prompt_ids(prompt))
        whole = [*ids, labels[len(ids) - 1]]
        assert labels[: prompt_length - 1] == [-100] * (prompt_length - 1)
        assert labels[prompt_length - 1 : len(ids)] == whole[prompt_length:]
        assert set(labels[len(ids) :]) <= {-100}
        text = tokenizer.decode(whole, skip_special_tokens=True)
        assert text.strip() == f"Q: {prompt}\nA: {target}"
        assert whole.count(tokenizer.eos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["causal", "encoder_decoder", "classifier"])
def test_padding_settings_change_nothing(tokenizer, kind):
    """Padding side, truncation side, and whether there is a pad token at all."""
    encoder = Encoder(tokenizer, QUESTION, kind, decoder_start_token_id=0)
    pairs = [(PAIRS[0][0], "SUPPORTS"), (PAIRS[1][0], "REFUTES")] if kind == "classifier" else PAIRS
    expected = encoder.rows(pairs, [0, 1], 2)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.pad_token = "Q" if tokenizer.pad_token is None else None
    actual = encoder.rows(pairs, [0, 1], 2)
    assert torch.equal(actual.labels, expected.labels)
    assert all(torch.equal(actual.inputs[name], expected.inputs[name]) for name in expected.inputs)
    mask = actual.inputs["attention_mask"]
    assert not (mask.diff(dim=1) > 0).any(), "padding stands on the right"
    assert not mask.all()


def test_rows_of_a_batch_are_the_rows_alone(tokenizer):
    encoder = Encoder(tokenizer, LINES)
    both = encoder.rows(PAIRS, [0, 1], 2)
    for index, pair in enumerate(PAIRS):
        ids, labels = unpadded(both, index)
        alone = encoder.pair(*pair)
        assert ids == alone["input_ids"]
        assert labels[: len(ids)] == alone["labels"]


def test_an_answer_is_tokenised_as_it_stands_behind_the_prompt():
    """Not as at the start of a text: a SentencePiece tokenizer would put a space there."""
    tokenizer = unigram()
    encoder = Encoder(tokenizer, PromptFormat("Q: {input}\n", "{target}"))
    ids = encoder.target_ids("Where?", "Paris")
    assert encoder.prompt_ids("Where?") + ids == tokenizer("Q: Where?\nParis")["input_ids"]
    assert ids != tokenizer("Paris")["input_ids"]


def test_prompt_that_grows_into_the_answer():
    """Where prompt and answer have no border between tokens, the answer keeps ids of its own."""
    encoder = Encoder(byte_level(), PromptFormat("{input}", "{target}", "\n"))
    whole = encoder.tokenizer("Par" + "is\n")["input_ids"]
    assert whole[: len(encoder.prompt_ids("Par"))] != encoder.prompt_ids("Par")
    assert encoder.tokenizer.decode(encoder.target_ids("Par", "is")) == "is\n"
    assert encoder.tokenizer.decode(encoder.pair("Par", "is")["input_ids"]).startswith("Par")


@pytest.mark.parametrize("max_length", [12, 16, 24])
def test_long_prompt_loses_its_beginning_and_the_target_nothing(max_length):
    tokenizer = byte_level()
    prompt = "Which of all the cities of France is the capital of France?"
    full = Encoder(tokenizer, QUESTION, max_length=1000).pair(prompt, "Italy")
    with pytest.warns(
        TruncationWarning, match=rf"max_length \({max_length} tokens.*lose their beginning. Raise max_length"
    ):
        cut = Encoder(tokenizer, QUESTION, max_length=max_length).pair(prompt, "Italy")
    assert len(cut["input_ids"]) <= max_length < len(full["input_ids"])
    assert cut["input_ids"] == full["input_ids"][-len(cut["input_ids"]) :]
    assert [label for label in cut["labels"] if label != -100] == [label for label in full["labels"] if label != -100]
    assert tokenizer.decode(cut["input_ids"]).endswith("\nA: Italy")


def test_a_long_prompt_keeps_its_bos():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    prompt = "<bos>Which of all the cities of France is the capital of France?"
    encoder = Encoder(tokenizer, PromptFormat("{input}", " {target}", "\n"), max_length=16)
    full = replace(encoder, max_length=1000).pair(prompt, "Italy")["input_ids"]
    with pytest.warns(TruncationWarning):
        cut = encoder.pair(prompt, "Italy")["input_ids"]
    assert len(cut) < len(full) and cut[0] == tokenizer.bos_token_id == full[0]
    assert cut[1:] == full[1 - len(cut) :]


def test_target_that_does_not_fit():
    encoder = Encoder(byte_level(), QUESTION, max_length=6)
    with pytest.raises(
        TokenizerError, match=r"The target 'San Francisco, Paris' has \d+ tokens; max_length is 6\. Raise"
    ):
        encoder.pair("Where?", "San Francisco, Paris")


@pytest.mark.parametrize("pair", [("Where is \udcff?", "Oslo"), ("Where?", "Os\udcfflo")])
def test_text_that_was_no_utf8(tokenizer, pair):
    """Bytes of a pipe or a command line in another encoding arrive as lone surrogates."""
    encoder = Encoder(tokenizer, PromptFormat(stop="\n"), "causal")
    with pytest.raises(TokenizerError, match=r"udcff.* not valid Unicode \(was it UTF-8\?\)"):
        encoder.rows([pair], [0], 1)


@pytest.mark.parametrize("kind", ["causal", "encoder_decoder"])
@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_empty_target(kind, target):
    encoder = Encoder(byte_level(), QUESTION, kind, decoder_start_token_id=0)
    with pytest.raises(TokenizerError, match=r"The target of 'Where\?' is empty; it must hold at least one token"):
        encoder.pair("Where?", target)


def test_empty_prompt():
    with pytest.raises(TokenizerError, match=r"The prompt '' has no token"):
        Encoder(byte_level()).pair("", "Paris")


def test_no_end_of_sequence_token():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match=r"has no end-of-sequence token.*Set a stop text"):
        Encoder(tokenizer, QUESTION)
    rows = Encoder(tokenizer, LINES).rows(PAIRS, [0, 1], 2)
    assert decode_labels(tokenizer, rows.labels[0]) == " San Francisco\n"


def test_encoder_decoder_reads_the_target_one_step_behind():
    tokenizer = unigram()
    encoder = Encoder(tokenizer, QUESTION, "encoder_decoder", decoder_start_token_id=0)
    rows = encoder.rows(PAIRS, [0, 1], 2)
    for index, (prompt, target) in enumerate(PAIRS):
        ids, labels = unpadded(rows, index)
        assert ids == tokenizer(QUESTION.question(prompt))["input_ids"]
        labels = [label for label in labels if label != -100]
        assert labels == tokenizer(target)["input_ids"]
        assert labels[-1] == tokenizer.eos_token_id
        mask = rows.inputs["decoder_attention_mask"][index].bool()
        assert rows.inputs["decoder_input_ids"][index][mask].tolist() == [0, *labels[:-1]]


def test_a_leading_bos_is_read_and_not_trained():
    """BART's decoder starts with EOS and is given BOS."""
    tokenizer = with_eos()
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    pair = Encoder(tokenizer, QUESTION, "encoder_decoder", decoder_start_token_id=eos).pair("Where?", "Paris")
    answer = tokenizer("Paris", add_special_tokens=False)["input_ids"]
    assert pair["decoder_input_ids"] == [eos, bos, *answer]
    assert pair["labels"] == [-100, *answer, eos]


def test_encoder_prompt_loses_its_end_and_keeps_eos():
    tokenizer = unigram()
    encoder = Encoder(tokenizer, QUESTION, "encoder_decoder", max_length=10, decoder_start_token_id=0)
    full = tokenizer(QUESTION.question(PAIRS[0][0]))["input_ids"]
    assert len(full) > 10
    with pytest.warns(TruncationWarning, match="lose their end"):
        assert encoder.prompt_ids(PAIRS[0][0]) == [*full[:9], tokenizer.eos_token_id]


def test_encoder_decoder_needs_its_start():
    with pytest.raises(ConfigError, match="needs decoder_start_token_id"):
        Encoder(unigram(), kind="encoder_decoder")


def test_classifier():
    tokenizer, format = with_eos(), PromptFormat("{input}")
    rows = Encoder(tokenizer, format, "classifier").rows([("Rome", "SUPPORTS"), ("Paris", "REFUTES")], [0, 1], 2)
    assert rows.labels.tolist() == [[1], [0]]
    assert unpadded(rows, 0)[0] == tokenizer("Rome")["input_ids"]
    assert set(rows.inputs) == {"input_ids", "attention_mask"}


def test_class_that_is_none():
    with pytest.raises(TokenizerError, match=r"'NOT ENOUGH INFO' is no class of a binary classifier\. Expected one of"):
        Encoder(with_eos(), PromptFormat("{input}"), "classifier").pair("Rome", "NOT ENOUGH INFO")


def test_classifier_on_a_decoder_sees_the_same_end_in_a_padded_row():
    """GPT-2's classifier finds a row's last token by the pad id of its config."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=3)
    model = GPT2ForSequenceClassification(config).eval()
    encoder = Encoder.for_model(model, with_eos(), PromptFormat("{input}"))
    pairs = [("Rome", "SUPPORTS"), ("What is the capital of France?", "REFUTES")]
    both = run_model(model, encoder.rows(pairs, [0, 1], 2))
    alone = run_model(model, encoder.rows(pairs[:1], [0], 1))
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize(
    ("task", "tasks", "grouped"),
    [
        ([0, 1], 2, True),
        ([0, 0, 1, 1], 2, True),
        ([0, 1, 1], 2, False),
        ([1, 0], 2, False),
        ([0, 1, 0, 1], 2, False),
        ([1], 2, False),
    ],
)
def test_grouped_rows(task, tasks, grouped):
    rows = Encoder(byte_level(), QUESTION).rows([PAIRS[0]] * len(task), task, tasks)
    assert (rows.grouped, rows.task.tolist(), rows.tasks) == (grouped, task, tasks)
    assert (rows.task_of_row is None) is grouped


def test_a_few_shot_example_before_it_changes_no_label():
    tokenizer = with_bos()
    plain = Encoder(tokenizer, LINES).pair(*PAIRS[0])["labels"]
    worked = Encoder(tokenizer, PromptFormat("Q: Where is Rome?\nA: Italy\nQ: {input}\nA:", stop="\n")).pair(*PAIRS[0])[
        "labels"
    ]
    assert [label for label in plain if label != -100] == [label for label in worked if label != -100]


def test_model_kinds(family):
    expected = {"bert": "classifier", "gpt2": "causal", "llama": "causal"}
    assert model_kind(tiny_model(family)) == expected.get(family, "encoder_decoder")
