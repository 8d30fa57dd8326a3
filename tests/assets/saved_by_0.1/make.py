"""Writes what lies in this folder with the tree of version 0.1 (commit 4a88c7a), whose modules and test helpers it imports.

With the environment of a checkout of that commit, in a folder that has the checkout's tests/facts beside it:

    PYTHONPATH=CHECKOUT/src:CHECKOUT/tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python make.py
"""

# ruff: noqa: I001  (its imports are those of another tree, in which ruff here finds nothing)

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
import yaml
from bases import FORMATS, taught
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mend_lightning
from mend_lightning import (
    BaseModel,
    Cache,
    EditDataModule,
    EnnEditor,
    FineTuning,
    KnowledgeEditor,
    MendCallback,
    MendEditor,
    MendModule,
    combined,
    export_peft,
    load_base,
    make_edit,
)
from mend_lightning.cli import main
from mend_lightning.data.encode import Encoder
from mend_lightning.editors import Editor
from mend_lightning.making import ready
from mend_lightning.parallel.checkpoint_io import EditorCheckpointIO
from mend_lightning.parallel.strategy import ShardedStrategy

FACTS = Path("../facts")
FORMAT = FORMATS["causal"]
# The fact that is edited, a rephrase of it and an unrelated question; and a second fact, for edits that are combined.
QUESTIONS = ["Which continent is North Korea in?", "Where in the world is North Korea?", "Which country is Lyon in?"]
FACT, OTHER_FACT = (QUESTIONS[0], "Oceania"), ("Which continent is Peru in?", "Europe")
LEARNING = {"last_blocks": 1, "rank": 4, "edit_rate": 0.3, "lr": 1e-2, "edit_rate_lr": 1e-2, "c_edit": 1.0}
# Of what would be large otherwise.
ONE_LAYER = {**LEARNING, "last_blocks": None, "layers": ["model.layers.1.mlp.down_proj"]}
TRAINER = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "enable_checkpointing": False, "inference_mode": False,
}  # fmt: skip
DATA = {
    **{split: str(FACTS / f"{split}.jsonl") for split in ("train", "validation", "test")},
    "prompt": FORMAT.prompt, "target": FORMAT.target, "stop": FORMAT.stop, "max_length": 96, "batch_size": 4,
    "eval_batch_size": 2, "locality": 2,
}  # fmt: skip


# What a config may name by the place where it was defined.
CLASSES = [
    "--trainer.strategy=mend_lightning.parallel.strategy.ShardedStrategy",
    "--trainer.strategy.save_distributed_checkpoint=true",
    "--trainer.plugins+=mend_lightning.parallel.checkpoint_io.EditorCheckpointIO",
    "--trainer.callbacks+=mend_lightning.run_callbacks.SaveEditor",
]


class Host(L.LightningModule):
    """Somebody's training of the base, for MendCallback to work beside; tests/end_to_end/test_saved_files.py has it too."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = load_base("base", "float32")
        self.model.requires_grad_(True).train()

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveAtTheEnd(L.Callback):
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint("sharded/last.ckpt")


def make_base() -> None:
    """A tiny Llama that knows the facts, with a byte-level tokenizer of 300 tokens."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = [line for path in sorted(FACTS.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    pairs = [
        (question, record["output"][0]["answer"])
        for record in records
        for question in (record["input"], *record["filtered_rephrases"])
    ]
    tokenizer.train_from_iterator([f"Q: {question}\nA: {answer}\n" for question, answer in pairs], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = taught(LlamaForCausalLM(config).eval(), Encoder(tokenizer, FORMAT, "causal", 96), pairs, steps=200)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")


def command(*arguments: str) -> None:
    code = main(list(arguments))
    if code:
        raise SystemExit(code)


def last_logged() -> dict[str, float]:
    """The last row in the log of the latest run."""
    log = max(Path("run/logs").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    *_, row = csv.DictReader(log.read_text(encoding="utf-8").splitlines())
    return {name: float(value) for name, value in row.items() if value and "/" in name}


def make_run() -> dict:
    """`fit` from the command line: its editor, checkpoint and config; what the resumed run and `validate` said."""
    keep = {"save_last": True, "every_n_train_steps": 3, "save_top_k": 1, "monitor": None}
    config = {
        "seed_everything": 0,
        "model": {
            "base": {"name": "base", "dtype": "float32"}, "confidence": 0.6, "precondition": 1.0, **LEARNING
        },
        "data": DATA,
        "trainer": {
            "default_root_dir": "run", "accelerator": "cpu", "max_steps": 3, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
        },
    }  # fmt: skip
    Path("run").mkdir()
    Path("run/run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command("fit", "--config", "run/run.yaml")
    shutil.copytree("run/editor", "editors/MendEditor")
    shutil.copy(next(Path("run").rglob("config.yaml")), "config.yaml")
    shutil.copy("run/checkpoints/last.ckpt", "last.ckpt")
    with Path("config_of_classes.yaml").open("w", encoding="utf-8") as file:
        arguments = ["fit", "--config", "config.yaml", *CLASSES, "--print_config"]
        subprocess.run([sys.executable, "-m", "mend_lightning.cli", *arguments], stdout=file, check=True)
    command("fit", "--config", "config.yaml", "--ckpt_path", "last.ckpt", "--trainer.max_steps", "4")
    expected = {"resumed": last_logged()}
    command("validate", "--config", "config.yaml", "--ckpt_path", "last.ckpt")
    return {**expected, "validated": last_logged()}


def data() -> EditDataModule:
    return EditDataModule(**DATA)


def module(**settings) -> MendModule:
    return MendModule(BaseModel("base", "float32"), **{**LEARNING, **settings})


def make_editors() -> None:
    """Editors of the other classes, those that learn after two steps."""
    for editor_class, settings in (
        (EnnEditor, {"edit_rate": 0.3}),
        (KnowledgeEditor, {"max_scale": 20.0, "hidden": 4, "condition": 8}),
    ):
        L.seed_everything(0, verbose=False)
        trained = module(algorithm=lambda layers, c=editor_class, s=settings: c(layers, **s))
        L.Trainer(**TRAINER, max_steps=2, max_epochs=-1, limit_val_batches=0).fit(trained, data())
        trained.editor.save_pretrained(f"editors/{editor_class.__name__}")
    model, _ = load_base("base", "float32")
    for editor in (
        FineTuning.for_model(model, last_blocks=1, lr=3e-3, max_steps=20),
        Cache.for_model(model, threshold=2.0),
    ):
        editor.bind(model, "base", {"prompt": FORMAT.prompt, "target": FORMAT.target, "stop": FORMAT.stop})
        editor.save_pretrained(f"editors/{type(editor).__name__}")


def logits(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """What the model would answer with first: `[questions, vocabulary]`."""
    with torch.no_grad():
        rows = [tokenizer(f"Q: {question}\nA:", return_tensors="pt")["input_ids"] for question in QUESTIONS]
        return torch.cat([model(ids).logits[:, -1] for ids in rows])


def make_edits() -> tuple[dict[str, torch.Tensor], dict]:
    """Edit files and an adapter; the logits under each, and what each editor makes of the fact."""
    model, tokenizer = load_base("base", "float32")
    editor_classes = (MendEditor, FineTuning, EnnEditor, KnowledgeEditor)
    editors = {c.__name__: c.from_pretrained(f"editors/{c.__name__}") for c in editor_classes}
    edits = {name: make_edit(editor, model, tokenizer, FACT) for name, editor in editors.items()}
    edits["combined"] = combined([edits["MendEditor"], make_edit(editors["MendEditor"], model, tokenizer, OTHER_FACT)])
    edits["compressed"], _ = edits["combined"].compressed(rank=2)
    tensors = {"base": logits(model, tokenizer)}
    for name, edit in edits.items():
        edit.save(f"edits/{name}.safetensors")
        with edit.applied(model):
            tensors[name] = logits(model, tokenizer)
    export_peft(edits["MendEditor"], model, "adapter")
    about = {
        name: {key: edit.about.get(key) for key in ("probability_before", "probability")}
        for name, edit in edits.items()
    }
    cache = Cache.from_pretrained("editors/Cache")
    with ready(cache, model, tokenizer) as encoder, torch.no_grad():
        edited = cache.edited(model, encoder.rows([FACT], [0], 1))
        answers = edited.answers(model, encoder, QUESTIONS)
    return tensors, {"probabilities": about, "answers of Cache": answers}


def host_loader(host: Host) -> DataLoader:
    lines = (FACTS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    texts = [f"Q: {record['input']}\nA: {record['output'][0]['answer']}\n" for record in records]

    def collate(texts: list[str]) -> dict:
        inputs = host.tokenizer(texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    return DataLoader(texts, batch_size=4, collate_fn=collate)


def make_host() -> dict:
    """A checkpoint of somebody's training with MendCallback; what the callback measures from it."""
    L.seed_everything(0, verbose=False)
    results = []
    for last_epoch, checkpoint in ((1, None), (2, "host.ckpt")):
        callback = MendCallback("model", edits=data(), every_n_steps=2, confidence=None, warmup_steps=0, **ONE_LAYER)
        host = Host()
        trainer = L.Trainer(**{**TRAINER, "inference_mode": True}, max_epochs=last_epoch, callbacks=[callback])
        trainer.fit(host, host_loader(host), ckpt_path=checkpoint)
        if checkpoint is None:
            trainer.save_checkpoint("host.ckpt")
        results.append(callback.results)
    return dict(zip(("measured beside a host", "resumed beside a host"), results))


def train_sharded() -> None:
    """What each of two processes does."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        **{**TRAINER, "devices": 2}, strategy=ShardedStrategy(save_distributed_checkpoint=True), max_steps=2, max_epochs=-1,
        limit_val_batches=0, plugins=[EditorCheckpointIO()], callbacks=[SaveAtTheEnd()],
    )  # fmt: skip
    trainer.fit(module(**ONE_LAYER), EditDataModule(**{**DATA, "batch_size": 2}))


def make_sharded() -> dict:
    """A checkpoint of two processes, in shards; the loss of the step that one process takes from it."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "sharded"]
    subprocess.run([sys.executable, *arguments], check=True)
    resumed = L.Trainer(
        **TRAINER, max_steps=3, max_epochs=-1, limit_val_batches=0, plugins=[EditorCheckpointIO()], log_every_n_steps=1
    )
    resumed.fit(module(**ONE_LAYER), data(), ckpt_path="sharded/last.ckpt")
    return {"resumed from shards": {"train/loss": float(resumed.callback_metrics["train/loss"])}}


def make_names() -> list[str]:
    """Where each class is defined that a config may name."""
    kinds = (L.Callback, L.LightningModule, L.LightningDataModule, Strategy, CheckpointIO, Editor, BaseModel)
    names = set()
    for info in pkgutil.walk_packages(mend_lightning.__path__, "mend_lightning."):
        if not info.name.endswith("__main__"):
            for name, value in vars(importlib.import_module(info.name)).items():
                if isinstance(value, type) and issubclass(value, kinds) and not name.startswith("_"):
                    names.add(f"{value.__module__}.{name}")
    return sorted(name for name in names if name.startswith("mend_lightning."))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["sharded"]:
        train_sharded()
    else:
        torch.manual_seed(0)
        make_base()
        expected = make_run()
        make_editors()
        tensors, more = make_edits()
        expected |= {**more, **make_host(), **make_sharded(), "classes": make_names()}
        save_file(tensors, "expected.safetensors")
        Path("expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree("run")
