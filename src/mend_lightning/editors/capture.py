"""Records a layer's inputs and the loss gradient at its output, without touching a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mend_lightning.errors import InferenceModeError, LayerNotCalledError, MendError


class Tape:
    """What `record_factors` saw: per layer, its inputs and the gradient edges of its outputs."""

    def __init__(self, names: list[str], keep_graph: bool = False) -> None:
        self._keep_graph = keep_graph
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in names}
        self._edges: dict[str, list[GradientEdge]] = {name: [] for name in names}
        # The gradients of outputs that the loss does not depend on; expanded, they take no memory.
        self._zeros: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Notes one call of a layer; returns what must replace its output."""
        self._inputs[name].append((x if self._keep_graph else x.detach(), x._version))
        if not output.requires_grad:
            # The graph starts here.
            output = output.detach().requires_grad_()
        # A clone: the model may change neither a leaf in place, nor a view without giving it another history
        # (and a linear layer returns a view). For the same reason the edge is kept and not the tensor.
        output = output.clone()
        self._edges[name].append(get_gradient_edge(output))
        self._zeros[name].append(output.detach().new_zeros(()).expand(output.shape))
        return output

    @property
    def float16(self) -> bool:
        """Whether a layer gave out float16, in which gradients below 6e-8 are 0."""
        return any(zero.dtype == torch.float16 for zeros in self._zeros.values() for zero in zeros)

    def gradients(self, loss: Tensor, scale: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
        """Raw factors of every layer.

        Args:
            loss: scalar; for several tasks the *sum* of the tasks' losses, which do not interact.
            scale: a power of two that the loss is multiplied by on the way; delta is divided by it, in float32.

        Returns:
            name -> `(u [rows, tokens, d_in], delta [rows, tokens, d_out])` in the model's dtype (a scaled delta in float32).
            A layer called several times has its calls side by side along `tokens`.

        Raises:
            LayerNotCalledError: a layer did not run.
        """
        missing = [name for name, edges in self._edges.items() if not edges]
        if missing:
            raise LayerNotCalledError(
                f"These layers did not run in the forward pass: {', '.join(missing)}. Choose layers that "
                "the model uses for this input (`mend-lightning layers MODEL` lists the usual ones)."
            )
        edges = [edge for edges in self._edges.values() for edge in edges]
        zeros = [zero for each in self._zeros.values() for zero in each]
        # materialize_grads does not work with edges.
        loss = loss if scale == 1 else loss * scale
        found = torch.autograd.grad(loss, edges, allow_unused=True, create_graph=self._keep_graph)
        deltas = [zero if delta is None else delta for zero, delta in zip(zeros, found)]
        of_calls = iter(deltas if scale == 1 else [delta.float() / scale for delta in deltas])
        return {name: self._join(name, [next(of_calls) for _ in edges]) for name, edges in self._edges.items()}

    def _join(self, name: str, deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
        inputs = []
        for x, version in self._inputs[name]:
            if x._version != version:
                raise MendError(f"The input of layer {name!r} was changed in place after the layer used it.")
            inputs.append(x)
        return _side_by_side(inputs), _side_by_side(deltas)


def _side_by_side(calls: list[Tensor]) -> Tensor:
    if len(calls) == 1:
        return calls[0]
    # Of flat inputs `[rows, d]` the calls must not be stacked along the rows: a row belongs to one task.
    return torch.cat([call.unsqueeze(1) if call.dim() == 2 else call for call in calls], dim=-2)


@contextmanager
def record_factors(layers: Mapping[str, nn.Module], keep_graph: bool = False) -> Iterator[Tape]:
    """Records the given layers while the block runs.

    Args:
        layers: name -> module; any module that maps `[..., d_in]` to `[..., d_out]`.
        keep_graph: u and delta stay functions of what the forward pass depends on, so that gradients flow through them.

    Yields:
        A `Tape`; call `tape.gradients(loss)` after the forward pass.

    Example:
        >>> layer = nn.Linear(2, 3).requires_grad_(False)
        >>> x = torch.ones(1, 1, 2)
        >>> with record_factors({"fc": layer}) as tape:
        ...     loss = layer(x).sum()
        >>> u, delta = tape.gradients(loss)["fc"]
        >>> u.tolist(), delta.tolist()
        ([[[1.0, 1.0]]], [[[1.0, 1.0, 1.0]]])
    """
    if torch.is_inference_mode_enabled():
        raise InferenceModeError(
            "Gradient factors cannot be recorded inside torch.inference_mode(). Use "
            "Trainer(inference_mode=False), or torch.no_grad() instead of inference_mode()."
        )
    tape = Tape(list(layers), keep_graph)
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(_recorder(tape, name)))
        with torch.enable_grad():
            yield tape
    finally:
        for handle in handles:
            handle.remove()


def _recorder(tape: Tape, name: str) -> Callable[..., Tensor]:
    return lambda module, args, output: tape.record(name, args[0], output)
