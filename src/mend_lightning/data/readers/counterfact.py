"""CounterFact (Meng et al., NeurIPS 2022): `counterfact.json`, a JSON list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, optional_text, require, text, texts
from mend_lightning.data.record import Question, Record
from mend_lightning.errors import RecordError

NEIGHBOURS = "neighborhood_prompts"


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`requested_rewrite` (`prompt` with {}, `subject`, `target_new.str`, `target_true.str`, `relation_id`),
    `paraphrase_prompts` and `neighborhood_prompts`.

    Neighbourhood prompts are about other subjects that share the true answer: hard locality examples.
    `attribute_prompts` and `generation_prompts` are not read.
    """
    require(data, ("requested_rewrite", "paraphrase_prompts", NEIGHBOURS), where)
    rewrite = data["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise RecordError(f"{where}: 'requested_rewrite' must be an object, got {rewrite!r}.")
    inside = f"{where}, in 'requested_rewrite'"
    require(rewrite, ("prompt", "subject", "target_new", "target_true"), inside)
    subject = text(rewrite["subject"], "subject", inside)
    prompt = text(rewrite["prompt"], "prompt", inside)
    if "{}" not in prompt:
        raise RecordError(f"{inside}: 'prompt' must hold {{}} where the subject goes, got {prompt!r}.")
    true = _target(rewrite, "target_true", inside)
    new = _target(rewrite, "target_new", inside)
    neighbours = texts(data[NEIGHBOURS], NEIGHBOURS, where)
    return Record(
        prompt=prompt.replace("{}", subject),
        answers=(true,) if true else (),
        alternatives=(new,) if new else (),
        rephrases=texts(data["paraphrase_prompts"], "paraphrase_prompts", where),
        subject=subject,
        relation=optional_text(rewrite, "relation_id", inside),
        line=line,
        locality=tuple(Question(each, (true,), NEIGHBOURS, hard=True) for each in neighbours) if true else (),
    )


def _target(rewrite: Mapping[str, Any], key: str, where: str) -> str:
    value = rewrite[key]
    if not isinstance(value, Mapping) or "str" not in value:
        raise RecordError(f'{where}: {key!r} must be an object like {{"str": "Paris"}}, got {value!r}.')
    return text(value["str"], f"{key}.str", where)


FORMAT = Format(
    "counterfact",
    "counterfact.json of ROME, a JSON list",
    "requested_rewrite, paraphrase_prompts, neighborhood_prompts",
    lambda data: "requested_rewrite" in data,
    parse,
)
