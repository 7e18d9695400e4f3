"""Pictures, figures and tables as bytes: with what the user has imported, never importing it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .values import MAX_TEXT_VALUE, on_device, plain


def png(height: int, width: int, channels: int, pixels: bytes) -> bytes:
    """An 8-bit PNG (grey, grey+alpha, RGB or RGBA) of row-major pixels (PNG 1.2, RFC 2083)."""
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    stride = width * channels
    raw = b"".join(b"\0" + pixels[i : i + stride] for i in range(0, height * stride, stride))

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    data = zlib.compress(raw, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def image_maker(value: Any) -> Callable[[Path], None]:
    """A call that writes `value` as PNG: array (H, W), (H, W, C) or (C, H, W) with C of 1 to 4,
    uint8 or floats from 0 to 1; a PIL image. The pixels are copied now, encoded when called."""
    if hasattr(value, "save") and hasattr(value, "mode"):
        picture = value.copy()
        return lambda path: picture.save(path, format="PNG")
    if hasattr(value, "detach"):
        tensor = value.detach().clone()
        if on_device(value):  # the copy to the host waits for the device, so not in this call
            return lambda path: _write_array(path, tensor.cpu().float().numpy())
        return lambda path: _write_array(path, tensor.float().numpy())
    if not hasattr(value, "shape") or not hasattr(value, "astype"):
        raise TypeError(f"an image is an array, a tensor, a PIL image or a path, not {type(value)}")
    array = value.copy()
    return lambda path: _write_array(path, array)


def _write_array(path: Path, array: Any) -> None:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise ValueError(f"an image has shape (H, W), (H, W, C) or (C, H, W), not {array.shape}")
    if array.dtype.kind == "f":
        peak = float(array.max()) if array.size else 0.0
        array = (array * (255.0 if peak <= 1.0 else 1.0)).clip(0, 255).round()
    elif array.dtype.kind == "b":
        array = array * 255
    height, width, channels = array.shape
    path.write_bytes(png(height, width, channels, array.clip(0, 255).astype("uint8").tobytes()))


def figure_bytes(figure: Any) -> tuple[bytes, str]:
    """(bytes, file ending) of a matplotlib or plotly figure; drawn now, as it may change."""
    if hasattr(figure, "savefig"):
        out = io.BytesIO()
        figure.savefig(out, format="png", bbox_inches="tight")
        return out.getvalue(), ".png"
    if hasattr(figure, "to_json"):
        return str(figure.to_json()).encode(), ".plotly.json"
    raise TypeError(f"a figure comes from matplotlib or plotly, not from {type(figure)}")


def table_bytes(rows: Any) -> bytes:
    """`{"columns": [...], "rows": [[...]]}` of a list of dicts, a list of lists or a DataFrame."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")
    rows = list(rows)
    if all(isinstance(r, Mapping) for r in rows):
        columns: list[Any] = list(dict.fromkeys(k for r in rows for k in r))
        cells: Iterable[Iterable[Any]] = [[r.get(c) for c in columns] for r in rows]
    else:
        columns = list(range(max((len(r) for r in rows), default=0)))
        cells = rows
    table = {"columns": [str(c) for c in columns], "rows": [[_cell(v) for v in r] for r in cells]}
    return json.dumps(table).encode()


def _cell(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, str):
        return value[:MAX_TEXT_VALUE]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # JSON has no such numbers, and browsers refuse them
    return value
