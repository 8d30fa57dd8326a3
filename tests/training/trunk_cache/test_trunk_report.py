"""`fit` with a trunk cache: the same editor, what is said of it, and when one is recommended."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import REMARKS, run_config, state_copy
from helpers.commandline import assert_says, call
from helpers.models import make_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from mend_lightning.data.records import read_records
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.editors import FineTuning, MendEditor
from mend_lightning.errors import ConfigError, NoEffectWarning
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.training.distributed.strategies import ShardedStrategy
from mend_lightning.training.step import edit_step
from mend_lightning.training.trunk_cache import CachedTrunk
from mend_lightning.training.trunk_cache import trunk_report as trunk_in_training
from mend_lightning.training.trunk_cache.estimate import Worth, run_rows, trunk_share, worth_of
from mend_lightning.training.trunk_cache.observe import observe_trunk
from mend_lightning.training.trunk_cache.trunk_report import TrunkReport, check_trunk_cache

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")


@pytest.mark.parametrize(
    "kind, family, settings",
    [("encoder_decoder", "t5", {}), ("causal", "llama", {"tasks_at_once": 3, "precondition": 0.1})],
)
def test_fit_learns_the_same(mend, edit_data, trainer, tmp_path, kind, family, settings):
    """Within rounding: a row's states are of the batch that it was first seen in. A second run finds every row."""
    states, used = [], []
    for folder in (None, tmp_path / "caches", tmp_path / "caches"):
        torch.manual_seed(0)
        module = mend(family, trunk_cache=folder, last_blocks=1, **settings)
        run, steps = trainer(max_steps=5, limit_val_batches=0), []
        module.on_train_end = lambda module=module, steps=steps: steps.append(module.trunk_of)
        run.fit(module, edit_data(kind))
        states.append(state_copy(module.editor))
        used.append(getattr(steps[0], "use", None))
        assert module.trunk_of is run_trunk
    for name, value in states[0].items():
        for state in states[1:]:
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    assert used[0] is None
    assert 0 < used[1].found < used[1].rows == used[2].rows == used[2].found


def test_mixed_precision_has_a_cache_of_its_own(mend, edit_data, trainer, tmp_path):
    states = []
    for folder in (None, tmp_path / "caches"):
        torch.manual_seed(0)
        module = mend("llama", trunk_cache=folder)
        trainer(max_steps=3, precision="bf16-mixed", limit_val_batches=0).fit(module, edit_data())
        states.append(state_copy(module.editor))
    (about,) = (tmp_path / "caches").glob("*/trunk.json")
    assert '"autocast": "torch.bfloat16"' in about.read_text()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0.02, atol=1e-2)


def test_from_the_command_line(base_folder, facts, tmp_path):
    config = run_config(tmp_path / "run", base_folder("gpt2"), facts, max_steps=2, limit_val_batches=0)
    cache = ["--model.trunk_cache", tmp_path / "caches"]
    for arguments in ([], ["--ckpt_path", "last", "--trainer.max_steps", 3]):
        said = call("fit", "--config", config, *cache, *arguments)
        assert (said.code, said.err) == (0, "")
        assert re.search(
            rf"Trunk cache: \d+ of \d+ rows \(\d+%\) were found in {tmp_path}/caches, which takes 0 MB", said.out
        )


def test_a_folder_that_holds_other_things(base_folder, facts, tmp_path):
    config = run_config(tmp_path / "run", base_folder("gpt2"), facts, max_steps=1)
    said = call("fit", "--config", config, "--model.trunk_cache", facts)
    assert said.code != 0
    assert_says(said.err, f"trunk_cache {facts} holds other things.* Give a new or an empty folder")


def test_a_strategy_that_shards_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="trunk_cache cannot serve a base in shards.*strategy ddp"):
        check_trunk_cache(tmp_path, ShardedStrategy())


@pytest.mark.parametrize("reads_answers", [True, False])
@pytest.mark.parametrize("epochs, calibration", [(0.5, 1.0), (1, 0), (3.5, 0), (12, 1)])
@pytest.mark.parametrize("rephrases, locality", [(1, 1), (3, 4)])
def test_rows_that_come_again(epochs, calibration, reads_answers, rephrases, locality):
    """Against the draws of a whole run."""
    sampler = TaskSampler(read_records("world_facts/test")[:120], rephrases, locality, min(1, locality - 1))
    drawn: list[tuple[str, str]] = []
    for share in (calibration, epochs):
        for number in range(int(share * len(sampler))):
            drawn += rows_of(sampler.task(*divmod(number, len(sampler))))
    texts = drawn if reads_answers else [prompt for prompt, _ in drawn]
    asked, different = run_rows(sampler, epochs, calibration, reads_answers)
    assert asked == pytest.approx(len(texts))
    assert different == pytest.approx(len(set(texts)), rel=0.05)


def rows_of(task) -> list[tuple[str, str]]:
    return [(task.prompt, task.target), *((text, task.target) for text in task.rephrases), *task.locality]


@pytest.mark.parametrize("blocks, last", [(8, 2), (8, 6)])
def test_the_trunks_share_of_a_step(family, blocks, last):
    """Against the multiplications that torch counts in a step; attention's are not in the estimate."""
    model, batch = tiny_model(family, torch.float32, blocks), make_batch(family)
    editor = MendEditor.for_model(model, last_blocks=last, rank=4)
    layers = editor.modules_in(model)
    shape = observe_trunk(model, layers, batch.z_edit.inputs)
    with FlopCounterMode(display=False) as step:
        edit_step(model, editor, batch).total(0.1).backward()
    with FlopCounterMode(display=False) as trunk:
        for rows in (batch.z_edit, batch.x_in, batch.x_out):
            run_trunk(model, rows, layers)
    counted = trunk.get_total_flops() / step.get_total_flops()
    assert trunk_share(model, editor, shape, batch) == pytest.approx(counted, abs=0.08)


def test_size_on_disk(tmp_path):
    """Of every row of a batch, each seen once."""
    model, batch = tiny_model("llama", torch.bfloat16), make_batch("llama", tasks=5, prefix=5)
    editor = MendEditor.for_model(model, rank=4)
    cached, layers = CachedTrunk(tmp_path), editor.modules_in(model)
    shape = observe_trunk(model, layers, batch.z_edit.inputs)
    for rows in (batch.z_edit, batch.x_in, batch.x_out):
        cached(model, rows, layers)
    entries = cached._opened.rows.store._entries.values()
    worth = worth_of(model, editor, shape, batch, (50.0, 25.0))
    assert (worth.trunk_blocks, worth.blocks, worth.found) == (1, 4, 0.5)
    assert worth.size == pytest.approx(sum(entry.size for entry in entries), rel=0.15)


def test_who_is_told_that_it_pays(mend, edit_data, trainer, monkeypatch, capsys):
    disk = SimpleNamespace(free=10**9)
    monkeypatch.setattr(trunk_in_training, "shutil", SimpleNamespace(disk_usage=lambda path: disk))

    def told(max_steps: int, **settings) -> bool:
        module = mend("bert", last_blocks=1, rank=1, **settings)
        trainer(max_steps=max_steps, limit_val_batches=0, callbacks=[TrunkReport()]).fit(
            module, edit_data("classifier")
        )
        return "A trunk cache would pay: 3 of 4 blocks" in capsys.readouterr().out

    assert told(12)
    # Less than an epoch.
    assert not told(1)
    disk.free = 1000
    assert not told(12)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`.*")
def test_an_editor_that_needs_no_training(mend, edit_data, trainer, tmp_path):
    module = mend("gpt2", trunk_cache=tmp_path / "caches", algorithm=FineTuning)
    with pytest.warns(NoEffectWarning, match="trunk_cache has no effect: FineTuning needs no training"):
        trainer(max_steps=1, callbacks=[TrunkReport()]).fit(module, edit_data())


def test_what_is_said():
    assert Worth(3, 4, 0.5, 0.5, 10).pays(free=40)
    assert not Worth(3, 4, 0.5, 0.5, 11).pays(free=40)
    assert not Worth(3, 4, 0.5, 0.49, 10).pays(free=40)
