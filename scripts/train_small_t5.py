"""Trains a small T5 from scratch that answers the questions of world_facts, for trying out edits of an encoder-decoder.

    python scripts/train_small_t5.py                # writes runs/small-t5

It learns the facts of all splits: an editor's test facts are held out from the *editor*, while the base model has to
know them, or drawdown would mean nothing. Every fact is learned in five phrasings; the relation's other two are asked at
the end, to see whether the model has learned the fact or the sentences.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from jsonargparse import auto_cli
from small_models import Budget, Pair, SmallModel, accuracy, save, train
from statements import SPLITS, capital, subject_as_asked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from world_facts_tables import QUESTIONS

from mend_lightning.data.records import Record, read_records
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.training.progress.console import console


def learned(record: Record) -> list[Pair]:
    """The fact in every phrasing of its record."""
    return [(question, record.answers[0]) for question in (record.prompt, *record.rephrases)]


def unseen(record: Record) -> list[Pair]:
    """The fact in the phrasings of its relation that are not in the record.

    Example:
        >>> facts = read_records("world_facts/test")
        >>> len(learned(facts[0])), len(unseen(facts[0]))
        (5, 2)
    """
    subject = subject_as_asked(record)
    asked = [capital(question.format(subject)) for question in QUESTIONS[record.relation]]
    return [(question, record.answers[0]) for question in asked if question not in (record.prompt, *record.rephrases)]


def t5_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that ends every text with </s>, as T5's does; every text can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def new_t5(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 (gated, output head of its own) with fresh weights."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=4 * width, d_kv=64, num_heads=max(1, width // 64),
        num_layers=layers, num_decoder_layers=layers, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    # transformers starts a head of its own at std 1: logits of size √width, hundreds of steps from anything useful.
    torch.nn.init.normal_(model.lm_head.weight, std=width**-0.5)
    return model


def main(
    out: Path = Path("runs/small-t5"),
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 1e-3,
    width: int = 256,
    layers: int = 4,
    vocabulary: int = 2048,
    checkpoint_every: int = 250,
    facts: int | None = None,
    seed: int = 0,
) -> None:
    """Trains a small T5 on world_facts; the same command resumes a killed run.

    Args:
        out: folder of the model, its tokenizer, checkpoints and training.json.
        steps: optimiser steps.
        batch_size: questions a step.
        lr: peak learning rate.
        width: d_model; layers: blocks of the encoder and of the decoder.
        vocabulary: number of tokens.
        checkpoint_every: steps between checkpoints.
        facts: learn the first so many facts of each split only; default: all.
        seed: of the weights and of the order.
    """
    L.seed_everything(seed, verbose=False)
    records = {split: read_records(f"world_facts/{split}")[:facts] for split in SPLITS}
    everything = [record for split in SPLITS for record in records[split]]
    pairs = [pair for record in everything for pair in learned(record)]
    tokenizer = t5_tokenizer([text for pair in pairs for text in pair], vocabulary)
    model = new_t5(tokenizer, width, layers)
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(), max_length=48)
    module = SmallModel(model, encoder, pairs, Budget(steps, batch_size, lr, checkpoint_every, seed))
    train(module, out)
    parts = {split: [pair for record in chosen for pair in learned(record)] for split, chosen in records.items()}
    parts["unseen phrasings"] = [pair for record in everything for pair in unseen(record)]
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "seconds": round(module.seconds, 1),
        "accuracy": {name: round(accuracy(model, encoder, pairs), 4) for name, pairs in parts.items()},
    }
    save(out, model, tokenizer, report)
    console().print(f"Saved to {out}: {report}", highlight=False)


if __name__ == "__main__":
    auto_cli(main)
