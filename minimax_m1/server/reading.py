"""Reading what lies within a body: objects of known fields, texts whole or in parts, thinking that a client carries."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from typing import Any

from minimax_m1.errors import UserError
from minimax_m1.server.errors import ApiError, nearest

_SEAL = "minimax-m1:"


def refuse(values: Any, reasons: Mapping[str, str]) -> None:
    """Refuse the fields of a body that this server knows and cannot honour.

    Args:
        values: the body as it came.
        reasons: their names, with what to do instead.

    Raises:
        ApiError: 400.
    """
    if isinstance(values, Mapping):
        for name, instead in reasons.items():
            if values.get(name) is not None:
                raise ApiError(400, f"{name}: is not supported; {instead}", param=name, code="unknown_parameter")


def read_object(value: Any, where: str, known: Collection[str]) -> dict[str, Any]:
    """Return an object within a body, without its nulls.

    Raises:
        UserError: it is no object.
        ApiError: 400, it has a field that is not known.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {shown(value)} cannot be used; accepted: an object")
    value = {name: field for name, field in value.items() if field is not None}
    for name in value:
        if name not in known:
            field = f"{where}.{name}"
            hint = nearest(name, sorted(known))
            raise ApiError(400, f"{field}: is not known here{hint}", param=field, code="unknown_parameter")
    return value


def read_text(item: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be a text and must be there.

    Raises:
        UserError: it is not.
    """
    if name not in item:
        raise UserError(f"{where}.{name}: is missing")
    if not isinstance(item[name], str):
        raise UserError(f"{where}.{name}: {shown(item[name])} cannot be used; accepted: a text")
    return str(item[name])


def read_kind(item: Any, where: str, kinds: Collection[str], default: str | None = None) -> str:
    """Return the `type` of an object within a body.

    Raises:
        UserError: it is no object, or of a type that cannot be used.
    """
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: {shown(item)} cannot be used; accepted: an object")
    kind = item.get("type", default)
    if kind not in kinds:
        raise UserError(f"{where}.type: {shown(kind)} cannot be used; accepted: {', '.join(kinds)}")
    return str(kind)


def read_parts(value: Any, where: str, kinds: Mapping[str, Collection[str]]) -> list[dict[str, Any]]:
    """Return what may be a text or a list of parts as parts; a text is one of the first kind.

    Args:
        value: as it came.
        where: its place in the body.
        kinds: the types that a part may have, with the fields of each besides `type`.

    Raises:
        UserError: neither of the two, or parts that cannot be used.
        ApiError: 400, a part with a field that is not known.
    """
    if isinstance(value, str):
        return [{"type": next(iter(kinds)), "text": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: {shown(value)} cannot be used; accepted: a text, or a list of {' or '.join(kinds)}")
    parts = []
    for i, part in enumerate(value):
        kind = read_kind(part, f"{where}[{i}]", kinds)
        parts.append(read_object(part, f"{where}[{i}]", {"type", *kinds[kind]}))
    return parts


def shown(value: Any) -> str:
    """Return a value for a message, not at length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- the thinking that a client carries from one request to the next without seeing it ---------------------------------


def seal(thinking: str) -> str:
    """Return thinking as an opaque text. It hides nothing: who holds it may read it."""
    return _SEAL + base64.urlsafe_b64encode(thinking.encode("utf-8", "replace")).decode()


def unseal(text: str) -> str:
    """Return the thinking of a sealed text; of one that another server made, nothing, for it can read it alone."""
    if not text.startswith(_SEAL):
        return ""
    try:
        return base64.urlsafe_b64decode(text.removeprefix(_SEAL)).decode("utf-8", "replace")
    except binascii.Error:
        return ""
