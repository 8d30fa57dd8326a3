"""`mend-lightning check-data`: what a data file holds, and what of it can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mend_lightning.data.check import DataCheck, Lengths, check_source, counts, token_lengths
from mend_lightning.errors import EmptyDatasetError, ModelLoadError, RecordError
from mend_lightning.models.architecture import resolve_name
from mend_lightning.models.inputs.prompts import RUNNING_TEXT, PromptFormat
from mend_lightning.training.progress.console import console

SHOWN = 10


def check_data_command(
    file: str,
    format: str = "auto",
    columns: dict[str, str | list[str]] | None = None,
    require_rephrases: bool = True,
    base: str | None = None,
    max_length: int = 200,
    prompt: str = "{input}",
    target: str = " {target}",
    stop: str | None = "",
    trust_remote_code: bool = False,
) -> None:
    """Says what a data file holds, how many records can be used, and why the others cannot.

    Unlike in training, where the first faulty record is an error, all of them are collected. The exit code is 1
    where nothing can be used.

    Args:
        file: a file, a shipped set, or a datasets source (name:split).
        format: of the file (docs/data.md); auto recognises it.
        columns: the file's own names for the format's keys.
        require_rephrases: leave records without rephrases out, as training does by default.
        base: model id or folder whose tokenizer measures questions and targets; nothing else of it is loaded.
        max_length: the limit in tokens (data.max_length).
        prompt: template of a question (data.prompt).
        target: template of an answer (data.target).
        stop: text that ends an answer (data.stop).
        trust_remote_code: run code that comes with the tokenizer. Only for models you trust.
    """
    # Before a large file is read.
    texts = PromptFormat(prompt, target, stop)
    tokenizer = load_tokenizer(base, trust_remote_code) if base else None
    check = check_source(file, format, columns, require_rephrases)
    if not check.format and check.faults:
        raise RecordError(_first_fault(check))
    console().print(summary_table(file, check))
    if check.records:
        console().print(pairs_table("What the records bring along", counts(check)))
    if check.faults:
        console().print(faults_table(check.faults))
    if tokenizer is not None and check.usable:
        if check.usable[0].text:
            # Generation data allows no other format.
            texts = PromptFormat(prompt, RUNNING_TEXT.target, RUNNING_TEXT.stop)
        lengths = token_lengths(check.usable, _measure(tokenizer), texts, max_length)
        console().print(lengths_table(lengths, base, max_length))
    console().print(verdict(check), highlight=False)
    if not check.usable and not check.known:
        raise EmptyDatasetError(f"{file}: nothing in it can be used.")


def load_tokenizer(base: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model, without the model.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_name(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"The tokenizer of {base!r} cannot be loaded: {error}. Give a model's local folder, a hub id that is cached "
            "or can be downloaded, or smollm2-135m-instruct."
        ) from error


def _measure(tokenizer: Any) -> Callable[[Sequence[str], bool], list[int]]:
    def measure(texts: Sequence[str], special: bool) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]]

    return measure


def summary_table(file: str, check: DataCheck) -> Table:
    """How many records there are, and what becomes of them."""
    rows = [
        ("format", check.format),
        ("records", str(len(check.records) + len(check.faults))),
        ("can be edited", str(len(check.usable))),
        ("can be asked as unrelated facts", str(check.known)),
        *((f"left out, {reason}", _with_lines(lines)) for reason, lines in check.left_out.items()),
        ("faulty", _with_lines([line for line, _ in check.faults])),
        ("question stands in an earlier record", _with_lines(check.duplicates)),
    ]
    return pairs_table(escape(str(file)), rows)


def pairs_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and how many."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def faults_table(faults: Sequence[tuple[int, str]]) -> Table:
    """The first faulty records, with what is wrong."""
    shown = faults[:SHOWN]
    table = Table(title=f"Faulty records: {len(shown)} of {len(faults)}", title_justify="left")
    table.add_column("line", justify="right")
    table.add_column("what is wrong")
    for line, message in shown:
        table.add_row(str(line), escape(message.splitlines()[0]))
    return table


def lengths_table(lengths: dict[str, Lengths], base: str | None, max_length: int) -> Table:
    """Token counts against the limit."""
    table = Table(title=f"Tokens by the tokenizer of {escape(str(base))}", title_justify="left")
    for column in ("", "shortest", "median", "longest", f"over {max_length}"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in lengths.items():
        table.add_row(name, str(each.shortest), f"{each.middle:g}", str(each.longest), _with_lines(each.too_long))
    return table


def verdict(check: DataCheck) -> str:
    """What to do with the file, in a sentence or two."""
    sentences = []
    if check.faults:
        sentences.append(f"Training stops at the first faulty record (line {check.faults[0][0]}): mend or remove them.")
    if check.usable:
        sentences.append(f"{len(check.usable)} of {len(check.records) + len(check.faults)} records can be edited.")
    elif check.known:
        sentences.append("It holds no edit; use it as data.locality_data.")
    if "without rephrases" in check.left_out:
        sentences.append("data.require_rephrases: false (--require_rephrases false) keeps records without rephrases.")
    return " ".join(sentences)


def _with_lines(lines: Sequence[int]) -> str:
    """A number, and the first lines it counts."""
    if not lines:
        return "0"
    first = ", ".join(map(str, lines[:SHOWN]))
    return f"{len(lines)} (line{'s' if len(lines) > 1 else ''} {first}{', …' if len(lines) > SHOWN else ''})"


def _first_fault(check: DataCheck) -> str:
    _, message = check.faults[0]
    return f"No record could be read; the first one: {message}"
