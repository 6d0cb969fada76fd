"""Logs of W&B in a folder: records of Protocol Buffers in blocks, read without its package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs, curves_of, pictures_beside
from lsp_callbacks.report.logs.settings import HIDDEN, SECRET, flattened

#: The file begins with it; then come blocks of this size, and records with headers of this size in them.
MAGIC, BLOCK, HEADER = b":W&B", 32768, 7
#: Kinds of a record's part.
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
#: Numbers of fields in ``wandb_internal.proto``: of a record, of a history, of one of its items.
HISTORY, CONFIG, RUN, EXIT = 2, 5, 17, 18
ITEM, STEP, RUN_CONFIG = 1, 2, 4
KEY, NESTED_KEY, VALUE = 1, 2, 16
#: Lightning's logger writes its own step under this key.
GLOBAL_STEP = "trainer/global_step"


def read_wandb(path: Path) -> LoggedRun:
    """Return the run of a ``.wandb`` file, which may still be written.

    Args:
        path: of the file in ``wandb/offline-run-.../``.

    Raises:
        UnreadableLogs: for a file that is none of W&B's.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise UnreadableLogs(f"{path} does not begin as a file of W&B")
    points: dict[str, list[tuple[int, float]]] = {}
    configuration: dict[str, Any] = {}
    ended = False
    for record in records(content):
        for number, value in fields(record):
            if number == HISTORY:
                _add_row(value, points)
            elif number == CONFIG:
                configuration |= _items(value, 1)
            elif number == RUN:
                for part, inner in fields(value):
                    if part == RUN_CONFIG:
                        configuration |= _items(inner, 1)
            elif number == EXIT:
                ended = True
    points.pop("epoch", None)
    shown = {key: value for key, value in configuration.items() if key != "_wandb"}
    settings = {name: HIDDEN if SECRET.search(name) else value for name, value in flattened(shown)} if shown else {}
    pictures, left_out = pictures_beside(path.parent / "files" / "media" / "images", "**/stability/*.png")
    return LoggedRun(
        path, "W&B", curves_of(points), {"config": settings} if settings else {}, pictures=pictures, notes=left_out,
        ended=ended,
    )  # fmt: skip


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of the file; one that is not whole yet ends it."""
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # too little room for a header: filled with zeros
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part = content[at + HEADER : at + HEADER + length]
        if len(part) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        at += HEADER + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message; numbers of fixed size are passed over.

    Raises:
        UnreadableLogs: for a message that is broken.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise UnreadableLogs("a record of W&B is broken")
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise UnreadableLogs(f"a record of W&B has a field of the unknown kind {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        value |= (message[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 128:
            return value, at
    raise UnreadableLogs("a record of W&B is broken")


def _items(message: bytes, number: int) -> dict[str, Any]:
    """Return key and value of all items, whose values are JSON."""
    items: dict[str, Any] = {}
    for field, item in fields(message):
        if field != number or not isinstance(item, bytes):
            continue
        names, text = [], "null"
        for part, value in fields(item):
            if part in (KEY, NESTED_KEY):
                names.append(value.decode("utf-8", "replace"))
            elif part == VALUE:
                text = value.decode("utf-8", "replace")
        try:
            items["/".join(filter(None, names))] = json.loads(text)
        except ValueError:
            items["/".join(filter(None, names))] = text
    return items


def _add_row(message: bytes, points: dict[str, list[tuple[int, float]]]) -> None:
    row = _items(message, ITEM)
    steps = [inner for number, value in fields(message) if number == STEP for part, inner in fields(value) if part == 1]
    step = row.get(GLOBAL_STEP, steps[0] if steps else row.get("_step"))
    if not isinstance(step, int | float):
        return
    for key, value in row.items():
        value = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.get(str(value), value)
        if isinstance(value, int | float) and not key.startswith("_") and key != GLOBAL_STEP:
            points.setdefault(key, []).append((int(step), float(value)))
