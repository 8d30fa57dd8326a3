"""EditDataModule: files of facts in, batches of edit tasks out."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from mend_lightning.data.batch import EditBatch, collate_groups
from mend_lightning.data.buckets import TaskLengths
from mend_lightning.data.columns import Columns
from mend_lightning.data.host_model import HostModel, contrasts_of, editor_of
from mend_lightning.data.locality import Locality, read_locality
from mend_lightning.data.neighbors import Names
from mend_lightning.data.order import ResumableLoader, TaskDataset, TaskOrder
from mend_lightning.data.records import read_records
from mend_lightning.data.running_text import check_running_text
from mend_lightning.data.sources import check_source
from mend_lightning.data.task_formats import DataFormats
from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.errors import ConfigError, EmptyDatasetError
from mend_lightning.models.inputs.encoder import Encoder, ModelKind
from mend_lightning.models.inputs.prompts import PromptFormat

LoaderT = TypeVar("LoaderT", bound=DataLoader)


class EditDataModule(L.LightningDataModule):
    """Batches of independent edit tasks, as `EditBatch` with `z_edit`, `x_out` and `x_in`.

    Every draw depends on the seed, the epoch and the record alone: the number of workers, processes and a
    resumed run change nothing.

    Args:
        train: training facts: a JSONL, JSON, CSV or Parquet file, a shipped set (`world_facts/train`), or a folder or
            hub id of the `datasets` library (`name:split`).
        validation, test: likewise; None leaves the stage out.
        format: of these files (docs/data.md); "auto" recognises each by its first record's keys.
        columns: the files' own names for the format's keys, such as `{prompt: question, target: new_answer}`.
        locality_data: where unrelated facts come from instead of the same set: a source of questions and answers, of
            which each split gets a share of its own, or one source a split (`{train: …, test: …}`).
        require_rephrases: False keeps records without rephrases; they are measured on the question itself.
        tokenizer: a Hugging Face tokenizer, or the folder or hub id of one; None takes the base model's in `fit`, `validate`,
            `test`, `predict`, and in a `MendCallback` the host's `tokenizer`.
        prompt: template of a question, with `{input}`.
        target: template of an answer, with `{target}`.
        stop: text that ends an answer; "" means the end-of-sequence token, None that nothing does (running text).
        batch_size: edit tasks a step (a process).
        edits_at_once: edits a task, made together into one edited model (the paper's table 5); 1: each alone.
        rephrases, locality: rephrases and unrelated facts of one training task.
        hard_locality: how many of the unrelated facts have the edit's relation and another subject. Records that bring
            locality examples of their own use those first.
        eval_batch_size, eval_rephrases, eval_locality, eval_hard_locality: the same for evaluation.
        validation_edits, test_edits: evaluate the first so many records only; None: all.
        max_length: longest row in tokens.
        kind: "causal", "encoder_decoder" or "classifier"; None takes the base model's.
        num_workers: processes that prepare batches.
        bucket_by_length: training batches are of edits with rows of about equal length, so that less of a step is padding;
            which are together is drawn anew each epoch. A batch is then no sample of the whole set. False: any with any.
        formats: training asks in these (docs/data.md), an edit in one and each of its rephrases and unrelated facts in one of
            its own: names, or mappings of one's own; None: in `prompt`, `target` and `stop` alone.
        eval_formats: the same for evaluation; None: as in training. `test` measures in the first of them, and in each an edit
            that was made in each.
        format_edits: so many of the test's edits are measured in all formats.
        seed: of all draws; evaluation draws use `seed + 1`, so they are the same in every run with this seed.

    Example:
        >>> data = EditDataModule("world_facts/train", locality=3)
        >>> data.sampler("train").task(epoch=0, index=0).target != ""
        True
    """

    def __init__(
        self,
        train: str | Path = "world_facts/train",
        validation: str | Path | None = None,
        test: str | Path | None = None,
        tokenizer: Any = None,
        prompt: str = "{input}",
        target: str = " {target}",
        stop: str | None = "",
        batch_size: int = 8,
        rephrases: int = 1,
        locality: int = 1,
        hard_locality: int = 0,
        eval_batch_size: int = 16,
        eval_rephrases: int = 2,
        eval_locality: int = 4,
        eval_hard_locality: int = 2,
        validation_edits: int | None = None,
        test_edits: int | None = None,
        max_length: int = 200,
        kind: ModelKind | None = None,
        num_workers: int = 0,
        seed: int = 0,
        format: str = "auto",
        columns: dict[str, str | list[str]] | None = None,
        locality_data: Locality = None,
        require_rephrases: bool = True,
        edits_at_once: int = 1,
        bucket_by_length: bool = True,
        formats: list[str | dict[str, Any]] | None = None,
        eval_formats: list[str | dict[str, Any]] | None = None,
        format_edits: int = 16,
    ) -> None:
        super().__init__()
        counts = {
            "batch_size": batch_size, "rephrases": rephrases, "locality": locality,
            "eval_batch_size": eval_batch_size, "eval_rephrases": eval_rephrases, "eval_locality": eval_locality,
            "validation_edits": validation_edits, "test_edits": test_edits, "format_edits": format_edits,
            "edits_at_once": edits_at_once,
        }  # fmt: skip
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1, not {count}.")
        if hard_locality > locality or eval_hard_locality > eval_locality:
            raise ConfigError(
                f"hard_locality ({hard_locality}; evaluation {eval_hard_locality}) counts within locality "
                f"({locality}; evaluation {eval_locality}) and cannot exceed it."
            )
        # Not save_hyperparameters: its entry in the checkpoint would hold the tokenizer.
        self.files = {"train": train, "validation": validation, "test": test}
        self.format = PromptFormat(prompt, target, stop)
        self.formats, self.format_edits = DataFormats.of(self.format, formats, eval_formats), format_edits
        self._reading: tuple[str, Columns | None, bool] = (format, columns, require_rephrases)
        self.locality_data = locality_data
        if isinstance(locality_data, dict) and set(locality_data) - set(self.files):
            given = ", ".join(locality_data)
            raise ConfigError(f"locality_data names {given}; its splits are {', '.join(self.files)}.")
        self._tokenizer, self.kind = tokenizer, kind
        self._host: HostModel | None = None
        # Evaluated batches are of about eval_batch_size edits: how tasks are put together changes no number there.
        self.batch_size, self.eval_batch_size = batch_size, max(1, eval_batch_size // edits_at_once)
        self.edits_at_once, self.bucket_by_length = edits_at_once, bucket_by_length
        self.max_length, self.num_workers, self.seed = max_length, num_workers, seed
        self._draws = {
            "train": (rephrases, locality, hard_locality, seed),
            "evaluation": (eval_rephrases, eval_locality, eval_hard_locality, seed + 1),
        }
        self._limits = {"train": None, "validation": validation_edits, "test": test_edits}
        self._samplers: dict[str, TaskSampler] = {}

    def setup(self, stage: str) -> None:
        """Checks that the files are there, before gigabytes of model load."""
        data = self.locality_data
        splits = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",))
        elsewhere = data if isinstance(data, dict) else dict.fromkeys(splits, data)
        for source in (*map(self.files.get, splits), *map(elsewhere.get, splits)):
            if source is not None:
                check_source(source)

    @cached_property
    def tokenizer(self) -> Any:
        """What was given; loaded where that was a name."""
        given = self._tokenizer
        return AutoTokenizer.from_pretrained(given) if isinstance(given, (str, Path)) else given

    def attach(self, host: HostModel) -> None:
        """From now on the tasks are for this model: where there is no Trainer with a MendModule that says so (`MendCallback`)."""
        self._host = host

    @property
    def encoder(self) -> Encoder:
        """Text to ids, for this data and the base model it is used with."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        base, found = getattr(module, "base_model", None), getattr(module, "tokenizer", None)
        if self._host is not None:
            base, found = self._host.model, self._host.tokenizer
        tokenizer = self.tokenizer if self.tokenizer is not None else found
        if tokenizer is None:
            raise ConfigError("EditDataModule has no tokenizer. Pass tokenizer=..., or use it with a MendModule.")
        encoder = (
            Encoder(tokenizer, self.format, self.kind or "causal", self.max_length)
            if base is None
            else Encoder.for_model(base, tokenizer, self.format, self.max_length, self.kind)
        )
        return replace(encoder, formats=self.formats.prompt_formats(tokenizer, encoder.kind))

    def sampler(self, split: str) -> TaskSampler:
        """The tasks of a split: "train", "validation" or "test"."""
        if split not in self._samplers:
            records = read_records(self._source(split), *self._reading)
            unrelated = read_locality(self.locality_data, split)
            check_running_text([*records, *(unrelated or [])], self.format, self.formats.draw(split) is not None)
            draws = self._draws["train" if split == "train" else "evaluation"]
            formats, neighbors = self.formats.draw(split), self._neighbors(split)
            self._samplers[split] = TaskSampler(records, *draws, unrelated, formats, *neighbors)
        return self._samplers[split]

    def _neighbors(self, split: str) -> tuple[int, Names | None]:
        """How many neighbors constrain an edit, and what with: never names of the facts that are evaluated."""
        count, names = contrasts_of(editor_of(self._host, self.trainer))
        return count, None if split == "train" or not count else names or self.sampler("train").names

    def format_tasks(self) -> dict[int, dict[str, EditTask]]:
        """The test's first edits in each of the evaluation's formats; see `DataFormats.tasks`."""
        edits = min(self.format_edits, self._limits["test"] or self.format_edits)
        return self.formats.tasks(self.sampler("test"), edits)

    def train_dataloader(self) -> ResumableLoader:
        sampler = self.sampler("train")
        lengths = TaskLengths(sampler, self.encoder, self.edits_at_once) if self.bucket_by_length else None
        order = self._order(len(sampler) // self.edits_at_once, self.batch_size, shuffle=True, lengths=lengths)
        if len(order) == 0:
            each = f" tasks of {self.edits_at_once} edits" if self.edits_at_once > 1 else ""
            raise EmptyDatasetError(
                f"{self.files['train']} has {len(sampler)} usable records, fewer than one batch of {self.batch_size}{each} "
                f"on each of {order.num_replicas} process(es). Lower batch_size or give more records."
            )
        return self._loader(ResumableLoader, sampler, order, self.batch_size)

    def val_dataloader(self) -> DataLoader | list:
        if self.trainer is not None and self.trainer.state.fn == "validate":
            self._source("validation")
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        self._source("test")
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        self._source("test")
        return self._evaluation_loader("test")

    def _source(self, split: str) -> str | Path:
        found = self.files[split]
        if found is None:
            raise ConfigError(
                f"data.{split} is not set. Give a JSONL file, or a shipped set such as world_facts/{split}."
            )
        return found

    def _evaluation_loader(self, split: str) -> DataLoader | list:
        if self.files[split] is None:
            return []
        sampler = self.sampler(split)
        edits = min(len(sampler), self._limits[split] or len(sampler))
        size = edits // self.edits_at_once
        order = self._order(size, self.eval_batch_size, False)
        if size < order.num_replicas:
            # A process without a batch would skip its evaluation, and the others would wait for it.
            raise EmptyDatasetError(
                f"{self.files[split]}: {edits} record(s) to evaluate on {order.num_replicas} process(es); each needs at "
                f"least {self.edits_at_once}. Use fewer devices, raise the number of edits, or lower edits_at_once."
            )
        return self._loader(DataLoader, sampler, order, self.eval_batch_size, edits)

    def _order(self, size: int, batch_size: int, shuffle: bool, lengths: TaskLengths | None = None) -> TaskOrder:
        if self._host is not None:
            host = self._host
            return TaskOrder(size, batch_size, shuffle, self.seed, host.rank, host.world_size, host.even, lengths)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        even = self.trainer is not None and getattr(self.trainer.strategy, "shards_base", False)
        return TaskOrder(size, batch_size, shuffle, self.seed, rank, world_size, even, lengths)

    def _loader(
        self, kind: type[LoaderT], sampler: TaskSampler, order: TaskOrder, batch_size: int, limit: int | None = None
    ) -> LoaderT:
        return kind(
            TaskDataset(sampler, self.edits_at_once, limit),
            batch_size=batch_size,
            sampler=order,
            collate_fn=partial(collate_groups, encoder=self.encoder),
            num_workers=self.num_workers,
            persistent_workers=False,
            # Its workers' seeds come from here. By default torch draws them from the generator that training uses, so that
            # a resumed run, which starts its epoch again, or a validation would change what is drawn after it.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def teardown(self, stage: str) -> None:
        self._samplers.clear()

    def transfer_batch_to_device(self, batch: EditBatch, device: Any, dataloader_idx: int) -> EditBatch:
        return batch.to(device)


class EditData:
    """An `EditDataModule` for YAML of somebody's LightningCLI, which takes every data module in its config for its own.

    Args:
        **settings: see `EditDataModule`.

    Attributes:
        module: the data module.

    Example:
        >>> EditData(train="world_facts/train", locality=4).module.files["train"]
        'world_facts/train'
    """

    def __init__(self, **settings: Any) -> None:
        self.module = EditDataModule(**settings)
