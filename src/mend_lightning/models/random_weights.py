"""A base model of the real shape with random weights: scale can be measured with it, beliefs cannot be edited."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from mend_lightning.errors import ModelLoadError, RandomWeightsWarning
from mend_lightning.models.architecture import Architecture, kind_of_config, model_class
from mend_lightning.models.inputs.encoder import ModelKind
from mend_lightning.models.known_shapes import known_architecture, local_name
from mend_lightning.models.layers import layer_weight
from mend_lightning.models.sharding.fsdp import Fill, keep_whole
from mend_lightning.models.sharding.meta import allocate, parameters_on_meta
from mend_lightning.models.sharding.weights import RandomWeights

# Of the tokenizer that is trained where the model's own is not there. The facts do not fill more.
LARGEST_VOCABULARY = 8192
_PAD, _EOS = "<pad>", "<eos>"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip


def random_architecture(
    name: str,
    dtype: torch.dtype,
    revision: str | None = None,
    kind: ModelKind | None = None,
    trust_remote_code: bool = False,
) -> Architecture:
    """Everything of a model whose weights will be random; nothing is downloaded.

    Args:
        name: see `known_architecture`.
        dtype: of the weights. The values are the same in any.
        revision, kind, trust_remote_code: as in `BaseModel`.

    Raises:
        ModelLoadError: the architecture is not known on this machine.

    Warns:
        RandomWeightsWarning: always.
    """
    warnings.warn(
        f"The weights of {name} are random (random_weights): time and memory are those of the real model, and what it "
        "answers, before and after an edit, means nothing.",
        RandomWeightsWarning,
        stacklevel=4,
    )
    config = known_architecture(name, revision, trust_remote_code)
    tokenizer = local_tokenizer(name, revision, trust_remote_code)
    if tokenizer is None:
        tokenizer = stand_in_tokenizer(config, kind)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": True}
    return Architecture(local_name(name), config, tokenizer, model_class(config, kind), dtype, options)


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, kind: ModelKind | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model without weights, on torch's meta device: names and shapes of everything, and no memory.

    Example:
        >>> model = empty_model(known_architecture("EleutherAI/gpt-j-6B"), torch.bfloat16)
        >>> round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2)
        6.05
    """
    with torch.device("meta"):
        model = model_class(config, kind).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        _untie_head(model)
    return model


def random_model(architecture: Architecture) -> PreTrainedModel:
    """A model with random weights by its own initialisation, the same ones every time and in every dtype.

    Each weight is drawn once: built in the ordinary way, torch's own layers draw first what transformers then draws anew.
    """
    model, fill = random_units(architecture)
    keep_whole(model, fill)
    return model


def random_units(architecture: Architecture, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Fill]:
    """The model without weights, and what gives one unit of it after the other (`blocks_of`) its random ones on `device`."""
    # Drawn in bfloat16 whatever the dtype: an editor's fingerprint of the base is then the same in all.
    drawn = replace(architecture, dtype=torch.bfloat16)
    with parameters_on_meta():
        model = drawn.build()
        _untie_head(model)
    source = RandomWeights(model)

    def fill(name: str, unit: nn.Module) -> None:
        for parameter in allocate(name, unit, source, device):
            parameter.data = parameter.data.to(architecture.dtype)

    return model, fill


def _untie_head(model: PreTrainedModel) -> None:
    """T5 v1.1 was published with a head of its own, and transformers ties it until it loads one."""
    head = model.get_output_embeddings()
    if head is not None and getattr(model.config, "scale_decoder_outputs", True) is False:
        head.weight = nn.Parameter(torch.empty_like(layer_weight(head)))


def local_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any | None:
    """The model's own tokenizer, from its folder or the hub cache; None where neither has one."""
    where = local_name(name)
    # Asked for by its files: without any, transformers makes an empty tokenizer of the model's type.
    if Path(where).is_dir():
        found = any((Path(where) / file).is_file() for file in _TOKENIZER_FILES)
    else:
        found = "/" in where and any(
            isinstance(try_to_load_from_cache(where, file, revision=revision), str) for file in _TOKENIZER_FILES
        )
    if not found:
        return None
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"The tokenizer of {name}, whose files are on this machine, cannot be read: {error}"
        ) from error


def stand_in_tokenizer(config: PretrainedConfig, kind: ModelKind | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained in memory on the facts that ship with the package.

    Args:
        config: of the model: says how many ids there may be, and gets the tokenizer's ids for padding, the end of a text
            and the start of a decoder.
        kind: as in `BaseModel`; all but causal models get texts that end with the end-of-sequence token.

    Raises:
        ModelLoadError: the model's vocabulary is too small for the 256 bytes.
    """
    vocabulary, alphabet = _text_config(config).vocab_size, pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + 2:
        raise ModelLoadError(
            f"A stand-in tokenizer needs {len(alphabet) + 2} ids, and the model's vocabulary is {vocabulary}. Put the model's "
            "own tokenizer into its folder."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(LARGEST_VOCABULARY, vocabulary), special_tokens=[_PAD, _EOS], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_facts(), trainer)
    if (kind or kind_of_config(config)) != "causal":
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_EOS}", special_tokens=[(_EOS, 1)])
    _set_ids(config)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_PAD)


def _facts() -> Iterator[str]:
    for split in ("train", "validation", "test"):
        file = resources.files("mend_lightning").joinpath("data", "world_facts", f"{split}.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield from (record["input"], *record["filtered_rephrases"])
            yield from (f" {answer}" for answer in (record["output"][0]["answer"], *record["alternatives"]))


def _set_ids(config: PretrainedConfig) -> None:
    """Has a config use the stand-in's ids: padding is 0, the end of a text 1; a decoder starts with what it did."""
    text = _text_config(config)
    start = getattr(text, "decoder_start_token_id", None)
    starts_with_end = start is not None and start == text.eos_token_id
    text.pad_token_id, text.eos_token_id, text.bos_token_id = 0, 1, None
    if text.is_encoder_decoder:
        text.decoder_start_token_id = int(starts_with_end)
    if getattr(text, "forced_eos_token_id", None) is not None:
        text.forced_eos_token_id = 1


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that is about text: of a model that also sees pictures, its language model's."""
    return getattr(config, "text_config", None) or config
