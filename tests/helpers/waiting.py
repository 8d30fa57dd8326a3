"""Finds what makes the host wait for the device, where the CPU stands for both."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result, or its size, is known on the host only when the device has come that far.
ASKING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "argwhere", "linalg_cholesky", "linalg_inv", "histc",
}  # fmt: skip
# Reads memory without an operator of torch's.
READING = ("tolist", "numpy", "cpu", "__array__", "item")


class Waiting(TorchDispatchMode):
    """Lists operators that synchronize host and device.

    Tensors on the device are those given, and what is computed of any of them; others are the host's, which may be asked.

    Args:
        on_device: tensors to begin with.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        # The storages are kept alive, so that no other gets the address of one that is gone.
        self._storages = {}
        for tensor in on_device:
            self.put_on_device(tensor)

    def put_on_device(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage

    def is_on_device(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self.is_on_device(tensor) for tensor in given) and _asks(name, function._overloadname, args, kwargs):
            self.note(name)
        result = function(*args, **kwargs)
        if any(self.is_on_device(tensor) for tensor in given):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.put_on_device(leaf)
        if name == "lift_fresh" and _frames()[-1:] and _frames()[-1].startswith("mend_lightning/"):
            # Numbers of the host, which are sent to the device by a copy that is waited for.
            self.note("torch.tensor")
        return result

    def note(self, what: str) -> None:
        self.found.append(f"{what} in {' > '.join(_frames()[-3:])}")

    @contextmanager
    def watching(self, monkeypatch) -> Iterator[None]:
        """Watches the block, and what reads tensors past torch's operators as well."""
        with monkeypatch.context() as patch, self:
            for name in READING:
                patch.setattr(Tensor, name, self._reporting(name, getattr(Tensor, name)))
            yield

    def _reporting(self, name: str, read):
        def report(tensor: Tensor, *args, **kwargs):
            if self.is_on_device(tensor):
                self.note(name)
            return read(tensor, *args, **kwargs)

        return report


def _asks(name: str, overload: str, args: tuple, kwargs: dict) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        # With a number it is an expansion; with numbers for each, their sum is asked for.
        return overload in ("Tensor", "self_Tensor") and kwargs.get("output_size") is None
    return name in ASKING


def _frames() -> list[str]:
    """Where in the package, or in transformers, we are; the innermost last."""
    found = []
    for frame in traceback.extract_stack():
        for package in ("mend_lightning/", "transformers/"):
            if package in frame.filename:
                found.append(f"{package}{frame.filename.rsplit(package, 1)[1]}:{frame.lineno} {frame.line}")
    return found
