"""Groups whose labels Markdown, LaTeX, CSV and MLflow would each take for their own signs."""

from __future__ import annotations

import csv
import io
import shutil

import pytest
from markdown_it import MarkdownIt
from plain_store import Store

from muon_rl.experiments import tables
from muon_rl.experiments.comparison import Comparison, Options, compare
from muon_rl.experiments.log import log
from muon_rl.experiments.runs import find_experiments, find_runs

LATEX = {
    "[0.9,0.999]": "{[}0.9,0.999{]}",  # behind a line break it would be that break's height
    "*star*": "{*}star{*}",
    "a<b>|c": r"a\textless{}b\textgreater{}\textbar{}c",
    r"a\ {b}": r"a\textbackslash{} \{b\}",
    "~^$&%#_": r"\textasciitilde{}\textasciicircum{}\$\&\%\#\_",
}
LABELS = [
    *LATEX, "_under_ score_d", "`code`", "<script>", "&lt;", "[a](http://x)", "a|b", r"a\|b",
    'a,b"c', "# one", "η = 0.1",
]  # fmt: skip


def made(store) -> Comparison:
    runs = find_runs(store.client, find_experiments(store.client, ["walk"]))
    return compare(store.client, runs, Options(group_by=["optimizer"], resamples=10))


@pytest.fixture(scope="module")
def comparison(empty_store, tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("labels")
    shutil.copy(empty_store, folder / "mlflow.db")
    store = Store(folder)
    for label in LABELS:
        store.group(label, [1.0, 2.0])
    return made(store)


def test_markdown_shows_every_label_as_it_is(comparison):
    tokens = MarkdownIt("commonmark").enable("table").parse(tables.to_markdown(comparison))
    lines = [token for token in tokens if token.type == "tr_open"]
    starts = [index for index, token in enumerate(tokens) if token.type == "tr_open"]
    shown = [tokens[index + 2].children for index in starts[1:]]
    assert len(lines) == 1 + len(LABELS)
    assert {"".join(child.content for child in cell) for cell in shown} == set(LABELS)
    assert {child.type for cell in shown for child in cell} <= {"text", "text_special"}


def test_latex_takes_no_label_for_a_command(comparison):
    body = tables.to_latex(comparison).partition("\\midrule\n")[2].partition("\\bottomrule")[0]
    names = [row.partition(" & 2 & 2 & ")[0] for row in body.splitlines()]
    assert len(names) == len(LABELS)
    assert set(LATEX.values()) <= set(names)


def test_csv_gives_every_label_back(comparison):
    rows = csv.DictReader(io.StringIO(tables.to_csv(comparison), newline=""))
    assert {row["group"] for row in rows} == set(LABELS)


def test_a_label_is_a_line(store):
    for label in ("a\nb", "c\r\n\nd", " e\rf"):
        store.group(label, [1.0, 2.0])
    store.run([1.0], tags={"optimizer": "x\ny", "lr": "1"})
    assert [row.group for row in made(store).rows] == ["a b", "c d", "e f", "x y"]
    store.compare("--group-by=lr", "--baseline=optimizer=x y, lr=1", "--resamples=1")
    text = (store.folder / "out" / "summary.csv").read_bytes()
    assert text.count(b"\n") == 5 and b"\r" not in text


def test_every_label_s_numbers_are_logged_under_a_name_of_their_own(store):
    labels = ["/abs/path", "../x", ".", "a/", "a+b", "a*b", "", "muon"]
    for final, label in enumerate(labels):
        store.group(label, [float(final)])
    run_id = log(store.client, store.experiments["walk"], made(store), [], {})
    run = store.client.get_run(run_id)
    finals = {k: v for k, v in run.data.metrics.items() if k.endswith("/final_iqm")}
    assert run.info.status == "FINISHED"
    assert sorted(finals.values()) == [float(final) for final in range(len(labels))]
    assert finals["muon/final_iqm"] == 7 and finals["_abs_path/final_iqm"] == 0
