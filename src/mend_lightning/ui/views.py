"""What the page shows, as HTML: pure functions. Whatever a person or a model wrote is escaped here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal
from urllib.parse import quote

from mend_lightning.edits.stack_state import StackedEdit
from mend_lightning.evaluation.shifts import Shift, TokenShift
from mend_lightning.ui.comparison import Comparison, Probe

Side = Literal["before", "after"]
# A token's text as it can be seen: where the answer's tokens have spaces and line ends matters.
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def percent(probability: float) -> str:
    """A probability as a person reads it; what is nearly certain does not look certain.

    Example:
        >>> [percent(p) for p in (0.0, 0.0004, 0.0213, 0.5, 0.9996, 1.0)]
        ['<0.1 %', '<0.1 %', '2.1 %', '50 %', '>99.9 %', '>99.9 %']
    """
    if probability < 0.001:
        return "<0.1 %"
    if probability > 0.999:
        return ">99.9 %"
    return f"{100 * probability:.{1 if probability < 0.1 or probability > 0.99 else 0}f} %"


def visible(token: str) -> str:
    """A token's text, escaped, with blanks that can be seen.

    Example:
        >>> visible(" <b>\\n")
        '·&lt;b&gt;⏎'
    """
    return escape(token.translate(_VISIBLE)) or "∅"


def notices(messages: Sequence[str], kind: Literal["note", "warning", "error"]) -> str:
    """Messages to the person at the page, each in a box of its own.

    Example:
        >>> notices(["Type a question."], "error")
        '<div class="notice error" role="alert">Type a question.</div>'
    """
    role = "status" if kind == "note" else "alert"
    return "".join(f'<div class="notice {kind}" role="{role}">{escape(message)}</div>' for message in messages)


def hint(text: str) -> str:
    """What can be done here, in grey."""
    return f'<p class="hint">{escape(text)}</p>'


def header(base: str, editor: str, layers: int, format: str | None = None) -> str:
    """The page's head: what is being edited, with what, and how it is asked."""
    facts = [base or "base model", editor, f"{layers} layer{'' if layers == 1 else 's'} edited"]
    facts += [f"asked as {format}"] if format else []
    tags = "".join(f'<span class="tag">{escape(fact)}</span>' for fact in facts)
    return (
        '<header class="head"><h1>mend-lightning</h1><p>Correct what a language model believes, and see what else moves.</p>'
        f"<p>{tags}</p></header>"
    )


def comparison(compared: Comparison) -> str:
    """Before and after, side by side: the answer, the tokens of every answer in question, the likeliest first tokens."""
    shift = compared.shift
    heads: tuple[tuple[Side, str, str, str], ...] = (
        ("before", "Before", "the base model", shift.old),
        ("after", "After", f"with {edits_on(compared.on)}", shift.new),
    )
    cards = "".join(
        _card(compared, side, f"{title} <small>{escape(what)}</small>", answer) for side, title, what, answer in heads
    )
    return f'<div class="asked">{escape(shift.question)}</div><div class="sides">{cards}</div>'


def _card(compared: Comparison, side: Side, title: str, answer: str) -> str:
    kind = "same" if side == "before" else _verdict(compared)
    answers = "".join(_answer(text, tokens, side) for text, tokens in compared.answers.items())
    first = "".join(_bar(visible(token.token), getattr(token, side)) for token in compared.first_tokens)
    return (
        f'<section class="card {side}"><h2>{title}</h2><p class="answer {kind}" data-side="{side}">{_said(answer)}</p>'
        f'<h3>Probability of each answer, token by token</h3>{answers}<h3>First token</h3><div class="bars">{first}</div></section>'
    )


def _verdict(compared: Comparison) -> str:
    shift = compared.shift
    if compared.wanted and shift.new.strip().casefold() == compared.wanted.casefold():
        return "reached"
    return "other" if shift.changed or compared.wanted else "same"


def _said(answer: str) -> str:
    return escape(answer) if answer else '<span class="empty">no answer</span>'


def _answer(text: str, tokens: Sequence[TokenShift], side: Side) -> str:
    whole = math.prod(getattr(token, side) for token in tokens)
    chips = "".join(_chip(token, side) for token in tokens)
    return f'<div class="said"><div class="chips" title="{escape(text)}">{chips}</div><b class="whole">{percent(whole)}</b></div>'


def _chip(token: TokenShift, side: Side) -> str:
    probability = getattr(token, side)
    strong = probability > 0.6
    # Never the middle of the scale, where neither dark nor white letters can be read.
    kind = "chip strong" if strong else "chip"
    shade = 0.85 + 0.15 * probability if strong else 0.75 * probability
    return (
        f'<span class="{kind}" style="--shade:{shade:.2f}">{visible(token.token)}<i>{percent(probability)}</i></span>'
    )


def _bar(label: str, probability: float) -> str:
    return (
        f'<div class="bar"><code>{label}</code><span class="track"><span style="width:{100 * probability:.1f}%"></span></span>'
        f"<i>{percent(probability)}</i></div>"
    )


def edits_on(count: int) -> str:
    """How many edits are on, in words.

    Example:
        >>> edits_on(0), edits_on(2)
        ('no edit on', '2 edits on')
    """
    return f"{count or 'no'} edit{'' if count < 2 else 's'} on"


def shifts_table(probe: Probe, most: int | None = None) -> str:
    """Questions with their answers before and after, and how far the probabilities of these answers went.

    Args:
        probe: in the order to show.
        most: how many rows to show; None: all.
    """
    shifts = probe.shifts
    changed = sum(shift.changed for shift in shifts)
    rows = "".join(_shift_row(shift) for shift in shifts[:most])
    hidden = "" if most is None or len(shifts) <= most else f" The {most} that moved farthest are shown."
    return (
        f'<p class="caption">{changed} of {len(shifts)} answers changed, with {edits_on(probe.on)}.{hidden}</p>'
        '<table class="shifts">'
        "<thead><tr><th>Question</th><th>Before</th><th>After</th><th>Old answer’s probability</th>"
        f"<th>New answer’s probability</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _shift_row(shift: Shift) -> str:
    old, new = (shift.p_old_before, shift.p_old_after), (shift.p_new_before, shift.p_new_after)
    after = f'<td class="{"changed" if shift.changed else "kept"}">{_said(shift.new)}</td>'
    return (
        f"<tr><td>{escape(shift.question)}</td><td>{_said(shift.old)}</td>{after}<td>{_move(*old)}</td>"
        f"<td>{_move(*new) if shift.changed else ''}</td></tr>"
    )


def _move(before: float, after: float) -> str:
    """Two bars over each other: from, to."""
    bars = "".join(
        f'<span class="{side}" style="width:{100 * p:.1f}%"></span>' for side, p in (("from", before), ("to", after))
    )
    return f'<div class="move"><span class="double">{bars}</span>{percent(before)} → {percent(after)}</div>'


def edit_facts(entry: StackedEdit) -> str:
    """What an edit says of itself."""
    return "; ".join(f"{prompt} → {target}" for prompt, target in entry.edit.facts) or entry.name


def edit_details(entry: StackedEdit) -> str:
    """An edit's size, its probability, and where its file is to be had."""
    edit = entry.edit
    parts = [f"{edit.size() / 1024:.0f} KB" if edit.size() >= 1024 else f"{edit.size()} bytes"]
    if "probability" in edit.about:
        parts.insert(0, f"probability {percent(edit.about['probability'])} when made")
    link = f'<a href="edits/{quote(entry.name, safe="")}" download>Download</a>'
    return f'<div class="details">{escape(" · ".join(parts))} · {link}</div>'
