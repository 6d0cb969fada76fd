"""Claim: no number depends on the units of a run but by the power that its own unit says; NaN is rare.

Every quantity, on three networks under SGD, momentum, Adam and AdamW (the three dearest under momentum and AdamW), in
other units of the loss, of the parameters inside of the module, and of the weights of homogeneous networks, by factors
of 1e-6, 1e-3, 1e3 and 1e6: see ``tests/scaling.py``. Prints by quantity, law and type how many numbers there were, the
largest deviation relative to the size of what it should be, and the share of those that are missing (NaN or refused in
the new units alone), for factors of 1e-3 and 1e3, and in brackets for 1e-6 and 1e6.
"""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from scaling import LAWS, Row, compared

from lsp_callbacks.quantities import REGISTRY

DEAR = ("sgd_stability", "lyapunov_trajectory", "stability_profile")
NEAR, FAR = (1e-3, 1e3), (1e-6, 1e6)


def cell(row: Row) -> str:
    if not row.numbers:
        return "-"
    return f"{row.numbers} | {row.worst[0]:.0e} | {100 * row.missing / row.numbers:.2g} %"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    print("| quantity | law | type | numbers | worst | missing | (far) numbers | worst | missing |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names or list(REGISTRY):
        for dtype in (torch.float64, torch.float32):
            kinds = {"optimizers": ("momentum", "adamw")} if name in DEAR else {}
            near, far = (compared(name, dtype=dtype, scales=scales, **kinds) for scales in (NEAR, FAR))
            for law in LAWS:
                if near[law].numbers:
                    type_ = str(dtype).removeprefix("torch.")
                    print(f"| {name} | {law} | {type_} | {cell(near[law])} | {cell(far[law])} |", flush=True)
                for where in [*near[law].reasons, *far[law].reasons]:
                    print(f"{name} {law} {dtype} missing: {where}", file=sys.stderr, flush=True)
                for row in (near[law], far[law]):
                    if row.worst[0] > 1e-3:
                        print(f"{name} {law} {dtype} worst: {row.worst}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
