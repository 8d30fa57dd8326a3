"""The command line: what it writes, what it prints, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import REMARKS, SIZES, run_config
from helpers.commandline import assert_says, call
from matplotlib.image import imread

from mend_lightning import Edit, LowConfidenceWarning, MendEditor, __version__
from mend_lightning.cli.commands import inputs as bases_module
from mend_lightning.cli.main import COMMANDS, TRAINER_COMMANDS
from mend_lightning.errors import ModelLoadError
from mend_lightning.evaluation.metric_collection import PROTOCOL

pytest_plugins = ["helpers.bases"]
# The commands of one run write to one folder.
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")
QUESTION = "Which continent is North Korea in?"


@pytest.fixture(scope="module")
def config(base_folder, facts, tmp_path_factory) -> Path:
    """A run of three steps; its results go to the folder the config lies in."""
    root = tmp_path_factory.mktemp("run")
    return run_config(
        root, base_folder("llama"), facts, logged=True, max_steps=3, val_check_interval=2, check_val_every_n_epoch=None
    )


@pytest.fixture(scope="module")
def session(config) -> dict[str, SimpleNamespace]:
    """fit -> test -> predict -> edit, as a user types them."""
    root, tested = config.parent, ["--config", config, "--model.editor", config.parent / "editor"]
    asked = ["--prompt", QUESTION, "--target", "Oceania", "--rephrase+", "What continent is North Korea on?"]
    return {
        "fit": call("fit", "--config", config),
        "test": call("test", *tested),
        "predict": call("predict", *tested),
        "edit": call(
            "edit", "--editor", root / "editor", *asked, "--dtype", "float32", "--out", root / "edit.safetensors"
        ),
    }


def test_every_command_of_a_session_succeeds(session):
    assert {name: (result.code, result.err) for name, result in session.items()} == dict.fromkeys(session, (0, ""))


def test_what_fit_leaves(session, config):
    root = config.parent
    editor = MendEditor.from_pretrained(root / "editor")
    kept = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(editor.edit_rates, kept["editor.edit_rates"])
    assert editor.prompt_format == {"prompt": "Q: {input}\nA:", "target": " {target}", "stop": "\n"}
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    height, width, _ = imread(root / "curves.png").shape
    assert (width > 1000, height > 300) == (True, True)
    columns = (root / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/edit", "train/locality", "train/grad_norm", "val/loss", "val/edit_success"} <= set(columns)
    rows = (root / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[1:]
    first = dict(zip(columns, rows[0].split(",")))
    assert first["step"] == "0" and first["val/loss"] and not first["train/edit"]
    # Checkpoints are of every step, and validations of every other one.
    line = rf"Training changed, on {SIZES['validation']} validation edits: success 0\.\d+ → 0\.\d+, .*, KL .* → .*\."
    behind = r"\(That is the validation after step 2: the editor that was kept has none of its own\.\)$"
    assert re.search(f"{line}.* {behind}", session["fit"].out), session["fit"].out[-400:]
    assert "First edit:" in session["fit"].out and f"Editor saved to {root / 'editor'}" in session["fit"].out


def test_results_of_test(session, config):
    results = json.loads((config.parent / "results.json").read_text())
    # This editor does not look how sure its edits are.
    measured = set(PROTOCOL) - {"confident"}
    assert set(results["metrics"]) == measured | {"edit_nll"}
    assert set(results["protocol"]) == measured
    assert (results["edits"], results["seed"], results["edits_at_a_time"]) == (SIZES["test"], 0, 1)
    assert results["cost_of_an_edit"]["seconds"] > 0 and results["cost_of_an_edit"]["edits"] == 2
    assert results["versions"]["mend_lightning"] == __version__
    assert {"torch", "transformers", "lightning", "python"} <= results["versions"].keys()
    assert results["base_fingerprint"] == MendEditor.from_pretrained(config.parent / "editor").base_fingerprint
    shares = {
        "edit_success",
        "reliability",
        "generality",
        "base_accuracy",
        "kept",
        "kept_hard",
        "generated_exact_match",
    }
    assert set(results["intervals_95"]) == shares
    for name, (low, high) in results["intervals_95"].items():
        assert low <= results["metrics"][name] <= high, name


def test_results_follow_from_the_examples(session, config, facts):
    """One line a test record, in their order, and the means of the lines are the results."""
    lines = [json.loads(line) for line in (config.parent / "examples.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (facts / "test.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [record["input"] for record in records]
    metrics = json.loads((config.parent / "results.json").read_text())["metrics"]
    right = [value for line in lines for value in (line["reliable"], *line["general"])]
    known = [pair for line in lines for pair in zip(line["known_before"], line["known_after"])]
    exact = [answer == line["target"] for line in lines for answer in line["generated"]]
    assert metrics["edit_success"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert metrics["generated_exact_match"] == pytest.approx(sum(exact) / len(exact), abs=1e-6)
    assert metrics["base_accuracy"] == pytest.approx(sum(before for before, _ in known) / len(known), abs=1e-6)
    kept = [after for before, after in known if before]
    assert metrics["kept"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    ends = [value for line in lines for value in line["stop_probability"]]
    assert metrics["stop_probability"] == pytest.approx(sum(ends) / len(ends), rel=1e-3)
    probabilities = sorted(line["probability"] for line in lines)
    assert metrics["probability"] == pytest.approx(probabilities[len(lines) // 2], abs=6e-4)


def test_the_table_is_printed_once(session):
    for label, protocol in (about for name, about in PROTOCOL.items() if name != "confident"):
        assert label in session["test"].out and protocol.split()[0] in session["test"].out
    assert session["test"].out.count("95 % interval") == 1
    assert "Test metric" not in session["test"].out


def test_a_checkpoint_gives_the_results_of_its_editor(session, config):
    before = json.loads((config.parent / "results.json").read_text())["metrics"]
    assert call("test", "--config", config, "--ckpt_path", config.parent / "checkpoints" / "last.ckpt").code == 0
    assert json.loads((config.parent / "results.json").read_text())["metrics"] == before


def test_predictions(session, config):
    lines = [json.loads(line) for line in (config.parent / "predictions.jsonl").read_text().splitlines()]
    examples = [json.loads(line) for line in (config.parent / "examples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [example["prompt"] for example in examples]
    # The tiny base knows these facts.
    assert [line["before"] for line in lines] == [example["answers"][0] for example in examples]
    assert [line["after"] for line in lines] == [example["generated"][0] for example in examples]


def test_edit_shows_before_and_after_and_saves(session, config):
    edit = Edit.load(config.parent / "edit.safetensors")
    assert edit.about["edits"] == [{"prompt": QUESTION, "target": "Oceania"}]
    out = session["edit"].out
    assert QUESTION in out and "Asia" in out and "What continent is North Korea on?" in out
    assert f"Edit saved to {config.parent / 'edit.safetensors'}" in out


def test_several_facts_from_a_file(session, config, tmp_path):
    lines = [{"prompt": QUESTION, "target": "Africa"}, {"prompt": "Which country is Managua in?", "target": "Cuba"}]
    (tmp_path / "edits.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    out = tmp_path / "new folder" / "both.safetensors"
    result = call(
        "edit",
        "--editor",
        config.parent / "editor",
        "--edits",
        tmp_path / "edits.jsonl",
        "--dtype",
        "float32",
        "--out",
        out,
    )
    assert (result.code, result.err) == (0, "")
    assert Edit.load(out).about["edits"] == lines


@pytest.mark.parametrize(
    "content, text",
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a"}', 'line 2: expected .* got \'{"prompt": "a"}\''),
        ("\nParis", "line 2: expected .* got 'Paris'"),
        ('{"prompt": "a", "target": " "}', "line 1: prompt and target must be non-empty texts"),
        ("[1]", "line 1: expected"),
        ("\n", "holds no edit. Expected lines like"),
        (None, "edits file .* cannot be read: .*No such file"),
    ],
)
def test_bad_edit_files(content, text, tmp_path):
    path = tmp_path / "edits.jsonl"
    if content is not None:
        path.write_text(content)
    result = call("edit", "--edits", path)
    assert result.code == 1
    assert_says(result.err, text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--prompt", "a"], "needs --prompt and --target"),
        (["--prompt", "a", "--edits", "b"], "either --edits FILE, or --prompt and --target, not both"),
        (
            ["--prompt", "a", "--target", "b", "--editor", "nowhere"],
            "nowhere is not a saved editor: it has no editor.json",
        ),
    ],
)
def test_edit_that_cannot_be(arguments, text):
    result = call("edit", *arguments)
    assert result.code == 1
    assert_says(result.err, text)


def test_help():
    shown = call("--help")
    assert shown.code == 0
    assert all(f"{name} " in shown.out for name in (*TRAINER_COMMANDS, *COMMANDS))
    assert "show-config lists them" in shown.out
    assert call().out == shown.out
    assert call("--version").out == f"mend-lightning {__version__}"
    fit, edit = call("fit", "--help"), call("edit", "--help")
    assert (fit.code, edit.code) == (0, 0)
    assert "weight of the edit loss (paper: 0.1)" in fit.out and "edit tasks a step" in fit.out
    assert "the question whose answer changes" in edit.out


def test_unknown_command():
    result = call("tset")
    assert result.code == 2
    assert_says(result.err, "unknown command 'tset'. Did you mean 'test'\\? Commands: fit, validate, .*layers")


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("edit_rate_lr:", "edit_rat_lr:", "'model.edit_rat_lr'.*Did you mean 'model.edit_rate_lr'"),
        ("batch_size:", "bach_size:", "Did you mean 'data.batch_size'"),
        ("log_every_n_steps:", "log_evry_n_steps:", "Did you mean 'trainer.log_every_n_steps'"),
        ("dtype:", "dtpye:", "Did you mean 'model.base.dtype'"),
        ("\nmodel:", "\nmodle:", "Did you mean 'model"),
        ("seed_everything:", "seed_evrything:", "Did you mean 'seed_everything'"),
        ("save_last:", "save_lst:", "ModelCheckpoint.*'save_lst' is not accepted"),
        ("rank: 8", "rank: many", 'key "model.rank": Expected a .*int.* Got value: many'),
    ],
)
def test_typos_in_a_config(old, new, text, config, tmp_path):
    content = config.read_text()
    assert content.count(old) >= 1
    (tmp_path / "typo.yaml").write_text(content.replace(old, new, 1))
    result = call("fit", "--config", tmp_path / "typo.yaml")
    assert result.code == 2
    assert_says(result.err, text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--data.train", "nowhere.jsonl"], "'nowhere.jsonl' does not exist .*shipped sets: .*world_facts/test"),
        (
            ["--model.base.name", "nobody/nothing"],
            "'nobody/nothing' could not be loaded.*Give a local folder, download",
        ),
        (["--model.base.name", "."], "does not hold a model that transformers can load"),
        (
            ["--model.layers+", "model.layers.1.mlp.gate_prj"],
            "matches no layer. Did you mean model.layers.1.mlp.gate_proj",
        ),
        (["--data.hard_locality", 5], r"hard_locality \(5.*cannot exceed it"),
        (["--data.prompt", "Q:"], "prompt template must contain {input}"),
        (["--trainer.inference_mode", "true"], "inference_mode=False"),
        (["--trainer.default_root_dir", "a file/run"], "Cannot write to the folder a file/run.*Give one that you may"),
        (["--model.editor", "nowhere"], "nowhere is not a saved editor"),
        (["--trainer.strategy", "fspd2"], "There is no strategy 'fspd2'. Did you mean 'fsdp2'.*Usable: auto, ddp"),
        (["--trainer.strategy", "deepspeed"], "'deepspeed' cannot shard this model.*Usable: .*fsdp2"),
        (["--trainer.strategy", "ddp_spawn"], "'ddp_spawn' copies.*Use 'ddp'"),
        (
            ["--trainer.strategy", "ShardedStrategy", "--trainer.strategy.tensor_parallel_size", 2],
            "cannot be set up: tensor_parallel_size=2: tensor parallelism is not supported.*Leave it at 1.*over all devices.$",
        ),
        (
            ["--ckpt_path", "best"],
            "known to the process that trained alone.*--model.editor RUN/editor.*--ckpt_path last",
        ),
        (["--trainer.devices", 0], r"cannot be set up: .*devices='0'.* is not a valid input"),
    ],
)
def test_what_a_run_is_refused_for(arguments, text, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    result = call("fit", "--config", config, *arguments)
    assert result.code == 1
    assert_says(result.err, text)


def test_unknown_config():
    result = call("fit", "--config", "quikstart")
    assert result.code == 1
    assert_says(
        result.err, "Config 'quikstart' is no file .*Did you mean quickstart.*show-config` lists the shipped ones"
    )


def test_layers(base_folder):
    result = call("layers", base_folder("llama"), "--dtype", "float32")
    assert result.code == 0
    assert result.out.count("_proj") == 9 and "model.layers.3.mlp.down_proj │ Linear │ 24 │ 16" in result.out
    assert "Stack model.layers: 4 blocks" in result.out and "the paper's choice" in result.out
    result = call("layers", base_folder("gpt2"), "--layers+", "*.1.attn.c_*", "--dtype", "float32")
    assert (
        "transformer.h.1.attn.c_attn │ Conv1D │ 16 │ 48" in result.out and "they match ['*.1.attn.c_*']" in result.out
    )
    result = call("layers", base_folder("gpt2"), "--layers+", "transformer.h.1.atn.c_attn")
    assert_says(result.err, "matches no layer. Did you mean transformer.h.1.attn.c_attn")


def test_a_model_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEND_LIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
    result = call("get-smollm2")
    assert result.code == 1
    assert_says(result.err, r"Cannot write to the folder \S*file/cache: .*MEND_LIGHTNING_CACHE chooses another folder")


def test_an_edit_as_sure_as_asked(session, config, tmp_path):
    """--confidence overrides the editor's own; this one has none."""
    asked = ["--prompt", QUESTION, "--target", "Oceania", "--dtype", "float32", "--editor", config.parent / "editor"]
    with pytest.warns(LowConfidenceWarning, match="Oceania"):
        result = call("edit", *asked, "--confidence", 0.999999, "--out", tmp_path / "sure")
    assert result.code == 0, result.err
    call("edit", *asked, "--out", tmp_path / "plain")
    plain = Edit.load(tmp_path / "plain")
    assert plain.about["probability"] > 2 * plain.about["probability_before"]
    call("edit", *asked, "--confidence", plain.about["probability"] / 2, "--out", tmp_path / "less")
    less = Edit.load(tmp_path / "less")
    assert less.about["probability"] < plain.about["probability"]
    assert all(less.deltas[name].norm() < delta.norm() for name, delta in plain.deltas.items())
    result = call("edit", *asked, "--confidence", 1.5, "--out", tmp_path / "x")
    assert_says(result.err, "must be between 0 and 1, not 1.5")


def test_an_editor_remembers_how_its_base_is_loaded(config, session, monkeypatch):
    folder = config.parent / "editor"
    description = json.loads((folder / "editor.json").read_text())
    assert description["base_options"] == {"revision": None, "kind": None, "quantize": None}
    seen = {}

    def load(name, dtype, **options):
        seen.update(options, name=name)
        raise ModelLoadError("stop here")

    monkeypatch.setattr(bases_module, "load_base", load)
    editor = MendEditor.from_pretrained(folder)
    editor.base_options = {"revision": "abc", "kind": "causal"}
    editor.save_pretrained(config.parent / "pinned")
    asked = ["--prompt", QUESTION, "--target", "Oceania", "--editor", config.parent / "pinned"]
    assert_says(call("edit", *asked).err, "stop here")
    assert seen == {
        "name": editor.base_name, "revision": "abc", "kind": "causal", "trust_remote_code": False
    }  # fmt: skip
    seen.clear()
    assert_says(call("edit", *asked, "--base", "other", "--trust_remote_code", "true").err, "stop here")
    assert seen == {"name": "other", "trust_remote_code": True}


@pytest.mark.parametrize("family, kind", [("t5", "encoder_decoder"), ("bert", "classifier")])
def test_other_families(family, kind, base_folder, facts, tmp_path):
    config = run_config(tmp_path, base_folder(family), facts, kind, max_steps=2)
    assert call("fit", "--config", config).code == 0
    assert call("test", "--config", config, "--model.editor", tmp_path / "editor").code == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert ("generated_exact_match" in metrics) == (kind != "classifier")
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == SIZES["test"]
    if kind == "classifier":
        assert call("predict", "--config", config, "--model.editor", tmp_path / "editor").code == 0
        said = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert {each["before"] for each in said} <= {"SUPPORTS", "REFUTES"}
        # The answers are in the words of the edit.
        asked = ["--prompt", "Which continent is North Korea in? Asia.", "--target", "false", "--dtype", "float32"]
        edited = call("edit", "--editor", tmp_path / "editor", *asked, "--out", tmp_path / "edit.safetensors")
        assert edited.code == 0, edited.err
        assert re.search("(true|false) │ (true|false)", edited.out) and "REFUTES" not in edited.out
        assert (tmp_path / "edit.safetensors").is_file()


def test_overfitting_on_one_batch(config, tmp_path):
    """Lightning then puts a sampler of its own in place of ours."""
    once = ["--trainer.overfit_batches", "1", "--trainer.default_root_dir", tmp_path]
    with pytest.warns(UserWarning, match="You requested to overfit"):
        assert call("fit", "--config", config, *once).code == 0


def test_several_edits_at_once(config, tmp_path):
    once = ["--data.edits_at_once", "2", "--trainer.default_root_dir", tmp_path]
    assert call("fit", "--config", config, *once, "--data.batch_size", "2", "--trainer.max_steps", "2").code == 0
    tested = call("test", "--config", config, *once, "--model.editor", tmp_path / "editor")
    assert tested.code == 0 and "2 at once" in tested.out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["edits"], results["edits_at_a_time"]) == (SIZES["test"] // 2 * 2, 2)
    many = call("test", "--config", config, "--data.edits_at_once", "8", "--model.editor", tmp_path / "editor")
    assert many.code == 1
    assert_says(many.err, r"7 record\(s\) to evaluate on 1 process\(es\); each needs at least 8.*lower edits_at_once")
