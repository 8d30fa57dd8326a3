"""Runs a base model and returns logits only where a loss looks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.errors import EmptyEditError
from mend_lightning.models.forward.phases import LOGITS, phase
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes a language model's logits; None for a classifier."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The layer that embeds a language model's tokens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> input_embeddings(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32))).embedding_dim
        8
    """
    embedding: Any = model
    return embedding.get_input_embeddings()


def label_mask(rows: Rows) -> Tensor:
    """Positions with a label: `[rows, length]` bool."""
    return rows.labels != IGNORED_LABEL


def row_of(mask: Tensor) -> Tensor:
    """The row of every position that `mask` `[rows, length]` picks, in the order of `x[mask]`: `[n]` int64.

    Example:
        >>> row_of(torch.tensor([[True, False], [True, True]])).tolist()
        [0, 1, 1]
    """
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]


def attended_mask(rows: Rows) -> Tensor:
    """Real (not padding) positions of the sequence that the logits belong to: `[rows, length]` bool; see `Rows`."""
    return rows.attended_mask


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that has a model keep no keys and values, which after a single pass nobody reads; empty if it keeps none.

    Example:
        >>> without_cache(nn.Linear(1, 1))
        {}
    """
    return {"use_cache": False} if _may_cache(type(model).forward) else {}


@cache
def _may_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def run_model(model: nn.Module, rows: Rows) -> Tensor:
    """The model's logits for `rows`, as it returns them."""
    output = model(**rows.inputs, **without_cache(model))
    return output if isinstance(output, Tensor) else output.logits


def logits_at(model: nn.Module, rows: Rows, mask: Tensor | Positions) -> Tensor:
    """Logits at the positions of `mask` (`[rows, length]` bool, or `Positions`): `[n, vocabulary]`, row by row.

    The hidden states are gathered before the output head, so a large vocabulary costs only the
    positions that matter. Everything the model does after its head (scale, soft cap, bias) works on
    `[n, vocabulary]` as well. Classifiers have one position a row.
    """
    head, where = output_head(model), mask if isinstance(mask, Positions) else Positions.of(mask)
    if head is None:
        return run_model(model, rows).index_select(0, where.row)
    if head._forward_hooks:
        # The head itself is edited: capture and delta tell the tasks apart by row, so it must see whole rows.
        return where.take(run_model(model, rows))
    with _only_positions(head, where):
        return run_model(model, rows)


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """`generate` while the block runs: the output head gets the prompts' last states in a tensor of their own.

    As the slice `[:, -1:]` that transformers gives it, torch multiplies each row by a copy of the whole head: 32 rows on
    SmolLM2 took 32 times the head's memory, and most of the time of a short answer.
    """
    head = output_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]) if args else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _only_positions(head: nn.Module, where: Positions) -> Iterator[None]:
    with ExitStack() as stack:

        def gather(module: nn.Module, args: tuple) -> tuple:
            gathered = where.take(args[0])
            stack.enter_context(phase(LOGITS))
            return gathered, *args[1:]

        stack.callback(head.register_forward_pre_hook(gather).remove)
        yield


def labelled(rows: Rows, name: str) -> tuple[Positions, Tensor, Tensor]:
    """Label positions, targets and tasks of `rows`.

    Returns:
        positions of n labels, targets `[n]`, task of each target `[n]`.

    Raises:
        EmptyEditError: a task has no label at all.
    """
    if rows.unlabelled_task is not None:
        raise EmptyEditError(
            f"{name} of task {rows.unlabelled_task} has no label token: every label is "
            f"{IGNORED_LABEL}. The target was empty, or was cut off by the length limit."
        )
    where = rows.label_positions
    return where, where.take(rows.labels), rows.task.index_select(0, where.row)
