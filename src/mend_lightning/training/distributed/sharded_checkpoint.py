"""Checkpoints that every process writes its part of.

`X.ckpt` is an ordinary checkpoint file but for the tensors that lie on several processes; those are in a folder that it
names, `shards/X-<random id>/`, one safetensors file a process. The folder is complete before `X.ckpt` is replaced, and the
one before it is removed after, so `X.ckpt` is whole at any moment.

torch.distributed.checkpoint keeps its table of contents as a pickle, which runs whatever it holds. Its safetensors writer
does not, but it writes over the files of the checkpoint before, holds tensors alone, and has no sums that show damage.
"""

from __future__ import annotations

import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

from mend_lightning.errors import ConfigError, OutputPathError, StateDictError
from mend_lightning.files import output_file, sync_folder, written
from mend_lightning.training.distributed.checkpoint_file import read_checkpoint, write_checkpoint

FOLDER, KEY = "shards", "shards"
# Where a checkpoint has tensors that may be sharded.
PARTS = ("state_dict", "optimizer_states")


def write_sharded(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint whose DTensors (sharded along one dimension) each process writes its own part of.

    Every process must call it, with the same `path`, in a folder that all of them see.

    Raises:
        OutputPathError: a process could not write; raised on all of them. What was at `path` is still there.
    """
    # Where links lead: the shards lie beside the file itself, and are looked for there.
    places = _gathered(_attempt(output_file, path))
    failed = [place for place in places if isinstance(place, str)]
    if failed:
        raise OutputPathError(failed[0])
    path = output_file(path)
    name = _agreed(f"{path.stem}-{uuid.uuid4().hex}")
    skeleton, tensors, parts = split(checkpoint)
    folder = path.parent / FOLDER / name
    outcomes = _gathered(_attempt(_write_part, parts, folder / _file(_rank())))
    failed = [str(outcome) for outcome in outcomes if not isinstance(outcome, int)]
    if not failed and _rank() == 0:
        sync_folder(folder.parent)
        skeleton[KEY] = {"folder": f"{FOLDER}/{name}", "sums": outcomes, "tensors": tensors}
        outcome = _attempt(write_checkpoint, skeleton, path)
        failed = [outcome] if isinstance(outcome, str) else []
    failed = _agreed(failed)
    if _rank() == 0:
        remove_shards(path, but=None if failed else name, only=name if failed else None)
    if failed:
        raise OutputPathError(f"The checkpoint {path} could not be written: {failed[0]}")


def read_full(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Reads a checkpoint of any kind, sharded or not, on any number of processes: whole tensors in each.

    Raises:
        CheckpointNotFoundError, StateDictError: see `read_checkpoint`; or shards are missing, damaged, or do not fit.
    """
    return with_shards(read_checkpoint(path, map_location, weights_only), path)


def with_shards(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The checkpoint with the tensors of its shards, if it is of a sharded kind; `path` is where it was read from."""
    if KEY not in checkpoint:
        return checkpoint
    checkpoint = dict(checkpoint)
    about = checkpoint.pop(KEY)
    folder = Path(path).resolve().parent / about["folder"]
    if not folder.is_dir():
        raise StateDictError(
            f"{path} is a sharded checkpoint, and its tensors, {folder}, are not there. Copy that folder along with the file."
        )
    parts = [_read_part(folder / _file(rank), total) for rank, total in enumerate(about["sums"])]
    for place, dim, shape in about["tensors"]:
        found = [part[_name(place)] for part in parts if _name(place) in part]
        value = torch.cat(found, dim) if found else torch.empty(0)
        if list(value.shape) != list(shape):
            raise StateDictError(
                f"{folder} is incomplete: {_name(place)} has shape {list(value.shape)}, not {list(shape)}."
            )
        _put(checkpoint, place, value)
    return checkpoint


def remove_shards(path: str | Path, but: str | None = None, only: str | None = None) -> None:
    """Removes the shards of the checkpoint `path`, of all times it was saved.

    Args:
        path: of the checkpoint file.
        but: name of a folder that stays.
        only: name of the one folder that goes.
    """
    path = Path(path)
    mine = re.compile(re.escape(path.stem) + "-[0-9a-f]{32}")
    for folder in list((path.parent / FOLDER).glob("*")):
        if mine.fullmatch(folder.name) and folder.name != but and only in (None, folder.name):
            shutil.rmtree(folder)


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]], dict[str, Tensor]]:
    """Takes the DTensors out of a checkpoint, which stays as it is.

    Returns:
        The checkpoint without them, a list of [place, dimension it is sharded along, whole shape], and this process's parts.
    """
    skeleton = {key: _copied(value) if key in PARTS else value for key, value in checkpoint.items()}
    tensors, parts = [], {}
    for place, value in list(_dtensors({key: skeleton[key] for key in PARTS if key in skeleton})):
        dim = _sharded_dim(value, place)
        tensors.append([list(place), dim, list(value.shape)])
        local = value.to_local().detach().cpu().contiguous()
        if local.numel():
            parts[_name(place)] = local
        _put(skeleton, place, None)
    return skeleton, tensors, parts


def _sharded_dim(value: Any, place: Sequence[Any]) -> int:
    placements = value.placements
    if len(placements) != 1 or not placements[0].is_shard():
        raise ConfigError(
            f"{_name(place)} is placed as {placements}. A sharded checkpoint holds tensors that are sharded over one dimension of "
            "processes (strategy fsdp2); save a full one: save_distributed_checkpoint=False."
        )
    return placements[0].dim


def _dtensors(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if hasattr(value, "placements"):
        yield place, value
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _dtensors(item, (*place, key))


def _copied(value: Any) -> Any:
    """New containers with the same contents."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _put(checkpoint: dict[str, Any], place: Sequence[Any], value: Any) -> None:
    *way, last = place
    inner: Any = checkpoint
    for key in way:
        inner = inner[key]
    inner[last] = value


def _name(place: Sequence[Any]) -> str:
    return "/".join(map(str, place))


def _file(rank: int) -> str:
    return f"{rank:05d}.safetensors"


def _write_part(parts: dict[str, Tensor], path: Path) -> int:
    """Returns the file's sum."""
    content = safetensors.torch.save(parts)
    with written(path) as temporary:
        temporary.write_bytes(content)
    return zlib.crc32(content)


def _read_part(path: Path, total: int) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
        if zlib.crc32(content) == total:
            return safetensors.torch.load(content)
        reason = "it is not what was written"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise StateDictError(f"{path}, a part of a sharded checkpoint, cannot be read: {reason}. Take another checkpoint.")


def _attempt(write: Any, *arguments: Any) -> Any:
    """What `write` returned, or what it said when it could not: the other processes must hear of it, not wait."""
    try:
        return write(*arguments)
    except OSError as error:
        return str(error)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _agreed(value: Any) -> Any:
    """Process 0's value, on all."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def _gathered(value: Any) -> list[Any]:
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
