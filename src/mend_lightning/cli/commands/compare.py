"""`mend-lightning compare`: trains and tests several editors on one task and base, and puts the results side by side."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mend_lightning.cli.commands.comparison import (
    Outcome,
    check_same_edits,
    comparison_markdown,
    comparison_tables,
    read_outcome,
    rows_of,
)
from mend_lightning.cli.commands.plots import draw_comparison
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.cli.config.tree import Leaf, merge_trees, plain, to_yaml
from mend_lightning.editors.normalizer import STATISTICS_EDITS
from mend_lightning.errors import ConfigError, MendError
from mend_lightning.evaluation.report import versions
from mend_lightning.files import check_writable_file, write_json, written
from mend_lightning.training.progress.console import console

SECTION = "compare"
# The editor that is compared untrained as well, and what it is called then.
TRAINED, UNTRAINED = "MEND", "MEND, not trained"
# What `write_comparison` leaves.
RESULTS = ("comparison.json", "comparison.md", "success-drawdown.png", "cost.png", "success-edits.png")


@dataclass(frozen=True)
class Run:
    """One editor, trained and tested with one number of edits at once.

    Attributes:
        editor: its name in the comparison.
        edits_at_once: edits made together.
        folder: where everything of it goes.
        config: its whole config for `fit` and `test`.
        trained: the folder of the editor that is tested; None: the one that this run trains.
    """

    editor: str
    edits_at_once: int
    folder: Path
    config: Mapping[str, Any]
    trained: Path | None = None


def compare_command(
    name: str, out: Path | None = None, editors: list[str] | None = None, edits_at_once: list[int] | None = None
) -> None:
    """Trains (or loads) editors on one task and base, tests all on the same edits, writes one table and plots.

    A comparison that was stopped resumes: what is finished is not done again.

    Args:
        name: a config as for fit, with a section `compare` that names the editors: a file or a shipped one (`--config NAME`).
        out: folder of the results; default: the config's `compare.out`.
        editors: names of those to compare; default: all of the config. Where MEND is among them, it is compared untrained as well,
            unless the config's `compare.untrained` is false.
        edits_at_once: numbers of edits made together, such as [1,5,25]; default: the config's `compare.edits_at_once`. With
            a config without the section `compare`: its editor, trained and tested at each of these numbers.
    """
    runs, reference = plan(name, out, editors, edits_at_once)
    root = runs[0].folder.parents[1]
    for result in RESULTS:
        check_writable_file(root / result)
    outcomes = []
    for number, planned in enumerate(runs, start=1):
        many = "" if planned.edits_at_once == 1 else f", {planned.edits_at_once} edits at once"
        console().rule(f"{number} of {len(runs)}: {planned.editor}{many}")
        outcomes.append(run(planned))
    write_comparison(root, outcomes, reference, name)


def plan(
    config: str, out: Path | None = None, editors: Sequence[str] | None = None, counts: Sequence[int] | None = None
) -> tuple[list[Run], str]:
    """The runs that a config asks for, and the name of the reference editor.

    Raises:
        ConfigError: the section `compare` is missing or wrong, or an editor is not in it.
    """
    tree = dict(read_config(config).tree)
    section = tree.pop(SECTION, None)
    if section is None and counts:
        # One editor at several numbers of edits: the paper's table 5.
        name = _editor_name(plain(tree.get("model", {}).get("algorithm", {})))
        section = {"editors": {name: {}}, "out": _leaf(Path("runs") / f"{Path(config).stem}-several")}
    if not isinstance(section, dict) or not isinstance(section.get("editors"), dict):
        raise ConfigError(
            f"{config} has no section `{SECTION}` with `editors`. Expected, beside what fit needs: "
            "compare: {editors: {MEND: {}, "
            "FT: {model: {algorithm: …}}}}}; for one editor at several numbers of edits give --edits_at_once [1,5,25]."
        )
    settings = {key: plain(value) for key, value in section.items() if key != "editors"}
    _check_settings(settings, config)
    names = list(editors or section["editors"])
    unknown = [name for name in names if name not in section["editors"]]
    if unknown:
        raise ConfigError(f"{config} compares {', '.join(section['editors'])}; there is no {', '.join(unknown)}.")
    root = Path(out or settings.get("out") or "runs/compare")
    counts = list(counts or settings.get("edits_at_once") or [1])
    own = bool(settings.get("train_at_each", True))
    runs = [
        _run(name, count, counts[0] if not own else count, root, tree, section["editors"][name])
        for name in names
        for count in counts
    ]
    if settings.get("untrained", True) and UNTRAINED not in section["editors"]:
        runs = with_untrained(runs)
    _check_folders(runs)
    reference = settings.get("reference", names[0])
    if reference not in section["editors"]:
        raise ConfigError(
            f"{config}: {SECTION}.reference is {reference!r}; it must be one of {', '.join(section['editors'])}."
        )
    return runs, reference if reference in names else names[0]


def _check_folders(runs: Sequence[Run]) -> None:
    owners: dict[Path, str] = {}
    for run in runs:
        other = owners.setdefault(run.folder, run.editor)
        if other != run.editor:
            raise ConfigError(
                f"The editors {other!r} and {run.editor!r} would share the folder {run.folder}. Rename one."
            )


def _leaf(value: Any) -> Leaf:
    return Leaf(str(value), Path("--edits_at_once"), 0)


def _editor_name(algorithm: Any) -> str:
    path = algorithm.get("class_path", "MEND") if isinstance(algorithm, dict) else str(algorithm or "MEND")
    return path.rpartition(".")[2]


def _check_settings(settings: Mapping[str, Any], config: str) -> None:
    known = {"out": str, "reference": str, "edits_at_once": list, "train_at_each": bool, "untrained": bool}
    for key, value in settings.items():
        if key not in known or not isinstance(value, known[key]):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            raise ConfigError(f"{config}: {SECTION}.{key} is {value!r}. The section takes editors and {expected}.")


def _run(name: str, count: int, trained_at: int, root: Path, shared: dict[str, Any], own: Any) -> Run:
    if isinstance(own, Leaf) and own.value is not None and own.value != {}:
        raise ConfigError(
            f"compare.editors.{name} must hold what differs from the shared config, or {{}}; it is {own.value!r}."
        )
    merged = plain(merge_trees(shared, own if isinstance(own, dict) else {}))
    broken = next((key for key in ("model", "data", "trainer") if not isinstance(merged.get(key, {}), dict)), None)
    if broken:
        raise ConfigError(f"compare.editors.{name}: {broken} must hold settings, and it is {merged[broken]!r}.")
    folder = root / _folder_name(name) / f"k{count}"
    data = dict(merged.get("data", {}))
    # About as many edits a step whatever their grouping, but never less than one task.
    data |= {"edits_at_once": count, "batch_size": max(1, data.get("batch_size", 8) // count)}
    merged |= {"data": data, "trainer": {**merged.get("trainer", {}), "default_root_dir": str(folder)}}
    given = merged.get("model", {}).pop("editor", None)
    elsewhere = folder.parent / f"k{trained_at}" / "editor" if trained_at != count else None
    return Run(name, count, folder, merged, Path(given) if given else elsewhere)


def _folder_name(editor: str) -> str:
    return re.sub(r"[^a-z0-9+.]+", "-", editor.lower())


def with_untrained(runs: Sequence[Run]) -> list[Run]:
    """The runs, and behind those of MEND the same of an editor that learns nothing: what training adds is their difference.

    A saved editor has no such companion, for what it began with is not known.
    """
    mends = [run for run in runs if run.editor == TRAINED and _is_mend(run.config) and _is_own(run)]
    behind = max((index for index, run in enumerate(runs) if run in mends), default=-1) + 1
    return [*runs[:behind], *map(_untrained, mends), *runs[behind:]]


def _is_mend(config: Mapping[str, Any]) -> bool:
    return _editor_name(config.get("model", {}).get("algorithm")) in (TRAINED, "MendEditor")


def _is_own(run: Run) -> bool:
    """Whether the comparison trains its editor itself, if with another number of edits at once."""
    return run.trained is None or run.folder.parent in run.trained.parents


def _untrained(run: Run) -> Run:
    """`run` with learning rates of 0: its steps gather the running statistics, and nothing else.

    Where the config counts in steps there are as many of them as that takes.
    """
    folder = run.folder.parents[1] / _folder_name(UNTRAINED)
    model, data, trainer = (dict(run.config.get(key, {})) for key in ("model", "data", "trainer"))
    model |= {"lr": 0.0, "edit_rate_lr": 0.0, "validate_first": False}
    trainer["default_root_dir"] = str(folder / run.folder.name)
    enough = math.ceil(STATISTICS_EDITS / (data["batch_size"] * run.edits_at_once))
    if trainer.get("max_steps", -1) > enough and trainer.get("check_val_every_n_epoch", 1) is None:
        trainer["max_steps"] = enough
    trained = folder / run.trained.relative_to(run.folder.parent) if run.trained else None
    config = {**run.config, "model": model, "trainer": trainer}
    return Run(UNTRAINED, run.edits_at_once, folder / run.folder.name, config, trained)


def run(planned: Run) -> Outcome:
    """Trains and tests, unless both were done before.

    Raises:
        ConfigError: the folder holds results of another config.
        MendError: training or testing failed.
    """
    config = planned.folder / "run.yaml"
    if config.is_file() and config.read_text(encoding="utf-8") != to_yaml(dict(planned.config)):
        # What failed before it made anything may be tried again with a corrected config.
        if any((planned.folder / name).exists() for name in ("checkpoints", "editor", "results.json")):
            raise ConfigError(
                f"{planned.folder} holds results of another config than {planned.editor}'s is now. Remove that folder, or give "
                "another --out."
            )
        (planned.folder / "fit.json").unlink(missing_ok=True)
    with written(config) as temporary:
        temporary.write_text(to_yaml(dict(planned.config)), encoding="utf-8")
    seconds = 0.0 if planned.trained else _fit(planned, config)
    if not (planned.folder / "results.json").is_file():
        _call("test", config, "--model.editor", str(planned.trained or planned.folder / "editor"))
    return read_outcome(planned.editor, planned.folder, seconds)


def _fit(run: Run, config: Path) -> float:
    """Seconds of training, of all attempts together."""
    clock = run.folder / "fit.json"
    spent = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {"seconds": 0.0, "finished": False}
    if not spent["finished"]:
        last = run.folder / "checkpoints" / "last.ckpt"
        start = time.perf_counter()
        try:
            _call("fit", config, *(["--ckpt_path", str(last)] if last.is_file() else []))
            spent["finished"] = True
        finally:
            spent["seconds"] += time.perf_counter() - start
            write_json(clock, spent)
    return spent["seconds"]


def _call(command: str, config: Path, *arguments: str) -> None:
    """Runs a command in a process of its own: its memory is its own, and gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mend_lightning.cli", command, "--config", str(config), *arguments]
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches it as well; it saves what it has.
        process.wait()
        raise
    if code:
        raise MendError(
            f"`mend-lightning {command} --config {config}` failed (exit code {code}); its error is above. What was finished before "
            "is kept: the same comparison resumes there."
        )


def write_comparison(root: Path, outcomes: Sequence[Outcome], reference: str, config: str) -> None:
    """Prints the table; writes comparison.json, comparison.md and the plots to `root`."""
    for count in dict.fromkeys(outcome.edits_at_once for outcome in outcomes):
        check_same_edits([outcome for outcome in outcomes if outcome.edits_at_once == count])
    rows = rows_of(outcomes, reference)
    first = outcomes[0].results
    edits = len(outcomes[0].records)
    title = f"{len({row['editor'] for row in rows})} editors of {first['base']} on {edits} edits of {first['test']}"
    notes = [
        f"`mend-lightning compare --config {config}`. All with one k are tested on the same edits; k: edits made together, "
        f"and in training max(1, batch_size // k) such tasks a step. "
        f"Differences to {reference} with a 95 % interval from a paired bootstrap over tasks."
    ]
    write_json(root / "comparison.json", {"title": title, "reference": reference, "rows": rows, "versions": versions()})
    with written(root / "comparison.md") as temporary:
        temporary.write_text(comparison_markdown(title, rows, reference, notes), encoding="utf-8")
    console().print(*comparison_tables(title, rows, reference), sep="\n")
    files = [root / "comparison.json", root / "comparison.md", *draw_comparison(rows, root)]
    console().print(f"Written: {', '.join(map(str, files))}", highlight=False)
