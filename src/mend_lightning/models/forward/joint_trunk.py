"""One trunk pass over several sets of rows, and what each set has of it."""

from __future__ import annotations

from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.rows import Rows


def own_part(rows: Rows, trunk: TrunkOutputs, part: Rows, first: int) -> tuple[Rows, TrunkOutputs]:
    """A set of rows as it was before it was padded to stand among others, with the trunk's outputs for it alone.

    Args:
        rows: several sets (`concatenate_rows`).
        trunk: the trunk's outputs for them.
        part: one of the sets.
        first: where it begins in `rows`.

    Returns:
        The set, and the trunk's outputs. Where a length of `rows` cannot be told from another (an encoder's and a decoder's,
        say), the set is as long as all rows are.

    Example:
        >>> import torch
        >>> ids = torch.ones(2, 5, dtype=torch.long)
        >>> rows = Rows({"input_ids": ids}, ids, torch.tensor([0, 0]), 1)
        >>> short = Rows({"input_ids": ids[:1, :3]}, ids[:1, :3], torch.tensor([0]), 1)
        >>> part, trunk = own_part(rows, TrunkOutputs(2), short, 1)
        >>> part is short, trunk.rows
        (True, 1)
    """
    places = slice(first, first + len(part))
    widths = _widths(rows, part)
    if widths is None:
        part = part.padded_as(rows, places)
    return part, trunk.part(places, widths or {})


def _widths(rows: Rows, part: Rows) -> dict[int, int] | None:
    """A length of `rows` -> that of `part`; None where one length stands for two: input and output of equal length."""
    pairs = {(rows.inputs[name].shape[1], tensor.shape[1]) for name, tensor in part.inputs.items()}
    widths = dict(pairs)
    return widths if len(widths) == len(pairs) else None
