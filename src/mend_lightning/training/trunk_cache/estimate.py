"""Whether a trunk cache would pay: the trunk's share of a step's arithmetic, and what its rows take on disk.

Everything is counted from the model, a batch and the run's settings; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.editors.editor import Editor
from mend_lightning.models.forward.logits import output_head
from mend_lightning.models.forward.run_trunk import SHORTEST_PREFIX, common_prefix, shares_prefixes
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows, concatenate_rows
from mend_lightning.models.layers import editable_layers, find_stacks, is_editable, layer_shape, text_stacks
from mend_lightning.training.step import LocalityPositions
from mend_lightning.training.trunk_cache.observe import TrunkShape
from mend_lightning.training.trunk_cache.row_keys import MASK_OF

# It clearly pays where it saves this share of a step's arithmetic, and takes no more than that share of the free disk.
SAVED_SHARE = 0.25
DISK_SHARE = 0.25


@dataclass(frozen=True)
class Worth:
    """What a trunk cache would be worth to a run.

    Attributes:
        trunk_blocks, blocks: below the edited layers, and all of their stacks.
        arithmetic: the trunk's share of a step's multiplications.
        found: share of the run's rows that come again.
        size: bytes on disk.
    """

    trunk_blocks: int
    blocks: int
    arithmetic: float
    found: float
    size: float

    def pays(self, free: float) -> bool:
        """Whether it clearly does, with `free` bytes on the disk.

        Example:
            >>> Worth(26, 30, 0.6, 0.9, 1e9).pays(free=1e10), Worth(26, 30, 0.6, 0.3, 1e9).pays(free=1e10)
            (True, False)
        """
        return self.arithmetic * self.found >= SAVED_SHARE and self.size <= DISK_SHARE * free

    def line(self, free: float) -> str:
        """What a user is told.

        Example:
            >>> print(Worth(26, 30, 0.6, 0.9, 1e9).line(free=1e10))
            A trunk cache would pay: 26 of 30 blocks lie below the edited layers, 60% of a step's arithmetic, and about 90% of
            this run's rows come again. --model.trunk_cache FOLDER takes about 1 GB of disk (10 GB are free).
        """
        return (
            f"A trunk cache would pay: {self.trunk_blocks} of {self.blocks} blocks lie below the edited layers, "
            f"{self.arithmetic:.0%} of a step's arithmetic, and about {self.found:.0%} of\nthis run's rows come again. "
            f"--model.trunk_cache FOLDER takes about {self.size / 1e9:.2g} GB of disk ({free / 1e9:.2g} GB are free)."
        )


def worth_of(
    model: nn.Module,
    editor: Editor,
    shape: TrunkShape,
    batch: EditBatch,
    rows: tuple[float, float],
    positions: LocalityPositions = "all",
) -> Worth:
    """What a cache would be worth.

    Args:
        model: the base model.
        editor: what is trained.
        shape: of the trunk, `observe_trunk(...)`.
        batch: one of the run's.
        rows: how many the run will ask for, and how many different ones: `run_rows(...)`.
        positions: where the locality loss looks.
    """
    stacks, (asked, different) = find_stacks(model), rows
    tokens, count = _tokens(_rows_of(batch)), len(_rows_of(batch))
    shared = _shared_tokens(model, batch)
    sizes = [
        (tokens[stack.positions] / count - shared) * stack.width * stack.dtype.itemsize
        for stack in shape.stacks.values()
    ]
    return Worth(
        sum(stack.blocks for stack in shape.stacks.values()),
        sum(len(stacks[name]) for name in shape.stacks),
        trunk_share(model, editor, shape, batch, positions),
        max(0.0, 1 - different / asked),
        different * sum(sizes),
    )


def trunk_share(
    model: nn.Module, editor: Editor, shape: TrunkShape, batch: EditBatch, positions: LocalityPositions = "all"
) -> float:
    """The trunk's share of a training step's multiplications; attention's own (of tokens with tokens) are left out.

    The trunk runs once over all rows. The blocks above run forward and backward for the edits, forward for the unrelated
    rows, and edited forward and backward for these and the rephrases. The output head runs where a loss looks, the
    editor's transforms, forward and backward, over the edits' tokens.
    """
    z_edit, x_in, x_out = (_tokens(rows) for rows in (batch.z_edit, batch.x_in, batch.x_out))
    once = _shared_tokens(model, batch) * (len(_rows_of(batch)) - 1)
    trunk = above = 0
    for name, ids in _ids_of_stacks(model, batch).items():
        stack, below = find_stacks(model)[name], shape.stacks[name].blocks if name in shape.stacks else 0
        trunk += (z_edit[ids] + x_in[ids] + x_out[ids] - once) * sum(map(_weights, stack[:below]))
        above += (2 * z_edit[ids] + 2 * x_in[ids] + 3 * x_out[ids]) * sum(map(_weights, stack[below:]))
    head = output_head(model)
    locality = _labels(batch.x_out) if positions == "answer" else max(x_out.values())
    above += (2 * _labels(batch.z_edit) + 2 * _labels(batch.x_in) + 3 * locality) * (_weights(head) if head else 0)
    return trunk / (trunk + above + _transforms(editor, max(z_edit.values())))


def _transforms(editor: Editor, tokens: int) -> float:
    """Of the editor's: each layer's pairs of u and delta go through the transform of its shape."""
    parameters = sum(parameter.numel() for parameter in editor.parameters())
    return 3 * tokens * parameters * len(editor.layers) / len(set(editor.layers.values()))


def _ids_of_stacks(model: nn.Module, batch: EditBatch) -> dict[str, str]:
    """Stack -> the ids whose tokens it runs over: of two stacks that read text the encoder is the first."""
    names = [*text_stacks(model)]
    second = "decoder_input_ids" if "decoder_input_ids" in batch.z_edit.inputs else "input_ids"
    return {name: second if number else "input_ids" for number, name in enumerate(names)}


def _rows_of(batch: EditBatch) -> Rows:
    return concatenate_rows([batch.z_edit, batch.x_in, batch.x_out])


def _tokens(rows: Rows) -> dict[str, int]:
    """Tokens without padding, of each of the ids."""
    return {ids: int(rows.inputs[mask].sum()) for ids, mask in MASK_OF.items() if mask in rows.inputs}


def _labels(rows: Rows) -> int:
    return int((rows.labels != IGNORED_LABEL).sum())


def _weights(module: nn.Module) -> int:
    """Multiplications a token: the entries of the linear layers' weights, whatever form these are stored in."""
    layers = [module] if is_editable(module) else editable_layers(module).values()
    return sum(d_in * d_out for d_in, d_out in map(layer_shape, layers))


def _shared_tokens(model: nn.Module, batch: EditBatch) -> int:
    """Leading tokens that all rows share: they run once, and are kept once."""
    common = common_prefix(_rows_of(batch)) if shares_prefixes(model) else 0
    return common if common >= SHORTEST_PREFIX else 0


def run_rows(sampler: TaskSampler, epochs: float, calibration: float, reads_answers: bool) -> tuple[float, float]:
    """How many rows a run asks for, and about how many different ones: the mean over its draws.

    Args:
        sampler: of the training tasks.
        epochs: of training.
        calibration: share of an epoch that the calibration looks at before: the tasks that training begins with.
        reads_answers: whether the trunk reads the answers: a causal model's does, an encoder's does not.
    """
    seen, records = max(epochs, calibration), sampler.records
    asked = len(records) * (1 + sampler.rephrases + sampler.locality)
    edits = sum(_edit_rows(sampler, number, seen, reads_answers) for number in range(len(records)))
    own = [(len(record.locality), min(sampler.locality, len(record.locality))) for record in records]
    brought = sum(coverage(choices, at_once, seen) for choices, at_once in own if choices)
    drawn = seen * sum(sampler.locality - at_once for _, at_once in own)
    phrasings = sum(1 if record.text else 1 + len(record.rephrases) for record in sampler.pool)
    unrelated = coverage(phrasings, 1, drawn) if drawn else 0.0
    if not reads_answers and drawn and sampler.pool[0] in records:
        # The edits' own questions, in the same words.
        unrelated *= 1 - min(1.0, edits / phrasings)
    return (epochs + calibration) * asked, edits + brought + unrelated


def _edit_rows(sampler: TaskSampler, number: int, seen: float, reads_answers: bool) -> float:
    """Different rows of `z_edit` and `x_in` that are made of one record."""
    record = sampler.records[number]
    targets = len(record.alternatives) if reads_answers else 1
    if record.text:
        # Beginnings are dropped at random.
        return coverage(targets, 1, seen) + seen * sampler.rephrases
    phrasings = max(1, len(record.rephrases))
    return coverage(targets, 1, seen) + coverage(targets * phrasings, min(phrasings, sampler.rephrases), seen)


def coverage(choices: float, at_once: float, draws: float) -> float:
    """How many of `choices` things were drawn, in the mean, by `draws` draws of `at_once` different ones each.

    Example:
        >>> coverage(3, 1, 0.5), coverage(3, 1, 1), round(coverage(3, 1, 2), 2), coverage(4, 4, 9)
        (0.5, 1, 1.67, 4.0)
    """
    if draws <= 1:
        return at_once * draws
    return choices * (1 - (1 - at_once / choices) ** draws)
