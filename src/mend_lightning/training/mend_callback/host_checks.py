"""What is checked of a host before its training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError

# By class name: some of them cannot be imported everywhere.
_WAYS_OUT = {
    "DeepSpeedStrategy": "strategy='ddp' where the model fits on each device, else 'fsdp2' (ModelParallelStrategy)",
    "FSDPStrategy": "ModelParallelStrategy (FSDP2), which shards the same model, or strategy='ddp' where it fits on each device",
    "XLAStrategy": "strategy='ddp' on GPUs or CPUs",
    "SingleDeviceXLAStrategy": "a GPU or the CPU",
}


def check_host_strategy(strategy: Any) -> None:
    """Raises ConfigError where the Trainer's strategy leaves no model that an editor could run by itself."""
    for kind in type(strategy).__mro__:
        if kind.__name__ in _WAYS_OUT:
            raise ConfigError(
                f"MendCallback cannot work under {type(strategy).__name__}: the model's weights are not where its layers run, "
                f"or its modules cannot run outside of the training step. Use {_WAYS_OUT[kind.__name__]}."
            )
    method = getattr(strategy, "_start_method", None)
    if method in ("spawn", "fork", "forkserver"):
        raise ConfigError(
            f"MendCallback cannot work under a strategy that starts its processes by {method}: the editor would be lost with "
            "them when training ends. Use strategy='ddp', which starts the script once a process."
        )


def check_sharded(editor: Editor) -> None:
    """Raises ConfigError where this editor cannot work on a model that is sharded over processes."""
    if editor.shard_units() is None:
        raise ConfigError(
            f"{type(editor).__name__} cannot work on a sharded model: it reads weights outside of their modules' forward, or "
            "decides from the data how often the model runs. Use MendEditor (leave out `algorithm`), or strategy='ddp'."
        )


def check_prefixes(prefixes: Sequence[str]) -> None:
    """Raises ConfigError where two callbacks of one Trainer log under one prefix."""
    twice = [prefix for prefix in prefixes if prefixes.count(prefix) > 1]
    if twice:
        raise ConfigError(
            f"Two MendCallbacks log under the prefix {twice[0]!r}. Give each its own: MendCallback(..., prefix='...')."
        )


def check_budget(budget: float | None) -> None:
    """Raises ConfigError where a share of time is no number between 0 and 1."""
    if budget is not None and not 0 < budget < 1:
        raise ConfigError(f"time_budget is a share of the wall time, such as 0.1 for a tenth, not {budget}.")


@torch.no_grad()
def check_forward_pass(model: nn.Module, inputs: Mapping[str, Tensor], path: str) -> None:
    """Runs the model on `inputs` of an edit, and raises ConfigError where it cannot or returns no logits for them."""
    name = type(model).__name__
    try:
        output = model(**inputs)
    except Exception as error:
        raise ConfigError(
            f"model={path!r}: the forward of {name} does not take a batch of edits with {', '.join(inputs)}: "
            f"{type(error).__name__}: {error}. Give the path of a Hugging Face model that does; of a model that reads more than "
            "text, the path of its language model."
        ) from error
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[0] != len(inputs["input_ids"]):
        raise ConfigError(
            f"model={path!r}: the forward of {name} returns no logits ({type(output).__name__}), so there is no answer to edit. "
            "Give the path of a model with its output head, such as ...ForCausalLM or ...ForConditionalGeneration."
        )
