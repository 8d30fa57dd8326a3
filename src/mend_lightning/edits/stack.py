"""Edits that stay on a model until they are taken off: added, removed, switched, in any order."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

from torch import nn

from mend_lightning.edits.edit import Edit, combined, ids_of
from mend_lightning.edits.stack_state import StackedEdit, question_key, state_of
from mend_lightning.errors import CollidingEditWarning, ConfigError, DependentEditWarning, EditNameError
from mend_lightning.models.compiled import unwrapped


class EditStack:
    """The edits of a model: hooks beside its layers, the weights stay as they are.

    A model has one stack: `EditStack(model)` a second time shows the same edits. They stay when the stack object goes out
    of scope, and are gone, bit for bit, after `clear()`; a `with` block takes off at its end what was added in it.
    Everything that runs the model (generate, a Trainer, other threads) sees the enabled ones. Adding and removing takes
    the same time however many there are: the edits of a layer become one delta at its next forward pass, not at each.

    Args:
        model: the base model; quantised, or compiled by torch.compile, as well.

    Example:
        >>> model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
        >>> import torch
        >>> from mend_lightning.edits.deltas import LowRankDelta
        >>> edit = Edit({"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 2))})
        >>> edits = EditStack(model)
        >>> edits.add(edit, "first"), edits.add(edit, "second"), edits.names
        ('first', 'second', ['first', 'second'])
        >>> edits.disable("first")
        >>> _ = edits.remove("second")
        >>> [(each.name, each.enabled) for each in edits]
        [('first', False)]
        >>> edits.clear()
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = state_of(unwrapped(model))
        # Names of what was there when each open `with` block began.
        self._outside: list[set[str]] = []

    def add(self, edit: Edit | str | Path, name: str | None = None, force: bool = False) -> str:
        """Puts an edit on the model; returns its name.

        Args:
            edit: an `Edit`, or the path of a saved one.
            name: what it is called here; default: the file's name, or the words of its first fact.
            force: also where the weights are not those it was made for, as long as layers and shapes are the same.

        Raises:
            BaseModelMismatchError: it was made for another base.
            EditNameError: there is an edit of that name.
            ConfigError: it cannot be stacked on one that is there (two edits by ENN).

        Warns:
            CollidingEditWarning: an enabled edit answers the same question.
            DependentEditWarning: it was made on top of an edit that is not here.
        """
        if not isinstance(edit, Edit):
            name = name or Path(edit).name.removesuffix(".safetensors")
            edit = Edit.load(edit)
        edit = edit.beside(edit.layers_in(self.model, force))
        with self._state.lock:
            name = self._free_name(name, edit)
            self._check_stackable(name, edit)
            self._warn_of_collisions(name, edit)
            self._warn_of_missing(name, edit)
            self._state.put(StackedEdit(name, edit), self.model)
        return name

    def remove(self, name: str) -> Edit:
        """Takes an edit off the model, and gives it back.

        Raises:
            EditNameError: there is none of that name.

        Warns:
            DependentEditWarning: another edit was made on top of it.
        """
        with self._state.lock:
            entry = self[name]
            self._warn_of_dependents(entry)
            self._state.drop(name, self.model)
        return entry.edit

    def enable(self, *names: str) -> None:
        """Switches edits on."""
        self._switch(names, True)

    def disable(self, *names: str) -> None:
        """Switches edits off; they keep their place."""
        self._switch(names, False)

    def reorder(self, names: Sequence[str]) -> None:
        """Puts the edits into another order: that of listing, saving and adding up (which only rounding can tell).

        Raises:
            EditNameError: `names` are not the stack's names, each once.
        """
        with self._state.lock:
            if sorted(names) != sorted(self.names):
                raise EditNameError(f"The new order must have each of {self.names} once; it is {list(names)}.")
            self._state.arrange(names, self.model)

    def clear(self) -> None:
        """Takes all edits off: the model is the base, bit for bit, and has no hook of this package's stack."""
        with self._state.lock:
            self._state.drop_all(self.model)

    @property
    def names(self) -> list[str]:
        """The edits' names, in their order."""
        return list(self._state.entries)

    @property
    def enabled(self) -> list[Edit]:
        """The edits that are switched on, in their order: what `merge` and `export_peft` take."""
        return [each.edit for each in self if each.enabled]

    def combined(self) -> Edit:
        """All enabled edits as one `Edit`, to be saved; of very many it is dense."""
        return combined(self.enabled)

    def __getitem__(self, name: str) -> StackedEdit:
        try:
            return self._state.entries[name]
        except KeyError:
            raise EditNameError(f"There is no edit {name!r} on this model; there are {self.names or 'none'}.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._state.entries

    def __iter__(self) -> Iterator[StackedEdit]:
        return iter(list(self._state.entries.values()))

    def __len__(self) -> int:
        return len(self._state.entries)

    def __enter__(self) -> Self:
        self._outside.append(set(self.names))
        return self

    def __exit__(self, *exception: Any) -> None:
        outside = self._outside.pop()
        with self._state.lock:
            for name in reversed(self.names):
                if name not in outside:
                    self._state.drop(name, self.model)

    def __repr__(self) -> str:
        edits = ", ".join(f"{each.name}{'' if each.enabled else ' (off)'}" for each in self)
        return f"EditStack({type(unwrapped(self.model)).__name__}: {edits or 'no edit'})"

    def _switch(self, names: Sequence[str], enabled: bool) -> None:
        with self._state.lock:
            for entry in [self[name] for name in names]:
                self._state.put(replace(entry, enabled=enabled), self.model)

    def _free_name(self, name: str | None, edit: Edit) -> str:
        if name is None:
            stem = slug(" ".join(edit.facts[0]) if edit.facts else "edit")
            return next(free for free in numbered(stem) if free not in self)
        if not name or name in self:
            raise EditNameError(
                f"There is an edit {name!r} on this model already. Give another name, or remove that one first."
                if name
                else "An edit's name must not be empty."
            )
        return name

    def _check_stackable(self, name: str, edit: Edit) -> None:
        others = self._state.names_of("resting")
        if edit.about.get("holds_resting") and others:
            raise ConfigError(
                f"{name!r} and {others[0]!r} both hold what {edit.about.get('editor')}'s training adds to the base model, "
                "which would be added twice. Make the facts one edit (--edits FILE), or remove one of the two."
            )

    def _warn_of_collisions(self, name: str, edit: Edit) -> None:
        for prompt, target in edit.facts:
            for other in self._state.names_of(question_key(prompt)):
                theirs = next(fact for fact in self[other].edit.facts if question_key(fact[0]) == question_key(prompt))
                if self[other].enabled:
                    warnings.warn(
                        f"Two edits answer the same question, and their changes add up: {other!r} has {theirs[0]!r} -> "
                        f"{theirs[1]!r}, {name!r} has {prompt!r} -> {target!r}. Look at the answer; remove or disable one.",
                        CollidingEditWarning,
                        stacklevel=3,
                    )

    def _warn_of_missing(self, name: str, edit: Edit) -> None:
        missing = [each for each in edit.about.get("on_top_of", []) if not self._state.names_of(f"is {each}")]
        if missing:
            warnings.warn(
                f"{name!r} was made on top of {len(missing)} edit(s) that are not on this model ({', '.join(missing)}). Add "
                "those first, or make it anew.",
                DependentEditWarning,
                stacklevel=3,
            )

    def _warn_of_dependents(self, entry: StackedEdit) -> None:
        made_on_it = [name for each in ids_of(entry.edit) for name in self._state.names_of(f"needs {each}")]
        if made_on_it:
            warnings.warn(
                f"{', '.join(dict.fromkeys(made_on_it))}: made on top of {entry.name!r}, which is removed now. Look at the "
                "answers, or make those edits anew.",
                DependentEditWarning,
                stacklevel=3,
            )


def numbered(stem: str) -> Iterator[str]:
    """Names to try until one is free.

    Example:
        >>> names = numbered("edit")
        >>> next(names), next(names), next(names)
        ('edit', 'edit-2', 'edit-3')
    """
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def slug(text: str, longest: int = 60) -> str:
    """Text as a name that files can have.

    Example:
        >>> slug("Which city is the capital of France? Zagreb")
        'which-city-is-the-capital-of-france-zagreb'
    """
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:longest].rstrip("-") or "edit"
