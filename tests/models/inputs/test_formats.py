"""Formats by name: the text that each puts around a question, and for which models."""

from __future__ import annotations

import pytest
from helpers.bases import small_tokenizer
from helpers.models import decode_labels
from helpers.tokenizers import byte_level, chatting

from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.formats import NAMED, in_format, named_format, named_formats, prompt_formats
from mend_lightning.models.inputs.prompts import PromptFormat

OWN = PromptFormat("Q: {input}\nA:", " {target}", "\n")
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def chat_tokenizer():
    return chatting(byte_level(), "chatml")


def texts(name, own: PromptFormat = OWN, kind="causal") -> PromptFormat:
    return in_format(Encoder(chat_tokenizer(), own, kind, decoder_start_token_id=0), name).format


def test_own_is_the_data_s():
    assert texts("own") is OWN


@pytest.mark.parametrize("own", [OWN, PromptFormat("Q: {input}\nA: ", "{target}", "\n")], ids=["blank", "glued"])
def test_bare_and_statement_keep_a_blank_before_the_answer(own):
    """Also where the data's own format has it in the question's template."""
    assert texts("bare", own) == PromptFormat("{input}", " {target}", "\n")
    assert texts("statement", own) == PromptFormat("{input}", " {target}", None)


def test_an_encoder_decoder_ends_its_answer_to_a_statement():
    assert texts("statement", PromptFormat(), "encoder_decoder").stop == ""


def test_passage_comes_before_the_own_format():
    format = texts("passage")
    before, _, own = format.prompt.rpartition("\n\n")
    assert own == OWN.prompt and len(before) > 100
    assert (format.target, format.stop) == (OWN.target, OWN.stop)


def test_chats_build_on_each_other():
    chat, system, turns = (texts(name).prompt for name in ("chat", "chat_system", "chat_turns"))
    assert chat == "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
    assert system.startswith("<|im_start|>system\n") and system.endswith(chat)
    assert turns.endswith(chat) and turns.count("<|im_start|>user") == 4 and turns.count("<|im_start|>assistant") == 4


def test_training_texts_are_others_than_those_of_evaluation():
    formats = prompt_formats(tuple(NAMED.values()), OWN, chat_tokenizer(), "causal")
    for name in ("chat_system", "chat_turns", "passage"):
        keys = NAMED[name].training_keys
        assert name not in keys and len({formats[key].prompt for key in (name, *keys)}) == len(keys) + 1 > 4
    assert all(NAMED[name].training_keys == (name,) for name in ("own", "bare", "statement", "chat"))


def test_no_text_of_a_format_is_a_placeholder():
    """`{input}` stands once: a passage or a talk that held it would have the question in it twice."""
    for format in prompt_formats(tuple(NAMED.values()), OWN, chat_tokenizer(), "causal").values():
        assert format.prompt.count("{input}") == 1 and format.target.count("{target}") == 1


def test_formats_of_one_s_own():
    exam = {"name": "exam", "prompt": "Exam. {input}", "stop": "."}
    assert texts(exam) == PromptFormat("Exam. {input}", " {target}", ".")
    teacher = texts({"name": "teacher", "system": "You teach.", "talk": [["Hi?", "Hello."]]})
    assert teacher.prompt.startswith("<|im_start|>system\nYou teach.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>")
    both = named_format({"name": "report", "passage": ["It rained.", "The sun shone."]})
    assert both.training_keys == ("report/1",)
    assert texts(both).prompt == "It rained.\n\nQ: {input}\nA:"


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "exam"},
        {"prompt": "{input}"},
        {"name": "own", "prompt": "{input}"},
        {"name": "exam", "prompt": "{input}", "passage": "It rained."},
        {"name": "a/b", "prompt": "{input}"},
    ],
)
def test_a_mapping_that_is_no_format(spec):
    with pytest.raises(
        ConfigError, match=r"is no format\. One of your own has a name .* prompt / target / stop, or system"
    ):
        named_format(spec)


def test_a_name_that_is_none():
    with pytest.raises(ConfigError, match=r"no format 'chat_sistem'\. Did you mean 'chat_system'\? Formats: own, bare"):
        named_format("chat_sistem")


@pytest.mark.parametrize("specs", [[], ["chat", "chat"]])
def test_lists_that_are_none(specs):
    with pytest.raises(ConfigError, match="names each once, and at least one"):
        named_formats(specs)


def test_one_name_is_a_list():
    assert named_formats("chat") == named_formats(["chat"]) == (NAMED["chat"],)


@pytest.mark.parametrize(
    ("kind", "possible"), [("classifier", ["own"]), ("encoder_decoder", ["own", "bare", "statement", "passage"])]
)
def test_formats_that_a_kind_of_model_has(kind, possible):
    tokenizer = small_tokenizer(kind)
    for name in NAMED:
        if name in possible:
            assert prompt_formats([NAMED[name]], PromptFormat(), tokenizer, kind)
        else:
            with pytest.raises(ConfigError, match=rf"'{name}' is not for .* {kind}\. Formats: {', '.join(possible)}\."):
                prompt_formats([NAMED[name]], PromptFormat(), tokenizer, kind)


def test_a_model_without_a_chat_template():
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_formats([NAMED["chat"]], OWN, small_tokenizer(), "causal")


def test_rows_in_several_formats_are_those_of_an_encoder_of_each():
    tokenizer = chat_tokenizer()
    formats = prompt_formats(tuple(NAMED.values()), OWN, tokenizer, "causal")
    encoder = Encoder(tokenizer, OWN, formats=formats)
    keys = ["", "chat", "passage/1", "own", "chat_turns", "bare"]
    pairs = [(QUESTION, ANSWER)] * len(keys)
    rows = encoder.rows(pairs, range(len(keys)), len(keys), keys)
    assert rows.formats == tuple(keys)
    for i, key in enumerate(keys):
        alone = Encoder(tokenizer, formats[key or "own"], max_length=1000).pair(QUESTION, ANSWER)
        mask = rows.inputs["attention_mask"][i].bool()
        assert rows.inputs["input_ids"][i][mask].tolist() == alone["input_ids"]
        assert rows.labels[i][mask].tolist() == alone["labels"]
    assert decode_labels(tokenizer, rows.labels[1]) == "Paris<|im_end|>"
    assert encoder.rows(pairs, range(len(keys)), len(keys)).formats == ()


def test_what_a_format_adds_does_not_count_against_max_length():
    """A limit that was chosen for the data cuts no system prompt off."""
    tokenizer = chat_tokenizer()
    formats = prompt_formats([NAMED["chat_turns"]], OWN, tokenizer, "causal")
    # A few more: where a template and a question meet, their tokens may be others than those of each alone.
    length = len(Encoder(tokenizer, OWN).pair(QUESTION, ANSWER)["input_ids"]) + 6
    encoder = Encoder(tokenizer, OWN, max_length=length, formats=formats)
    ids = encoder.asking("chat_turns").pair(QUESTION, ANSWER)["input_ids"]
    assert len(ids) > length
    assert tokenizer.decode(ids).startswith(formats["chat_turns"].prompt[:40])


def test_a_format_that_the_encoder_does_not_have():
    with pytest.raises(ConfigError, match=r"no format 'chat'; it has none but its own"):
        Encoder(byte_level(), OWN).rows([(QUESTION, ANSWER)], [0], 1, ["chat"])


def test_a_format_of_one_s_own_may_change_all_three_texts():
    mine = named_format({"name": "exam", "prompt": "Exam. {input}", "target": " = {target}", "stop": ";"})
    assert mine.forms(PromptFormat(stop="\n"), None, "causal") == (PromptFormat("Exam. {input}", " = {target}", ";"),)
