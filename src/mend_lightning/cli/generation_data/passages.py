"""Prompts and paragraphs out of a text file."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mend_lightning.errors import OutputPathError

PARTIAL, ABOUT = "unfinished.jsonl", "about.json"


@dataclass(frozen=True)
class Passage:
    """A paragraph and the prompt that begins it."""

    prompt: str
    paragraph: str


def paragraphs(text: str, min_words: int = 50, ascii_only: bool = False) -> list[str]:
    """The paragraphs of a text with at least `min_words` words, each once, blanks and line breaks as single blanks.

    A paragraph ends at an empty line; where a line is long enough by itself, every line is one (Wikitext has a
    paragraph a line). The original keeps Wikitext's with 50 words and nothing but ASCII (`data_classes/wiki.py`).

    Example:
        >>> paragraphs("One two\\nthree.\\n\\nFour.\\n\\nFive six seven.", min_words=3)
        ['One two three.', 'Five six seven.']
    """
    found: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        long_lines = any(len(line.split()) >= min_words for line in lines)
        found += [" ".join(part.split()) for part in (lines if long_lines else [block])]
    long_enough = [part for part in found if len(part.split()) >= min_words and (part.isascii() or not ascii_only)]
    return list(dict.fromkeys(long_enough))


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The whole words within the first `count` tokens of a text; all of it where it has no more.

    Example:
        >>> class Letters:  # a token a letter
        ...     def __call__(self, text, add_special_tokens): return {"input_ids": list(text)}
        ...     def decode(self, ids, **options): return "".join(ids)
        >>> first_tokens(Letters(), "one two three", 9)
        'one two'
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= count:
        return text
    start = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
    # Where a decoded text differs from the original (half a character, a normalised blank), up to where they agree.
    agreed = next((i for i, (a, b) in enumerate(zip(start, text)) if a != b), len(start))
    if text[agreed : agreed + 1].isspace():
        return text[:agreed]
    return " ".join(text[:agreed].split(" ")[:-1])


def passages(
    texts: Sequence[str], tokenizer: Any, prompt_tokens: int, new_tokens: int, max_tokens: int
) -> list[Passage]:
    """Prompts of `prompt_tokens` tokens (at whole words) from those paragraphs that have `new_tokens` more at least.

    Args:
        max_tokens: a paragraph is kept up to so many.
    """
    found = []
    for text in texts:
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) < prompt_tokens + new_tokens:
            continue
        prompt = first_tokens(tokenizer, text, prompt_tokens)
        if prompt:
            found.append(Passage(prompt, first_tokens(tokenizer, text, max_tokens)))
    return found


def split_of(texts: Sequence[str], validation: float, test: float, seed: int) -> list[str]:
    """Which split each text goes to: exact shares, drawn by a checksum of seed and text, two texts a split at least.

    Example:
        >>> sorted(split_of([str(i) for i in range(10)], validation=0.2, test=0.2, seed=0))
        ['test', 'test', 'train', 'train', 'train', 'train', 'train', 'train', 'validation', 'validation']
    """
    order = sorted(range(len(texts)), key=lambda i: (zlib.crc32(f"{seed}/{texts[i]}".encode()), i))
    sizes = [max(2, round(share * len(texts))) if share else 0 for share in (validation, test)]
    names = ["validation"] * sizes[0] + ["test"] * sizes[1]
    names += ["train"] * (len(texts) - len(names))
    of_text = dict(zip(order, names))
    return [of_text[i] for i in range(len(texts))]


def is_finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `out` holds the set of these settings.

    Raises:
        OutputPathError: it holds another one.
    """
    if not (out / ABOUT).is_file():
        return False
    made = json.loads((out / ABOUT).read_text(encoding="utf-8")).get("settings", {})
    _check_same(made, settings, out)
    return True


def resume(path: Path, settings: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """The finished batches of an earlier run; a line that a killed run left half is cut off.

    Raises:
        OutputPathError: that run had other settings.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.is_file() else (b"", b"", b"")
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines:
        _check_same(lines[0], settings, path)
        os.truncate(path, len(whole) + 1)
    else:
        path.write_bytes(json.dumps(settings).encode() + b"\n")
    return lines[1:]


def _check_same(made: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    other = [f"{key}: {made.get(key)!r}, now {value!r}" for key, value in settings.items() if made.get(key) != value]
    if other:
        raise OutputPathError(
            f"{where} was made with other settings ({'; '.join(other)}). Give another folder, or remove it."
        )


def append(file: Any, batch: list[dict[str, str]]) -> None:
    """One batch is one line, on the disk before the next begins."""
    file.write(json.dumps(batch, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
