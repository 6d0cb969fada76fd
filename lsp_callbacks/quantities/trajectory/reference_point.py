"""Reference point in parameter space from which distances are measured, remembered by a random sketch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.errors import Unsupported
from lsp_callbacks.linalg import Sketch
from lsp_callbacks.linalg.sketch import BUCKETS

#: Sketch before there is a reference point.
NOWHERE = torch.full((BUCKETS,), torch.nan, dtype=torch.float64)


def existing_file(name: str, value: Any) -> str:
    """Return the path of a checkpoint.

    Raises:
        ValueError: if there is no such file.
    """
    if not isinstance(value, str | Path) or not Path(value).is_file():
        raise ValueError(f"{name}={value!r}: give the path of a checkpoint, or of a saved state_dict")
    return str(value)


def position(module: nn.Module, sketch: Sketch) -> Tensor:
    """Return the sketch of all parameters, on their device.

    Frozen ones are included, so that freezing or unfreezing during the run does not move the point.
    """
    return sketch(p.detach() for p in module.parameters())


def position_in(path: str, module: nn.Module, sketch: Sketch) -> Tensor:
    """Return the sketch of the module's parameters in a checkpoint.

    Raises:
        Unsupported: if it cannot be read, or lacks some of them.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved.get("state_dict", saved)
        tensors = [state[name].view_as(p) for name, p in module.named_parameters()]
    except Exception as error:  # whatever the file contains
        raise Unsupported(
            f"reference={path!r} is no checkpoint of this model ({type(error).__name__}: {error}): save its state_dict "
            "alone, or measure from the first parameters"
        ) from None
    return sketch(tensors)


def squared_distance(here: Tensor, there: Tensor) -> Tensor:
    """Return ``||theta - theta_ref||^2`` from both sketches, to 6 %."""
    return (here - there).square().sum()
