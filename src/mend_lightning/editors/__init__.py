"""Editors: each turns the edits of a batch into a changed model, one file each."""

from mend_lightning.editors.cache import Cache
from mend_lightning.editors.editor import Editor, EditorFactory
from mend_lightning.editors.enn import EnnEditor
from mend_lightning.editors.finetune import FineTuning
from mend_lightning.editors.in_context import InContext
from mend_lightning.editors.knowledge_editor import KnowledgeEditor
from mend_lightning.editors.mend import MendEditor

__all__ = [
    "Cache", "Editor", "EditorFactory", "EnnEditor", "FineTuning", "InContext", "KnowledgeEditor", "MendEditor"
]  # fmt: skip
