"""`mend-lightning make-generation-data`: a Wikitext-style editing set from any text file and any causal model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from mend_lightning.cli.generation_data.continuations import batch_seed, sample_continuations
from mend_lightning.cli.generation_data.passages import (
    ABOUT,
    PARTIAL,
    Passage,
    append,
    is_finished,
    paragraphs,
    passages,
    resume,
    split_of,
)
from mend_lightning.errors import ConfigError, DataFileError, EmptyDatasetError
from mend_lightning.files import check_writable_file, write_json, write_jsonl
from mend_lightning.models.architecture import Dtype
from mend_lightning.models.base import load_base
from mend_lightning.models.inputs.encoder import Encoder, model_kind
from mend_lightning.models.inputs.prompts import RUNNING_TEXT
from mend_lightning.models.smollm2 import MODEL_NAME
from mend_lightning.training.progress.console import console


def make_generation_data_command(
    text_file: Path,
    base: str = MODEL_NAME,
    out: Path = Path("generation-data"),
    prompt_tokens: int = 50,
    new_tokens: int = 10,
    max_tokens: int = 200,
    min_words: int = 50,
    ascii_only: bool = False,
    limit: int | None = None,
    temperature: float = 1.0,
    validation: float = 0.1,
    test: float = 0.1,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Makes an editing set of a text's paragraphs and what a causal model continues them with.

    Writes train.jsonl, validation.jsonl and test.jsonl.

    A run that was killed or interrupted resumes when it is started again with the same settings.

    Args:
        text_file: any text in UTF-8; a paragraph ends at an empty line, or is a line.
        base: whose continuations are the targets: a model id or folder, or smollm2-135m-instruct.
        out: the folder of the set.
        prompt_tokens: length of a prompt, cut at a whole word.
        new_tokens: length of a target (the paper: 10).
        max_tokens: paragraphs are kept up to here; the data.max_length of training.
        min_words: shorter paragraphs are left out (the original: 50).
        ascii_only: leave out paragraphs with other characters, as the original does.
        limit: use the first so many paragraphs only.
        temperature: of sampling; nothing else shapes it (how the original's were sampled is not published).
        validation, test: their shares of the paragraphs.
        batch_size: prompts at a time.
        seed: of sampling and of the split.
        dtype: of the model.
        trust_remote_code: run code that comes with the model. Only for models you trust.
    """
    _check_settings(prompt_tokens, new_tokens, max_tokens, batch_size, temperature, validation, test)
    text = read_text(text_file)
    settings = {
        "text": Path(text_file).name, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "base": base,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "max_tokens": max_tokens, "min_words": min_words,
        "ascii_only": ascii_only, "limit": limit, "temperature": temperature, "batch_size": batch_size, "seed": seed,
        "validation": validation, "test": test, "dtype": dtype,
    }  # fmt: skip
    for result in (PARTIAL, ABOUT, "train.jsonl", "validation.jsonl", "test.jsonl"):
        check_writable_file(out / result)
    if is_finished(out, settings):
        console().print(f"{out} holds this set already; nothing to do.", highlight=False)
        return
    done = resume(out / PARTIAL, settings)
    model, tokenizer = load_base(base, dtype, trust_remote_code=trust_remote_code)
    if model_kind(model) != "causal":
        raise ConfigError(f"{base} is no causal language model; continuations need one.")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = paragraphs(text, min_words, ascii_only)[:limit]
    # A token less: some tokenizers put one before every text.
    found = passages(texts, tokenizer, prompt_tokens, new_tokens, max_tokens - 1)
    encoder = Encoder.for_model(model, tokenizer, RUNNING_TEXT, prompt_tokens + new_tokens + 2)
    batches = [found[start : start + batch_size] for start in range(0, len(found), batch_size)]
    if done:
        console().print(f"Going on after {len(done)} of {len(batches)} batches.", highlight=False)
    try:
        with (out / PARTIAL).open("a", encoding="utf-8") as file:
            for number, batch in _progress(batches, len(done)):
                prompts = [passage.prompt for passage in batch]
                seed_of = batch_seed(seed, number)
                targets = sample_continuations(model, encoder, prompts, new_tokens, temperature, seed_of)
                done.append(records(batch, targets))
                append(file, done[-1])
    except KeyboardInterrupt:
        console().print(f"{len(done)} of {len(batches)} batches are kept; start again to resume.", highlight=False)
        raise
    _finish(out, [record for batch in done for record in batch], settings, len(found))


def _check_settings(
    prompt_tokens: int, new_tokens: int, max_tokens: int, batch_size: int, temperature: float, *shares: float
) -> None:
    if min(prompt_tokens, new_tokens, batch_size) < 1 or temperature <= 0:
        raise ConfigError("prompt_tokens, new_tokens and batch_size must be at least 1, and temperature above 0.")
    if prompt_tokens + new_tokens > max_tokens:
        tokens = prompt_tokens + new_tokens
        raise ConfigError(f"A prompt and its target have {tokens} tokens; max_tokens is {max_tokens}.")
    if min(shares) < 0 or sum(shares) >= 1:
        raise ConfigError(f"The shares of validation and test are {shares}; they must leave something for train.")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataFileError: it is missing, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} cannot be read as UTF-8 text: {error}") from error


def records(batch: list[Passage], targets: list[str | None]) -> list[dict[str, str]]:
    """Lines of the `wikitext` format; passages without a target are left out."""
    made = [(passage, target) for passage, target in zip(batch, targets) if target is not None]
    return [{"prompt": each.prompt, "target": target, "paragraph": each.paragraph} for each, target in made]


def _progress(batches: list[list[Passage]], done: int) -> Iterator[tuple[int, list[Passage]]]:
    bar = track(range(done, len(batches)), "Continuing", len(batches), completed=done, console=console())
    return ((number, batches[number]) for number in bar)


def _finish(out: Path, made: list[dict[str, str]], settings: Mapping[str, Any], tried: int) -> None:
    """Writes the splits, says what they hold, and only then removes the unfinished file."""
    texts = [record["paragraph"] for record in made]
    splits = split_of(texts, settings["validation"], settings["test"], settings["seed"])
    counts = Counter(splits)
    if counts["train"] < 2:
        raise EmptyDatasetError(
            f"{len(made)} of {tried} paragraphs gave a record, too few for train, validation and test. Give a longer "
            "text, or lower min_words and prompt_tokens."
        )
    for split in sorted(counts):
        write_jsonl(out / f"{split}.jsonl", [record for record, name in zip(made, splits) if name == split])
    write_json(out / ABOUT, {"settings": settings, "passages": tried, "records": dict(sorted(counts.items()))})
    (out / PARTIAL).unlink()
    sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
    console().print(
        f"{out}: {len(made)} records ({sizes}). {tried - len(made)} of {tried} continuations were left out: their text "
        "does not encode back to the tokens that were sampled.",
        highlight=False,
    )
