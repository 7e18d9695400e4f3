"""How long a rank may log nothing before it counts as stuck: by how often it logged before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STUCK_SECONDS = 10.0  #: no rank is stuck earlier; with a word each second it is shown within 15
USUAL_PAUSES = 4.0  #: of a slow rank, so many of its usual pauses between two steps
LONGEST_PAUSES = 1.5  #: and so many of its longest recent one, as that of an evaluation
MIN_PAUSES = 3  #: before it has made so many steps nobody knows what is usual
RECENT_ROWS = 500


def patience(rows: npt.NDArray[np.int64]) -> dict[int, float]:
    """stream index → seconds, of `Reader.recent_rows`; streams that made too few steps are left
    out."""
    out = {}
    starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
    for stream in np.split(rows, starts[1:]):
        if not len(stream):
            continue
        new_step = np.diff(stream[:, 2], prepend=stream[0, 2] - 1) != 0
        pauses = np.diff(stream[new_step, 3])[-RECENT_ROWS:] / 1e9
        if len(pauses) >= MIN_PAUSES:
            usual, longest = float(np.median(pauses)), float(pauses.max())
            seconds = max(STUCK_SECONDS, USUAL_PAUSES * usual, LONGEST_PAUSES * longest)
            out[int(stream[0, 0])] = seconds
    return out
