"""Loads the base model: a Hugging Face id, a local folder, or the model of the quickstart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from mend_lightning.errors import ConfigError, ModelLoadError
from mend_lightning.models.architecture import Architecture, Dtype, model_class, pick_dtype, resolve_name
from mend_lightning.models.inputs.encoder import ModelKind
from mend_lightning.models.quantisation import Quantize, prepare_quantized, quantization_config
from mend_lightning.models.random_weights import random_architecture, random_model
from mend_lightning.models.smollm2 import MODEL_NAME


@dataclass(frozen=True)
class BaseModel:
    """Which model's beliefs are edited, and how it is loaded.

    Args:
        name: a Hugging Face id, a local folder, or "smollm2-135m-instruct" (see `mend-lightning get-smollm2`).
        dtype: of the weights; "auto" is bfloat16 where the device computes in it, else float32; "stored" is what the
            model's files have. The editor is float32 whatever this says.
        revision: of a Hugging Face id.
        kind: "causal", "encoder_decoder" or "classifier"; None reads it off the model's config.
        trust_remote_code: run code that comes with the model. Only for models you trust.
        quantize: "int8" or "int4" stores the weights of the blocks' linear layers in 8 or 4 bit: bitsandbytes on a CUDA
            device, optimum-quanto elsewhere. An editor that was trained so loads its base so for edits.
        random_weights: build the architecture with random weights, always the same ones, and download nothing: time and
            memory can be measured so, and the model knows nothing. See `random_weights.py`.
    """

    name: str = MODEL_NAME
    dtype: Dtype = "auto"
    revision: str | None = None
    kind: ModelKind | None = None
    trust_remote_code: bool = False
    quantize: Quantize | None = None
    random_weights: bool = False

    def options(self) -> dict[str, str | bool | None]:
        """What an editor remembers beside the name, to load this model again. Trust is not passed on by a file."""
        random = {"random_weights": True} if self.random_weights else {}
        return {"revision": self.revision, "kind": self.kind, "quantize": self.quantize, **random}

    def architecture(self) -> Architecture:
        """Everything of the model but its weights; see `read_architecture`."""
        return read_architecture(
            self.name, self.dtype, self.revision, self.kind, self.trust_remote_code, self.random_weights
        )

    def load(self) -> tuple[nn.Module, Any]:
        """The frozen model in eval mode, and its tokenizer; see `load_base`."""
        return load_base(
            self.name, self.dtype, self.revision, self.kind, self.trust_remote_code, self.quantize, self.random_weights
        )


def read_architecture(
    name: str = MODEL_NAME,
    dtype: Dtype = "auto",
    revision: str | None = None,
    kind: ModelKind | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
) -> Architecture:
    """Reads a base model's config and tokenizer.

    Args: as in `BaseModel`.

    Raises:
        ModelLoadError: it is neither in a local folder nor in the cache, and cannot be downloaded; with random weights:
            its shape is not known on this machine.
    """
    if random_weights:
        return random_architecture(name, pick_dtype(dtype), revision, kind, trust_remote_code)
    where = resolve_name(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _said_well(name):
        config = AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    # transformers says "auto" for the dtype of the files.
    picked = "auto" if dtype == "stored" else pick_dtype(dtype)
    return Architecture(where, config, tokenizer, model_class(config, kind), picked, options)


def load_base(
    name: str = MODEL_NAME,
    dtype: Dtype = "auto",
    revision: str | None = None,
    kind: ModelKind | None = None,
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
    random_weights: bool = False,
) -> tuple[nn.Module, Any]:
    """Loads a base model, frozen and in eval mode, and its tokenizer.

    Args: as in `BaseModel`.

    Raises:
        ModelLoadError: as `read_architecture`, or its weights cannot be had.
        ConfigError: it cannot be quantised as asked.
        MissingPackageError: the library that quantises is not installed.

    Warns:
        RandomWeightsWarning: it was asked for random weights.
    """
    if random_weights and quantize is not None:
        raise ConfigError(
            f"random_weights and quantize={quantize!r} cannot be had together: what quantises reads the model's files. Leave "
            "one of them out."
        )
    found = read_architecture(name, dtype, revision, kind, trust_remote_code, random_weights)
    if random_weights:
        return random_model(found).eval().requires_grad_(False), found.tokenizer
    options = dict(found.options)
    if quantize is not None:
        options["quantization_config"] = quantization_config(
            quantize, found.model_class, found.config, found.dtype, trust_remote_code
        )
    with _said_well(name):
        model = found.model_class.from_pretrained(found.where, dtype=found.dtype, **options)
    if quantize is not None:
        prepare_quantized(model, quantize)
    return model.eval().requires_grad_(False), found.tokenizer


@contextmanager
def _said_well(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelLoadError(_not_loaded(name, error)) from error


def _not_loaded(name: str, error: Exception) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return f"The folder {folder} does not hold a model that transformers can load: {error}"
    return (
        f"Base model {name!r} could not be loaded: it is no local folder, and it is not in the Hugging Face cache or "
        "the hub cannot be reached. Give a local folder, download the model on a machine with network and copy it "
        f"here, or use {MODEL_NAME!r} after `mend-lightning get-smollm2`. The loader said: {error}"
    )
