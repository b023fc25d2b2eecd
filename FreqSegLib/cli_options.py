"""Command-line options made from a settings dataclass, so that a setting is declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

PANEL = "Advanced"


def with_settings(
    kind: type[Any], *, leave_out: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command that takes ``settings``: it gets one option a field of ``kind``, and the finished dataclass.

    Name, type, choices, default, limits (``least`` and ``most`` in a field's metadata) and help (``help``) come from
    the field. A field that is None by default stays None when the option is not given.

    Args:
        kind: a dataclass.
        leave_out: fields the command sets itself.

    Returns:
        The decorator.
    """
    hints = get_type_hints(kind)
    chosen = [item for item in fields(kind) if item.name not in leave_out]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own_hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=own_hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "settings"
        ]
        made = [_parameter(item, hints[item.name]) for item in chosen]

        @wraps(command)
        def run(**values: Any) -> Any:
            given = {item.name: values.pop(item.name) for item in chosen}
            return command(**values, settings=kind(**given))

        run.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *made)}
        return run

    return decorate


def option_name(field_name: str) -> str:
    """``num_points`` -> ``--num-points``."""
    return "--" + field_name.replace("_", "-")


def _parameter(item: Field[Any], hint: Any) -> inspect.Parameter:
    name = option_name(item.name)
    # A flag that is off unless given needs no way to turn it off.
    two_sided = bool in (hint, *get_args(hint)) and item.default is not False
    names = [f"{name}/{name.replace('--', '--no-', 1)}"] if two_sided else [name]
    limits = {
        theirs: item.metadata[ours] for ours, theirs in (("least", "min"), ("most", "max")) if ours in item.metadata
    }
    option = typer.Option(
        *names,
        help=item.metadata.get("help", "").replace("[", r"\["),
        rich_help_panel=PANEL,
        show_default=item.metadata.get("none", "preset's")
        if item.default is None and type(None) in get_args(hint)
        else True,
        **limits,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=Annotated[hint, option]
    )
