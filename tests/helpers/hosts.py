"""Somebody else's LightningModules, for MendCallback to be attached to; and everything that a run of one leaves behind."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.bases import FORMATS, SIZES, small_tokenizer, tiny_base
from helpers.models import KINDS
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.records import read_records
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.training.mend_callback.callback import MendCallback

BATCH = 4


class Normed(nn.Module):
    """A batch norm inside of the model: its statistics must not see what the editor runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Host(L.LightningModule):
    """Fine-tunes a language model, with all that a callback could disturb: dropout, batch norm, random numbers, mixed modes."""

    def __init__(self, family: str = "gpt2", lr: float = 1e-3) -> None:
        super().__init__()
        self.tokenizer, self.lr = small_tokenizer(KINDS[family]), lr
        self.model = tiny_base(family, self.tokenizer).requires_grad_(True).train()
        if family == "gpt2":
            self.model.transformer.ln_f = Normed(16)
            self.model.transformer.wpe.requires_grad_(False)
            self.model.transformer.h[0].mlp.dropout.eval()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noise = random.random() + numpy.random.rand() + float(torch.rand(()))
        loss = self.loss(batch) * (1 + 1e-3 * noise)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class ManualHost(Host):
    """Two optimisers, and steps that accumulate two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        named = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.AdamW(named[:3], lr=self.lr), torch.optim.SGD(named[3:], lr=self.lr)]


def collate(encoder: Encoder, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    rows = encoder.rows(pairs, [0] * len(pairs), 1)
    return {**rows.inputs, "labels": rows.labels}


def host_loader(host: Host, facts: Path, shuffle: bool = True) -> DataLoader:
    """Batches of questions and answers, drawn by torch's random numbers as anybody's loader does."""
    kind = "encoder_decoder" if getattr(host.model.config, "is_encoder_decoder", False) else "causal"
    start = getattr(host.model.config, "decoder_start_token_id", None)
    encoder = Encoder(host.tokenizer, FORMATS[kind], kind, 96, start)
    pairs = [(record.prompt, record.answers[0]) for record in read_records(facts / "train.jsonl")]
    return DataLoader(pairs, batch_size=BATCH, shuffle=shuffle, collate_fn=partial(collate, encoder))


def callback_for(facts: Path, kind: str = "causal", **settings: Any) -> MendCallback:
    """A MendCallback on the tiny facts, with a learning rate for tiny models."""
    data = {split: str(facts / f"{split}.jsonl") for split in SIZES}
    form = {"prompt": FORMATS[kind].prompt, "target": FORMATS[kind].target, "stop": FORMATS[kind].stop}
    edits = EditDataModule(**data, **form, max_length=96, batch_size=4, eval_batch_size=2, locality=2)
    learning = {"rank": 8, "lr": 1e-2, "edit_rate": 1e-2, "edit_rate_lr": 1e-2, "warmup_steps": 0, "confidence": None}
    return MendCallback(**{"edits": edits, "every_n_steps": 2, **learning, **settings})


class Rows(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name, version = "rows", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def without(self, prefix: str) -> list[dict[str, float]]:
        """What others logged; a row in which nobody did is left out."""
        kept = [{name: value for name, value in row.items() if not name.startswith(f"{prefix}/")} for row in self.rows]
        return [row for row in kept if set(row) - {"step", "epoch"}]


@dataclass
class Watch(L.Callback):
    """What the host is like at the end of every batch, after everybody else: must come last."""

    states: list[Any] = field(default_factory=list)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        modes = [(child.training, len(child._forward_hooks), "forward" in vars(child)) for child in module.modules()]
        flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
        loss = (outputs or {}).get("loss", torch.zeros(())).detach().clone()
        self.states.append((loss, trainer.global_step, modes, flags, torch.is_grad_enabled(), random_states()))


def random_states() -> list[Any]:
    state = numpy.random.get_state()
    return [random.getstate(), torch.get_rng_state(), state[1].copy(), state[2:]]


def trainer_for(callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": Rows(), **settings}
    return L.Trainer(
        callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        enable_checkpointing=any("Checkpoint" in type(each).__name__ for each in callbacks), **settings,
    )  # fmt: skip


def train_host(facts: Path, callbacks: list[L.Callback], host: type[Host] = Host, **settings: Any) -> dict[str, Any]:
    """Trains a host; returns everything that a callback could have changed, but for the keys of its own."""
    L.seed_everything(7, verbose=False)
    module = host()
    watch = Watch()
    trainer = trainer_for([*callbacks, watch], **settings)
    trainer.fit(module, host_loader(module, facts), host_loader(module, facts, shuffle=False))
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("mend")}
    return {
        "states": watch.states,
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "global_step": trainer.global_step,
        "logged": trainer.logger.without("mend"),
        "metrics": metrics,
        "random": random_states(),
        "trainer": trainer,
        "module": module,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values are not the same, to the last bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [line for key in one for line in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [line for i, pair in enumerate(zip(one, other)) for line in differences(*pair, f"{where}.{i}")]
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [where]
    same = numpy.array_equal(one, other) if isinstance(one, numpy.ndarray) else one == other
    return [] if same else [f"{where}: {one} and {other}"]


def compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Asserts that two runs of a host are the same, to the last bit."""
    left_out = {"trainer", "module"}
    found = differences(*({name: value for name, value in run.items() if name not in left_out} for run in (one, other)))
    assert not found, f"{len(found)} differences, among them {found[:5]}"
