"""Class paths of version 0.1: in files, in lists, on the command line, and under configs that build on others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mend_lightning.cli.config.overlays import read_config, resolved_configs

OLD, NEW = "mend_lightning.parallel.strategy.ShardedStrategy", "mend_lightning.ShardedStrategy"


def written(path: Path, **trainer) -> Path:
    path.write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")
    return path


def test_in_a_mapping_and_in_a_list(tmp_path):
    saving = {"class_path": "mend_lightning.run_callbacks.SaveEditor"}
    path = written(tmp_path / "run.yaml", strategy={"class_path": OLD}, callbacks=[saving])
    (_, content), files = resolved_configs(["--config", str(path)])
    assert yaml.safe_load(content) == {
        "trainer": {
            "strategy": {"class_path": NEW},
            "callbacks": [{"class_path": "mend_lightning.training.run_callbacks.SaveEditor"}],
        }
    }
    assert files == [path]


def test_arguments_of_one_class_are_merged_whatever_it_was_called(tmp_path):
    written(tmp_path / "low.yaml", strategy={"class_path": OLD, "init_args": {"tensor_parallel_size": 1}})
    high = tmp_path / "high.yaml"
    settings = {"class_path": NEW, "init_args": {"save_distributed_checkpoint": True}}
    high.write_text(yaml.safe_dump({"base_config": "low.yaml", "trainer": {"strategy": settings}}), encoding="utf-8")
    expected = {"tensor_parallel_size": 1, "save_distributed_checkpoint": True}
    assert read_config(high).values()["trainer"]["strategy"] == {"class_path": NEW, "init_args": expected}


@pytest.mark.parametrize("form", ["--trainer.strategy={}", '--trainer.strategy={{"class_path": "{}"}}', "{}"])
def test_on_the_command_line(form):
    assert resolved_configs([form.format(OLD)])[0] == [form.format(NEW)]


@pytest.mark.parametrize("name", [NEW, f"own.{OLD}", f"{OLD}OfMine", "mend_lightning.parallel.strategy"])
def test_other_names_stay(name, tmp_path):
    path = written(tmp_path / "run.yaml", strategy={"class_path": name})
    assert resolved_configs(["--config", str(path), name]) == (["--config", str(path), name], [path])
