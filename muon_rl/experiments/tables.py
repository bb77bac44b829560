"""A comparison as CSV for scripts, and as Markdown, LaTeX and text for readers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.rows import COLUMNS, EVERY_TASK, Row
from muon_rl.experiments.statistics import COVERAGE

Cells = list[list[str]]


def to_csv(comparison: Comparison) -> str:
    """Return one line a group with all columns, numbers in full; what was not asked for is empty.

    Args:
        comparison: with its rows.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in comparison.rows:
        cells = [getattr(row, column) for column in COLUMNS]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def cells(comparison: Comparison) -> tuple[list[str], Cells]:
    """Return header and lines of the table for readers, columns without a number left out.

    Args:
        comparison: with its rows.
    """
    baseline = comparison.options.baseline

    def spread(name: str) -> Callable[[Row], str]:
        return lambda row: _with_interval(
            getattr(row, name), getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        )

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("group", lambda row: row.group + " (baseline)" * (row.group == baseline)),
        ("runs", lambda row: str(row.runs)),
        ("seeds", lambda row: str(row.seeds)),
        ("left out", lambda row: str(row.failed)),
        ("frames", lambda row: "" if row.frames is None else f"{row.frames:,}"),
        ("final: IQM [95%]", spread("final_iqm")),
        ("mean", lambda row: number(row.final_mean)),
        ("median", lambda row: number(row.final_median)),
        ("area under curve: IQM [95%]", spread("auc_iqm")),
        (
            "P(improvement) [95%]",
            lambda row: _with_interval(
                row.improvement_probability, row.improvement_low, row.improvement_high, "{:.2f}"
            ),
        ),
        ("frames to threshold", lambda row: number(row.frames_to_threshold)),
        ("time to threshold", lambda row: duration(row.seconds_to_threshold)),
        ("frames/s", lambda row: number(row.frames_per_second)),
        (
            "optimizer's share",
            lambda row: "" if row.optimizer_share is None else f"{row.optimizer_share:.1%}",
        ),
        ("remarks", lambda row: row.remarks),
    ]
    filled = [(name, [cell(row) for row in comparison.rows]) for name, cell in columns]
    filled = [(name, column) for name, column in filled if any(column) or name == "remarks"]
    lines = [list(line) for line in zip(*(column for _, column in filled), strict=True)]
    return [name for name, _ in filled], lines


def notes(comparison: Comparison) -> list[str]:
    """Return what stands beside a table, a sentence each.

    Args:
        comparison: with its options.
    """
    options = comparison.options
    last = "the last evaluation" if options.last == 1 else f"the last {options.last} evaluations"
    unit = ""
    if comparison.bounds:
        spans = ", ".join(
            f"{t} {low:g} to {high:g}" for t, (low, high) in comparison.bounds.items()
        )
        unit = f" Scores are normalised: 0 to 1 is {spans}; tasks count together."
    covered = ", ".join(f"{c:.0%} (n = {n})" for n, c in sorted(COVERAGE.items()) if c < 0.95)
    said = [
        f"Score: {options.metric} ({last} of a run{options.up_to}), more is better; grouped by "
        f"{', '.join(options.group_by)}.{unit}",
        f"Brackets: 95% percentile intervals of a stratified bootstrap, {options.resamples:,} "
        f"resamples, seed {options.seed}. With few seeds they are too short: on normal scores that "
        f"of the IQM held the true one in {covered}, not in 95%.",
        "IQM: mean of the middle half of the runs. Area under curve: mean over the frames that all "
        "runs reached.",
    ]
    if options.thresholds:
        limits = [
            f"{limit:g}" if task == EVERY_TASK else f"{limit:g} on {task}"
            for task, limit in options.thresholds.items()
        ]
        said.append(
            f"Threshold: {', '.join(limits)}. Frames and time are of the first evaluation that "
            "reaches it, medians over the runs, empty unless most of them do."
        )
    if options.baseline is not None:
        said.append(
            f"P(improvement): how probably a run scores above one of {options.baseline}, ties half."
        )
    trials = [one.run.values.get("tuning_trials") for g in comparison.groups for one in g.counted]
    if not any(trials):
        said.append("No run says with how many trials its settings were tuned (tag tuning_trials).")
    return said


def to_markdown(comparison: Comparison) -> str:
    """Return a table with its notes below.

    Args:
        comparison: with its rows.
    """
    header, lines = cells(comparison)
    left = ("group", "remarks")
    rule = ["---" if name in left else "---:" for name in header]
    rows = [list(map(_markdown, line)) for line in lines]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])
    said = "\n".join(f"- {_markdown(note)}" for note in notes(comparison))
    return f"{table}\n\n{said}\n"


def to_latex(comparison: Comparison) -> str:
    """Return a table with its notes as caption; it needs the package ``booktabs``.

    Args:
        comparison: with its rows.
    """
    header, lines = cells(comparison)
    *header, _ = header
    remarks = [(line[0], line[-1]) for line in lines if line[-1]]
    lines = [line[:-1] for line in lines]
    body = [" & ".join(map(_latex, line)) + r" \\" for line in lines]
    caption = " ".join(map(_latex, notes(comparison)))
    said = " ".join(rf"\emph{{{_latex(group)}}}: {_latex(words)}." for group, words in remarks)
    return "\n".join([
        r"% Needs \usepackage{booktabs,graphicx}.",
        r"\begin{table}",
        r"\centering",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(_latex, header)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\caption{{{caption} {said}}}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def to_text(comparison: Comparison) -> str:
    """Return an aligned table for a terminal, its remarks and notes below.

    Args:
        comparison: with its rows.
    """
    header, lines = cells(comparison)
    short = [[*line[:-1]] for line in [header, *lines]]
    widths = [max(map(len, column)) for column in zip(*short, strict=True)]
    rows = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in short
    ]
    said = [f"{line[0]}: {line[-1]}" for line in lines if line[-1]]
    return "\n".join([*rows, "", *said, "", *notes(comparison)]) + "\n"


def number(value: float | None) -> str:
    """Return a number with four digits, or none at all.

    Args:
        value: any.

    Example:
        >>> number(12345.6), number(852.14), number(0.01234), number(None)
        ('12,346', '852.1', '0.01234', '')
    """
    if value is None:
        return ""
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    text = f"{value:#.4g}"
    return text if "e" in text else text.rstrip("0").rstrip(".") if text.endswith(".") else text


def duration(seconds: float | None) -> str:
    """Return a time as a person would say it.

    Args:
        seconds: any, or none.

    Example:
        >>> duration(42.4), duration(150), duration(8000)
        ('42 s', '2.5 min', '2.2 h')
    """
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _with_interval(
    value: float | None, low: float | None, high: float | None, form: str = ""
) -> str:
    write = form.format if form else number
    if value is None:
        return ""
    return write(value) + (f" [{write(low)}, {write(high)}]" if low is not None else "")


def _markdown(text: str) -> str:
    """Return a text whose signs stand for themselves, those that would do so anyway left alone."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


# An underscore within a word emphasises nothing; a bracket makes a link only before another.
_MARKDOWN = re.compile(r"[\\`*~<>|]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|&(?=#?\w+;)")
_LATEX = str.maketrans(
    {sign: "\\" + sign for sign in "&%$#_{}"}
    # What begins a line would be taken for an option of the line break before it.
    | {sign: f"{{{sign}}}" for sign in "[]*"}
    | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    }
)  # fmt: skip
