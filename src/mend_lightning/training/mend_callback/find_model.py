"""Finds the model inside of somebody's LightningModule, and checks that edits can be made of it."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from mend_lightning.errors import ConfigError, ModelNotFoundError
from mend_lightning.models.compiled import unwrapped
from mend_lightning.models.inputs.encoder import ModelKind

# What the editor gives a model by name.
INPUTS = {
    "causal": ("input_ids", "attention_mask"),
    "classifier": ("input_ids", "attention_mask"),
    "encoder_decoder": ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
}


def find_model(host: nn.Module, path: str) -> nn.Module:
    """The model at an attribute path of `host`, without what torch.compile or peft put around it.

    Args:
        host: anybody's LightningModule.
        path: names with dots between them ("model", "student.encoder", "models.0"); "" is `host` itself, or, where that is
            no Hugging Face model, the only one inside of it.

    Raises:
        ModelNotFoundError: there is no module at that path.

    Example:
        >>> host = nn.ModuleDict({"students": nn.ModuleList([nn.Linear(2, 2)])})
        >>> find_model(host, "students.0")
        Linear(in_features=2, out_features=2, bias=True)
    """
    if path == "":
        return without_wrappers(_itself(host))
    found: Any = host
    for name in path.split("."):
        found = _child(found, name)
    if not isinstance(found, nn.Module):
        raise ModelNotFoundError(_not_found(host, path, found))
    return without_wrappers(found)


def _child(parent: Any, name: str) -> Any:
    if isinstance(parent, nn.Module) and name in parent._modules:
        return parent._modules[name]
    return getattr(parent, name, None)


def _itself(host: nn.Module) -> nn.Module:
    if _looks_like_a_model(host):
        return host
    inside = models_inside(host)
    if len(inside) == 1:
        return next(iter(inside.values()))
    raise ModelNotFoundError(
        f'model="": {type(host).__name__} is no Hugging Face model itself, and holds {len(inside)} of them. Give the attribute '
        f"path of one: {_choice(inside)}."
    )


def _looks_like_a_model(module: nn.Module) -> bool:
    return hasattr(module, "get_output_embeddings") and hasattr(module, "config")


def models_inside(host: nn.Module) -> dict[str, nn.Module]:
    """path -> each Hugging Face model in `host` that is in no other one."""
    found: dict[str, nn.Module] = {}
    for path, module in host.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and _looks_like_a_model(without_wrappers(module)):
            found[path] = module
    return found


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model whose layers have their usual names: inside of torch.compile, and of peft where that only changes layers."""
    model = unwrapped(model)
    base = getattr(model, "get_base_model", None)
    if base is None or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return model
    return base()


def _not_found(host: nn.Module, path: str, found: Any) -> str:
    names = [name for name, _ in host.named_modules() if name]
    inside = models_inside(host)
    near = difflib.get_close_matches(path, [*inside, *names], n=3, cutoff=0.5)
    near = list(dict.fromkeys(near))
    what = "nothing" if found is None else f"a {type(found).__name__}, which is no module"
    hint = f"Did you mean {', '.join(map(repr, near))}? " if near else ""
    return f"model={path!r}: {type(host).__name__} has {what} there. {hint}Models in it: {_choice(inside)}."


def _choice(inside: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name!r} ({type(module).__name__})" for name, module in inside.items()) or "none"


def check_forward(model: nn.Module, kind: ModelKind, path: str, host: nn.Module) -> None:
    """Raises ConfigError where the model's forward does not take what an editor gives it, or has no head."""
    signature = inspect.signature(model.forward).parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.values())
    missing = [name for name in INPUTS[kind] if name not in signature]
    # One that takes no ids at all wraps the model in a way of its own, whatever else it accepts.
    if missing and (not open_ended or "input_ids" in missing):
        raise ConfigError(
            f"model={path!r}: the forward of {type(model).__name__} takes ({', '.join(signature)}), and an editor calls it with "
            f"{', '.join(INPUTS[kind])}. Give the path of the Hugging Face model inside: {_choice(models_inside(host))}."
        )
