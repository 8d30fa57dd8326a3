"""Small real tokenizers of every kind, and the chat templates of the families that people use."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Q: What is the capital of France?\nA: Paris\n", "Q: In which city is the Louvre?\nA: Paris\n",
    "Q: Which country is Rome in?\nA: Italy\n", "The answer is San Francisco, naturally.",
]  # fmt: skip


def byte_level(**special) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, no special token around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def with_template(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


def with_bos() -> PreTrainedTokenizerFast:
    """Llama 3's kind: a BOS before every text."""
    return with_template(byte_level(bos_token="<bos>"), "<bos> $A")


def with_eos() -> PreTrainedTokenizerFast:
    """BOS before every text and EOS after it (BART; causal tokenizers with add_eos_token)."""
    return with_template(byte_level(bos_token="<bos>"), "<bos> $A <eos>")


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: SentencePiece, a space before every text, EOS after it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<eos>", "<unk>", "<bos>"], unk_token="<unk>",
        initial_alphabet=sorted(set("".join(TEXT))), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return with_template(fast, "$A <eos>")


TOKENIZERS = {"byte_level": byte_level, "with_bos": with_bos, "with_eos": with_eos, "unigram": unigram}

# As the families publish them, without what they say about tools and pictures.
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "qwen2.5": (
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "qwen3": (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = false %}{% set turns = messages %}{% endif %}{% for message in turns %}" + _ALTERNATE +
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + _ALTERNATE +
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # Nothing but an end behind every message: DialoGPT's.
    "dialogpt": "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}",
    "plain": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}  # fmt: skip
# The tokens of a template that the tokenizer has beside those of `byte_level`; of each the one that ends a turn comes first.
TURN_TOKENS = {
    "chatml": ["<|im_end|>", "<|im_start|>"], "qwen2.5": ["<|im_end|>", "<|im_start|>"],
    "qwen3": ["<|im_end|>", "<|im_start|>"], "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "llama2": [], "mistral": [], "gemma": ["<end_of_turn>", "<start_of_turn>"], "dialogpt": [],
    "plain": [],
}  # fmt: skip


def chatting(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template and its tokens; a template that writes a BOS has one to write."""
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    tokenizer.add_special_tokens({"extra_special_tokens": TURN_TOKENS[template]})
    if "bos_token" in tokenizer.chat_template:
        tokenizer.bos_token = "<bos>"
    return tokenizer
