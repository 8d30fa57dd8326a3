"""`mend-lightning plan`: how much memory a config's training takes on each device, without a weight or a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from mend_lightning.cli.config.overlays import resolved_configs
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError, ModelLoadError
from mend_lightning.evaluation.report import versions
from mend_lightning.files import check_writable_file, write_json
from mend_lightning.models.architecture import kind_of_config, pick_dtype
from mend_lightning.models.base import BaseModel
from mend_lightning.models.forward.logits import input_embeddings
from mend_lightning.models.inputs.encoder import Encoder, ModelKind
from mend_lightning.models.known_shapes import known_architecture
from mend_lightning.models.quantisation import check_whole
from mend_lightning.models.random_weights import empty_model, local_tokenizer, stand_in_tokenizer
from mend_lightning.training.distributed.strategies import check_shardable
from mend_lightning.training.memory.activations import BatchCounts, step_bytes
from mend_lightning.training.memory.batch_sizes import measured_counts, most_counts
from mend_lightning.training.memory.plan import GIB, MemoryPlan, Sizes, Strategy, advice, gib, plan_memory, sizes_of
from mend_lightning.training.module import MendModule
from mend_lightning.training.progress.console import console

WHAT = {
    "base": "its weights", "editor": "parameters, float32", "gradient": "the editor's", "moments": "Adam's two",
    "buffers": "statistics, preconditioning", "communication": "gathered blocks, buckets of the gradient",
    "step: trunk": "hidden states below the edited blocks", "step: inner pass": "the edits' factors u and delta",
    "step: transforms": "what the editor's gradient needs", "step: confidence": "the search for each edit's size",
    "step: edited pass": "what the edited blocks' gradient needs",
    "step: logits": "of a few positions at a time; of all where processes share the base",
    "step: backward": "gradients on their way",
}  # fmt: skip
# Of a stand-in tokenizer: about as much as most templates write around a message.
STAND_IN_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>\n' + message.content + '</>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made for; `sharded_activations` are those of processes that share the base, where advice asks."""

    plan: MemoryPlan
    sizes: Sizes
    counts: BatchCounts
    lengths: str
    strategy: Strategy
    processes: int
    rank: int | None
    quantized: bool
    at_once: int
    sharded_activations: dict[str, int]


def plan_command(arguments: Sequence[str]) -> int:
    """Plans a config's training; returns 1 where it does not fit into `--memory`."""
    options, rest = _parser().parse_known_args(arguments)
    if options.out is not None:
        check_writable_file(options.out)
    config, model, data = read_run(rest)
    trainer = config.trainer
    strategy, processes = layout(trainer, options.strategy, options.devices, options.nodes)
    memory = None if options.memory is None else int(options.memory * GIB)
    found = plan_run(model, data, strategy, processes, memory)
    _show(found, model.base, options.memory, memory)
    if options.out is not None:
        write_json(options.out, {**about(found, model.base), "memory_gib": options.memory, "versions": versions()})
        console().print(f"Written: {options.out}", highlight=False)
    return int(memory is not None and found.plan.total > memory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mend-lightning plan", allow_abbrev=False,
        description="How much memory a config's training takes on each device. Loads no weights and asks no network.",
        epilog="Everything else is as for fit: --config NAME, and keys that change it (--model.rank 512 ...).",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", choices=get_args(Strategy), help="default: what the config's trainer says, else one"
    )
    parser.add_argument("--devices", type=int, help="devices of a node")
    parser.add_argument("--nodes", type=int, help="nodes")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device: says whether the plan fits into it")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the plan is written")
    return parser


def read_run(arguments: Sequence[str]) -> tuple[Any, MendModule, EditDataModule]:
    """The config that `fit` would run with these arguments, its module (nothing is loaded) and its data."""
    from lightning.pytorch import Trainer

    from mend_lightning.cli.run_parser import RunParser

    parser = RunParser(prog="mend-lightning plan")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None, default=None)
    parser.add_lightning_class_args(MendModule, "model")
    parser.add_lightning_class_args(EditDataModule, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    config = parser.parse_args(resolved_configs(list(arguments))[0])
    # jsonargparse gives this another name from 4.49 on.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(config)
    return config, made.model, made.data


def layout(
    trainer: Any, strategy: Strategy | None = None, devices: int | None = None, nodes: int | None = None
) -> tuple[Strategy, int]:
    """Strategy and number of processes: as asked for, else the trainer's."""
    devices = device_count(trainer.devices) if devices is None else devices
    nodes = trainer.num_nodes if nodes is None else nodes
    if devices < 1 or nodes < 1:
        raise ConfigError(f"devices and nodes must be at least 1, not {devices} and {nodes}.")
    processes = devices * nodes
    if strategy is None:
        strategy = _strategy_of(trainer, processes)
    if strategy == "one" and processes > 1:
        raise ConfigError(f"--strategy one is one device; {processes} are asked for. Use ddp, fsdp or fsdp2.")
    return strategy, processes


def _strategy_of(trainer: Any, processes: int) -> Strategy:
    named = str(getattr(trainer.strategy, "class_path", trainer.strategy)).rpartition(".")[2].lower()
    if named in ("fsdp", "fsdp1", "shardedbasestrategy"):
        return "fsdp"
    if named in ("fsdp2", "shardedstrategy"):
        return "fsdp2"
    return "ddp" if processes > 1 else "one"


def device_count(devices: Any) -> int:
    """How many devices of a node the Trainer's `devices` names; "auto" and -1 are all of this machine.

    Example:
        >>> device_count(2), device_count("3"), device_count("0,2"), device_count([1])
        (2, 3, 2, 1)
    """
    if isinstance(devices, list | tuple):
        return len(devices)
    if "," in str(devices):
        return len([part for part in str(devices).split(",") if part.strip()])
    return max(1, torch.cuda.device_count()) if str(devices) in ("auto", "-1") else int(devices)


def plan_run(
    module: MendModule, data: EditDataModule, strategy: Strategy, processes: int, memory: int | None = None
) -> Planned:
    """The plan of a run, made on torch's meta device; `memory` bytes a device has.

    Raises:
        ModelLoadError: the base's shape is not known on this machine.
        ConfigError: `fit` would refuse to shard this base or editor.
    """
    base, sharded = module.base, strategy in ("fsdp", "fsdp2")
    if sharded:
        check_whole(base.quantize)
    architecture = known_architecture(base.name, base.revision, base.trust_remote_code)
    kind = base.kind or kind_of_config(architecture)
    encoder, whose = _encoder(base, architecture, data, kind)
    model = empty_model(architecture, pick_dtype(base.dtype), kind, base.trust_remote_code).eval().requires_grad_(False)
    editor = empty_editor(module, model)
    if sharded:
        check_shardable(editor)
    counts = measured_counts(data, encoder, module.locality_positions) if encoder is not None else None
    lengths = (
        f"measured on the training data with {whose}" if counts else f"max_length ({data.max_length}) of every row"
    )
    counts = counts or most_counts(data, kind, module.locality_positions)
    quantize = getattr(base, "quantize", None)
    sizes = sizes_of(model, editor, quantize)
    shared = activations = step_bytes(model, editor, counts, module.tasks_at_once, sharded)
    plan = plan_memory(sizes, activations, strategy, processes)
    if memory is not None and plan.total > memory and not sharded:
        shared = step_bytes(model, editor, counts, module.tasks_at_once, sharded=True)
    rank = editor.settings.get("rank")
    at_once = min(module.tasks_at_once or counts.tasks, counts.tasks)
    return Planned(plan, sizes, counts, lengths, strategy, processes, rank, quantize is not None, at_once, shared)


def _encoder(base: BaseModel, architecture: Any, data: EditDataModule, kind: ModelKind) -> tuple[Encoder | None, str]:
    """Text to ids, with the model's own tokenizer or a stand-in, which also fits the config to its ids; and whose it is."""
    tokenizer = local_tokenizer(base.name, base.revision, base.trust_remote_code)
    whose = "the model's tokenizer" if tokenizer is not None else "a stand-in for its tokenizer"
    if tokenizer is None:
        try:
            tokenizer = stand_in_tokenizer(architecture, kind)
        except ModelLoadError:
            # A vocabulary below 256 bytes: lengths are what the settings allow.
            return None, ""
        tokenizer.chat_template = STAND_IN_TEMPLATE
    start = getattr(architecture, "decoder_start_token_id", None)
    formats = data.formats.prompt_formats(tokenizer, kind)
    return Encoder(tokenizer, data.format, kind, data.max_length, start, formats=formats), whose


def empty_editor(module: MendModule, model: torch.nn.Module) -> Editor:
    """The editor that `module` would train, on the meta device, in training mode."""
    with torch.device("meta"):
        editor = module.new_editor(model)
        if editor.settings.get("embedding", 0) is None:
            # KnowledgeEditor learns this width when it is bound to weights.
            width = input_embeddings(model).embedding_dim
            editor = type(editor)(editor.layers, **{**editor.settings, "embedding": width})
    return editor.train()


def _show(found: Planned, base: BaseModel, limit: float | None, memory: int | None) -> None:
    many = f"{found.processes} devices, {found.strategy}" if found.processes > 1 else "one device"
    table = Table(title=f"Memory of each device, training an editor of {base.name} ({many})", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("what it is")
    for name, size in found.plan.parts().items():
        if size:
            table.add_row(name, gib(size), WHAT[name])
    table.add_section()
    table.add_row("a training step", gib(found.plan.step), "all of these")
    if found.plan.calibration:
        table.add_row("calibration", gib(found.plan.calibration), "before the first step, without the parts of a step")
    table.add_row("total", gib(found.plan.total), "the largest of the run")
    console().print(table)
    for line in lines(found, limit, memory):
        console().print(line, highlight=False)


def lines(found: Planned, limit: float | None, memory: int | None) -> list[str]:
    """What stands under the table."""
    rows = [found.counts.z_edit, found.counts.x_in, found.counts.x_out]
    said = [
        f"Lengths: {found.lengths}; edits {rows[0].rows} rows of {rows[0].length} tokens, rephrases {rows[1].rows} of "
        f"{rows[1].length}, unrelated {rows[2].rows} of {rows[2].length}.",
        "Beside it: what Python, torch and a GPU's context take, scratch memory inside kernels, and the allocator's gaps.",
    ]
    if memory is None:
        return said
    if found.plan.total <= memory:
        return [*said, f"Fits into {limit:g} GiB: {gib(memory - found.plan.total)} GiB are left."]
    edits = (found.counts.tasks, found.at_once)
    given = (
        found.plan,
        found.sizes,
        found.strategy,
        *edits,
        found.rank,
        memory,
        found.quantized,
        found.sharded_activations,
    )
    hints = advice(*given)
    return [*said, f"Does not fit into {limit:g} GiB: {gib(found.plan.total - memory)} GiB too much. What helps:",
            *(f"  {hint}" for hint in hints)]  # fmt: skip


def about(found: Planned, base: BaseModel) -> dict[str, Any]:
    """What `--out` writes, sizes in bytes."""
    counts = {
        name: vars(rows) if name in ("z_edit", "x_in", "x_out") else rows for name, rows in vars(found.counts).items()
    }
    return {
        "base": base.name, "strategy": found.strategy, "processes": found.processes, "lengths": found.lengths,
        "counts": counts, "sizes": vars(found.sizes), **found.plan.as_dict(),
    }  # fmt: skip
