"""The commands that are not a Trainer's, one file each; `run` finds them by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from inspect import signature

# Command -> (file, function). Imported when it runs: `--help` and the small commands need not load what a large one does.
_COMMANDS = {
    "edit": ("edit", "edit_command"),
    "apply": ("apply", "apply_command"),
    "show": ("show", "show_command"),
    "ui": ("ui", "ui_command"),
    "compare": ("compare", "compare_command"),
    "sequential": ("sequential", "sequential_command"),
    "check-data": ("check_data", "check_data_command"),
    "make-generation-data": ("make_generation_data", "make_generation_data_command"),
    "layers": ("layers", "layers_command"),
    "plan": ("plan", "plan_command"),
    "show-config": ("show_config", "show_config_command"),
    "merge": ("merge", "merge_command"),
    "export": ("export", "export_command"),
    "import-peft": ("import_peft", "import_peft_command"),
    "get-smollm2": ("get_smollm2", "smollm2_command"),
}
# Options that may be given again and again, each time with one value more.
_REPEATABLE = {"edit": ("--rephrase", "--unrelated", "--neighbour"), "apply": ("--ask",)}


def run(command: str, arguments: list[str]) -> int:
    """Parses `arguments` for a command's function and calls it; returns the exit code, 0 where it returns none."""
    from jsonargparse import auto_cli

    file, function = _COMMANDS[command]
    called = getattr(import_module(f"{__name__}.{file}"), function)
    if command == "plan":
        # Takes what fit takes, so it reads its arguments itself.
        return called(arguments)
    if command == "show-config" and arguments and not arguments[0].startswith("-"):
        # What may be left out is an option for jsonargparse; here it reads better without one.
        arguments = ["--name", *arguments]
    if command in ("apply", "show", "merge", "export"):
        arguments = files_first(arguments)
    arguments = with_true(arguments, _switches(called))
    arguments = one_by_one(arguments, _REPEATABLE.get(command, ()))
    if command in ("compare", "sequential"):
        # `--config NAME`, as for fit: jsonargparse keeps that option for files of a command's own arguments.
        arguments = [argument.removeprefix("--config=") for argument in arguments if argument not in ("--config", "-c")]
    code = auto_cli(called, args=arguments, prog=f"mend-lightning {command}", as_positional=True)
    return code if isinstance(code, int) else 0


def files_first(arguments: list[str]) -> list[str]:
    """Edit files that come first on the line, as many as there are, as the option that they are to jsonargparse.

    Example:
        >>> files_first(["a.safetensors", "b.safetensors", "--out", "merged"])
        ['--edits', '["a.safetensors", "b.safetensors"]', '--out', 'merged']
    """
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return (["--edits", json.dumps(arguments[:count])] if count else []) + arguments[count:]


def one_by_one(arguments: list[str], names: Sequence[str]) -> list[str]:
    """Options of a list, given with one value each time, as jsonargparse's `--name+` (with a list in brackets they stay).

    Example:
        >>> one_by_one(["--ask", "Who?", "--ask=Why?", "--ask", '["When?"]'], ["--ask"])
        ['--ask+', 'Who?', '--ask+=Why?', '--ask', '["When?"]']
    """
    changed = []
    for argument, value in zip(arguments, [*arguments[1:], ""]):
        name, equals, rest = argument.partition("=")
        lone = not _is_list(rest if equals else value)
        changed.append(f"{name}+{equals}{rest}" if name in names and lone else argument)
    return changed


def _is_list(value: str) -> bool:
    """Whether this is a list in brackets, and not a text that begins with one: "[sic] Who?", "[b]Who?[/b]"."""
    value = value.strip()
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return value.startswith("[") and value.endswith("]") and value.count("[") == 1


def with_true(arguments: list[str], flags: Collection[str]) -> list[str]:
    """Switches that are given without a value, as `--check true`.

    Example:
        >>> with_true(["--check", "--out", "a", "--force"], ["--check", "--force"])
        ['--check', 'true', '--out', 'a', '--force', 'true']
    """
    changed = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        changed += [argument, "true"] if argument in flags and following.startswith("-") else [argument]
    return changed


def _switches(function: Callable) -> list[str]:
    return [f"--{name}" for name, parameter in signature(function).parameters.items() if parameter.annotation == "bool"]
