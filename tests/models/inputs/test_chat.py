"""A chat template as a prompt format, against what the template makes of whole conversations."""

from __future__ import annotations

import pytest
from helpers.tokenizers import CHAT_TEMPLATES, TOKENIZERS, TURN_TOKENS, byte_level, chatting, with_bos

from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.generation import stop_ids
from mend_lightning.models.inputs.chat import chat_format, end_of_turn
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat

QUESTION, ANSWER = "What is the capital of France?", "San Francisco"
SYSTEM, TALK = "Be brief.", (("Is it raining?", "No."), ("Where is Rome?", "Italy"), ("Thanks!", "With pleasure."))
# Templates without a role for the system: what it is told comes first in the first turn.
NO_SYSTEM = ("gemma", "mistral")


def conversation(template: str, system: str, talk) -> list[dict[str, str]]:
    """The messages that a user of the model would send."""
    said = [text for turn in talk for text in turn] + [QUESTION]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    if system and template in NO_SYSTEM:
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def template_ids(tokenizer, messages, **settings) -> list[int]:
    """What the template makes of messages, with a BOS before it where the tokenizer starts every text with one."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return [bos, *ids] if starts and ids[0] != bos else ids


@pytest.mark.parametrize("talk", [(), TALK], ids=["question", "turns"])
@pytest.mark.parametrize("system", ["", SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_question_and_answer_have_the_ids_of_the_template(make, template, system, talk):
    tokenizer = chatting(make(), template)
    encoder = Encoder(tokenizer, chat_format(tokenizer, system, talk), max_length=1000)
    messages = conversation(template, system, talk)
    asked = template_ids(tokenizer, messages, add_generation_prompt=True)
    answered = template_ids(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}])
    ids, target = encoder.prompt_ids(QUESTION), encoder.target_ids(QUESTION, ANSWER)
    assert ids[: len(asked)] == asked
    # Behind its generation prompt only this template writes something that is no answer: an empty thought.
    assert (len(ids) > len(asked)) == (template == "qwen3")
    assert answered[: len(ids) + len(target)] == [*ids, *target]
    if template != "plain":
        assert target[-1] == tokenizer.convert_tokens_to_ids((TURN_TOKENS[template] or ["<eos>"])[0])
        rest = answered[len(ids) + len(target) :]
        assert not tokenizer.decode([i for i in rest if i != tokenizer.eos_token_id]).strip(), (
            "nothing is left but blanks"
        )


@pytest.mark.parametrize("template", ["llama3", "gemma", "mistral", "chatml"])
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_bos_comes_once(make, template):
    tokenizer = chatting(make(), template)
    pair = Encoder(tokenizer, chat_format(tokenizer, SYSTEM)).pair(QUESTION, ANSWER)
    has_bos = template != "chatml" or tokenizer.bos_token_id is not None
    assert pair["input_ids"].count(tokenizer.convert_tokens_to_ids("<bos>")) == has_bos


@pytest.mark.parametrize(
    ("template", "target", "stop"),
    [
        ("chatml", "{target}", "<|im_end|>"),
        ("qwen3", "{target}", "<|im_end|>"),
        ("llama3", "{target}", "<|eot_id|>"),
        ("gemma", "{target}", "<end_of_turn>"),
        ("llama2", " {target} ", ""),
        ("mistral", " {target}", ""),
        ("dialogpt", "{target}", ""),
        ("plain", " {target}", "\n"),
    ],
)
def test_blank_and_end_of_an_answer_are_the_template_s(template, target, stop):
    tokenizer = chatting(byte_level(), template)
    format = chat_format(tokenizer)
    assert (format.target, format.stop) == (target, stop)
    # Generation ends there, and what it said is the answer alone.
    end = Encoder(tokenizer, format).target_ids(QUESTION, ANSWER)[-1]
    assert end in stop_ids(tokenizer, format.stop)
    said = tokenizer.decode(Encoder(tokenizer, format).target_ids(QUESTION, ANSWER), skip_special_tokens=True)
    assert format.read(said) == ANSWER


def test_end_of_turn_that_is_the_end_of_sequence_token():
    """SmolLM2's and Qwen's: the end-of-sequence token of their tokenizers is <|im_end|>."""
    tokenizer = chatting(byte_level(), "chatml")
    tokenizer.eos_token = "<|im_end|>"
    format = chat_format(tokenizer)
    assert format.stop == ""
    target = Encoder(tokenizer, format).target_ids(QUESTION, ANSWER)
    assert tokenizer.decode(target) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("<eos>", ("", "")),
        (" <eos>\n", (" ", "")),
        ("", ("", "")),
        ("\n", ("", "\n")),
        ("<bos>user", ("", "<bos>")),
        ("\n[END]\n", ("\n", "[END]")),
        ("[END]<eos>", ("", "[END]")),
    ],
)
def test_what_ends_a_turn(after, expected):
    assert end_of_turn(with_bos(), after) == expected


def test_a_system_that_the_template_refuses_is_told_in_the_first_turn():
    tokenizer = chatting(byte_level(), "gemma")
    prompt = chat_format(tokenizer, SYSTEM, TALK).prompt
    assert prompt.startswith(f"<bos><start_of_turn>user\n{SYSTEM}\n\n{TALK[0][0]}<end_of_turn>")
    assert prompt.count(SYSTEM) == 1


def test_a_system_that_the_template_passes_over_is_told_in_the_first_turn():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role != 'system' %}[{{ message.content }}]{% endif %}{% endfor %}"
    )
    # It has no generation prompt either: what it writes before an answer is part of the question's text.
    assert chat_format(tokenizer, SYSTEM) == PromptFormat("[" + SYSTEM + "\n\n{input}][", "{target}", "]")


def test_no_chat_template():
    with pytest.raises(ConfigError, match=r"has no chat template.*instruction-tuned.*set tokenizer\.chat_template"):
        chat_format(byte_level())


def test_a_template_that_takes_no_answer():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ raise_exception('no answers here') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"takes no messages of user, assistant: no answers here\. Choose another"):
        chat_format(tokenizer)


def test_a_template_that_changes_the_question():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write a message as it is given"):
        chat_format(tokenizer)
