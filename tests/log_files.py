"""Log files of runs, as their loggers write them."""

import csv
import json
import math
from pathlib import Path

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&"\''


def write_csv(folder, columns, steps=None):
    """A ``metrics.csv``; None is an empty cell."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(map(len, columns.values()), default=0)
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *columns])
        for i in range(count):
            cells = [column[i] if i < len(column) and column[i] is not None else "" for column in columns.values()]
            rows.writerow([i if steps is None else steps[i], *cells])
    return folder


def columns(count=40, *, slope=0.01, layers=3):
    """Numbers of a run whose Courant number grows, and whose second layer grows fastest."""
    return {
        "train_loss": [2.0 * math.exp(-i / 20) + 0.2 for i in range(count)],
        "stability/courant": [0.2 + slope * i for i in range(count)],
        "stability/courant_mean_square": [0.2 + slope * i for i in range(count)],
        "stability/courant_source": [2.0] * count,
        "stability/mean_square_lr": [0.5] * count,
        **{
            f"stability/spectral_norm/net.{k}": [1 + k / 10 + (0.5 if k == 1 else 0.01) * i for i in range(count)]
            for k in range(layers)
        },
        **{f"stability/residual_gain/blocks.{k}": [0.1 * (k - 1)] * count for k in range(layers)},
    }


def write_mlflow(folder, metrics, *, status=3, parameters=None):
    """A run of MLflow's file store: a file for each metric, a line for each value."""
    for key, values in metrics.items():
        path = folder / "metrics" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"1700000000000 {value} {step}\n" for step, value in enumerate(values)))
    for name, text in (parameters or {}).items():
        path = folder / "params" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "meta.yaml").write_text(f"run_id: abc\nstatus: {status}\n")
    return folder


def _varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number, content):
    """A field of a message of Protocol Buffers: text and messages by their length, numbers as they are."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    content = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def write_wandb(path: Path, rows, *, config=None, ended=True):
    """A ``.wandb`` file: records in blocks of 32 KB, the larger ones in several parts."""
    config = b"".join(field(1, field(1, key) + field(16, json.dumps(value))) for key, value in (config or {}).items())
    records = [field(17, field(1, "id") + field(4, config))]
    for row in rows:
        items = b"".join(field(1, field(2, key) + field(16, json.dumps(value))) for key, value in row.items())
        records.append(field(1, 7) + field(2, items))
    records += [field(18, field(1, 0))] * ended
    content = b":W&B" + b"\xe1\xbe\x00"
    for record in records:
        first = True
        while True:
            room = 32768 - len(content) % 32768
            if room < 7:
                content += bytes(room)
                continue
            part, record = record[: room - 7], record[room - 7 :]
            kind = (1 if first else 4) if not record else (2 if first else 3)
            content += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
            if not record:
                break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
