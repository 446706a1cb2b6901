"""Our additions to how cyclopts fills arguments: typed tables from TOML, and two values that it would misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_origin

from cyclopts import App, ArgumentCollection, CoercionError, Token
from cyclopts.config import Dict

from minimax_m1.errors import UserError
from minimax_m1.settings import read_toml


class Recipe:
    """A source of values for cyclopts: a TOML file whose keys are the names of the settings."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: it cannot be read, or is not TOML.
        """
        self._values, self._source = read_toml(path), str(path)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Fill what no flag has filled; keys that are no setting are errors."""
        values = dict(self._values)
        for argument in arguments:
            name = argument.name.removeprefix("--").replace("-", "_")
            value = values.get(name)
            # Cyclopts would hand on the values of a table of anything as text, and take a table's key with a dot in
            # it, such as a file's name, for two; and cyclopts 4, the last for Python 3.10, would make a list in a list
            # of an empty one.
            is_empty_list = value == [] and get_origin(argument.hint) is tuple
            if is_empty_list or (get_origin(argument.hint) is dict and isinstance(value, dict)):
                del values[name]
                if not argument.tokens:
                    value = () if is_empty_list else value
                    argument.append(Token(keyword=name, source=self._source, implicit_value=value))
        Dict(values, source=self._source, use_commands_as_keys=False)(app, commands, arguments)


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 3.5 where a whole number is wanted, which cyclopts would round, and flags into a table of anything.

    Raises:
        CoercionError, UserError: naming the flag and the value.
    """
    for argument in arguments:
        for token in argument.tokens:
            if argument.hint in (int, int | None, tuple[int, ...]) and "." in token.value:
                raise CoercionError(token=token, argument=argument, target_type=int)
            if argument.hint == dict[str, Any] and (token.keys or token.value):
                name = argument.name.removeprefix("--")
                raise UserError(f"{name}: cannot be set by a flag; accepted: a table [{name}] in a recipe (--config)")
