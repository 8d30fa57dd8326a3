"""Tiny random models of every family, and batches of random ids for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows

VOCABULARY = 40
# The default layers leave a trunk of one block: of four, or of three in each stack.
BLOCKS, BLOCKS_OF_EACH_STACK = 4, 3

# What computing the same in another order, or in other memory, may change, in parts of the largest entry. Some hundreds
# of sums lie behind a logit, and float32 rounds each by 2^-24 of it; what was seen under every instruction set is at most
# 4e-6. A fault changes more.
ROUNDING = 1e-4
# Two roundings of the same sums are two draws of one size: which is larger is chance, up to this factor (of the largest
# of many entries).
ALIKE = 4

KINDS = {
    "t5": "encoder_decoder", "t5_gated": "encoder_decoder", "bart": "encoder_decoder",
    "gpt2": "causal", "llama": "causal", "bert": "classifier",
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float64, blocks: int | None = None) -> nn.Module:
    """A frozen model in eval mode, with weights large enough for its nonlinearities to matter."""
    config, model_class = _CONFIGS[family](blocks)
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Vectors are biases and the layer norms' weights: those keep what they have.
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.to(dtype).eval().requires_grad_(False)


def _t5(blocks: int | None, activation: str = "relu"):
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=blocks or BLOCKS_OF_EACH_STACK,
        num_decoder_layers=blocks or BLOCKS_OF_EACH_STACK, feed_forward_proj=activation, dropout_rate=0.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.T5ForConditionalGeneration


def _bart(blocks: int | None):
    blocks = blocks or BLOCKS_OF_EACH_STACK
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=blocks, decoder_layers=blocks, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return config, transformers.BartForConditionalGeneration


def _gpt2(blocks: int | None):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_head=2, n_inner=24, n_layer=blocks or BLOCKS, bos_token_id=1, eos_token_id=1
    )
    return config, transformers.GPT2LMHeadModel


def _llama(blocks: int | None):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks or BLOCKS,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return config, transformers.LlamaForCausalLM


def _bert(blocks: int | None):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks or BLOCKS,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    return config, transformers.BertForSequenceClassification


_CONFIGS = {
    "t5": _t5, "t5_gated": lambda blocks: _t5(blocks, "gated-gelu"), "bart": _bart,
    "gpt2": _gpt2, "llama": _llama, "bert": _bert,
}  # fmt: skip


def make_rows(family: str, task: Sequence[int], tasks: int, seed: int = 0, prefix: int = 0) -> Rows:
    """Rows of random ids, of different lengths, padded on the right.

    Args:
        family: key of `KINDS`.
        task: of each row.
        tasks: their number.
        seed: of the ids and lengths.
        prefix: this many leading tokens are the same in all rows, whatever the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    # The first row is the longest: padding occurs, and the first row has none.
    lengths = [9, *(_integer(generator, 5, 9) for _ in task[1:])]
    ids = [_ids(generator, length) for length in lengths]
    for row in ids:
        row[:prefix] = torch.arange(2, 2 + prefix)
    inputs = {"input_ids": _padded(ids), "attention_mask": _padded([torch.ones_like(row) for row in ids])}
    labels = _classes(generator, len(ids)) if KINDS[family] == "classifier" else _last_labels(generator, lengths)
    if KINDS[family] == "encoder_decoder":
        lengths = [4, *(_integer(generator, 2, 4) for _ in task[1:])]
        decoder = [_ids(generator, length) for length in lengths]
        inputs["decoder_input_ids"] = _padded(decoder)
        inputs["decoder_attention_mask"] = _padded([torch.ones_like(row) for row in decoder])
        labels = _last_labels(generator, lengths)
    grouped = list(task) == [i * tasks // len(task) for i in range(len(task))] and len(task) % tasks == 0
    return Rows(inputs, labels, torch.tensor(task), tasks, grouped)


def make_batch(family: str, tasks: int = 3, edits: int = 1, seed: int = 0, prefix: int = 0) -> EditBatch:
    """Tasks with `edits` edit rows, two unrelated rows and two rephrases each, and no common lengths."""
    repeated = {count: [task for task in range(tasks) for _ in range(count)] for count in (edits, 2)}
    return EditBatch(
        z_edit=make_rows(family, repeated[edits], tasks, 3 * seed, prefix),
        x_out=make_rows(family, repeated[2], tasks, 3 * seed + 1, prefix),
        x_in=make_rows(family, repeated[2], tasks, 3 * seed + 2, prefix),
    )


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _ids(generator: torch.Generator, length: int) -> Tensor:
    # 0 is padding, 1 is T5's end of sequence.
    return torch.randint(2, VOCABULARY, (length,), generator=generator)


def _classes(generator: torch.Generator, rows: int) -> Tensor:
    return torch.randint(0, 2, (rows, 1), generator=generator)


def _last_labels(generator: torch.Generator, lengths: Sequence[int]) -> Tensor:
    """One to three labels at the end of each row."""
    rows = []
    for length in lengths:
        count = min(length, _integer(generator, 1, 3))
        rows.append(torch.cat([torch.full((length - count,), IGNORED_LABEL), _ids(generator, count)]))
    return _padded(rows, IGNORED_LABEL)


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def decode_labels(tokenizer: transformers.PreTrainedTokenizerBase, labels: Tensor) -> str:
    """The text that one row's aligned labels `[length]` spell."""
    return tokenizer.decode(labels[labels != IGNORED_LABEL].tolist())


def spread_parameters(module: nn.Module, size: float = 0.1) -> nn.Module:
    """Moves every parameter away from its initial value, so that none is 0 or 1 by accident."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def rounds_alike(actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether `actual` is as near to the truth as plain float32 is; where rounding is multiplied, a bound of it would be a guess.

    Args:
        actual: what is tested.
        plain: the same, computed in the plainest way in the same dtype.
        exact: the same in float64.
    """
    error, allowed = (max(map(relative_error, found, exact)) for found in (actual, plain))
    # Plain float32 may come out exact by chance.
    return error < ALIKE * max(allowed, 2.0**-22)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in parts of the largest entry expected (absolute where all of it is 0)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    expected = expected.detach().double()
    error = float((actual.detach().double() - expected).abs().max())
    return error / (float(expected.abs().max()) or 1.0)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, in parts of the norm expected (absolute where that is 0): a few entries may be further away."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm()) / (float(expected.norm()) or 1.0)
