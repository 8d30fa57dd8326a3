"""What a data file holds, counted: for `mend-lightning check-data`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from mend_lightning.data.columns import Columns
from mend_lightning.data.readers.fields import Format
from mend_lightning.data.record import Record
from mend_lightning.data.records import iterate_records, unusable
from mend_lightning.data.sources import Row
from mend_lightning.errors import RecordError
from mend_lightning.models.inputs.prompts import PromptFormat

# text -> number of tokens, for several texts at once; the second argument: with the tokenizer's special tokens.
Measure = Callable[[Sequence[str], bool], list[int]]


@dataclass
class DataCheck:
    """What was found in a source.

    Attributes:
        format: name of its format; "" where no record could be read.
        records: every record that could be read, usable or not.
        usable: those that can be edited.
        left_out: reason -> lines of the records that cannot.
        faults: (line, message) of every record that could not be read.
        duplicates: lines of records whose question stands in an earlier record.
    """

    format: str = ""
    records: list[Record] = field(default_factory=list)
    usable: list[Record] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    faults: list[tuple[int, str]] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Records that can be asked as unrelated facts."""
        return sum(record.can_be_asked for record in self.records)


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one kind of text.

    Attributes:
        shortest, middle, longest: of all.
        too_long: lines of the records that exceed the limit.
    """

    shortest: int
    middle: float
    longest: int
    too_long: tuple[int, ...]


def check_source(
    name: str | Path, format: str = "auto", columns: Columns | None = None, require_rephrases: bool = True
) -> DataCheck:
    """Reads all of a source; what is wrong with a record is noted and not raised.

    Args: as in `read_records`.

    Raises:
        DataFileError: the file cannot be read.
        RecordError: it is a list that is not JSON.
    """
    check = DataCheck()

    def found(chosen: Format) -> None:
        check.format = chosen.name

    def fault(row: Row, error: RecordError) -> None:
        check.faults.append((row.line, str(error)))

    seen: set[str] = set()
    for record in iterate_records(name, format, columns, on_error=fault, on_format=found):
        check.records.append(record)
        reason = unusable(record, require_rephrases)
        if reason:
            check.left_out[reason].append(record.line)
        else:
            check.usable.append(record)
        if record.prompt in seen:
            check.duplicates.append(record.line)
        seen.add(record.prompt)
    return check


def counts(check: DataCheck) -> list[tuple[str, str]]:
    """(what, how many) of everything that usable records bring along; of a source without any: of all its records."""
    records = check.usable or check.records
    rephrases = sum(len(record.rephrases) for record in records)
    own = [question for record in records for question in record.locality]
    kinds = Counter(question.kind or "portability" for record in records for question in record.portability)
    relations = Counter(record.relation for record in records if record.relation)
    largest = ", ".join(f"{name} {count}" for name, count in relations.most_common(5))
    largest += ", …" if len(relations) > 5 else ""
    rows = [
        ("rephrases", f"{rephrases} ({rephrases / len(records):.1f} a record)" if records else "0"),
        ("new answers", f"{sum(len(record.alternatives) for record in records)}"),
        ("without true answers", f"{sum(not record.answers and not record.text for record in records)}"),
        ("locality examples of their own", f"{len(own)} ({sum(question.hard for question in own)} hard)"),
        ("portability questions", ", ".join(f"{kind} {count}" for kind, count in kinds.items()) or "0"),
        ("subjects", f"{len({record.subject for record in records if record.subject})}"),
        ("relations", f"{len(relations)} ({largest})" if relations else "0"),
    ]
    if any(record.text for record in records):
        rows.append(("paragraphs", f"{sum(bool(record.text) for record in records)}"))
    return rows


def token_lengths(
    records: Sequence[Record], measure: Measure, format: PromptFormat, max_length: int
) -> dict[str, Lengths]:
    """Token counts of questions and targets, against the limit.

    Args:
        records: to be measured.
        measure: texts to numbers of tokens.
        format: the text around them.
        max_length: limit of question and target together.
    """
    longest_question = [max((r.prompt, *r.rephrases), key=len) for r in records]
    prompts = measure([format.question(text) for text in longest_question], True)
    longest_target = [max(r.alternatives, key=len, default="") for r in records]
    targets = measure([format.answer(text) + (format.stop or "") for text in longest_target], False)
    both = [prompt + target for prompt, target in zip(prompts, targets)]
    lines = [record.line for record in records]
    found = {
        "question (the longest phrasing)": _lengths(prompts, lines, max_length),
        "target (the longest)": _lengths(targets, lines, max_length),
        "question and target": _lengths(both, lines, max_length),
    }
    paragraphs = [record for record in records if record.text]
    if paragraphs:
        sizes = measure([record.text for record in paragraphs], True)
        found["paragraph"] = _lengths(sizes, [record.line for record in paragraphs], max_length)
    return found


def _lengths(sizes: Sequence[int], lines: Sequence[int], limit: int) -> Lengths:
    too_long = tuple(line for size, line in zip(sizes, lines) if size > limit)
    return Lengths(min(sizes), median(sizes), max(sizes), too_long)
