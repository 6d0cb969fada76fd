"""Logs of TensorBoard: event files, read by its own package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.report.logs.logged_run import LARGEST_PICTURE, PNG, LoggedRun, UnreadableLogs, curves_of
from lsp_callbacks.report.logs.settings import settings_beside


def read_tensorboard(folder: Path) -> LoggedRun:
    """Return the run of a folder of event files.

    Args:
        folder: with files named ``events.out.tfevents...``.

    Raises:
        UnreadableLogs: without the package tensorboard.
    """
    try:
        accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError as error:
        raise UnreadableLogs(
            f"{folder} holds event files of TensorBoard, and its package is not installed: pip install tensorboard"
        ) from error
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0, accumulator.IMAGES: 1})
    events.Reload()
    tags = events.Tags()
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    points.pop("epoch", None)
    settings, texts = settings_beside(folder, ("hparams.yaml", "config.yaml"))
    unread = len([tag for tag in tags["tensors"] if not tag.startswith("_hparams_")])
    notes = (f"{unread} tensors were not read: only scalars and pictures are",) if unread else ()
    return LoggedRun(folder, "TensorBoard", curves_of(points), settings, texts, _pictures(events, tags), notes)


def _pictures(events: Any, tags: Any) -> dict[str, bytes]:
    """Return the last picture of each tag of stability."""
    pictures = {}
    for tag in tags["images"]:
        content = events.Images(tag)[-1].encoded_image_string
        if PREFIX in tag and content.startswith(PNG) and len(content) <= LARGEST_PICTURE:
            pictures[tag] = content
    return pictures
