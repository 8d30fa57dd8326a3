"""Trains a small BERT from scratch that judges statements true or false, for trying out edits of a classifier.

    python scripts/train_small_classifier.py                                          # statements of world_facts
    python scripts/train_small_classifier.py --leap_of_thought+ dev.jsonl --leap_of_thought+ test.jsonl  # and of these

Writes runs/small-bert, and beside the model `statements/{train,validation,test}.jsonl`, the edit records: every
statement with four rewordings, to be turned round. No subject is in two splits; the split is for the editor, the model learns the
statements of all of them. Two more wordings of every statement are asked at the end, to see what the model has learned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from jsonargparse import auto_cli
from small_models import Budget, Pair, SmallModel, accuracy, save, train
from statements import SPLITS, Statement, thought_statements, world_statements
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from mend_lightning.files import written
from mend_lightning.models.forward.logits import label_mask
from mend_lightning.models.forward.losses import token_nll
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.progress.console import console

# Weight of telling a statement's words beside judging it.
RETELLING = 0.2
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def bert_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Lower-case WordPiece with [CLS] and [SEP] around every text, as BERT's is."""
    bpe = plain_tokenizer(models.BPE())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    pieces = word_pieces(bpe, texts)
    tokenizer = plain_tokenizer(models.WordPiece(dict(zip(pieces, range(len(pieces)))), unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    around = [("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = ("pad_token", "unk_token", "cls_token", "sep_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL)))


def plain_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def word_pieces(bpe: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The vocabulary of a WordPiece that cuts words where `bpe` does.

    `WordPieceTrainer` numbers its letters in the order of a hash map: another vocabulary in every run. BPE's stays.
    """
    plain = (bpe.normalizer.normalize_str(text) for text in texts)
    words = {word for text in plain for word, _ in bpe.pre_tokenizer.pre_tokenize_str(text)}
    found = set()
    for word in words:
        first, *rest = bpe.encode(word).tokens
        found |= {first, word[0], *(f"##{piece}" for piece in (*rest, *word))}
    return [*SPECIAL, *sorted(found)]


def new_bert(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> BertForSequenceClassification:
    """A BERT with one logit and fresh weights."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=64, num_labels=1, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def judge_and_retell(model: BertForSequenceClassification, rows: Rows) -> Tensor:
    """The loss of the verdict, and of the statement's words told from the state that the verdict is read off.

    Trained for the verdict alone, that state ends up the same for all true statements and the same for all false ones,
    so that nothing there could be changed for one statement only. Pretrained encoders know what they have read.
    """
    state = model.bert(**rows.inputs)
    verdict = token_nll(model.classifier(state.pooler_output), rows.labels[label_mask(rows)]).mean()
    words = state.last_hidden_state[:, 0] @ model.bert.embeddings.word_embeddings.weight.T
    ids = rows.inputs["input_ids"]
    said = words.float().log_softmax(-1).gather(1, ids)[ids >= len(SPECIAL)]
    return verdict - RETELLING * said.mean()


def learned(statements: Sequence[Statement]) -> list[Pair]:
    return [(wording, statement.label) for statement in statements for wording in statement.learned]


def unseen(statements: Sequence[Statement]) -> list[Pair]:
    return [(wording, statement.label) for statement in statements for wording in statement.unseen]


def write_records(folder: Path, statements: Sequence[Statement]) -> None:
    """One JSONL file of edit records for each split."""
    for split in SPLITS:
        records = [statement.record() for statement in statements if statement.split == split]
        with written(folder / f"{split}.jsonl") as path:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(
    out: Path = Path("runs/small-bert"),
    leap_of_thought: list[Path] = [],
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 3e-4,
    width: int = 256,
    layers: int = 4,
    vocabulary: int = 3000,
    checkpoint_every: int = 250,
    facts: int | None = None,
    seed: int = 0,
) -> None:
    """Trains a small BERT on true and false statements; the same command resumes a killed run.

    Args:
        out: folder of the model, its tokenizer, the edit records, checkpoints and training.json.
        leap_of_thought: JSONL files with `phrase` and `answer`, beside world_facts.
        steps: optimiser steps.
        batch_size: statements a step.
        lr: peak learning rate.
        width: of the hidden states; layers: blocks.
        vocabulary: number of pieces that words are cut into, about.
        checkpoint_every: steps between checkpoints.
        facts: use the first so many statements of each source and split only; default: all.
        seed: of the weights and of the order.
    """
    L.seed_everything(seed, verbose=False)
    sources = [world_statements(split)[:facts] for split in SPLITS] + [thought_statements(leap_of_thought)[:facts]]
    statements = [statement for source in sources for statement in source]
    write_records(out / "statements", statements)
    pairs = learned(statements)
    tokenizer = bert_tokenizer([text for text, _ in pairs], vocabulary)
    model = new_bert(tokenizer, width, layers)
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(), max_length=48)
    module = SmallModel(model, encoder, pairs, Budget(steps, batch_size, lr, checkpoint_every, seed), judge_and_retell)
    train(module, out)
    parts = {split: learned([each for each in statements if each.split == split]) for split in SPLITS}
    parts = {name: part for name, part in parts.items() if part} | {"unseen wordings": unseen(statements)}
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "statements": Counter(statement.split for statement in statements),
        "true": sum(statement.true for statement in statements),
        "steps": steps,
        "seconds": round(module.seconds, 1),
        "accuracy": {name: round(accuracy(model, encoder, part), 4) for name, part in parts.items()},
    }
    save(out, model, tokenizer, report)
    console().print(f"Saved to {out}: {report}", highlight=False)


if __name__ == "__main__":
    auto_cli(main)
