"""What a reader has to know before believing a row, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from muon_rl.experiments.groups import Group
from muon_rl.experiments.rows import EVERY_TASK, Options, Row
from muon_rl.experiments.runs import NONE
from muon_rl.experiments.statistics import coverage

ENOUGH = 5  # seeds
_SHOWN = 3  # names in a list


def remarks_of(
    groups: Sequence[Group], rows: Sequence[Row], tasks: Sequence[str], options: Options
) -> list[list[str]]:
    """Return the remarks on each row.

    Args:
        groups: the baseline first, if there is one.
        rows: of the groups, in their order.
        tasks: of all groups.
        options: of the comparison.
    """
    baseline = groups[0] if options.baseline is not None else None
    found = []
    for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
        others = [g for g in groups if g is not group and g.counted]
        doubts = [
            *_seeds(group, tasks),
            *_left_out(group, options),
            *_budgets(group, others, tasks, options),
            *_tuning(group, others),
            *_numbers(group, options),
        ]
        beside = []
        if baseline is not None and group.counted and group is not baseline:
            beside = [*_against(group, baseline)]
        soft = [*_same(group, options)]
        soft += _overlaps(index, rows, against_first=baseline is not None)
        if options.thresholds:
            soft += _threshold(group, options)
        if group.seeds >= ENOUGH and (share := coverage(group.seeds)) and share < 0.95:
            soft.append(f"{group.seeds} seeds: the 95% interval covers about {share:.0%}")
        if group.label == NONE or f"={NONE}" in group.label:
            soft.append("these runs lack what is grouped by")
        shown = []
        if baseline is not None and group is not baseline and not doubts and not beside:
            # A doubt about the baseline is one about what is measured against it.
            doubted = [*_seeds(baseline, tasks), *_left_out(baseline, options)]
            doubted += _numbers(baseline, options)
            if not doubted:
                shown = [*_shown(group, row, tasks, options)]
        found.append([*doubts, *beside, *soft, *shown])
    return found


def _seeds(group: Group, tasks: Sequence[str]) -> Iterator[str]:
    if not group.counted:
        yield "pilot: no claim (no run counts)"
        return
    if group.seeds < ENOUGH:
        yield f"pilot: no claim ({_count(group.seeds, 'seed')})"
    if group.seeds < 2:
        yield "one seed: no interval"
    lengths = {len(members) for members in group.tasks.values()}
    if len(lengths) > 1:
        yield f"tasks have {min(lengths)} to {max(lengths)} seeds"
    if missing := [task for task in tasks if task not in group.tasks]:
        yield f"no run on {_list(missing)}"


def _left_out(group: Group, options: Options) -> Iterator[str]:
    for status, word in (("FAILED", "failed"), ("KILLED", "killed"), ("RUNNING", "running"),
                         ("SCHEDULED", "scheduled")):  # fmt: skip
        if runs := group.with_status(status):
            yield f"{len(runs)} {word} {'run' if len(runs) == 1 else 'runs'} left out"
    if group.without_metric:
        finished = _count(len(group.without_metric), "run")
        yield f"{finished} without {options.metric}{options.up_to} left out"
    if group.without_number:
        yield f"{_count(len(group.without_number), 'run')} without a finite value left out"
    for task, seeds in group.doubled.items():
        of = f" on {task}" if len(group.tasks) > 1 else ""
        for seed in dict.fromkeys(seeds):
            times = seeds.count(seed) + 1
            often = "twice" if times == 2 else f"{times} times"
            yield f"seed {seed} {often}{of}: the newest finished run counts"
    points = {run.values["point"] for run in group.runs if "point" in run.values}
    if group.doubled and len(points) > 1 and "point" not in options.group_by:
        yield f"{_count(len(points), 'point')} of a sweep in one: --group-by point parts them"
    if unnamed := [one for one in group.counted if one.run.seed is None]:
        nameless = _count(len(unnamed), "run")
        yield f"{nameless} without the tag or param seed: each counts as a seed"


def _budgets(
    group: Group, others: Sequence[Group], tasks: Sequence[str], options: Options
) -> Iterator[str]:
    kinds = {"budget": "budgets"}
    if options.until is not None:  # to which their schedules went on
        kinds["whole_budget"] = "whole budgets"
    for task, (kind, word) in product(group.tasks, kinds.items()):
        of = f" on {task}" if len(tasks) > 1 else ""
        own = [getattr(one.history, kind) for one in group.tasks[task]]
        beside = [one for other in others for one in other.tasks.get(task, ())]
        rest = [getattr(one.history, kind) for one in beside]
        if min(own) < max(own):
            yield f"{word} differ{of}: {min(own):,} to {max(own):,} frames in this group"
        elif rest and (min(rest), max(rest)) != (own[0], own[0]):
            span = f"{min(rest):,}" + f" to {max(rest):,}" * (min(rest) < max(rest))
            yield f"{word} differ{of}: {own[0]:,} frames here, {span} in other groups"


def _tuning(group: Group, others: Sequence[Group]) -> Iterator[str]:
    own, rest = _trials([group]), _trials(others)
    if len(own) > 1:
        yield f"tuning trials differ: {_list(own)} in this group"
    elif own and rest and own != rest:
        yield f"tuning trials differ: {own[0]} here, {_list(rest)} in other groups"


def _trials(groups: Sequence[Group]) -> list[str]:
    trials = {
        one.run.values.get("tuning_trials", "unrecorded")
        for group in groups
        for one in group.counted
    }
    return sorted(trials, key=lambda text: (len(text), text))


def _numbers(group: Group, options: Options) -> Iterator[str]:
    histories = [one.history for one in group.counted]
    for word, count in (
        ("NaN", sum(history.nans for history in histories)),
        ("infinite", sum(history.infinities for history in histories)),
    ):
        if count:
            verb = "was" if count == 1 else "were"
            yield f"{_count(count, 'value')} {verb} {word} and left out"
    if ends := sum(history.ends_without_number for history in histories):
        yield f"{_count(ends, 'run')} ended without a number: an earlier evaluation counts as final"
    short = sum(history.values.size < options.last for history in histories)
    if short:
        yield f"{_count(short, 'run')} with fewer than {options.last} evaluations"


def _against(group: Group, baseline: Group) -> Iterator[str]:
    if baseline.seeds < ENOUGH:
        yield f"the baseline has {_count(baseline.seeds, 'seed')}: no claim"
    shared = [task for task in group.tasks if task in baseline.tasks]
    if not shared:
        yield "no task in common with the baseline"
    if any(group.seed_names(task) != baseline.seed_names(task) for task in shared):
        yield "seeds differ from the baseline's"


def _same(group: Group, options: Options) -> Iterator[str]:
    scores = {one.final(options.last) for one in group.counted}
    if len(group.counted) > 1 and len(scores) == 1:
        yield f"all {len(group.counted)} runs end with the same score: do they differ at all?"


def _overlaps(index: int, rows: Sequence[Row], against_first: bool) -> Iterator[str]:
    row = rows[index]
    names = []
    for position, other in enumerate(rows):
        beside = position == 0 if against_first else True
        if position != index and beside and _overlap(row, other):
            names.append(other.group)
    if names and against_first:
        yield "interval overlaps the baseline's"
    elif names:
        yield f"interval overlaps that of {_list(names)}"
    low, high = row.improvement_low, row.improvement_high
    if low is not None and high is not None and low <= 0.5 <= high:
        yield "improvement's interval holds 0.5: no difference shown"


def _overlap(row: Row, other: Row) -> bool:
    ends = row.final_iqm_low, row.final_iqm_high, other.final_iqm_low, other.final_iqm_high
    low, high, other_low, other_high = ends
    if low is None or high is None or other_low is None or other_high is None:
        return False
    return low <= other_high and other_low <= high


def _threshold(group: Group, options: Options) -> Iterator[str]:
    of = [
        (one, options.thresholds.get(task, options.thresholds.get(EVERY_TASK)))
        for task, members in group.tasks.items()
        for one in members
    ]
    asked = [(one, limit) for one, limit in of if limit is not None]
    missed = sum(one.reaches(limit)[0] == float("inf") for one, limit in asked)
    if missed:
        yield f"{missed} of {_count(len(asked), 'run')} did not reach the threshold"


def _shown(group: Group, row: Row, tasks: Sequence[str], options: Options) -> Iterator[str]:
    """Yield the one claim that a table makes, where nothing speaks against it."""
    low, high = row.improvement_low, row.improvement_high
    if low is None or high is None or low <= 0.5 <= high:
        return
    where = f"on {tasks[0]}" if len(tasks) == 1 else f"over {len(tasks)} tasks"
    side = "above" if low > 0.5 else "below"
    chance = row.improvement_probability or 0.0
    share, ends = (chance, (low, high)) if side == "above" else (1 - chance, (1 - high, 1 - low))
    yield (
        f"shown {where} with {group.seeds} seeds each and equal budgets{options.up_to}: "
        f"final {options.metric} {side} {options.baseline}'s in {share:.0%} of pairs of runs "
        f"(95% interval {ends[0]:.0%} to {ends[1]:.0%})"
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _list(names: Sequence[str]) -> str:
    shown = list(names[:_SHOWN])
    if len(names) > _SHOWN:
        shown.append(f"{len(names) - _SHOWN} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
