"""The differences that are meant, for each case, with the defect of the original each one mends.

One that is not listed here fails the test, and so does one that is listed and does not occur.
Epoch 2 is the last of three; 3 is the number some originals give the final evaluation.
"""

from __future__ import annotations

from .compare import Declared, Renamed
from .trainings import Case

_OWN_FIGURE = "the original draws the picture again with pyplot and never closes the figure"
_FINAL = "the final evaluation is no epoch: the original lets it pass for one more, or replace one"
_BATCH = "the original takes the batch's number for the iteration: each epoch replaces the last"
_LAST = "the newest weights are kept too, for a run whose best ones are not written"
_NAMES = "class names are logged for Platform; the other originals leave them out"
_CURVES = "the plots are logged as numbers too, for Platform; others get them as tables"
_MARK = "by this tag the task is found again, so that none is made twice"

CLEARML = (
    Declared("only gateway", "tag | rankgate:*", _MARK),
    Declared("only gateway", "param | properties/model/names", _NAMES),
    Renamed("original", r"(image .* train)\.jpg \| (\d)", r"\1_batch\2", _BATCH),
    Renamed("original", r"(image .* val)(_\w+)\.jpg \| (\d)", r"\1_batch\3\2", _BATCH),
    Renamed("gateway", r"(image .*) \| \d", r"\1", _BATCH),
    Declared("value", "plot | * | plot image | 0", _OWN_FIGURE),
    Declared("only gateway", "model | last | *", _LAST),
)

CLEARML_NEW = (
    *CLEARML,
    Declared("only gateway", "plot | Curves | *", _CURVES),
    Declared("only gateway", "plot | Results | *", _CURVES),
    Declared(
        "only original",
        "param | General/_ignore_remote_overrides_",
        "the original passes an argument of connect() that this package stores as a parameter",
    ),
    Declared("only original", "scalar | metrics | * | 3", _FINAL),
    Declared("only original", "scalar | Epoch Time | Epoch Time | 3", _FINAL),
)

_ONE_TITLE = "the original puts results and validation losses under one title"
CLEARML_OLD = (
    *CLEARML,
    Renamed("original", r"scalar \| val \| (metrics/.*)", r"scalar | metrics | \1", _ONE_TITLE),
    Declared("value", "scalar | metrics | metrics/* | 2", _FINAL),
    Declared("only gateway", "plot | labels* | plot image | 0", "only plots of fixed names"),
)

NEPTUNE_OLD = (
    Declared("only original", "refused | metrics/*", "the last step twice: Neptune refuses it"),
    Declared("only gateway", "atom | final/*", _FINAL),
    Declared("only gateway", "atom | Configuration/Model/model/names", _NAMES),
    Declared("value", "file | Plots/*", _OWN_FIGURE),
    Declared("only gateway", "file | Plots/labels*", "only plots of fixed names"),
    Declared("only gateway", "file | weights/exp/last.pt", _LAST),
)

HUB_OLD = (
    Renamed("original", r"scalar \| (metrics/.*) \| 2", r"scalar | final/\1 | 2", _FINAL),
    Declared("only gateway", "scalar | metrics/* | 2", _FINAL),
    Declared("only gateway", "scalar | val/*_loss | 2", _FINAL),
    Declared("only gateway", "scalar | final/fitness | 2", _FINAL),
    Declared("only gateway", "checkpoint | epoch | 2", _LAST),
)

PLATFORM_NEW = (
    Declared("only gateway", "checkpoint | last.pt", _LAST),
    Declared("only original", "epoch | *fitness | 3", _FINAL),
    Declared("only original", "scalar | * | 3", _FINAL),
)

DECLARED: dict[Case, tuple[Declared | Renamed, ...]] = {
    Case("clearml", "8.4.190"): CLEARML_NEW,
    Case("clearml", "8.2.50"): CLEARML_OLD,
    Case("neptune", "8.2.50"): NEPTUNE_OLD,
    Case("hub", "8.2.50"): HUB_OLD,
    Case("platform", "8.4.190"): PLATFORM_NEW,
}
