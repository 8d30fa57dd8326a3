"""Losses at the output head, a few positions at a time, so that no matrix of positions × vocabulary is ever whole.

Each position's loss depends on its own hidden state alone. So its gradient there is computed together with the loss, while
the logits of those few positions exist, and nothing is run twice: what is kept is `[n, width]` instead of `[n, vocabulary]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.errors import LayerNotCalledError
from mend_lightning.models.compiled import unwrapped
from mend_lightning.models.forward.logits import logits_at, output_head, without_cache
from mend_lightning.models.forward.losses import mean_shares, sum_shares, token_kl, token_nll
from mend_lightning.models.forward.phases import LOGITS, phase
from mend_lightning.models.forward.trunk import returning
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import layer_weight
from mend_lightning.models.sharding.collectives import is_sharded

# Of one matrix of logits in float32; a few of them exist at a time.
LOGITS_BYTES = 2**25
# On a model inside `whole_logits`.
_WHOLE = "_mend_lightning_whole_logits"


@dataclass(frozen=True)
class HeadStates:
    """What the output head reads at some positions, and what the model makes of it.

    Attributes:
        hidden: `[n, width]`; the logits themselves where the head cannot be run apart.
        logits_of: some of `hidden` -> their logits `[m, vocabulary]`.
        at_once: how many positions' logits are made at a time.
    """

    hidden: Tensor
    logits_of: Callable[[Tensor], Tensor]
    at_once: int

    @classmethod
    def known(cls, logits: Tensor) -> HeadStates:
        """Of logits `[n, vocabulary]` that are there already."""
        return cls(logits, _as_they_are, len(logits) or 1)

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    def split(self, first: int) -> tuple[HeadStates, HeadStates]:
        """The first positions, and the others."""
        # split, not two slices: each slice's backward would allocate a padded tensor of full size.
        begin, rest = self.hidden.split([first, len(self) - first])
        return HeadStates(begin, self.logits_of, self.at_once), HeadStates(rest, self.logits_of, self.at_once)

    def detach(self) -> HeadStates:
        return HeadStates(self.hidden.detach(), self.logits_of, self.at_once)


def states_at(model: nn.Module, rows: Rows, where: Positions) -> HeadStates:
    """Runs the model up to its head.

    Args:
        model: any model; `logits_at` says what a classifier's positions are.
        rows: its inputs.
        where: the positions.

    Raises:
        LayerNotCalledError: the model gave its logits without its head.
    """
    head = output_head(model)
    if head is None or head._forward_hooks or not _runs_apart(model):
        return HeadStates.known(logits_at(model, rows, where))
    seen, returned = _up_to_head(model, head, rows)
    return HeadStates(where.take(seen), _Rest(model, head, rows, returned), _at_once(head))


def head_nll(states: HeadStates, targets: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Each task's mean negative log-likelihood: `[tasks]` float32, NaN where a task has no position.

    Args:
        states: at n positions.
        targets: `[n]` ids.
        task: `[n]`, the task of each position.
        tasks: their number.

    Example:
        >>> states = HeadStates(torch.zeros(3, 4), lambda hidden: hidden, at_once=2)
        >>> head_nll(states, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2).exp().round(decimals=3).tolist()
        [4.0, 4.0]
    """
    return _mean_by_task(states, lambda part, rows: token_nll(states.logits_of(part), targets[rows]), task, tasks)


def head_kl(base: HeadStates, edited: HeadStates, task: Tensor, tasks: int) -> Tensor:
    """Each task's mean KL(base ‖ edited): `[tasks]` float32; arguments as in `head_nll`. No gradient goes to `base`."""

    def value(part: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            before = base.logits_of(base.hidden[rows].detach())
        return token_kl(before, edited.logits_of(part))

    return _mean_by_task(edited, value, task, tasks)


@phase(LOGITS)
def _mean_by_task(states: HeadStates, value: Callable[[Tensor, slice], Tensor], task: Tensor, tasks: int) -> Tensor:
    # Multiplied by its share where the loss is made: the gradient is then rounded like that of the mean.
    share = mean_shares(task, tasks)
    weighted = _ByPosition.apply(states.hidden, lambda part, rows: value(part, rows) * share[rows], states.at_once)
    return sum_shares(weighted, task, tasks)


class _ByPosition(torch.autograd.Function):
    """Values of positions, whose gradients are made along with them. They have no second derivative."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: Callable[[Tensor, slice], Tensor], at_once: int) -> Tensor:
        values = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], at_once):
            rows = slice(start, start + at_once)
            part = hidden[rows].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                found = value(part, rows)
                total = found.sum()
            values[rows] = found.detach()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(total, part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None


@contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Losses inside are taken on all their logits at once, as those of a model that processes share are.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with whole_logits(model):
        ...     _runs_apart(model)
        False
        >>> _runs_apart(model)
        True
    """
    model.__dict__[_WHOLE] = True
    try:
        yield
    finally:
        del model.__dict__[_WHOLE]


class _HeadReached(Exception):
    """Ends a pass at the output head; never leaves this file."""


def _up_to_head(model: nn.Module, head: nn.Module, rows: Rows) -> tuple[Tensor, dict[nn.Module, Any]]:
    """What the head would read `[rows, length, width]`, and what each module beside the head's path returned before."""
    seen: list[Tensor] = []
    returned: dict[nn.Module, Any] = {}

    def stop(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _HeadReached

    handles = [head.register_forward_pre_hook(stop)]
    handles += [beside.register_forward_hook(_keeper(returned)) for beside in _beside(model, head)]
    try:
        model(**rows.inputs, **without_cache(model))
    except _HeadReached:
        return seen[0], returned
    finally:
        for handle in handles:
            handle.remove()
    raise LayerNotCalledError(
        f"{type(model).__name__} returned without a call of its output head ({type(head).__name__}, which "
        "get_output_embeddings names), so where its logits come from is not known."
    )


def _keeper(returned: dict[nn.Module, Any]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        returned[module] = output

    return keep


def _beside(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The children of the modules that hold the head, but those that hold it themselves: a model's backbone, mostly."""
    path, found = [model], []
    while path[-1] is not head:
        path.append(next(child for child in path[-1].children() if any(each is head for each in child.modules())))
    for parent in path[:-1]:
        found += [child for child in parent.children() if child not in path]
    return found


@dataclass(frozen=True)
class _Rest:
    """What a model does from its head on: scales, caps and biases behind it as well."""

    model: nn.Module
    head: nn.Module
    rows: Rows
    returned: dict[nn.Module, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        handle = self.head.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        try:
            with returning(self.returned):
                return self.model(**self.rows.inputs, **without_cache(self.model)).logits
        finally:
            handle.remove()


def _runs_apart(model: nn.Module) -> bool:
    """Not where processes share the model, which all must run equally often, nor where it is compiled as a whole."""
    whole = unwrapped(model) is not model or getattr(model, "_compiled_call_impl", None) is not None
    return not is_sharded(model) and not whole and _WHOLE not in model.__dict__


def _at_once(head: nn.Module) -> int:
    vocabulary = getattr(head, "out_features", None) or layer_weight(head).shape[0]
    return max(16, LOGITS_BYTES // (4 * vocabulary))


def _as_they_are(logits: Tensor) -> Tensor:
    return logits
