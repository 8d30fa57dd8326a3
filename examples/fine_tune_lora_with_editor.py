"""Fine-tunes LoRA adapters (peft) of a causal language model, and trains an editor of the adapted model beside.

    mend-lightning get-smollm2
    python examples/fine_tune_lora_with_editor.py

Needs peft: pip install "mend-lightning[peft]". The callback looks through peft's wrapper: edits are of the model inside, its
adapters included, and name its layers as they are named without adapters.
"""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from mend_lightning import EditDataModule, MendCallback, load_base, read_records


class QuestionAnswering(L.LightningModule):
    """A frozen language model with adapters that learn answers."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = (
            get_peft_model(model, LoraConfig(r=8, lora_dropout=0.1, task_type="CAUSAL_LM")).train(),
            lr,
        )

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def lines() -> list[str]:
    """A question with its answer, in every phrasing of every fact."""
    records = [record for split in ("train", "validation", "test") for record in read_records(f"world_facts/{split}")]
    return [
        f"Q: {asked}\nA: {record.answers[0]}\n" for record in records for asked in (record.prompt, *record.rephrases)
    ]


def collate(tokenizer, texts):
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    ids, mask, labels = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=value)
        for each, value in ((rows, 0), ([torch.ones_like(row) for row in rows], 0), (rows, -100))
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(model: str = "smollm2-135m-instruct", steps: int = 60, batch_size: int = 8, lr: float = 1e-3) -> L.Trainer:
    """Fine-tunes `model` (as `load_base` knows it: a folder, a hub id)."""
    L.seed_everything(0)
    base, tokenizer = load_base(model, "float32")
    loader = DataLoader(lines(), batch_size, shuffle=True, collate_fn=partial(collate, tokenizer))
    texts = {"prompt": "Q: {input}\nA:", "stop": "\n", "tokenizer": tokenizer}
    edits = EditDataModule("world_facts/train", "world_facts/validation", validation_edits=48, locality=4, **texts)
    mend = MendCallback("model", edits=edits, every_n_steps=4)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, callbacks=[mend])
    trainer.fit(QuestionAnswering(base, lr), loader)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in auto_cli(main).callback_metrics.items()})
