"""Trains a small model from scratch until it knows a list of texts: what the two train_small_*.py scripts share.

Texts are encoded by the package's own `Encoder`, so that a model is trained on the very token ids it will later be
asked and edited with.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from mend_lightning.data.order import ResumableLoader, TaskDataset, TaskOrder
from mend_lightning.errors import ConfigError
from mend_lightning.files import check_writable, written
from mend_lightning.models.architecture import pick_dtype
from mend_lightning.models.forward.logits import label_mask, logits_at, row_of
from mend_lightning.models.forward.losses import is_correct, rows_all_true, token_nll
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

Pair = tuple[str, str]
Loss = Callable[[nn.Module, Rows], Tensor]


@dataclass(frozen=True)
class Budget:
    """How long a model is trained, and how.

    Args:
        steps: optimiser steps; batch_size: texts a step.
        lr: AdamW's peak learning rate; it rises over the first twentieth of the steps and falls to 0.
        checkpoint_every: steps between checkpoints, from which a killed run resumes.
        seed: of the weights and of the order of texts.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    checkpoint_every: int = 250
    seed: int = 0


class Pairs:
    """(text, answer) pairs under the names that `TaskDataset` asks for."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def group(self, epoch: int, index: int, edits_at_once: int, limit: int | None) -> Pair:
        return self.pairs[index]


class SmallModel(L.LightningModule):
    """Trains a model with AdamW until it knows the answers of `pairs`.

    There is no dropout, so that a run which was killed and continued ends with the same weights.

    Args:
        model: a Hugging Face model with fresh weights.
        encoder: text to ids.
        pairs: (text, answer) pairs to learn.
        budget: how long and how.
        loss: of the model on rows of the pairs.
    """

    def __init__(
        self, model: nn.Module, encoder: Encoder, pairs: Sequence[Pair], budget: Budget, loss: Loss | None = None
    ) -> None:
        super().__init__()
        self.loss = loss or answer_loss
        self.model, self.encoder, self.pairs, self.budget = model, encoder, list(pairs), budget
        self.seconds, self._started = 0.0, 0.0
        # bfloat16 where the processor computes in it; weights and optimiser stay in float32.
        self._half = pick_dtype("auto") is torch.bfloat16

    def train_dataloader(self) -> DataLoader:
        size = self.budget.batch_size
        order = TaskOrder(len(self.pairs), size, shuffle=True, seed=self.budget.seed)
        dataset, collate = TaskDataset(Pairs(self.pairs)), partial(encode_pairs, self.encoder)
        return ResumableLoader(dataset, batch_size=size, sampler=order, collate_fn=collate)

    def training_step(self, rows: Rows, index: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            loss = self.loss(self.model, rows)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(rows))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.budget.lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rise_and_fall, steps=self.budget.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self._started = time.perf_counter()

    def on_train_end(self) -> None:
        self.seconds += time.perf_counter() - self._started

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["made_with"] = self._made_with()
        checkpoint["seconds"] = self.seconds + time.perf_counter() - self._started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["made_with"] != self._made_with():
            raise ConfigError(
                f"The checkpoint was made with {checkpoint['made_with']}, this run has {self._made_with()}. Give "
                "another --out, or remove the old one to start afresh."
            )
        self.seconds = checkpoint["seconds"]

    def _made_with(self) -> dict[str, Any]:
        config = self.model.config
        sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        budget = self.budget
        return {"texts": len(self.pairs), **sizes, "steps": budget.steps, "lr": budget.lr, "seed": budget.seed}


def answer_loss(model: nn.Module, rows: Rows) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    mask = label_mask(rows)
    return token_nll(logits_at(model, rows, mask), rows.labels[mask]).mean()


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair]) -> Rows:
    return encoder.rows(pairs, [0] * len(pairs), 1)


def rise_and_fall(step: int, steps: int) -> float:
    """The learning rate's factor: up to 1 over the first twentieth of the steps, then linearly to 0."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train(module: SmallModel, out: Path) -> None:
    """Trains the module, from its last checkpoint in `out` where there is one."""
    check_writable(out)
    quiet()
    folder, budget = out / "checkpoints", module.budget
    keep = ModelCheckpoint(folder, "last", every_n_train_steps=budget.checkpoint_every, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=budget.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_model_summary=False,
        callbacks=[keep, TQDMProgressBar(refresh_rate=10)],
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ckpt_path=last if last.is_file() else None, weights_only=True)


def quiet() -> None:
    """Hides remarks of Lightning that do not apply here."""
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*Checkpoint directory .* is not empty.*"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


@torch.no_grad()
def accuracy(model: nn.Module, encoder: Encoder, pairs: Sequence[Pair], batch_size: int = 256) -> float:
    """Share of pairs whose whole answer, its stop included, is the most probable one (teacher-forced)."""
    model.eval()
    right = 0
    for start in range(0, len(pairs), batch_size):
        rows = encode_pairs(encoder, pairs[start : start + batch_size]).to(next(model.parameters()).device)
        mask = label_mask(rows)
        hits = is_correct(logits_at(model, rows, mask), rows.labels[mask])
        right += int(rows_all_true(hits, row_of(mask), len(rows)).sum())
    return right / len(pairs)


def save(out: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any]) -> None:
    """Writes the folder that `load_base` loads, and what was measured to training.json."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with written(out / "training.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
