"""Numbers do not depend on the layout of a global batch; this file is also the script that several processes run."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from helpers.bases import REMARKS, SIZES, run_config
from helpers.models import ROUNDING, relative_error, tiny_model
from helpers.processes import launch
from helpers.training import assert_same_training
from safetensors.torch import load_file

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.errors import EmptyDatasetError, FailingRunWarning
from mend_lightning.models.base import BaseModel
from mend_lightning.models.sharding.collectives import whole_state
from mend_lightning.models.sharding.fsdp import blocks_of
from mend_lightning.training.module import MendModule
from mend_lightning.training.run_callbacks import ResultsReport, StartReport

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
GLOBAL_BATCH, STEPS, RATE = 4, 4, 1e-4
# What is measured moves with a weight that rounding sends another way, by some steps of RATE.
NEAR = {"rel": 10 * RATE, "abs": RATE / 10}


class Losses(L.Callback):
    """The loss of every step, the mean over the processes, and the metrics of every validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
        names = ("train/edit", "train/locality", "train/loss")
        self.logged.append({name: float(trainer.callback_metrics[name]) for name in names})

    def on_validation_end(self, trainer, module) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.validations.append(values)


@dataclass(frozen=True)
class Layout:
    """How the global batch is laid out; the name says it in ids of tests."""

    processes: int
    strategy: str = "auto"
    accumulate: int = 1
    family: str = "llama"
    quantize: str | None = None

    @property
    def name(self) -> str:
        bits = f"-{self.quantize}" if self.quantize else ""
        return f"{self.processes}-{self.strategy}-{self.accumulate}-{self.family}{bits}"

    @property
    def alone(self) -> Layout:
        """The same computation on one process: what it is compared with."""
        return replace(self, processes=1, strategy="auto")


# One launch for each number of processes: starting them takes most of the time.
LAYOUTS = {
    2: [
        Layout(2, "ddp"), Layout(2, "fsdp2"), Layout(2, "ddp", accumulate=2), Layout(2, "fsdp2", accumulate=2),
        Layout(2, "fsdp2", family="t5"), Layout(2, "fsdp2", family="gpt2"),
        Layout(2, "fsdp1", family="gpt2"), *([Layout(2, "ddp", quantize="int8")] if find_spec("optimum") else []),
    ],
    4: [Layout(4, "ddp")],
}  # fmt: skip
SPREAD = [layout for layouts in LAYOUTS.values() for layout in layouts]


def run(root: Path, layout: Layout) -> None:
    """Trains, validates and tests by the config in `root`; leaves `out.pt` and what the test report writes."""
    config = yaml.safe_load((root / "run.yaml").read_text())
    L.seed_everything(0, verbose=False)
    base = BaseModel(**config["model"].pop("base"), quantize=layout.quantize)
    # A small rate: Adam makes whole steps of gradients that are nothing but rounding.
    rates = {"lr": RATE, "edit_rate_lr": RATE}
    module = MendModule(base, **{**config["model"], **rates}, precondition=0.1, calibration_batches=2)
    batch_size = GLOBAL_BATCH // layout.processes // layout.accumulate
    data = EditDataModule(**{**config["data"], "batch_size": batch_size})
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu", devices=layout.processes, strategy=layout.strategy, max_steps=STEPS, max_epochs=-1,
        default_root_dir=root, inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=2 * layout.accumulate, accumulate_grad_batches=layout.accumulate,
        check_val_every_n_epoch=None, gradient_clip_val=1.0, callbacks=[losses, StartReport(), ResultsReport()],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=FailingRunWarning)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
    states = [whole_state(module.editor)] * layout.processes
    said = [[str(each.message) for each in caught if each.category is FailingRunWarning]] * layout.processes
    if layout.processes > 1:
        torch.distributed.all_gather_object(states, states[0])
        torch.distributed.all_gather_object(said, said[0])
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in module.parameters())
    if trainer.is_global_zero:
        out = {"losses": losses.losses, "validations": losses.validations, "states": states, "sharded": sharded}
        out["logged"], out["said"] = losses.logged, said
        out["fingerprint"] = module.editor.base_fingerprint
        out["held"] = sum(
            held(parameter) for block in blocks_of(module.base_model).values() for parameter in block.parameters()
        )
        torch.save(out, root / "out.pt")


def held(parameter: torch.Tensor) -> int:
    """Numbers of a parameter that this process has."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


@pytest.fixture(scope="module")
def runs(base_folder, facts, tmp_path_factory):
    """`runs(layout)`: what a run left behind, and its folder. Runs of one process are this one's."""
    folder = tmp_path_factory.mktemp("runs")
    for layout in {*SPREAD, *(layout.alone for layout in SPREAD)}:
        kind = "encoder_decoder" if layout.family == "t5" else "causal"
        base = (
            base_folder(layout.family) if layout.family != "gpt2" else old_files(base_folder("gpt2"), folder / "gpt2")
        )
        run_config(folder / layout.name, base, facts, kind)
    for processes, layouts in LAYOUTS.items():
        (folder / "layouts.json").write_text(json.dumps([asdict(layout) for layout in layouts]))
        launch(__file__, processes, folder)

    def of(layout: Layout) -> tuple[dict, Path]:
        root = folder / layout.name
        if not (root / "out.pt").exists():
            run(root, layout)
        return torch.load(root / "out.pt", weights_only=True), root

    return of


def old_files(base: Path, target: Path) -> Path:
    """A copy without safetensors, which under fsdp2 process 0 loads and sends."""
    if not target.exists():
        shutil.copytree(base, target)
        torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
    return target


@pytest.fixture(params=SPREAD, ids=lambda layout: layout.name)
def layout(request) -> Layout:
    return request.param


@pytest.fixture
def both(layout, runs) -> list[tuple[dict, Path]]:
    """A run on several processes, and the same on one."""
    return [runs(layout), runs(layout.alone)]


def test_losses(both, layout):
    spread, alone = (out for out, _ in both)
    assert len(alone["losses"]) == STEPS * layout.accumulate
    assert spread["losses"] == pytest.approx(alone["losses"], rel=ROUNDING)
    # Lightning divides what it steps with by the number of micro-batches, and not what is logged.
    assert [line["train/loss"] / layout.accumulate for line in alone["logged"]] == alone["losses"]
    for expected, actual in zip(alone["logged"], spread["logged"], strict=True):
        assert actual == pytest.approx(expected, rel=ROUNDING, abs=1e-6)


def test_weights_and_statistics(both):
    """Of all processes: the same bits on each, and those of one process up to rounding; the base is known again."""
    (spread, _), (alone, _) = both
    expected, states = alone["states"][0], spread["states"]
    for name in expected:
        assert all(torch.equal(state[name], states[0][name]) for state in states), name
    assert_same_training(states[0], expected, RATE, STEPS)
    assert spread["fingerprint"] == alone["fingerprint"]
    counts = [value for name, value in expected.items() if name.endswith("count")]
    assert counts and all(int(count) > 0 for count in counts)


def test_what_is_sharded(runs):
    """Every parameter of the base and of the editor; under ddp none."""
    assert runs(Layout(2, "ddp"))[0]["sharded"] == 0
    out = runs(Layout(2, "fsdp2"))[0]
    learned = [name for name in out["states"][0] if not name.endswith(("count", "mean", "m2", "matrix", "calibrated"))]
    assert out["sharded"] == len(learned) + len(list(tiny_model("llama").parameters()))


def test_blocks_are_given_back(both, layout):
    """After the passes of a whole run: one block may still be there, where the trunk's pass ended."""
    share = both[0][0]["held"] / both[1][0]["held"]
    assert share < 0.7 if layout.strategy.startswith("fsdp") else share == 1


def test_validation_metrics(both):
    """Five examples: one process has an uneven batch more than the other. The first validation is before the first step."""
    spread, alone = (out["validations"] for out, _ in both)
    assert len(alone) == len(spread) == 3 and alone[0]["val/base_accuracy"] > 0
    assert alone[0]["val/edit_nll"] != alone[1]["val/edit_nll"]
    for expected, actual in zip(alone, spread):
        assert actual == pytest.approx(expected, **NEAR)


def test_test_metrics_and_examples(both, facts):
    """Seven examples: none twice, none missing, in the order of the file."""
    results = [json.loads((root / "results.json").read_text()) for _, root in both]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], **NEAR)
    assert results[0]["intervals_95"] == results[1]["intervals_95"]
    prompts = [json.loads(line)["input"] for line in (facts / "test.jsonl").read_text().splitlines()]
    examples = [(root / "examples.jsonl").read_text().splitlines() for _, root in both]
    spread, alone = ([json.loads(line) for line in lines] for lines in examples)
    assert [line["prompt"] for line in alone] == [line["prompt"] for line in spread] == prompts
    assert [line["generated"] for line in alone] == [line["generated"] for line in spread]
    assert len(spread) == SIZES["test"]


def test_a_run_that_fails_is_warned_of_once(both):
    """By one process, after the training and in the test: this editor has no confidence, and is not blamed before it."""
    (spread, _), (alone, _) = both
    (expected,), (said, *others) = alone["said"], spread["said"]
    assert not any(others)
    begin = [message.partition(":")[0] for message in expected]
    assert begin == ["The validation after step 4 fails, on 5 edits", "The test fails, on 7 edits"]
    assert [message.partition(":")[0] for message in said] == begin


def test_accumulation_sees_the_same_tokens(runs):
    """Two micro-batches update the statistics as one batch does: they are of the base's activations alone."""
    whole, halves = (runs(Layout(1, accumulate=count))[0]["states"][0] for count in (1, 2))
    for name, value in whole.items():
        if name.endswith(("count", "mean", "m2")):
            assert relative_error(halves[name], value) < ROUNDING, name


def test_fewer_examples_than_processes(facts):
    data = EditDataModule(test=facts / "test.jsonl", test_edits=1)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, lightning_module=None, strategy=None)
    with pytest.raises(EmptyDatasetError, match="test.jsonl: 1 record.* on 2 process.*; each needs at least 1"):
        data.test_dataloader()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for settings in json.loads(Path(sys.argv[1], "layouts.json").read_text()):
        given = Layout(**settings)
        run(Path(sys.argv[1]) / given.name, given)
    # gloo's threads are joined here; left to the interpreter's end, a process was seen to abort.
    torch.distributed.destroy_process_group()
