"""Tiny base models with a real tokenizer as local folders, so that tests load them the way users load theirs.

A pytest plugin (`pytest_plugins = ["helpers.bases"]`): the folders are made once a session, each when first asked for.
Tests import its helpers as well, which is why pytest must not want to rewrite it: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from helpers.models import KINDS, tiny_model
from mend_lightning.data.batch import EditBatch, collate_tasks
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.records import find_data_file
from mend_lightning.models.base import BaseModel
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.training import run_callbacks
from mend_lightning.training.module import MendModule

# What Lightning remarks about runs as small as these; `pytestmark = pytest.mark.filterwarnings(*REMARKS)`.
REMARKS = (
    r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    # LightningCLI uses what jsonargparse has given another name.
    r"ignore:\s*By default only one JsonargparseDeprecationWarning.*",
    r"ignore:\s*.* was deprecated in v4\..* and will be removed in v5.*",
    "ignore:.*You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:.*does not have many workers.*",
    "ignore:.*The number of training batches.*is smaller than the logging interval.*",
    "ignore:.*in eval mode at the start of training.*",
)
# Records that each split in tests/assets/facts holds (some of world_facts, copied: what a tiny model learns depends on each of
# them). An odd number: the last evaluation batch is not full.
SIZES = {"train": 16, "validation": 5, "test": 7}
# What the bases that know these facts learned: teaching multiplies a processor's rounding until each has a model of its own.
# Written by `PYTHONPATH=tests python -m helpers.bases`.
ASSETS = Path(__file__).parents[1] / "assets"
TAUGHT = ASSETS / "taught"
FORMATS = {
    "causal": PromptFormat("Q: {input}\nA:", stop="\n"),
    "encoder_decoder": PromptFormat(),
    "classifier": PromptFormat(),
}


@pytest.fixture(scope="session", autouse=True)
def _two_edits_tell_what_one_costs():
    """Eight are a third of the time that testing an editor on these facts takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_callbacks, "COST_EDITS", 2)
        yield


@pytest.fixture(scope="session")
def facts(tmp_path_factory) -> Path:
    """Folder with a few facts of each split of world_facts, and with claims to verify (FEVER's kind)."""
    folder = tmp_path_factory.mktemp("facts")
    for split, size in SIZES.items():
        lines = (ASSETS / "facts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == size
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        claims = "\n".join(json.dumps(claim(json.loads(line), i)) for i, line in enumerate(lines))
        (folder / f"claims_{split}.jsonl").write_text(claims + "\n", encoding="utf-8")
    return folder


def claim(record: dict, index: int) -> dict:
    """A record about a fact as one about the truth of a sentence; every other one is wrong."""
    true = index % 2 == 0
    said = record["output"][0]["answer"] if true else record["alternatives"][0]
    verdicts = ("SUPPORTS", "REFUTES") if true else ("REFUTES", "SUPPORTS")
    return {
        "input": f"{record['input']} {said}.",
        "filtered_rephrases": [f"{text} {said}." for text in record["filtered_rephrases"]],
        "output": [{"answer": verdicts[0]}],
        "alternatives": [verdicts[1]],
        "subject": record["subject"],
    }


def small_tokenizer(kind: str = "causal") -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on world_facts; encoder-decoders and classifiers end every text with EOS."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    records = map(json.loads, find_data_file("world_facts/test").read_text(encoding="utf-8").splitlines())
    texts = (f"Q: {record['input']}\nA: {record['output'][0]['answer']}\n" for record in records)
    tokenizer.train_from_iterator(texts, trainer)
    if kind != "causal":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_base(family: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A tiny model with the tokenizer's vocabulary."""
    model = tiny_model(family, torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
            if KINDS[family] == "encoder_decoder":
                config.decoder_start_token_id = 0
    return model.requires_grad_(False)


def taught(model: nn.Module, encoder: Encoder, texts: list[tuple[str, str]], steps: int) -> nn.Module:
    """The model after it learned the answers of `texts`, so that it has something to be edited and to forget."""
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=1e-2)
    for step in range(steps):
        pairs = texts[step % 5 :: 5]
        rows = encoder.rows(pairs, [0] * len(pairs), 1)
        logits = model(**rows.inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, facts):
    """`base_folder(family)`: the folder of a saved base model; causal ones and T5 know most of `facts`."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = _save_base(family, tmp_path_factory.mktemp(family), facts)
        return made[family]

    return folder


def _save_base(family: str, folder: Path, facts: Path) -> Path:
    kind = KINDS[family]
    tokenizer = small_tokenizer(kind)
    # Whoever asks first must not move the random numbers of the test that asks.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_base(family, tokenizer)
    if kind != "classifier":
        _load_taught(model, TAUGHT / f"{family}.safetensors", _lessons(tokenizer, _phrasings(facts)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _load_taught(model: nn.Module, path: Path, lessons: str) -> None:
    """What `write_taught` wrote, if it learned these lessons."""
    with safe_open(path, "pt") as file:
        assert file.metadata()["lessons"] == lessons, (
            f"{path} learned other facts: write it anew with `PYTHONPATH=tests python -m helpers.bases`"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))


def _lessons(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]) -> str:
    """Mark of the facts as token ids: other facts and another tokenizer have another."""
    return hashlib.sha256(json.dumps([tokenizer(list(pair))["input_ids"] for pair in texts]).encode()).hexdigest()


def write_taught(folder: Path, facts: Path) -> None:
    """A file of float16 weights for each family whose base knows the facts in `facts`."""
    folder.mkdir(exist_ok=True)
    for family, kind in KINDS.items():
        if kind == "classifier":
            continue
        torch.manual_seed(0)
        tokenizer, texts = small_tokenizer(kind), _phrasings(facts)
        model = tiny_base(family, tokenizer)
        encoder = Encoder(tokenizer, FORMATS[kind], kind, 96, getattr(model.config, "decoder_start_token_id", None))
        taught(model, encoder, texts, steps=100)
        weights = {name: parameter.half() for name, parameter in model.named_parameters()}
        save_file(weights, folder / f"{family}.safetensors", metadata={"lessons": _lessons(tokenizer, texts)})


def _phrasings(facts: Path) -> list[tuple[str, str]]:
    """(question, answer) of every phrasing of every fact, phrasings of one fact next to each other."""
    lines = [line for split in SIZES for line in (facts / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (question, record["output"][0]["answer"])
        for record in map(json.loads, lines)
        for question in (record["input"], *record["filtered_rephrases"])
    ]


@pytest.fixture
def mend(base_folder):
    """`mend(family, **settings)`: a MendModule on a tiny base, with a learning rate for tiny models."""

    def module(family: str, **settings) -> MendModule:
        settings = {"rank": 8, "lr": 1e-2, "edit_rate_lr": 1e-2, "edit_rate": 1e-2, "c_edit": 1.0, **settings}
        return MendModule(BaseModel(str(base_folder(family)), "float32"), **settings)

    return module


@pytest.fixture
def edit_data(facts):
    """`edit_data(kind, **settings)`: an EditDataModule on the tiny facts."""

    def data(kind: str = "causal", **settings) -> EditDataModule:
        prefix = "claims_" if kind == "classifier" else ""
        files = {split: facts / f"{prefix}{split}.jsonl" for split in SIZES}
        format = FORMATS[kind]
        texts = {"prompt": format.prompt, "target": format.target, "stop": format.stop}
        settings = {"batch_size": 4, "eval_batch_size": 2, "locality": 2, "max_length": 96, **texts, **settings}
        return EditDataModule(**files, **settings)

    return data


@pytest.fixture
def trainer(tmp_path):
    """`trainer(**settings)`: a Trainer for edits, on the CPU, that prints nothing and writes to `tmp_path`."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "inference_mode": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return partial(_trainer, default_root_dir=tmp_path, max_epochs=-1, **quiet, **settings)


def _trainer(**settings) -> L.Trainer:
    return L.Trainer(**settings)


def state_copy(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the module holds now, to compare with later."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ, among them {different[:3]}"


def first_batches(
    module: MendModule, data: EditDataModule, count: int, split: str = "train", size: int = 4
) -> list[EditBatch]:
    """Batches of `size` tasks, made without a Trainer."""
    module.configure_model()
    start = getattr(module.base_model.config, "decoder_start_token_id", None)
    encoder = Encoder(module.tokenizer, data.format, module.base_kind, data.max_length, start)
    sampler = data.sampler(split)
    return [collate_tasks([sampler.task(0, size * i + j) for j in range(size)], encoder) for i in range(count)]


def given(batches: list) -> DataLoader:
    """A loader of ready batches."""
    return DataLoader(batches, batch_size=None)


def run_config(root: Path, base: Path, facts: Path, kind: str = "causal", logged: bool = False, **trainer) -> Path:
    """Writes the YAML of a run from the command line; its results go to `root`.

    Unless it is `logged` there are no curves of it, which take as long to draw as such a run takes.
    """
    format = FORMATS[kind]
    prefix = "claims_" if kind == "classifier" else ""
    keep = {"dirpath": str(root / "checkpoints"), "save_last": True, "every_n_train_steps": 1}
    config = {
        "seed_everything": 0,
        "model": {
            "base": {"name": str(base), "dtype": "float32"}, "rank": 8, "lr": 1e-2, "edit_rate_lr": 1e-2,
            "edit_rate": 1e-2, "c_edit": 1.0,
        },
        "data": {
            **{split: str(facts / f"{prefix}{split}.jsonl") for split in SIZES},
            "prompt": format.prompt, "target": format.target, "stop": format.stop, "max_length": 96,
            "batch_size": 4, "eval_batch_size": 2, "locality": 2,
        },
        "trainer": {
            "default_root_dir": str(root), "accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
            **({} if logged else {"logger": False}), **trainer,
        },
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    write_taught(TAUGHT, ASSETS / "facts")
