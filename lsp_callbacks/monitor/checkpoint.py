"""The state of a monitor in a checkpoint."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lsp_callbacks.monitor.history import History
from lsp_callbacks.step.known_scale import KnownScales

if TYPE_CHECKING:
    from lsp_callbacks.monitor.monitor import Monitor

VERSION = 5


def monitor_state(monitor: Monitor, *, vectors: bool, joined: bool) -> dict[str, Any]:
    """Return the state of a monitor.

    Args:
        monitor: it changes nothing of what it measures.
        vectors: whether the vectors of windows that are under way are saved, too.
        joined: whether the steps are those of several ranks.
    """
    state: dict[str, Any] = {
        "version": VERSION,
        "cadence": monitor.cadence.state_dict(),
        "budget": monitor.budget.state_dict(),
        "history": monitor.history.state_dict(),
        "courant": monitor.courant.state_dict(),
        "losses": monitor.losses.state_dict(),
        "quantities": {name: quantity.state_dict() for name, quantity in monitor.quantities.items()},
    }
    if monitor.trace is not None:
        state["trace"] = monitor.trace.state_dict(joined=joined)
    if vectors:
        state["vectors"] = {name: quantity.vectors() for name, quantity in monitor.quantities.items()}
        state["known_scales"] = monitor.known_scales.state()
    return state


def load_monitor_state(monitor: Monitor, state: dict[str, Any]) -> None:
    """Continue from a state that `monitor_state` returned; begin anew, with a warning, where it cannot be read."""
    try:
        _load(monitor, state)
    except Exception as error:
        monitor.reset()
        warnings.warn(
            f"lsp_callbacks begins anew: the checkpoint's state of version {state.get('version')} cannot be read "
            f"({type(error).__name__}: {error})",
            stacklevel=3,
        )


def _load(monitor: Monitor, state: dict[str, Any]) -> None:
    """Continue from a state that `monitor_state` returned.

    Raises:
        ValueError: for a state of another version.
        Exception: if something in it is missing, or of another kind.
    """
    if state.get("version") != VERSION:
        raise ValueError(f"this release reads version {VERSION}")
    monitor.history.replace(History.from_state(state["history"]))
    monitor.courant.load_state_dict(state["courant"])
    if monitor.courant.key not in {None, *(key for quantity in monitor.quantities.all for key in quantity.keys)}:
        monitor.errors.warn_once(f"stability/courant was {monitor.courant.name} before, which is not measured any more")
        monitor.courant.reset()
    monitor.losses.load_state_dict(state["losses"])
    for name, quantity in monitor.quantities.items():
        quantity.load_state_dict(dict(state["quantities"].get(name, {})), strict=False)
        quantity.load_vectors(state.get("vectors", {}).get(name, {}))
    monitor.known_scales = KnownScales()
    monitor.known_scales.load(state.get("known_scales", ()))
    if monitor.trace is not None and "trace" in state:
        monitor.trace.load_state_dict(state["trace"])
    monitor.cadence.load_state_dict(state["cadence"], windows="vectors" in state)
    monitor.budget.load_state_dict(state["budget"])
    for name in monitor.budget.reduced.keys() & monitor.cadence.paces.keys():  # the quantities are as they were made
        monitor.cadence.paces[name].is_stale = True
    monitor.cadence.headline = monitor.headline
