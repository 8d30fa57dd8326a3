"""Editors: each turns an edit's gradient factors into low-rank weight deltas."""

from mend_lightning.editors.mend import MendEditor

__all__ = ["MendEditor"]
