"""`fit` with a trunk cache: the same editor, and what is said of it."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.bases import REMARKS, run_config, state_copy
from helpers.commandline import assert_says, call
from helpers.training import assert_same_training

from mend_lightning.editors import FineTuning
from mend_lightning.errors import ConfigError, NoEffectWarning
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.training.distributed.strategies import ShardedStrategy
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
    for state in states[1:]:
        assert_same_training(state, states[0], rate=1e-2, steps=5)
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


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`.*")
def test_an_editor_that_needs_no_training(mend, edit_data, trainer, tmp_path):
    module = mend("gpt2", trunk_cache=tmp_path / "caches", algorithm=FineTuning)
    with pytest.warns(NoEffectWarning, match="trunk_cache has no effect: FineTuning needs no training"):
        trainer(max_steps=1, callbacks=[TrunkReport()]).fit(module, edit_data())
