"""The runs of an MLflow experiment that a comparison is about, and how they are grouped."""

from __future__ import annotations

import difflib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from muon_rl.tags import KIND, PAUSES

NONE = "(none)"  # the group of the runs that lack what is grouped by
_SQLITE = "sqlite:///"


class ComparisonError(Exception):
    """A comparison that cannot be made, told in a line or two."""


@dataclass(frozen=True)
class Run:
    """A run as a comparison sees it.

    Args:
        run_id: MLflow's.
        status: FINISHED, FAILED, KILLED, RUNNING or SCHEDULED.
        start: milliseconds since 1970.
        task: the tag or param ``task``, else the experiment's name.
        seed: the tag or param ``seed``, if there is one.
        values: params, and over them the tags.
    """

    run_id: str
    status: str
    start: int
    task: str
    seed: str | None
    values: dict[str, str] = field(repr=False)

    @property
    def pauses(self) -> list[tuple[int, int]]:
        """Begin and end of each time that the run stood still, milliseconds since 1970."""
        noted = json.loads(self.values.get(PAUSES, "[]"))
        return [(int(begin), int(end)) for begin, end in noted]


def open_store(tracking_uri: str) -> MlflowClient:
    """Return a client of a tracking store that exists.

    Args:
        tracking_uri: any of MLflow's.

    Raises:
        ComparisonError: if it is a file or folder that is missing, or no store of MLflow's.
    """
    missing = ComparisonError(
        f"There is no tracking store {tracking_uri}: name one with --tracking-uri or "
        "MLFLOW_TRACKING_URI."
    )
    if tracking_uri.startswith(_SQLITE):
        file = Path(tracking_uri.removeprefix(_SQLITE).partition("?")[0])
        if not file.is_file():
            raise missing
        # MLflow would make its tables, and an experiment, in an empty one. Not opened read-only:
        # what a killed writer left half done could not be rolled back.
        try:
            with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as store:
                store.execute("select 1 from experiments").fetchone()
        except sqlite3.DatabaseError as error:
            raise ComparisonError(f"{file} is no tracking store of MLflow's: {error}.") from error
    try:
        # MLflow would make a folder, and an experiment in it.
        if is_local_uri(tracking_uri) and not Path(local_file_uri_to_path(tracking_uri)).is_dir():
            raise missing
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ComparisonError(f"{tracking_uri} cannot be read: {first_line}") from error
    return client


def find_experiments(client: MlflowClient, names: Sequence[str]) -> list[Experiment]:
    """Return experiments by their names or ids.

    Args:
        client: of the store.
        names: or ids, where no experiment has that name.

    Raises:
        ComparisonError: naming what there is.
    """
    there = list(_pages(client.search_experiments))
    by_name = {experiment.experiment_id: experiment for experiment in there}
    by_name |= {experiment.name: experiment for experiment in there}
    found = {}
    for name in names:
        if name not in by_name:
            all_names = sorted(experiment.name for experiment in there)
            close = difflib.get_close_matches(name, all_names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ComparisonError(
                f"There is no experiment {name!r} in {client.tracking_uri}: {hint}"
                f"There {'is' if len(all_names) == 1 else 'are'} {', '.join(all_names) or 'none'}."
            )
        found[by_name[name].experiment_id] = by_name[name]
    return list(found.values())


def find_runs(
    client: MlflowClient, experiments: Sequence[Experiment], filter_string: str = ""
) -> list[Run]:
    """Return the runs of experiments: neither deleted ones, nor parents, nor comparisons.

    Args:
        client: of the store.
        experiments: in which.
        filter_string: MLflow's, such as ``params.`data.batch_size` = '256'``; empty for all.

    Raises:
        ComparisonError: if there is none, or the filter is not understood.
    """
    names = {experiment.experiment_id: experiment.name for experiment in experiments}

    def search(filter_string: str) -> list[MlflowRun]:
        def page(**which: Any) -> list[MlflowRun]:
            return client.search_runs(list(names), filter_string, ViewType.ACTIVE_ONLY, **which)

        return list(_pages(page))

    runs = search("")
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    if filter_string:
        try:
            runs = search(filter_string)
        except MlflowException as error:
            raise ComparisonError(f"--filter={filter_string!r}: {error}") from error
    found = [
        _run(run, names[run.info.experiment_id])
        for run in runs
        if run.data.tags.get(KIND) not in ("sweep", "comparison") and run.info.run_id not in parents
    ]
    if not found:
        which = " that the filter leaves" if filter_string else ""
        raise ComparisonError(f"There is no run{which} in {' or '.join(names.values())}.")
    return found


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> tuple[list[str], dict[str, list[Run]]]:
    """Return the runs by the values of tags or params.

    Args:
        runs: any.
        keys: of tags or params, ``init_args`` left out of them or not; none of them means
            ``method`` if runs have that, else ``optimizer``.

    Returns:
        The keys; and the runs by label: the value of a single key, ``key=value, …`` of several,
        ``(none)`` where a run has none of them. A label is a line: white space in it is a blank.

    Raises:
        ComparisonError: if no run has a key, naming near ones.
    """
    known = {key for run in runs for key in run.values}
    if not keys:
        keys = [key for key in ("method", "optimizer") if key in known][:1]
        if not keys:
            raise ComparisonError(f"Say --group-by KEY: {_nearest('', known)}")
    keys = [key if key in known else key.replace(".init_args", "") for key in keys]
    for key in keys:
        if key not in known:
            raise ComparisonError(f"No run has a tag or param {key!r}: {_nearest(key, known)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_label(run, keys), []).append(run)
    return keys, dict(sorted(groups.items(), key=lambda item: natural(item[0])))


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return what sorts a text as a person would: 2 before 10.

    Args:
        text: any.
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [
        (0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)
    ]


def _label(run: Run, keys: Sequence[str]) -> str:
    values = {key: " ".join(run.values[key].split()) for key in keys if key in run.values}
    if len(keys) == 1 or not values:
        return values.get(keys[0], NONE)
    return ", ".join(f"{key}={values.get(key, NONE)}" for key in keys)


def _run(run: MlflowRun, experiment: str) -> Run:
    values = {**run.data.params, **run.data.tags}
    seed = values.get("seed")
    return Run(
        run_id=run.info.run_id,
        status=run.info.status,
        start=run.info.start_time or 0,
        task=values.get("task", experiment),
        seed=None if seed is None else seed.strip(),
        values=values,
    )


def _nearest(key: str, known: set[str]) -> str:
    keys = sorted(name for name in known if not name.startswith(("mlflow.", "version/")))
    ends = [name for name in keys if key and name.endswith("." + key)]
    if close := ends + difflib.get_close_matches(key, keys, n=4, cutoff=0.5):
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    shown = ", ".join(keys[:20]) + ", …" * (len(keys) > 20)
    return f"runs have {shown}." if keys else "runs have neither tags nor params."


def _pages(search) -> Iterator:
    token = None
    while True:
        page = search(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
