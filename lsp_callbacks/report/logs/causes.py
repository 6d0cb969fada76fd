"""What lies behind a verdict: the quantity that decided it, and the layers and blocks that stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lsp_callbacks.monitor.courant_source import CODES, COURANT, SOURCE
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.quantities.key import PREFIX, Key, is_global
from lsp_callbacks.report.curves import latest, readings
from lsp_callbacks.report.judgement import Verdict
from lsp_callbacks.report.logs.logged_run import layers_of
from lsp_callbacks.report.table import keys_of_a_run

#: Kinds whose largest value stands out; of the others a large value is not a bad one.
LARGEST = (
    "residual_gain", "residual_stiffness", "spectral_norm", "sigma_x", "forward_gain", "backward_gain", "dead_units",
    "saturated_units", "player_courant", "batch_norm_excess", "condition",
)  # fmt: skip
#: The key behind each cause of a verdict.
DECIDING = {"courant": "courant", "exponent": "lyapunov", "collapse": "collapsed", "stop": "courant"}


@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Attributes:
        where: "quantity", "layer" or "block".
        name: of it.
        text: what stands out.
        meaning: of its number.
        advice: what to do when that is bad; empty without advice.
    """

    where: str
    name: str
    text: str
    meaning: str = ""
    advice: str = ""


def findings(history: Mapping[str, Curve], verdict: Verdict) -> list[Finding]:
    """Return the quantities beyond their thresholds, that which decided first, and the layers and blocks behind.

    Layers that stand out are where to look first; that they are the cause is not proved.

    Args:
        history: curves of stability.
        verdict: on the run.
    """
    keys = keys_of_a_run()
    return [*_quantities(history, verdict, keys), *_layers(history, keys)]


def courant_source(history: Mapping[str, Curve]) -> str | None:
    """Return which number the headline Courant number is; None where that is not logged."""
    code = latest(history.get(SOURCE))
    return next((key for key, value in CODES.items() if value == code), None)


def stated(keys: Mapping[str, Key], name: str) -> Key:
    """Return what is said of a name, which may be that of a layer's number; an empty key for an unknown one."""
    kind, slash, _ = name.partition("/")
    if not slash:
        return keys.get(name, Key(""))
    return next((key for stated, key in keys.items() if stated.startswith(f"{kind}/")), Key(""))


def _quantities(history: Mapping[str, Curve], verdict: Verdict, keys: Mapping[str, Key]) -> list[Finding]:
    deciding = PREFIX + DECIDING.get(verdict.cause, "")
    names = [key for key in history if is_global(key) and stated(keys, key.removeprefix(PREFIX)).threshold < math.inf]
    chosen = []
    for key in sorted(names, key=lambda key: key != deciding):
        key_of, values = stated(keys, key.removeprefix(PREFIX)), readings(history[key])
        beyond = [s for s, v in zip(history[key].steps, history[key].values) if v > key_of.threshold]
        if not values or not (beyond or key == deciding) or (key == courant_source(history) and COURANT in history):
            continue
        text = f"{values[-1]:.3g} at the last reading"
        if beyond:
            text += f", above {key_of.threshold:g} at {len(beyond):,} of {len(values):,} readings, first at step "
            text += f"{beyond[0]:,}; {max(values):.3g} at most"
        source = courant_source(history) if key == COURANT else None
        meaning = key_of.meaning + (f" It is {source.removeprefix(PREFIX)} here." if source else "")
        chosen.append(Finding("quantity", key.removeprefix(PREFIX), text, meaning, key_of.advice))
    return chosen


def _layers(history: Mapping[str, Curve], keys: Mapping[str, Key]) -> list[Finding]:
    kinds = layers_of(history)
    chosen = []
    for kind in (kind for kind in LARGEST if kind in kinds):
        curves = {name: curve for name, curve in kinds[kind].items() if readings(curve)}
        if not curves:
            continue
        largest = max(curves, key=lambda name: latest(curves[name]))
        first, last = readings(curves[largest])[0], latest(curves[largest])
        text = f"the largest {kind} of {len(curves):,}: {last:.3g} at step {curves[largest].steps[-1]:,}"
        text += f", {first:.3g} at first" if len(readings(curves[largest])) > 1 else ""
        grown = max(curves, key=lambda name: latest(curves[name]) - readings(curves[name])[0])
        if grown != largest and (rise := latest(curves[grown]) - readings(curves[grown])[0]) > 0:
            text += f"; {grown} has grown most, by {rise:.3g} to {latest(curves[grown]):.3g}"
        about = stated(keys, f"{kind}/")
        where = "block" if kind.startswith("residual") else "player" if kind.startswith("player") else "layer"
        meaning, advice = _whole(kind, keys)
        chosen.append(Finding(where, largest, text, about.meaning or meaning, about.advice or advice))
    return chosen


def _whole(kind: str, keys: Mapping[str, Key]) -> tuple[str, str]:
    """Return what is said of the largest value over all layers, where the registry states it."""
    key = keys.get(f"{kind}_max", Key(""))
    return key.meaning, key.advice
