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
    "BaseModel": "base",
    "load_base": "base",
    "Cache": "editors",
    "Drawdown": "metrics",
    "EditSuccess": "metrics",
    "PerplexityDrawdown": "metrics",
    "Edit": "edit",
    "combined": "edit",
    "EditStack": "stack",
    "make_edit": "making",
    "EditBatch": "types",
    "Factors": "types",
    "FineTuning": "editors",
    "Rows": "types",
    "EditData": "data.module",
    "EditDataModule": "data.module",
    "ShardedStrategy": "parallel.strategy",
    "ShardedBaseStrategy": "parallel.strategy",
    "Editor": "editors",
    "EnnEditor": "editors",
    "InContext": "editors",
    "KnowledgeEditor": "editors",
    "CollidingEditWarning": "errors",
    "LowConfidenceWarning": "errors",
    "LowRankDelta": "delta",
    "MendCallback": "callback",
    "MendEditor": "editors",
    "MendError": "errors",
    "MendModule": "module",
    "NoEffectWarning": "errors",
    "PromptFormat": "data.prompts",
    "edit_step": "step",
    "export_peft": "shipping.peft_adapter",
    "generate_answers": "generate",
    "import_peft": "shipping.peft_import",
    "merge": "shipping.merging",
    "read_records": "data.records",
    "answer_shifts": "effects.shifts",
    "next_token_shifts": "effects.shifts",
    "token_shifts": "effects.shifts",
    "plot_shifts": "effects.shift_plot",
    "check_edit": "effects.safety",
    "neutral_questions": "effects.neutral",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
