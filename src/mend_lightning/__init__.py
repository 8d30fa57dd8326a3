"""mend-lightning: correct what a language model believes.

    from mend_lightning import MendEditor, load_base

    model, tokenizer = load_base("smollm2-135m-instruct")
    editor = MendEditor.from_pretrained("runs/quickstart/editor")
    edit = editor.edit(model, tokenizer, "In which country is Lyon?", "Italy")
    with edit.applied(model):
        ...  # model.generate(...) believes it; afterwards the model is what it was, bit for bit
    edit.save("lyon.safetensors")

Names below are imported when they are first used, so that Lightning is loaded only where it is needed.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BaseModel": "models.base",
    "load_base": "models.base",
    "Cache": "editors",
    "Drawdown": "evaluation.metrics",
    "EditSuccess": "evaluation.metrics",
    "PerplexityDrawdown": "evaluation.metrics",
    "Edit": "edits.edit",
    "combined": "edits.edit",
    "EditStack": "edits.stack",
    "make_edit": "editors.making",
    "EditBatch": "data.batch",
    "Factors": "editors.factors",
    "FineTuning": "editors",
    "Rows": "models.inputs.rows",
    "EditData": "data.datamodule",
    "EditDataModule": "data.datamodule",
    "EditorCheckpointIO": "training.distributed.checkpoint_io",
    "ShardedStrategy": "training.distributed.strategies",
    "ShardedBaseStrategy": "training.distributed.strategies",
    "Editor": "editors",
    "EnnEditor": "editors",
    "InContext": "editors",
    "KnowledgeEditor": "editors",
    "CollidingEditWarning": "errors",
    "FailingRunWarning": "errors",
    "LowConfidenceWarning": "errors",
    "LowRankDelta": "edits.deltas",
    "MendCallback": "training.mend_callback.callback",
    "MendEditor": "editors",
    "MendError": "errors",
    "MendModule": "training.module",
    "NoEffectWarning": "errors",
    "PromptFormat": "models.inputs.prompts",
    "edit_step": "training.step",
    "export_peft": "edits.export.peft_export",
    "generate_answers": "models.forward.generation",
    "import_peft": "edits.export.peft_import",
    "merge": "edits.export.merging",
    "read_records": "data.records",
    "answer_shifts": "evaluation.shifts",
    "next_token_shifts": "evaluation.shifts",
    "token_shifts": "evaluation.shifts",
    "plot_shifts": "evaluation.shift_plot",
    "check_edit": "evaluation.safety",
    "neutral_questions": "evaluation.neutral",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
