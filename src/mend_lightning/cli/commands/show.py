"""`mend-lightning show`: what edit files change, how large they are, and on which base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mend_lightning.cli.commands.inputs import load_base_of, read_edits
from mend_lightning.cli.commands.output import print_json
from mend_lightning.edits.edit import Edit
from mend_lightning.models.architecture import Dtype
from mend_lightning.training.progress.console import console


def show_command(
    edits: list[str] = [],
    base: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Shows what an edit changes: `mend-lightning show EDIT [EDIT ...]`. No base model is loaded unless one is named.

    Args:
        edits: edit files; may simply come first on the line. Several give a short table.
        base: base model (id, folder) to measure ‖ΔW‖/‖W‖ on; default: what the file says.
        dtype: of the base model.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        force: measure on other weights than the edits were made for, as long as layers and shapes are the same.
        json: print a JSON object for each file instead.
    """
    loaded = read_edits(edits)
    found = [description(path, edit) for path, edit in zip(edits, loaded)]
    if base:
        model, _ = load_base_of(loaded, base, dtype, trust_remote_code)
        for each, edit in zip(found, loaded):
            norms = edit.relative_norm(model, force)
            for layer in each["layers"]:
                layer["relative_norm"] = norms.get(layer["name"])
    if json:
        print_json(*found)
    elif len(found) == 1:
        for part in (pairs_table(found[0]), layers_table(found[0])):
            console().print(part)
    else:
        console().print(files_table(found))


def description(path: str | Path, edit: Edit) -> dict[str, Any]:
    """Everything about an edit file as builtins; None where the file does not say."""
    about = edit.about
    norms = about.get("relative_norm", {})
    layers = [
        {
            "name": name, "form": type(delta).__name__, "shape": list(delta.shape), "rank": delta.rank,
            "norm": float(delta.norm()[0]), "relative_norm": norms.get(name),
        }
        for name, delta in edit.deltas.items()
    ]  # fmt: skip
    said = ("id", "editor", "date", "base", "base_options", "base_fingerprint", "prompt_format", "format", "probability_before",
            "probability", "on_top_of", "compressed", "versions", "check", "keep",
            "contrasts")  # fmt: skip
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "facts": [{"prompt": prompt, "target": target} for prompt, target in edit.facts],
        "layers": layers,
        **{key: about.get(key) for key in said},
        "combined": len(about.get("combined", [])) or None,
    }


def pairs_table(found: dict[str, Any]) -> Table:
    """What an edit is, and where it comes from."""
    table = Table(title=escape(found["file"]), title_justify="left", show_header=False)
    for name, value in _pairs(found):
        table.add_row(name, escape(value))
    return table


def _pairs(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for fact in found["facts"]:
        yield "changes", f"{fact['prompt']} → {fact['target']}"
    if not found["facts"]:
        yield "changes", "(the file does not say)"
    revision = (found["base_options"] or {}).get("revision")
    named = [found["base"] or "(the file does not say)", *([f"revision {revision}"] if revision else [])]
    weights = [f"weights {found['base_fingerprint']}"] if found["base_fingerprint"] else []
    yield "base model", ", ".join(named + weights)
    for name, key in (("editor", "editor"), ("asked as", "format"), ("made", "date"), ("id", "id")):
        if found[key]:
            yield name, found[key]
    if found["probability"] is not None:
        before = found["probability_before"]
        yield (
            "probability of the new answer",
            f"{'' if before is None else f'{before:.3g} → '}{found['probability']:.3g}",
        )
    for name, key in (("keeps", "keep"), ("contrasts", "contrasts")):
        if found[key]:
            yield name, "\n".join(found[key])
    if found["on_top_of"]:
        yield "made on top of", ", ".join(found["on_top_of"])
    if found["combined"]:
        yield "combined from", f"{found['combined']} edits"
    if found["compressed"]:
        yield (
            "compressed to",
            ", ".join(
                f"{key} {found['compressed'].get(key)}"
                for key in ("rank", "energy")
                if found["compressed"].get(key) is not None
            ),
        )
    if found["check"]:
        yield "check", check_words(found["check"])
    if found["versions"]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield "size", f"{found['bytes'] / 1024:.0f} KB"


def check_words(check: dict[str, Any]) -> str:
    """The check's result in a line."""
    numbers = f"success {check['success']:.2f}, {check['kept']:.3f} of {check['kept_of']} other answers retained"
    return f"{'safe to keep' if check['safe'] else 'not safe to keep'} ({numbers}, KL {check['kl_mean']:.3g})"


def layers_table(found: dict[str, Any]) -> Table:
    """A row for each layer that changes."""
    table = Table(title="Layers", title_justify="left")
    table.add_column("layer")
    for column in ("in", "out", "rank", "‖ΔW‖", "‖ΔW‖/‖W‖"):
        table.add_column(column, justify="right")
    for layer in found["layers"]:
        dense = layer["form"] != "LowRankDelta"
        relative = "" if layer["relative_norm"] is None else f"{layer['relative_norm']:.4f}"
        rank = "dense" if dense else str(layer["rank"])
        table.add_row(layer["name"], *map(str, layer["shape"]), rank, f"{layer['norm']:.4g}", relative)
    return table


def files_table(found: list[dict[str, Any]]) -> Table:
    """A row for each of several files."""
    table = Table(title="Edits", title_justify="left")
    for column in ("file", "changes", "base", "editor", "P(new answer)", "largest ‖ΔW‖/‖W‖", "KB", "check"):
        table.add_column(column)
    for each in found:
        first = [f"{fact['prompt']} → {fact['target']}" for fact in each["facts"][:1]]
        more = [f"and {len(each['facts']) - 1} more"] if len(each["facts"]) > 1 else []
        norms = [layer["relative_norm"] for layer in each["layers"] if layer["relative_norm"] is not None]
        check = "" if not each["check"] else "safe" if each["check"]["safe"] else "not safe"
        probability = "" if each["probability"] is None else f"{each['probability']:.2f}"
        cells = (Path(each["file"]).name, "; ".join(first + more), str(each["base"] or ""), str(each["editor"] or ""))
        largest = f"{max(norms):.4f}" if norms else ""
        table.add_row(*map(escape, cells), probability, largest, f"{each['bytes'] / 1024:.0f}", check)
    return table
