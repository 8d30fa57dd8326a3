"""Warnings as messages for a person."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mend_lightning import errors

_OWN_WARNINGS = tuple(
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, Warning) and each.__module__ == errors.__name__
)


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """A list that holds this package's warnings when the block has ended; others are shown as ever.

    Python keeps its filters for the whole process, so blocks must not run at the same time: the session's lock sees to it.

    Example:
        >>> with captured_warnings() as messages:
        ...     warnings.warn("It did nothing.", errors.NoEffectWarning)
        >>> messages
        ['It did nothing.']
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        # Appended: filters that make errors of other warnings stay in force.
        for category in _OWN_WARNINGS:
            warnings.simplefilter("always", category)
        yield messages
    for warning in caught:
        if issubclass(warning.category, _OWN_WARNINGS):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
