"""Edits: low-rank changes of weights that are applied, stacked, saved and undone."""
