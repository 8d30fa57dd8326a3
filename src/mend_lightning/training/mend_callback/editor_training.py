"""Trains an editor beside somebody else's training: its own optimiser, clipping, schedule and synchronisation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.normalizer import RunningNormalizer
from mend_lightning.errors import NoEffectWarning
from mend_lightning.training.optimization import Decay, lr_factor, parameter_groups
from mend_lightning.training.step import LocalityPositions, step_loss


@dataclass(frozen=True)
class LearningSettings:
    """How an editor learns; each as in `MendCallback`."""

    lr: float = 1e-4
    edit_rate_lr: float = 3e-6
    warmup_steps: int = 20
    decay: Decay = "linear"
    clip: float = 100.0
    c_edit: float = 0.3
    locality_positions: LocalityPositions = "all"
    tasks_at_once: int | None = None


class EditorTraining:
    """Steps of an editor's own Adam. Gradients are taken by the editor's parameters and by nothing else.

    Args:
        editor: a trainable editor, on the device of the model.
        settings: how it learns.

    Attributes:
        steps: that were taken; skipped: steps that were left out because their gradient was not finite.
    """

    def __init__(self, editor: Editor, settings: LearningSettings) -> None:
        self.editor, self.settings = editor, settings
        groups = parameter_groups(editor, settings.lr, settings.edit_rate_lr)
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self._rates = [group["lr"] for group in groups]
        self.steps = self.skipped = 0
        for tensor in (*editor.parameters(), *editor.buffers()):
            from_first_process(tensor.data)

    def step(self, model: nn.Module, batch: EditBatch, progress: float = 0.0) -> dict[str, Tensor]:
        """One step on a batch.

        Args:
            model: the host's, isolated (`isolation.isolated`).
            batch: edit tasks, on the model's device.
            progress: share of the host's training that is over, which `decay` goes by.

        Returns:
            name -> mean over the tasks of this process, and the norm of the gradient of all.

        Warns:
            NoEffectWarning: the gradient is not finite, so the editor is left as it was.
        """
        parameters = list(self.editor.parameters())
        statistics = _statistics(self.editor)
        before = [tensor.clone() for tensor in statistics]
        self.editor.train()
        try:
            settings = self.settings
            loss, out = step_loss(
                model, self.editor, batch, settings.c_edit, settings.tasks_at_once, settings.locality_positions
            )
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.editor.eval()
        gradients = mean_of_processes([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)])
        norm = nn.utils.get_total_norm(gradients)
        self._set_rates(progress)
        self.steps += 1
        if bool(norm.isfinite()):
            self._descend(parameters, gradients, norm)
        else:
            self._skip(statistics, before)
        losses = {f"{name}_loss": value.mean().detach() for name, value in out.losses().items()}
        return {**losses, "loss": loss.detach(), "grad_norm": norm}

    def _set_rates(self, progress: float) -> None:
        settings = self.settings
        factor = lr_factor(self.steps, float("inf"), settings.warmup_steps, "none")
        if settings.decay == "linear":
            factor *= max(0.0, 1 - progress)
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate * factor

    def _descend(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], norm: Tensor) -> None:
        scale = (self.settings.clip / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient * scale
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _skip(self, statistics: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Nothing of such a batch stays; the host's training must not end for it."""
        self.skipped += 1
        for tensor, value in zip(statistics, before):
            tensor.copy_(value)
        if self.skipped == 1:
            warnings.warn(
                f"The editor's gradient is not finite in its step {self.steps}: the step is left out, and the editor is as it was. "
                "Usual causes: a model in float16, or whose training has diverged; a learning rate (lr) that is too high. "
                "Steps after this one that are left out are counted, and told at the end.",
                NoEffectWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The optimiser and the counters, as tensors and builtins."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.skipped = state["steps"], state["skipped"]


def _statistics(editor: Editor) -> list[Tensor]:
    return [
        buffer for module in editor.modules() if isinstance(module, RunningNormalizer) for buffer in module.buffers()
    ]


def several_processes() -> bool:
    """Whether this process is one of several that train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_first_process(tensor: Tensor) -> Tensor:
    """The first process's values, in place, on every process that trains with it."""
    if several_processes():
        distributed.broadcast(tensor, src=0)
    return tensor


def mean_of_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes, the same bits on each; in one message.

    Example:
        >>> mean_of_processes([torch.ones(2)])
        [tensor([1., 1.])]
    """
    if not several_processes():
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]
