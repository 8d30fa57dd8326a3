"""Fine-tuning (FT) and fine-tuning with a KL penalty (FT+KL), the baselines of the MEND paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mend_lightning.data.record import Record
from mend_lightning.editors.edited_model import Made
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.locality_stream import LocalityStream, read_unrelated
from mend_lightning.edits.deltas import DenseDelta
from mend_lightning.errors import ConfigError, InferenceModeError, NonFiniteError
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.logits import attended_mask, label_mask, labelled, logits_at
from mend_lightning.models.forward.losses import is_correct, mean_by_task, rows_all_true, token_kl, token_nll
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.rows import Rows

# torch.optim.RMSprop's own, which the original code left as they are.
SMOOTHING, EPSILON = 0.99, 1e-8


class FineTuning(Editor):
    """Fine-tunes the chosen layers on each edit until the new answer is the greedy output. Nothing is trained before.

    RMSprop on `ΔW`, from 0, for at most `max_steps` steps; it stops as soon as every label token of the edit is the
    most probable one, before the step that would follow. With `locality_data` the loss is
    `c_edit · NLL(edit) + KL(base ‖ edited)` on one fresh unrelated fact a step (FT+KL), else `NLL(edit)`. All edits of
    a batch are tuned side by side, each as if it were alone: their losses are added up, RMSprop works by element, and an
    edit that has its answer takes part no longer.

    RMSprop's first step moves every weight by 10 `lr`, whatever the gradient. Where that is enough the KL of FT+KL
    changes nothing, for its gradient is 0 at the base. Measured on SmolLM2-135M-Instruct (32 validation edits of
    world_facts, the quickstart's prompt, bfloat16; FT reached every edit), edit success / known facts retained:

    | lr | 1e-5 | 3e-5 | 1e-4 | 3e-4 | 5e-4 | 1e-3 |
    |---|---|---|---|---|---|---|
    | FT, `model.layers.26.mlp.down_proj` | | | 0.53 / 0.92 | 0.75 / 0.90 | 0.88 / 0.85 | 0.98 / 0.74 |
    | FT+KL, the same layer | | | | 0.68 / 0.91 | | 0.98 / 0.74 |
    | FT, the last 3 blocks (the default layers) | 0.55 / 0.91 | 0.80 / 0.86 | 0.96 / 0.66 | 0.95 / 0.22 | | |

    `ΔW` is dense: an edit takes as much room as the layers' weights, and four times that while it is made.

    Args:
        layers: name -> (d_in, d_out) of the edited layers.
        lr: RMSprop's learning rate (original: `edit_lr: 5e-6`); what works depends on the model and its layers.
        max_steps: at most so many steps (paper and original: 100).
        clip: largest norm of an edit's gradient over all layers (original: 100).
        locality_data: data file, or shipped set, of the unrelated facts; None: plain FT. The facts to edit should not
            be in it. The fact of a step depends on `seed` and the step alone, so it is the same for all edits.
        c_edit: weight of the edit's loss beside the KL (original: 0.01); without `locality_data` it is not used.
        locality_positions: positions the KL looks at: "all" (the original's) or "answer".
        tasks_at_a_time: so many edits are tuned side by side; it bounds the memory of tuning and changes no edit; the
            result holds one `ΔW` for each edit of the batch.
        seed: of the unrelated facts.

    Example:
        >>> FineTuning({"fc": (2, 3)}, lr=1e-4).trainable
        False
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        lr: float = 5e-6,
        max_steps: int = 100,
        clip: float = 100.0,
        locality_data: str | None = None,
        c_edit: float = 0.01,
        locality_positions: Literal["all", "answer"] = "all",
        tasks_at_a_time: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            layers, lr=lr, max_steps=max_steps, clip=clip, locality_data=locality_data, c_edit=c_edit,
            locality_positions=locality_positions, tasks_at_a_time=tasks_at_a_time, seed=seed,
        )  # fmt: skip
        for name, value in (("lr", lr), ("max_steps", max_steps), ("clip", clip), ("tasks_at_a_time", tasks_at_a_time)):
            if value <= 0:
                raise ConfigError(f"{name} of FineTuning must be greater than 0, not {value}.")
        self.lr, self.max_steps, self.clip, self.c_edit = lr, max_steps, clip, c_edit
        self.locality_data, self.locality_positions = locality_data, locality_positions
        self.tasks_at_a_time, self.seed = tasks_at_a_time, seed
        self._records: Sequence[Record] = ()

    def make_deltas(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> Made:
        """Tunes `ΔW` for every edit of `z_edit`; see `Editor.make_deltas`. `inner` is the NLL before the first step.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
            ConfigError: `locality_data` is set, and there is no encoder.
        """
        if torch.is_inference_mode_enabled():
            raise InferenceModeError(
                "Fine-tuning needs gradients, which torch.inference_mode() forbids. Use Trainer(inference_mode=False), or "
                "torch.no_grad() instead of inference_mode()."
            )
        layers = self.modules_in(model)
        edits = _Edits(model, layers, z_edit, trunk or run_trunk(model, z_edit, layers))
        stream = self._stream(model, layers)
        device, tasks = z_edit.task.device, z_edit.tasks
        found = {name: torch.zeros(tasks, d_out, d_in, device=device) for name, (d_in, d_out) in self.layers.items()}
        inner, reached = torch.zeros(tasks, device=device), torch.zeros(tasks, dtype=torch.bool, device=device)
        for chosen in torch.arange(tasks, device=device).split(self.tasks_at_a_time):
            self._tune(edits, stream, chosen, found, inner, reached)
        deltas = {name: DenseDelta(weight) for name, weight in found.items()}
        return Made(deltas, inner, torch.zeros(()), reached)

    def _stream(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> LocalityStream | None:
        if self.locality_data is None:
            return None
        self._records = self._records or read_unrelated(self.locality_data)
        return LocalityStream(model, layers, self.text_encoder(), self._records, self.seed)

    @torch.enable_grad()
    def _tune(
        self,
        edits: _Edits,
        stream: LocalityStream | None,
        chosen: Tensor,
        found: dict[str, Tensor],
        inner: Tensor,
        reached: Tensor,
    ) -> None:
        """Tunes the tasks `chosen`; fills in their places of `found`, `inner` and `reached`."""
        weights = {name: weight[chosen] for name, weight in found.items()}
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        # The last round only looks.
        for step in range(self.max_steps + 1):
            leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
            nll, right = edits.losses(leaves, chosen, step)
            if step == 0:
                inner[chosen] = nll.detach()
            reached[chosen] = right
            ended = right if step < self.max_steps else torch.ones_like(right)
            if bool(ended.any()):
                for name, weight in weights.items():
                    found[name][chosen[ended]] = weight.detach()[ended]
                if bool(ended.all()):
                    return
            loss = nll if stream is None else self.c_edit * nll + self._drift(edits, leaves, stream, step)
            gradients = torch.autograd.grad(loss[~ended].sum(), list(leaves.values()))
            clipped = dict(zip(leaves, self._clipped(gradients)))
            with torch.no_grad():
                going, chosen = ~ended, chosen[~ended]
                weights, squares = ({n: _rows(x, going) for n, x in state.items()} for state in (weights, squares))
                for name, weight in weights.items():
                    rmsprop_(weight, squares[name], _rows(clipped[name], going), self.lr)

    def _drift(self, edits: _Edits, leaves: dict[str, Tensor], stream: LocalityStream, step: int) -> Tensor:
        """KL(base ‖ edited) on the step's unrelated fact, the mean over its positions: `[tasks]`."""
        tasks = next(iter(leaves.values())).shape[0]
        rows, trunk, index = stream.at(step, tasks)
        # The original: every real position, of the decoder where there is one.
        mask = attended_mask(rows) if self.locality_positions == "all" else label_mask(rows)
        with torch.no_grad(), replayed(trunk, index[:1]):
            base = logits_at(edits.model, rows.part(slice(0, 1)), mask[:1])
        with replayed(trunk, index), applied(edits.layers, _deltas(leaves)):
            edited = logits_at(edits.model, rows, mask)
        return token_kl(base.repeat(tasks, 1), edited).reshape(tasks, -1).mean(1)

    def _clipped(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients `[tasks, d_out, d_in]`, those of a task cut to the norm `clip` over all layers."""
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        return [gradient * scale[:, None, None] if bool((scale < 1).any()) else gradient for gradient in gradients]


@dataclass(frozen=True)
class _Edits:
    """What is tuned: the base model, its edited layers, the edits and their trunk."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    z_edit: Rows
    trunk: TrunkOutputs

    def losses(self, weights: Mapping[str, Tensor], chosen: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """NLL of the edits of the tasks `chosen`, and whether their targets are the greedy output: `[tasks]` each."""
        rows, index = self.z_edit.of_tasks(chosen)
        mask, targets, task = labelled(rows, "The edit")
        with replayed(self.trunk, index), applied(self.layers, _deltas(weights), rows.task_of_row):
            logits = logits_at(self.model, rows, mask)
        nll = mean_by_task(token_nll(logits, targets), task, rows.tasks)
        if not bool(nll.isfinite().all()):
            raise NonFiniteError(
                f"The loss of an edit is not finite after {step} step(s) of fine-tuning. Lower lr; if the base is in "
                "float16, use bfloat16 or float32."
            )
        return nll, rows_all_true(is_correct(logits, targets), task, rows.tasks)


def rmsprop_(weight: Tensor, square: Tensor, gradient: Tensor, lr: float) -> None:
    """One step of RMSprop, in place.

    Args:
        weight: what is tuned; square: the running mean of its squared gradient; gradient: all of one shape.
        lr: learning rate.
    """
    square.mul_(SMOOTHING).addcmul_(gradient, gradient, value=1 - SMOOTHING)
    weight.addcdiv_(gradient, square.sqrt().add_(EPSILON), value=-lr)


def _deltas(weights: Mapping[str, Tensor]) -> dict[str, DenseDelta]:
    return {name: DenseDelta(weight) for name, weight in weights.items()}


def _rows(x: Tensor, going: Tensor) -> Tensor:
    """The tasks that are still tuned, without a copy where all are."""
    return x.detach() if bool(going.all()) else x.detach()[going]
