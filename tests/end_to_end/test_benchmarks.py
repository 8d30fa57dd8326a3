"""The benchmark measures two programs that compute the same, and its command writes what it found."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.bases import FORMATS, run_config
from helpers.models import relative_error

pytest_plugins = ["helpers.bases"]

# The benchmark is a program beside the package, run from the repository's root, and is not installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import compared, phases, width  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.floor import Floor  # noqa: E402
from benchmarks.memory import peak_memory  # noqa: E402
from benchmarks.timing import Timing, in_turn  # noqa: E402
from benchmarks.workloads import (  # noqa: E402
    C_EDIT,
    Bench,
    Settings,
    build,
    compare_logits,
    compare_losses,
    warm_up_statistics,
    workload,
)
from mend_lightning import make_edit  # noqa: E402
from mend_lightning.editors.factors import edit_factors  # noqa: E402
from mend_lightning.evaluation.cost import RESET, resident_peak  # noqa: E402
from mend_lightning.training.step import edit_step  # noqa: E402

LOSS, GRADIENT = 1e-4, 1e-3
TINY = ("tiny-gpt2", "tiny-t5")
OPTIONS = ["--edits", "3", "--tokens", "10", "--rank", "8", "--threads", "1", "--repeats", "1"]

needs_proc = pytest.mark.skipif(not RESET.exists(), reason="the peak is read from Linux's /proc")


def tiny_bench(model: str, command: str = "step") -> Bench:
    bench = build(Settings(command, model, edits=3, tokens=10, rank=8, threads=1))
    warm_up_statistics(bench)
    return bench


@pytest.mark.parametrize("model", TINY)
def test_ours_and_reference_have_the_same_losses(model):
    found = compare_losses(tiny_bench(model))
    assert all(each["difference"] < LOSS for each in found.values()), found
    # Equal would prove nothing if the edit changed nothing.
    assert found["locality"]["reference"] > 10 * LOSS


@pytest.mark.parametrize("model", TINY)
def test_ours_and_reference_have_the_same_gradients(model):
    bench = tiny_bench(model)
    edit_step(bench.model, bench.editor, bench.batch).total(C_EDIT).backward()
    ours = {name: parameter.grad for name, parameter in bench.editor.named_parameters()}
    bench.editor.zero_grad()
    bench.reference.step(bench.batch, training=False)
    for name, parameter in bench.editor.named_parameters():
        assert parameter.grad.any(), name
        assert relative_error(ours[name], parameter.grad) < GRADIENT, name


@pytest.mark.parametrize("model", TINY)
def test_ours_and_reference_apply_the_same_edit(model):
    assert compare_logits(tiny_bench(model, "apply"))["logits"]["difference"] < LOSS


@pytest.mark.parametrize("command", ["step", "apply"])
@pytest.mark.parametrize("variant", ["ours", "reference", "floor"])
def test_a_workload_leaves_the_base_as_it_was(command, variant):
    bench = tiny_bench("tiny-gpt2", command)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    workload(bench, command, variant)()
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in bench.model.parameters())


def test_variants_are_timed_in_turn_and_the_first_round_does_not_count():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = list(in_turn(runs, repeats=2))
    assert calls == [name for name, _ in found] == ["a", "b"] * 3
    assert [seconds is None for _, seconds in found] == [True] * 2 + [False] * 4


def test_seconds_are_divided_by_the_edits_of_a_step():
    assert Timing.of([4.0, 2.0, 9.0], per=2) == Timing(median=2.0, min=1.0, max=4.5)


@needs_proc
def test_the_peak_is_seen_after_the_memory_was_freed():
    # 64 MB: above the size from which malloc takes every block from the system and gives it back.
    found = resident_peak(lambda: torch.ones(16_000_000).sum())
    assert 60 < found["beyond"] < 80


@needs_proc
def test_memory_is_measured_in_a_process_of_its_own():
    found = peak_memory(Settings("step", "tiny-gpt2", edits=2, tokens=10, rank=8, threads=1), "ours")
    assert found["before"] > 50
    assert 0 <= found["beyond"] < 50


@pytest.mark.parametrize(("command", "model"), [("step", "tiny-gpt2"), ("apply", "tiny-t5")])
def test_the_command_prints_a_table_and_appends_a_json_line(command, model, tmp_path, capsys):
    results = tmp_path / f"{command}.jsonl"
    results.write_text("{}\n")
    main([command, "--model", model, *OPTIONS, "--no-memory", "--out", str(tmp_path)])
    earlier, line = map(json.loads, results.read_text().splitlines())
    assert earlier == {}
    assert line["settings"]["model"] == model and line["settings"]["threads"] == 1
    assert line["settings"]["edits"] == (3 if command == "step" else 1)
    assert f"benchmarks {command} --model {model}" in line["command_line"]
    assert set(line["seconds_per_edit"]) == {"ours", "reference", "floor"}
    assert line["largest_difference"] < LOSS and line["of_floor"] > 0
    assert {"torch", "transformers", "mend_lightning", "python"} <= set(line["versions"])
    assert line["cpu"] and line["date"] and line["times_faster"] > 0
    printed = capsys.readouterr().out
    assert "reference" in printed and "times faster" in printed and "times the floor's time" in printed


def test_variants_are_chosen(tmp_path, capsys):
    line = main(["step", "--model", "tiny-gpt2", *OPTIONS, "--no-memory", "--compare", "floor", "--out", str(tmp_path)])
    assert set(line["seconds_per_edit"]) == {"ours", "floor"} and "times_faster" not in line
    with pytest.raises(SystemExit):
        main(["step", "--compare", "flor"])
    assert "'flor' is not known; compare with reference or floor, or both" in capsys.readouterr().err


def test_memory_alone(tmp_path, monkeypatch):
    """Without the measurement, which takes a process of its own for each variant."""
    monkeypatch.setattr(
        compared, "peak_memory", lambda settings, variant: {"before": 9.0, "beyond": 2.0 + (variant == "ours")}
    )
    line = main(["memory", "--model", "tiny-gpt2", *OPTIONS, "--compare", "floor", "--out", str(tmp_path)])
    assert not line["seconds_per_edit"] and line["memory_of_floor"] == 1.5
    assert json.loads((tmp_path / "memory.jsonl").read_text()) == line


@pytest.mark.parametrize("model", TINY)
def test_the_floor_runs_the_same_tensors(model):
    """Its edits' loss is ours; and each of the editor's matrices gets a gradient, as in ours."""
    bench = tiny_bench(model)
    floor = Floor(bench.model, bench.editor, bench.batch, C_EDIT)
    ours = edit_step(bench.model, bench.editor, bench.batch)
    assert float(floor.inner_loss()) == pytest.approx(float(ours.inner.mean()), rel=1e-6)
    factors = edit_factors(bench.model, bench.editor.modules_in(bench.model), bench.batch.z_edit)[0]
    assert {name: len(places) for name, places in floor.kept.items()} == {
        name: len(each.u) for name, each in factors.items()
    }
    floor.step()
    matrices = [p for name, p in bench.editor.named_parameters() if name.endswith((".u", ".v"))]
    assert matrices and all(p.grad is not None and p.grad.any() for p in matrices)


@pytest.mark.parametrize("model", TINY)
def test_without_normalising_and_clamps_the_floor_is_ours(model, monkeypatch):
    """What the floor leaves out taken from ours: the losses are equal then, so nothing else is missing."""
    bench = tiny_bench(model)
    bench.editor.eval()
    for transform in bench.editor.transforms:
        transform.normalize = False
    monkeypatch.setattr(torch.Tensor, "clamp", lambda self, min=None, max=None: self)
    ours = edit_step(bench.model, bench.editor, bench.batch).total(C_EDIT)
    floor = Floor(bench.model, bench.editor, bench.batch, C_EDIT).step()
    assert float(floor) == pytest.approx(float(ours.detach()), rel=1e-5)


def test_rows_too_short_for_their_targets_are_refused():
    with pytest.raises(ValueError, match="no room for a prompt"):
        build(Settings("step", "tiny-gpt2", tokens=7))


def test_the_command_for_stacks(tmp_path, capsys):
    arguments = [
        "stack",
        "--model",
        "tiny-gpt2",
        "--dtype",
        "float32",
        "--rank",
        "3",
        "--tokens",
        "6",
        "--changes",
        "12",
    ]
    line = main([*arguments, "--stacked", "1", "5", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "stack.jsonl").read_text()) == line
    assert line["changes"]["edits"] == 12 and line["changes"]["bit_equal"] is True
    assert line["forward"].keys() == {"0", "1", "5"} and line["forward"]["0"]["ratio"] == 1.0
    assert all(each["seconds"] > 0 for each in line["forward"].values())
    assert all(each["max"] >= each["median"] > 0 for each in line["changes"]["ms"].values())
    assert len(line["layers"]) == 6 and line["settings"]["stacked"] == [1, 5]
    assert "The base is bit-equal afterwards." in capsys.readouterr().out


def test_forwards_are_of_that_many_edits(monkeypatch):
    """Each timed pass has as many edits on as its name says; afterwards there is none."""
    from benchmarks import stack
    from mend_lightning import EditStack

    model, on = stack.load("tiny-gpt2", "float32"), []
    edits = stack.random_edits(model, None, rank=2, count=4)
    model.register_forward_pre_hook(lambda *_: on.append(sum(each.enabled for each in EditStack(model))))
    found = stack.time_forwards(model, edits, [1, 4], torch.ones(1, 5, dtype=torch.long), repeats=3)
    assert on == [0, 0, 1, 1, 4, 4] * 3 and found.keys() == {"0", "1", "4"}
    assert not len(EditStack(model))


def test_the_command_for_making_edits(tmp_path, mend, facts, monkeypatch):
    """Every variant makes an edit of each fact, as it is called, in turn with the others."""
    from benchmarks import making

    module = mend("llama", confidence=0.5)
    module.configure_model()
    module.editor.prompt_format = asdict(FORMATS["causal"])
    folder, made = module.editor.save_pretrained(tmp_path / "editor"), []

    def watched(editor, model, tokenizer, fact, keep, contrasts, subjects):
        edit = make_edit(editor, model, tokenizer, fact, keep, contrasts, subjects)
        made.append((len(edit.about.get("contrasts", [])), editor.inner_steps, editor.wordings))
        return edit

    monkeypatch.setattr(making, "make_edit", watched)
    options = ["--facts", str(facts / "test.jsonl"), "--count", "2", "--repeats", "1", "--threads", "1"]
    line = main(["make", "--editor", str(folder), *options, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "make.jsonl").read_text()) == line
    assert made == [settings for settings in making.VARIANTS.values() for _ in range(2)] * 2
    assert line["making"]["one step"]["ratio"] == 1.0
    assert all(each["max"] >= each["seconds"] >= each["min"] > 0 for each in line["making"].values())


def test_the_command_for_plans(tmp_path, monkeypatch, capsys):
    """Without the measurement itself, which needs a process of its own and minutes."""
    from benchmarks import plan

    sizes = {"total": 110.0, "kept": 60.0, "activations": 50.0}
    off = {**dict.fromkeys(sizes, 0.0), "total": 0.1}
    found = {"planned_mb": sizes, "measured_mb": {**sizes, "total": 100.0}, "off": off, "loading_mb": 7.0}
    runs = []
    monkeypatch.setattr(plan, "run_apart", lambda run: runs.append(run) or found)
    line = main(
        ["plan", "--model", "openai-community/gpt2", "--dtype", "float32", "--edits", "3", "--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / "plan.jsonl").read_text()) == line and line["planned_mb"] == sizes
    assert runs == [plan.Run("openai-community/gpt2", "float32", 3)] and line["settings"]["rank"] == 1920
    assert "+10.0" in capsys.readouterr().out


@needs_proc
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_peak_of_training_steps_is_seen(tmp_path):
    from transformers import GPT2Config

    from benchmarks import plan

    GPT2Config(n_embd=32, n_head=2, n_layer=4, vocab_size=2000).save_pretrained(tmp_path)
    module, data, peak = plan.fit(plan.Run(str(tmp_path), "float32", 2, 8))
    assert module.trainer.global_step == plan.BEFORE + plan.MEASURED and data.batch_size == 2
    assert 50 < peak.before <= peak.peak < peak.before + 200


@needs_proc
def test_width(tmp_path, monkeypatch):
    """The figures mean nothing at this size, but for their order. In this process: others take long to start."""
    monkeypatch.setattr(width, "peak", width.measure)
    line = main(["width", "--widths", "128", "256", "--tokens", "8", "--out", str(tmp_path)])
    assert [(row["variant"], row["width"]) for row in line["rows"]] == [
        ("ours", 128), ("ours", 256), ("reference", 128), ("reference", 256),
    ]  # fmt: skip
    assert all(row["beyond_mb"] > 0 for row in line["rows"]) and line["rows"][1]["times"] > 1
    assert json.loads((tmp_path / "width.jsonl").read_text()) == line


@pytest.mark.filterwarnings("ignore")
def test_scaling(tmp_path, base_folder, facts):
    config = run_config(tmp_path / "run", base_folder("llama"), facts)
    options = ["--config", str(config), "--processes", "1", "--warm-up", "1", "--steps", "2", "--repeats", "1"]
    line = main(["scaling", *options, "--out", str(tmp_path)])
    assert line["edits_per_second"]["1"]["median"] > 0 and line["times_the_first"] == {"1": 1.0}


def test_profile(tmp_path):
    """Each phase that a step has takes time, and none of what the step needs is left out."""
    arguments = ["profile", "--edits", "3", "--tokens", "10", "--rank", "8", "--threads", "1", "--repeats", "2"]
    for model in TINY:
        line = main([*arguments, "--model", model, "--out", str(tmp_path)])
        assert line["seconds"].keys() == set(phases.PHASES)
        assert {name for name, seconds in line["seconds"].items() if not seconds} == {phases.CONFIDENCE}
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    assert len((tmp_path / "profile.jsonl").read_text().splitlines()) == 2


def test_gradients_of_a_profiled_step_are_those_of_a_step():
    bench = tiny_bench("tiny-gpt2")
    edit_step(bench.model, bench.editor, bench.batch).total(C_EDIT).backward()
    expected = [parameter.grad.clone() for parameter in bench.editor.parameters()]
    bench.editor.zero_grad()
    watch = phases.Stopwatch()
    with phases.watched(watch) as made:
        loss = edit_step(bench.model, bench.editor, bench.batch).total(C_EDIT)
    torch.autograd.backward(made, torch.autograd.grad(loss, made))
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(bench.editor.parameters(), expected))
    assert watch.seconds.keys() == set(phases.FUNCTIONS.values()) - {phases.CONFIDENCE}
