"""Files of questions of given lengths."""

from __future__ import annotations

import json
import random


def write_questions(folder, count: int = 400) -> dict[str, str]:
    """Questions of 4 to 30 words and, independent of them, unrelated ones."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(("who", "is", "the", "city", "of", "France", "named")) for _ in range(words))

    def words() -> int:
        return min(30, max(4, round(draw.lognormvariate(2.3, 0.5))))

    lines = []
    for _ in range(count):
        about = words()
        rephrases = [text(max(4, round(about * draw.uniform(0.75, 1.3)))) for _ in range(3)]
        lines.append({"prompt": text(about), "target": text(draw.randint(1, 4)), "rephrases": rephrases})
    (folder / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unrelated = [{"question": text(words()), "answer": text(draw.randint(1, 4))} for _ in range(count)]
    (folder / "unrelated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unrelated))
    return {"train": str(folder / "edits.jsonl"), "locality_data": str(folder / "unrelated.jsonl")}
