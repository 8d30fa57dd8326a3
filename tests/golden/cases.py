"""Golden cases as models, editors and batches of this package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.mend import MendEditor
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
REASON = f"golden vectors of the original code are not at {FOLDER}"
STATISTICS = {"u": "u_stats", "v": "delta_stats"}


def case_names(pattern: str = "*") -> list[str]:
    """Cases that match; a single placeholder, which every test skips, where the folder is absent."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.json")) or ["absent"]


class BertClassifier(nn.Module):
    """The original's classifier: one logit from BERT's pooled output."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__()
        self.model = transformers.BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.classifier(self.model(**inputs).pooler_output)


@dataclass(frozen=True)
class Case:
    """One golden file pair: `config` is its JSON, `tensors` its safetensors."""

    config: dict
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.config["inner_params"]]

    @property
    def is_classifier(self) -> bool:
        return self.config["hf"]["model_class"] == "BertClassifier"

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix`, by the rest of their names."""
        start = prefix + "/"
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}

    @cached_property
    def model(self) -> nn.Module:
        hf = self.config["hf"]
        config = getattr(transformers, hf["config_class"])(**hf["kwargs"])
        config._attn_implementation = hf["attn_implementation"]
        model = BertClassifier(config) if self.is_classifier else getattr(transformers, hf["model_class"])(config)
        model.load_state_dict(self.part("base"))
        return model.eval().requires_grad_(False)

    def checkpoint(self) -> dict[str, Tensor]:
        """What the original would have saved before its first step: its statistics are NaN then."""
        statistics = self.part("stats/before_warmup")
        for key, value in self.part("final_stats").items():
            statistics[key] = torch.full_like(value, torch.nan)
        return {**self.part("hyper"), **statistics}

    def editor(self) -> MendEditor:
        init = {"id": "identity", "xavier": "xavier"}[self.config["mend"]["init"]]
        # t5_unshared alone needs "original": its decoder has ReLU units that are dead in training and
        # fire in `eval`, where the original divides by 1e-7. All others come out the same with "center".
        return MendEditor.from_original(
            self.model,
            self.checkpoint(),
            self.config["inner_params"],
            init=init,
            normalize=self.config["mend"]["norm"],
            constant_units="original",
        )

    def batch(self, stage: str) -> EditBatch:
        parts = ("edit_inner", "loc", "edit_outer")
        return EditBatch(*(self._rows(self.part(f"{stage}/batch/{part}")) for part in parts))

    def _rows(self, inputs: dict[str, Tensor]) -> Rows:
        """Rows of one task: the original averages one loss over all edits of a batch."""
        labels = inputs.pop("labels")
        if self.config["hf"]["model_class"].startswith("T5") and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        shift = self.config["shift_targets"] and not self.is_classifier
        task = torch.zeros(len(labels), dtype=torch.long)
        return Rows(inputs, _next_labels(labels) if shift else labels, task, tasks=1)


def _next_labels(labels: Tensor) -> Tensor:
    """Labels `[rows, length]` where the logits that predict them are: one position before."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


@cache
def load_case(name: str) -> Case:
    return Case(json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors"))


def group_key(case: Case, layer: str) -> str:
    """The original's name of a layer's transform."""
    param = f"{layer}.weight"
    if not case.config["mend"]["shared"]:
        return param.replace(".", "#")
    return next(key for key, members in case.config["shape_dict"].items() if param in members)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest entry expected; absolute where all of it is 0."""
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    error = float((actual.detach().double() - expected.double()).abs().max())
    return error / (float(expected.abs().max()) or 1.0)
