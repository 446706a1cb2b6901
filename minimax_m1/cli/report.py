"""`minimax-m1 report`: the report of a training run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minimax_m1.errors import UserError
from minimax_m1.settings import ReportSettings
from minimax_m1.training.report import compare_runs


def report(runs: Sequence[Path], settings: ReportSettings) -> None:
    """Write the report of `runs` and print where it is.

    Raises:
        UserError: no run, a folder that is none, the file cannot be written, or matplotlib is not installed.
    """
    if not runs:
        raise UserError("run: none given; accepted: one output folder of train or several")
    default = runs[0] / "report.html" if len(runs) == 1 else Path("compare.html")
    print(compare_runs(runs, settings.output or default))
