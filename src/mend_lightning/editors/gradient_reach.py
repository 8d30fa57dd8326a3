"""How far the gradient of a loss at a row's labels reaches in each layer, found out by a look at the model.

Factors are made of tokens that have a gradient. Which these are the device knows, and asking it means waiting for it. What
they are *at most* follows from how the model mixes tokens: behind its last attention a label's gradient stays at the label, in
a causal model it stays at or before it, and everywhere it stays off the padding. Two tiny rows tell: each has one label in
its middle, and padding behind.

* Row 0 has an ordinary gradient: tokens before the label have one, those behind it have none, or padding has none.
* Row 1 has the gradient NaN at its label. `0 * NaN` is NaN, so whatever the weights are, all tokens that the label can depend
  on have a gradient of NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mend_lightning.editors.capture import record_factors
from mend_lightning.models.compiled import unwrapped
from mend_lightning.models.forward.logits import logits_at
from mend_lightning.models.inputs.positions import Reach
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows

# Of the tiny rows: tokens, how many of them are no padding, and the label's place. All differ between input and decoder.
INPUT, DECODER = (8, 6, 3), (6, 5, 2)

_FOUND: WeakKeyDictionary[nn.Module, dict[str, Reach | None]] = WeakKeyDictionary()


def gradient_reach(model: nn.Module, layers: Mapping[str, nn.Module], rows: Rows) -> dict[str, Reach | None]:
    """Name of each layer -> how far a gradient reaches in it; None where that is not known. Runs the model once.

    Args:
        model: the base model.
        layers: name -> module.
        rows: what the model is given; that decides nothing but the tiny rows' ids.
    """
    model = unwrapped(model)
    if not _usual(rows):
        return dict.fromkeys(layers)
    known = _FOUND.setdefault(model, {})
    new = {name: layer for name, layer in layers.items() if name not in known}
    if new:
        known.update(_found(model, new, rows))
    return {name: known[name] for name in layers}


def remember_reach(model: nn.Module, found: Mapping[str, Reach]) -> None:
    """Notes how far gradients reach in layers of a model that has no numbers: a look at it would tell nothing."""
    _FOUND.setdefault(unwrapped(model), {}).update(found)


def _usual(rows: Rows) -> bool:
    """Whether rows are as `data.encode` makes them: labels by position, or one a row without a decoder."""
    names = set(rows.inputs)
    if "input_ids" not in names or names - {"input_ids", "attention_mask"} - _DECODER_NAMES:
        return False
    of_labels = rows.inputs.get("decoder_input_ids", rows.inputs["input_ids"])
    return rows.labels.shape == of_labels.shape or (rows.labels.shape[1] == 1 and not names & _DECODER_NAMES)


_DECODER_NAMES = {"decoder_input_ids", "decoder_attention_mask"}


@dataclass(frozen=True)
class _Line:
    """One sequence of the tiny rows; see `INPUT`."""

    length: int
    attended: int
    label: int

    def of(self, ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
        """Ids and mask `[2, length]`, of the first row's ids, repeated where it is short."""
        line = ids[0].repeat(self.length)[: self.length].repeat(2, 1)
        mask = (torch.arange(self.length, device=ids.device) < self.attended).long().expand_as(line)
        return torch.where(mask.bool(), line, pad_id), mask


def _tiny_rows(rows: Rows) -> tuple[Rows, int]:
    """Two rows with one label each, and its position."""
    inputs, pad_id = {}, rows.pad_id
    inputs["input_ids"], inputs["attention_mask"] = _Line(*INPUT).of(rows.inputs["input_ids"], pad_id)
    line, classifier = _Line(*INPUT), rows.labels.shape[1] == 1 and rows.labels.shape != rows.inputs["input_ids"].shape
    if "decoder_input_ids" in rows.inputs:
        line = _Line(*DECODER)
        ids, mask = line.of(rows.inputs["decoder_input_ids"], pad_id)
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = ids, mask
    label = 0 if classifier else line.label
    labels = torch.full((2, 1 if classifier else line.length), IGNORED_LABEL, device=rows.labels.device)
    labels[:, label] = 1
    return Rows(inputs, labels, torch.arange(2, device=labels.device), 2, pad_id=pad_id), label


def _found(model: nn.Module, layers: Mapping[str, nn.Module], rows: Rows) -> dict[str, Reach | None]:
    tiny, label = _tiny_rows(rows)
    # Anomaly detection, where it is on, would take row 1 for a mistake.
    with torch.autograd.set_detect_anomaly(False), record_factors(layers) as tape:
        plain, tainted = logits_at(model, tiny, tiny.label_positions).float().unbind(0)
        raw = tape.gradients(plain.sum() + tainted.sum() * torch.nan)
    # NaN is not 0 either.
    touched = {name: (delta.reshape(2, -1, delta.shape[-1]) != 0).any(-1).tolist() for name, (_, delta) in raw.items()}
    return {
        name: _reach(_places(row_0), _places(row_1), len(row_0), tiny, label)
        for name, (row_0, row_1) in touched.items()
    }


def _places(flags: Iterable[bool]) -> set[int]:
    return {place for place, flag in enumerate(flags) if flag}


def _reach(plain: set[int], tainted: set[int], length: int, tiny: Rows, label: int) -> Reach | None:
    """What the tokens with an ordinary gradient, and those with NaN, say of a layer that saw `length` tokens."""
    by_position = tiny.labels.shape[1] == length
    if tainted == {label}:
        return "labels" if by_position else "first" if tiny.labels.shape[1] == 1 else None
    # One token with a gradient says nothing of those without: it must have reached others.
    if by_position and plain - {label} and max(plain) <= label:
        return "until"
    if length == INPUT[0] and len(plain) > 1 and max(plain) < INPUT[1]:
        return "inputs"
    return None
