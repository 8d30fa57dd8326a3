"""Fine-tunes a T5 on the questions of world_facts, and trains an editor of it beside.

    python scripts/train_small_t5.py --steps 500      # a small T5 that knows a quarter of them; or any T5
    python examples/fine_tune_t5_with_editor.py

fine_tune_t5.py is the same without the editor, and ends with the same loss to the last bit.
"""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mend_lightning import EditDataModule, MendCallback, read_records


class QuestionAnswering(L.LightningModule):
    """A T5 that learns answers."""

    def __init__(self, model: str, lr: float) -> None:
        super().__init__()
        self.model, self.lr = AutoModelForSeq2SeqLM.from_pretrained(model).train(), lr

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def questions() -> list[tuple[str, str]]:
    """(question, answer) in every phrasing of every fact."""
    records = [record for split in ("train", "validation", "test") for record in read_records(f"world_facts/{split}")]
    return [(question, record.answers[0]) for record in records for question in (record.prompt, *record.rephrases)]


def collate(tokenizer, pairs):
    asked, answers = zip(*pairs)
    inputs = tokenizer(list(asked), padding=True, return_tensors="pt")
    labels = tokenizer(text_target=list(answers), padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = -100
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


def main(model: str = "runs/small-t5", steps: int = 800, batch_size: int = 32, lr: float = 5e-4) -> L.Trainer:
    """Fine-tunes `model` (a folder or hub id)."""
    L.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loader = DataLoader(questions(), batch_size, shuffle=True, collate_fn=partial(collate, tokenizer))
    edits = EditDataModule("world_facts/train", "world_facts/validation", tokenizer=tokenizer, locality=4)
    mend = MendCallback("model", edits=edits, every_n_steps=4)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, callbacks=[mend])
    trainer.fit(QuestionAnswering(model, lr), loader)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in auto_cli(main).callback_metrics.items()})
