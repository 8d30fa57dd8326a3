"""MEND as the paper writes it, slowly: one task, one row, one token at a time, dense weights, float64.

Nothing of the package is used here but the names and shapes of an editor's parameters. A layer's ΔW is added to
its weight by `torch.func.functional_call`; rows are cut to their real length, so no padding exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

EPSILON = 1e-7


class Welford:
    """Running mean and variance, a row at a time (Welford, 1962)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.m2 = torch.zeros(width, dtype=torch.float64)

    def add(self, row: Tensor) -> None:
        self.count += 1
        before = row - self.mean
        self.mean = self.mean + before / self.count
        self.m2 = self.m2 + before * (row - self.mean)

    def std(self) -> Tensor:
        return (self.m2 / max(self.count - 1, 1)).sqrt()

    def normalize(self, row: Tensor) -> Tensor:
        if self.count < 2:
            return row
        std = self.std()
        # A unit that never varied is centred and not divided by almost nothing.
        return (row - self.mean) / torch.where(std == 0, torch.ones_like(std), std + EPSILON)


@dataclass(frozen=True)
class Row:
    """One row without padding: model inputs `[1, length]`, and (position, target) of every label."""

    inputs: dict[str, Tensor]
    labels: list[tuple[int, int]]


def rows_of_task(rows, task: int) -> list[Row]:
    """The rows of one task, each cut to its real length."""
    found = []
    for index in range(len(rows.task)):
        if int(rows.task[index]) == task:
            inputs = {}
            for name in ("input_ids", "decoder_input_ids"):
                if name in rows.inputs:
                    mask = rows.inputs[name.replace("input_ids", "attention_mask")][index].bool()
                    inputs[name] = rows.inputs[name][index][mask][None]
            labels = [(t, int(label)) for t, label in enumerate(rows.labels[index]) if label != -100]
            found.append(Row(inputs, labels))
    return found


def log_probabilities(model: nn.Module, row: Row, weights: dict[str, Tensor] | None = None) -> Tensor:
    """`[positions, ids]`; a classifier of one logit has one position and the ids 0 and 1."""
    # tie_weights: an edit of an output head is no edit of the embedding that shares its weight.
    output = functional_call(model, weights or {}, args=(), kwargs=row.inputs, tie_weights=False)
    logits = output.logits[0].double()
    if logits.shape[-1] == 1:
        return torch.stack([nn.functional.logsigmoid(-logits), nn.functional.logsigmoid(logits)], -1)
    return nn.functional.log_softmax(logits, -1)


def nll(model: nn.Module, rows: list[Row], weights: dict[str, Tensor] | None = None) -> Tensor:
    """Mean over the label tokens of all rows."""
    losses = []
    for row in rows:
        log_p = log_probabilities(model, row, weights)
        losses += [-log_p[position, target] for position, target in row.labels]
    return torch.stack(losses).mean()


def kl(
    model: nn.Module,
    rows: list[Row],
    weights: dict[str, Tensor],
    positions: str,
    before: dict[str, Tensor] | None = None,
) -> Tensor:
    """KL(base ‖ edited): mean over all positions of all rows, or over those of the labels.

    Args:
        before: weights of the base by name, where they are not the model's own.
    """
    values = []
    for row in rows:
        base, edited = log_probabilities(model, row, before), log_probabilities(model, row, weights)
        per_position = (base.exp() * (base - edited)).sum(-1)
        chosen = range(len(per_position)) if positions == "all" else [position for position, _ in row.labels]
        values += [per_position[position] for position in chosen]
    return torch.stack(values).mean()


def tokens_of(model: nn.Module, names: list[str], loss_of) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """The loss, and per layer (u, δ) of every token where neither is all zero."""
    modules, calls, handles = dict(model.named_modules()), {name: [] for name in names}, []
    for name in names:

        def keep(module, args, output, name=name):
            output = output if output.requires_grad else output.requires_grad_()
            output.retain_grad()
            calls[name].append((args[0].detach(), output))

        handles.append(modules[name].register_forward_hook(keep))
    loss = loss_of()
    loss.backward()
    for handle in handles:
        handle.remove()
    tokens = {}
    for name in names:
        pairs = [(u, y.grad) for u, y in calls[name]]
        each = [(u.double(), d.double()) for us, ds in pairs for u, d in zip(us.flatten(0, -2), ds.flatten(0, -2))]
        tokens[name] = [(u, delta) for u, delta in each if u.any() and delta.any()]
    return loss.detach(), tokens


@dataclass
class Result:
    edit: list[Tensor] = field(default_factory=list)
    locality: list[Tensor] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def total(self, c_edit: float) -> Tensor:
        return sum(c_edit * edit + locality for edit, locality in zip(self.edit, self.locality)) / len(self.edit)


class ReferenceMend:
    """The paper's editor, with a float64 copy of another editor's parameters (by their names)."""

    def __init__(self, editor: nn.Module) -> None:
        self.shapes, self.settings = dict(editor.layers), dict(editor.settings)
        self.names = list(self.shapes)
        self.parameters = {name: value.detach().double().requires_grad_() for name, value in editor.named_parameters()}
        keys = [self.shapes[name] if self.settings["shared"] else name for name in self.names]
        order = list(dict.fromkeys(keys))
        self.transform = {name: order.index(key) for name, key in zip(self.names, keys)}
        self.mode = {name: keys[:i].count(keys[i]) for i, name in enumerate(self.names)}
        self.u_stats = [Welford(self._first(i)[0]) for i in range(len(order))]
        self.delta_stats = [Welford(self._first(i)[1]) for i in range(len(order))]

    def _first(self, transform: int) -> tuple[int, int]:
        return next(self.shapes[name] for name in self.names if self.transform[name] == transform)

    def step(self, model: nn.Module, batch, training: bool, positions: str = "all") -> Result:
        """One meta-learning step, a task at a time."""
        result, tasks, seen = Result(), range(batch.z_edit.tasks), []
        for task in tasks:
            edit = rows_of_task(batch.z_edit, task)
            loss, tokens = tokens_of(model, self.names, lambda edit=edit: nll(model, edit))
            result.inner.append(loss)
            seen.append(tokens)
        prepared = self._normalized(seen, training)
        result.tokens = sum(len(each[name]) for each in seen for name in self.names)
        for task in tasks:
            weights = self._weights(model, prepared[task])
            result.edit.append(nll(model, rows_of_task(batch.x_in, task), weights))
            result.locality.append(kl(model, rows_of_task(batch.x_out, task), weights, positions))
        return result

    def _normalized(self, seen, training: bool):
        """Layer after layer: the statistics take in the tokens of all tasks, then these are normalised."""
        prepared = [dict() for _ in seen]
        for name in self.names:
            u_stats, delta_stats = self.u_stats[self.transform[name]], self.delta_stats[self.transform[name]]
            for tokens in seen:
                for u, delta in tokens[name] if training else []:
                    u_stats.add(u)
                    delta_stats.add(delta)
            for task, tokens in enumerate(seen):
                pairs = tokens[name]
                if self.settings["normalize"]:
                    pairs = [(u_stats.normalize(u), delta_stats.normalize(delta)) for u, delta in pairs]
                prepared[task][name] = pairs
        return prepared

    def _weights(self, model: nn.Module, tokens) -> dict[str, Tensor]:
        """W̃ = W − α Σ δ̃ ũᵀ of every layer, by the name of its weight."""
        modules, weights = dict(model.named_modules()), {}
        for index, name in enumerate(self.names):
            d_in, d_out = self.shapes[name]
            update = torch.zeros(d_out, d_in, dtype=torch.float64)
            for u, delta in tokens[name]:
                u, delta = self.edit_factors(name, u, delta)
                update = update + torch.outer(delta, u)
            update = -self.parameters["edit_rates"][index] * update
            if type(modules[name]).__name__ == "Conv1D":  # y = x W
                update = update.T
            weight = modules[name].weight
            weights[f"{name}.weight"] = weight + update.to(weight.dtype)
        return weights

    def edit_factors(self, name: str, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(ũ, δ̃) of one token."""
        d_in, d_out = self.shapes[name]
        inputs = self.settings["inputs"]
        if inputs == "combined":
            both = self._network(name, "combined", torch.cat([u, delta]))
            return both[:d_in], both[d_in:]
        if inputs == "smaller":
            inputs = "delta" if d_in > d_out else "u"
        if inputs in ("separate", "u"):
            u = self._network(name, "u", u)
        if inputs in ("separate", "delta"):
            delta = self._network(name, "delta", delta)
        return u, delta

    def _network(self, name: str, net: str, h: Tensor) -> Tensor:
        for layer in range(self.settings["n_hidden"] + 1):
            start = f"transforms.{self.transform[name]}.nets.{net}.layers.{layer}."
            p = {key[len(start) :]: value for key, value in self.parameters.items() if key.startswith(start)}
            z = p["u"] @ (p["v"] @ h) + p["bias"]
            if self.settings["shared"]:
                z = p["scale"][self.mode[name]] * z + p["shift"][self.mode[name]]
            # Its gradient at exactly 0 is 1, where the identity start is.
            z = torch.where(z >= 0, z, torch.zeros_like(z))
            h = z if self.settings["init"] == "xavier" else h + z
        return h
