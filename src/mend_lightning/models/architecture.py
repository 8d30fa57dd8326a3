"""The architecture behind a model's name: its config, class, tokenizer and dtype, before any weight is loaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from mend_lightning.errors import ModelLoadError
from mend_lightning.models.inputs.encoder import ModelKind
from mend_lightning.models.smollm2 import MODEL_NAME, find_smollm2

Dtype = Literal["auto", "stored", "float32", "bfloat16", "float16"]
_AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        where: folder or hub id.
        config: its Hugging Face config.
        tokenizer: its tokenizer.
        model_class: the class that builds or loads it.
        dtype: what its weights are loaded in, or "auto": as they are stored.
        options: of loading (revision, trust).
    """

    where: str
    config: Any
    tokenizer: Any
    model_class: Any
    dtype: torch.dtype | str
    options: dict[str, Any]

    def build(self) -> PreTrainedModel:
        """The model as its class initialises it."""
        dtype = self.config.dtype or torch.float32 if self.dtype == "auto" else self.dtype
        trust = self.options["trust_remote_code"]
        model = self.model_class.from_config(self.config, dtype=dtype, trust_remote_code=trust)
        if model.can_generate():
            # As `from_pretrained`: where the model has no such file, what its config says stays.
            with suppress(OSError):
                where = {name: self.options[name] for name in ("revision", "local_files_only") if name in self.options}
                model.generation_config = GenerationConfig.from_pretrained(self.where, **where)
        return model


def resolve_name(name: str) -> str:
    """The folder of the quickstart model for its name; any other name as it is.

    Raises:
        ModelLoadError: the quickstart model is not prepared yet.
    """
    if name != MODEL_NAME:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder = find_smollm2()
    if folder is None:
        raise ModelLoadError(f"{MODEL_NAME} is not prepared on this machine yet. Run `mend-lightning get-smollm2`.")
    return str(folder)


def model_class(config: Any, kind: ModelKind | None = None) -> Any:
    """The auto class of transformers that builds or loads a config's model; None reads the kind off the config."""
    return _AUTO_CLASSES[kind or kind_of_config(config)]


def kind_of_config(config: Any) -> ModelKind:
    """What kind of model a Hugging Face config describes.

    Example:
        >>> from transformers import BartConfig, GPT2Config
        >>> kind_of_config(BartConfig()), kind_of_config(GPT2Config())
        ('encoder_decoder', 'causal')
    """
    architectures = getattr(config, "architectures", None) or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return "classifier"
    return "encoder_decoder" if getattr(config, "is_encoder_decoder", False) else "causal"


def pick_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype; "auto" depends on the device that will compute; "stored" without files is what most are published in."""
    if dtype == "stored":
        return torch.bfloat16
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in capabilities and "SVE" not in capabilities:
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
