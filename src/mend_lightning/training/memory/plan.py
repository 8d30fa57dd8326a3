"""How much memory training an editor takes on each device: what is divided, what is copied, what comes on top.

Every formula is a sum of bytes:

    base            parameters and buffers in their dtype; int8 1, int4 1/2 byte a weight of the blocks' linear layers
    editor          4 bytes a parameter, and its buffers (statistics; a preconditioner's matrix is d_in x d_in)
    gradient        4 bytes a parameter of the editor
    moments         8 bytes a parameter of the editor: Adam's two
    activations     one step's, by phase: `step_plan.step_bytes`
    ddp buckets     the gradient once more, laid out for the reduction
    fsdp2 buffers   the two largest blocks whole (one computes, the next is gathered), what is in no block, and of the
                    editor its largest transform whole, with its gradient
    calibration     before the first step, of preconditioned editors: float64 moments of every edited layer's inputs

Under fsdp2 base, editor, gradient and moments are divided by the number of processes; buffers are not. Under fsdp the base's
blocks are divided, and two of them gathered; everything else is as under ddp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from mend_lightning.editors.editor import Editor
from mend_lightning.models.forward.phases import BACKWARD, EDITED, LOGITS
from mend_lightning.models.layers import find_stacks, is_editable, layer_weight

Strategy = Literal["one", "ddp", "fsdp", "fsdp2"]
GIB = 2**30
# Phases of a step that `tasks_at_once` makes smaller.
OUTER = (EDITED, LOGITS, BACKWARD)
# A rank that learned as well on SmolLM2-135M (docs/tuning.md).
SMALL_RANK = 256
# Bytes of a weight in a quantised base; its scales, one a row or a group of weights, are not counted.
QUANTISED = {"int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Sizes:
    """What a model and an editor of it weigh, in bytes.

    Attributes:
        base: all parameters and buffers of the base.
        block: its largest transformer block.
        outside: what is in no block (embeddings, norms, head).
        editor: the editor's parameters.
        unit: its largest part that is sharded as one.
        buffers: the editor's statistics and matrices.
        calibration: what estimating the preconditioning needs; 0 without.
    """

    base: int
    block: int
    outside: int
    editor: int
    unit: int
    buffers: int
    calibration: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device, in bytes.

    Attributes:
        base, editor, gradient, moments, buffers: what stays.
        activations: phase of a training step -> bytes, at the moment when most is alive.
        communication: buffers of the strategy.
        calibration: needed before the first step, when there are no gradient, moments and activations.
    """

    base: int
    editor: int
    gradient: int
    moments: int
    buffers: int
    activations: Mapping[str, int] = field(default_factory=dict)
    communication: int = 0
    calibration: int = 0

    @property
    def kept(self) -> int:
        """What is there before, between and after steps, but for gradient and moments."""
        return self.base + self.editor + self.buffers + self.communication

    @property
    def step(self) -> int:
        """The most that a training step needs."""
        return self.kept + self.gradient + self.moments + sum(self.activations.values())

    @property
    def total(self) -> int:
        """The most of the whole run, calibration included.

        Example:
            >>> MemoryPlan(100, 10, 10, 20, 1, {"logits": 5}, calibration=80).total
            191
        """
        return max(self.step, self.kept + self.calibration)

    def parts(self) -> dict[str, int]:
        """name -> bytes of everything that adds up to `step`."""
        named = {"base": self.base, "editor": self.editor, "gradient": self.gradient, "moments": self.moments}
        named |= {"buffers": self.buffers, "communication": self.communication}
        return named | {f"step: {phase}": size for phase, size in self.activations.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything as builtins."""
        return {"parts": self.parts(), "step": self.step, "calibration": self.calibration, "total": self.total}


def plan_memory(sizes: Sizes, activations: Mapping[str, int], strategy: Strategy, processes: int = 1) -> MemoryPlan:
    """The plan of one of `processes` devices.

    Example:
        >>> sizes = Sizes(base=1000, block=100, outside=200, editor=80, unit=40, buffers=8)
        >>> plan_memory(sizes, {}, "ddp", 4).parts()["communication"]
        80
        >>> sharded = plan_memory(sizes, {}, "fsdp2", 4)
        >>> sharded.base, sharded.editor, sharded.moments, sharded.communication
        (250, 20, 40, 480)
    """
    parts = processes if strategy == "fsdp2" else 1
    base, editor = share(sizes.base, parts), share(sizes.editor, parts)
    if strategy == "fsdp":
        base = share(sizes.base - sizes.outside, processes) + sizes.outside
    kept = {"base": base, "editor": editor, "gradient": editor, "moments": 2 * editor, "buffers": sizes.buffers}
    communication = {
        "one": 0,
        "ddp": sizes.editor if processes > 1 else 0,
        "fsdp": 2 * sizes.block + sizes.editor if processes > 1 else 0,
        "fsdp2": 2 * sizes.block + sizes.outside + 2 * sizes.unit if processes > 1 else 0,
    }[strategy]
    return MemoryPlan(**kept, activations=activations, communication=communication, calibration=sizes.calibration)


def share(size: int, processes: int) -> int:
    """A process's part of what is divided, rounded up.

    Example:
        >>> share(10, 4)
        3
    """
    return -(-size // processes)


def sizes_of(model: nn.Module, editor: Editor, quantize: str | None = None) -> Sizes:
    """What a model and its editor weigh; both may be on the meta device.

    Args:
        model: the base.
        editor: an editor of it.
        quantize: see `BaseModel`; None: the weights are as they are.
    """
    stacks = find_stacks(model)
    blocks = [block for stack in stacks.values() for block in stack]
    each = [quantized_bytes(block, quantize) for block in blocks]
    plain, whole = sum(map(weight_bytes, blocks)), weight_bytes(model)
    units = [weight_bytes(unit, buffers=False) for unit in editor.shard_units() or [editor]]
    return Sizes(
        base=whole - plain + sum(each), block=max(each, default=0), outside=whole - plain,
        editor=weight_bytes(editor, buffers=False), unit=max(units),
        buffers=tensor_bytes(editor.buffers()), calibration=calibration_bytes(editor),
    )  # fmt: skip


def tensor_bytes(tensors: Any) -> int:
    """Bytes of tensors, each counted once."""
    found: dict[int, Tensor] = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def weight_bytes(module: nn.Module, buffers: bool = True) -> int:
    """Bytes of a module's parameters, and of its buffers."""
    return tensor_bytes([*module.parameters(), *(module.buffers() if buffers else ())])


def quantized_bytes(block: nn.Module, quantize: str | None) -> int:
    """Bytes of a block whose linear layers' weights are stored in 8 or 4 bit.

    Example:
        >>> quantized_bytes(nn.Sequential(nn.Linear(8, 4)), "int4"), quantized_bytes(nn.Sequential(nn.Linear(8, 4)), None)
        (32, 144)
    """
    if quantize is None:
        return weight_bytes(block)
    weights = [layer_weight(module) for module in block.modules() if is_editable(module)]
    return weight_bytes(block) - tensor_bytes(weights) + int(QUANTISED[quantize] * sum(w.numel() for w in weights))


def calibration_bytes(editor: Editor) -> int:
    """Float64 matrices d_in x d_in: two of every layer, four with rephrases, and about four more while one is solved."""
    widths = [d_in for d_in, _ in editor.layers.values()] if getattr(editor, "preconditioners", None) else []
    kept = 4 if editor.follows_rephrases else 2
    return 8 * (kept * sum(width**2 for width in widths) + 4 * max((width**2 for width in widths), default=0))


def advice(
    plan: MemoryPlan,
    sizes: Sizes,
    strategy: Strategy,
    tasks: int,
    at_once: int,
    rank: int | None,
    memory: int,
    quantized: bool = False,
    sharded_activations: Mapping[str, int] | None = None,
) -> list[str]:
    """What to change where `plan` does not fit into `memory` bytes, what helps most first.

    Args:
        plan, sizes, strategy: as `plan_memory` took and gave them.
        tasks: edits of a batch.
        at_once: edits whose outer pass is in memory at a time.
        rank: of the editor's matrices; None: it has none.
        memory: of a device.
        quantised: the base is quantised already.
        sharded_activations: what the activations would be if processes shared the base; None: as they are.
    """
    activations = sum(plan.activations.values())
    found: list[tuple[int, str]] = []
    if at_once > 1:
        outer = sum(plan.activations.get(phase, 0) for phase in OUTER)
        found.append((outer - outer // at_once, "--model.tasks_at_once 1, the same step"))
    if tasks > 1:
        less = activations - activations // tasks
        found.append((less, f"--data.batch_size 1 --trainer.accumulate_grad_batches {tasks}, nearly the same step"))
    if rank and rank > SMALL_RANK:
        less = 4 * plan.editor * (rank - SMALL_RANK) // rank
        found.append((less, f"--model.rank {SMALL_RANK} instead of {rank}"))
    sharded = strategy in ("fsdp", "fsdp2")
    # The two cannot go together (`quantisation.check_whole`).
    if not quantized and not sharded:
        found.append(((sizes.base - sizes.outside) // 2 * plan.base // sizes.base, "--model.base.quantize int8"))
    if plan.kept + plan.calibration == plan.total > plan.step:
        found.append((plan.total - plan.step, "--model.precondition null, so that nothing is calibrated"))
    said = [f"{text}: about {gib(less)} GiB less" for less, text in sorted(found, reverse=True) if less > GIB // 100]
    count = (
        None
        if strategy == "fsdp2" or quantized
        else devices_needed(sizes, sharded_activations or plan.activations, memory)
    )
    if count:
        said.insert(
            0, f"--trainer.strategy fsdp2 --trainer.devices {count}: base and editor, shared by {count} devices, fit"
        )
    return said or ["A smaller model, or devices with more memory."]


def devices_needed(sizes: Sizes, activations: Mapping[str, int], memory: int, most: int = 1024) -> int | None:
    """The smallest number of devices, doubled from 2 on, over which fsdp2 fits into `memory` each; None: none does."""
    count = 2
    while count <= most:
        if plan_memory(sizes, activations, "fsdp2", count).total <= memory:
            return count
        count *= 2
    return None


def gib(size: float) -> str:
    """
    Example:
        >>> gib(3 * 2**29)
        '1.50'
    """
    return f"{size / GIB:.2f}"
