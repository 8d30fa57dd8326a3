"""Configs that build on others: what is merged, where each value comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.commandline import assert_says, call

from mend_lightning.cli.commands.show_config import config_lines
from mend_lightning.cli.config.files import config_folder, config_names
from mend_lightning.cli.config.overlays import read_config, resolved_configs
from mend_lightning.cli.config.tree import leaves, to_yaml
from mend_lightning.errors import ConfigError

# What these two configs held before they shared files; runs that were measured used these values.
FACTS = {
    "train": "world_facts/train", "validation": "world_facts/validation", "test": "world_facts/test",
    "prompt": "Geography quiz\nQ: In which US state is Miami?\nA: Florida\nQ: {input}\nA:",
    "target": " {target}", "stop": "\n", "batch_size": 8, "rephrases": 3, "locality": 4, "hard_locality": 3,
    "max_length": 96,
}  # fmt: skip
EDITOR = {
    "base": {"name": "smollm2-135m-instruct", "dtype": "auto"}, "layers": ["model.layers.26.mlp.down_proj"],
    "rank": 256, "precondition": 0.001, "rephrase_ridge": 0.03, "calibration_batches": 178, "edit_rate": 5.4e-4,
    "lr": 1e-6, "edit_rate_lr": 2e-6, "warmup_steps": 20, "decay": "linear", "c_edit": 0.01,
    "locality_positions": "answer",
}  # fmt: skip
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
KEPT = {"class_path": CHECKPOINT, "init_args": {"monitor": "val/loss", "save_last": True}}
TRAINER = {
    "accelerator": "cpu", "max_epochs": -1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
    "gradient_clip_val": 100.0, "log_every_n_steps": 1, "enable_model_summary": False, "callbacks": [KEPT],
}  # fmt: skip
MEASURED = {
    "quickstart": {
        "seed_everything": 0,
        "model": {**EDITOR, "confidence": 0.78},
        "data": {**FACTS, "eval_rephrases": 2, "eval_locality": 4, "eval_hard_locality": 2, "validation_edits": 96},
        "trainer": {**TRAINER, "default_root_dir": "runs/quickstart", "max_steps": 60, "val_check_interval": 30},
    },
    "smollm2-world-facts": {
        "seed_everything": 0,
        "model": {**EDITOR, "confidence": 0.77},
        "data": {**FACTS, "validation_edits": 163},
        "trainer": {
            **TRAINER,
            "default_root_dir": "runs/smollm2-world-facts",
            "max_steps": 100,
            "val_check_interval": 100,
        },
    },
}


@pytest.fixture
def write(tmp_path):
    """`write("a", "rank: 1")` makes a.yaml and gives its path."""

    def file(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file


@pytest.mark.parametrize("name", list(MEASURED))
def test_measured_configs_are_what_they_were(name):
    values = read_config(name).values()
    assert values == MEASURED[name]
    # 1 == 1.0 == True, and not to a parser.
    assert to_yaml(_sorted(values)) == to_yaml(_sorted(MEASURED[name]))


def _sorted(data):
    return {key: _sorted(data[key]) for key in sorted(data)} if isinstance(data, dict) else data


def test_mappings_are_merged_and_all_else_is_replaced(write):
    low = "model: {rank: 8, layers: [a, b], base: {name: x, dtype: auto}}\ndata: {stop: s}\ntrainer: {callbacks: [1]}"
    write("low", low)
    high = write("high", "base_config: low\nmodel: {layers: [c], base: {name: y}}\ntrainer: {callbacks: null}")
    assert read_config(high).values() == {
        "model": {"rank": 8, "layers": ["c"], "base": {"name": "y", "dtype": "auto"}},
        "data": {"stop": "s"},
        "trainer": {"callbacks": None},
    }


def test_another_class_brings_its_own_arguments(write):
    write("low", "trainer: {logger: {class_path: A, init_args: {x: 1, y: 2}}}")
    same = write("same", "base_config: low\ntrainer: {logger: {class_path: A, init_args: {x: 3}}}")
    other = write("other", "base_config: low\ntrainer: {logger: {class_path: B, init_args: {z: 3}}}")
    assert read_config(same).values()["trainer"]["logger"]["init_args"] == {"x": 3, "y": 2}
    assert read_config(other).values()["trainer"]["logger"] == {"class_path": "B", "init_args": {"z": 3}}


def test_several_bases_later_ones_win_and_each_counts_once(write):
    write("root", "a: root\nb: root\nc: root\nd: root")
    write("left", "base_config: root\nb: left\nc: left")
    write("right", "base_config: root.yaml\nc: right")
    config = read_config(write("top", "base_config: [left, right]\nd: top"))
    assert config.values() == {"a": "root", "b": "left", "c": "right", "d": "top"}
    assert [file.stem for file in config.files] == ["root", "left", "right", "top"]


def test_a_config_of_ones_own_on_a_shipped_one(write):
    mine = write("mine", "base_config: quickstart\nmodel: {confidence: 0.6}")
    expected = {**MEASURED["quickstart"], "model": {**EDITOR, "confidence": 0.6}}
    assert read_config(mine).values() == expected
    # A file beside it goes before a shipped one of the same name.
    write("quickstart", "model: {rank: 3}")
    assert read_config(mine).values() == {"model": {"rank": 3, "confidence": 0.6}}


def test_sources_and_comments(write):
    low = write("low", 'a:\n  b: "x # y"  # why b\n  c:  # why c\n    - 1  # the item\n    - 2\n  d: 4\n')
    high = write("high", "# head\nbase_config: low\na:\n  d: [5]  # why d\n")
    found = {key: (leaf.value, leaf.file, leaf.line, leaf.comment) for key, leaf in leaves(read_config(high).tree)}
    assert found == {
        "a.b": ("x # y", low, 2, "why b"), "a.c": ([1, 2], low, 3, "why c"), "a.d": ([5], high, 4, "why d")
    }  # fmt: skip


def test_scalars_are_read_as_the_parser_reads_them(write):
    """YAML 1.1 takes 1e-6 for text and 2020-01-01 for a date."""
    text = "a: 1e-6\nb: 5.4e-4\nc: '1e-6'\nd: 2020-01-01\ne: .inf\nf: 1.\n"
    text += "g: true\nh: 'true'\ni: -3\nj: \"x\\ny\"\nk: .5\n"
    config = read_config(write("scalars", text))
    expected = {
        "a": 1e-6, "b": 5.4e-4, "c": "1e-6", "d": "2020-01-01", "e": float("inf"), "f": 1.0, "g": True, "h": "true",
        "i": -3, "j": "x\ny", "k": 0.5,
    }  # fmt: skip
    assert config.values() == expected
    assert read_config(write("again", config.text())).values() == expected


@pytest.mark.parametrize(
    "text, error",
    [
        ("base_config: quikstart", r"builds on 'quikstart', which is no file \(looked in .*Did you mean quickstart"),
        ("base_config: shared/trainr", "Did you mean shared/trainer"),
        ("base_config: top", r"top.yaml builds on itself: top.yaml -> top.yaml\. Remove one base_config"),
        ("base_config: [other]", r"top.yaml builds on itself: top.yaml -> other.yaml -> top.yaml"),
        ("base_config: 3", "base_config must be the name of a config or a list of names, got 3"),
        ("base_config: {a: b}", "base_config must be .* got {'a': 'b'}"),
        ("base_config: [a, 1]", r"base_config must be .* got \['a', 1\]"),
        ("base_config:", "base_config must be .* got None"),
        ("- a\n- b", r"top.yaml is no config: expected keys with values .*, got a sequence"),
        ("a: [1", "top.yaml cannot be read as YAML: .*line 1"),
        ("a:\n  rank: 1\n  rank: 2", "top.yaml, line 3: 'rank' is given twice"),
    ],
)
def test_what_is_refused(text, error, write):
    write("other", "base_config: top")
    with pytest.raises(ConfigError, match=error):
        read_config(write("top", text))


def test_an_empty_config_is_empty(write):
    assert read_config(write("empty", "# nothing\n")).values() == {}


def test_arguments_keep_their_order(write, tmp_path):
    write("low", "model: {rank: 8}")
    high, alone = write("high", "base_config: low\nmodel: {lr: 1e-6}"), write("alone", "model: {rank: 1}")
    given = ["fit", "--config", str(high), "--x", "1", f"--config={alone}", "-c", str(alone), "--config"]
    arguments, files = resolved_configs(given)
    assert yaml.safe_load(arguments[2]) == {"model": {"rank": 8, "lr": 1e-6}}
    path = str(alone)
    rest = ["--x", "1", "--config", path, "--config", path, "--config"]
    assert [*arguments[:2], *arguments[3:]] == ["fit", "--config", *rest]
    assert [file.stem for file in files] == ["low", "high", "alone", "alone"]


def test_the_parser_gets_what_was_merged(write):
    mine = write("mine", "base_config: quickstart\nmodel: {rank: 77, lr: 1e-5}\ndata: {prompt: '{input} #'}")
    result = call("fit", "--config", mine, "--model.c_edit", "0.5", "--print_config")
    assert result.code == 0
    # `call` joins the lines.
    for part in ("rank: 77", "lr: 1.0e-05", "prompt: '{input} #'", "c_edit: 0.5", "confidence: 0.78", "max_steps: 60"):
        assert part in result.out, part
    assert f"from {config_folder().resolve() / 'quickstart.yaml'} # from {mine}" in result.out


def test_a_typo_in_what_a_config_builds_on(write):
    write("low", "model: {rnk: 8}")
    result = call("fit", "--config", write("high", "base_config: low\nmodel: {lr: 1e-6}"))
    assert result.code == 2
    assert_says(result.err, "Did you mean 'model.rank'")


@pytest.mark.parametrize(
    "text, shown",
    [("model: 3", "model must .* got 3"), ("data:", "data must .* None"), ("trainer: [a]", "trainer must")],
)
def test_a_section_that_is_no_mapping(text, shown, write):
    result = call("fit", "--config", write("mine", f"base_config: quickstart\n{text}"))
    assert result.code == 1
    assert_says(result.err, f"mine.yaml, line 2: {shown}")


def test_show_config(write):
    assert call("show-config", "nothing").code == 1
    for name in (*config_names(), write("mine", "base_config: quickstart\nmodel:\n  confidence: 0.6  # less\n")):
        config = read_config(name)
        lines = config_lines(config)
        shown = write("shown", "\n".join(lines))
        # What is shown is YAML, and it is the config.
        assert read_config(shown).values() == config.values()
    assert f"  confidence: 0.6  # {name}, line 3: less" in lines
    result = call("show-config", "quickstart")
    assert result.code == 0
    confidence = "confidence: 0.78 # quickstart.yaml, line 10: not in the paper (None there), see editors/confidence.py"
    assert confidence in result.out
    assert "rank: 256 # shared/one-layer.yaml, line" in result.out
    assert result.err == ""
    listed = call("show-config").out
    assert "compare/smollm2 " in listed
    comparison = call("fit", "--config", "compare/smollm2")
    assert comparison.code == 1
    assert_says(
        comparison.err, "compares several editors. Give it to `mend-lightning compare --config compare/smollm2`"
    )
    assert all(name in listed for name in config_names())
