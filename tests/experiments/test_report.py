"""The files of a comparison: tables, pictures, the report and the run in MLflow."""

from __future__ import annotations

import base64
import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from mlflow import MlflowClient
from plain_store import START, Store

from muon_rl.cli import main
from muon_rl.experiments.rows import COLUMNS
from muon_rl.experiments.statistics import COVERAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
FILES = {
    "summary.csv", "summary.md", "summary.tex", "report.html",
    "curves.png", "curves.svg", "aggregate.png", "aggregate.svg",
}  # fmt: skip
ODD = "adam & <b>w</b>_1%"  # what Markdown, LaTeX and HTML would each take for their own
ALONE = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's elements, and whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text.setdefault(tag, []).append("")
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def fill(store: Store) -> None:
    """Write three groups on two tasks, one a pilot and one with a name full of signs."""
    for task in ("walk", "hop"):
        store.group("muon", [800.0, 820, 840, 860, 880], experiment=task)
        store.group(ODD, [500.0, 520, 540, 560, 580], experiment=task)
        store.group("sgd", [90.0, 100, 120], experiment=task)


def compare(store: Store, *options: str) -> Path:
    output = store.folder / "out"
    main([
        "compare", "walk", "hop", f"--tracking-uri={store.uri}", f"--output={output}",
        "--group-by=optimizer", f"--baseline={ODD}", "--resamples=500", *options,
    ])  # fmt: skip
    return output


@pytest.fixture(scope="module")
def made(empty_store, tmp_path_factory):
    """A comparison's files, made once, and its store."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(empty_store, folder / "mlflow.db")
    store = Store(folder)
    fill(store)
    return compare(store), store


def test_the_promised_files_are_written_and_no_others(made):
    assert {path.name for path in made[0].iterdir()} == FILES


def test_the_report_is_a_page_of_its_own(made):
    page = Page((made[0] / "report.html").read_text())
    assert page.text["title"] == ["eval/return on hop and walk, by optimizer"]
    links = [attributes.get(key) for _, attributes in page.elements for key in ("src", "href")]
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links if link)
    assert not page.all("script") and not page.all("link")
    assert "url(" not in page.text["style"][0] and "@import" not in page.text["style"][0]
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    named = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert named <= identifiers


def test_the_report_has_a_row_a_group_and_both_figures(made):
    page = Page((made[0] / "report.html").read_text())
    heads = [text for text, a in zip(page.text["th"], page.all("th"), strict=True)
             if a.get("scope") == "row"]  # fmt: skip
    assert heads == [f"{ODD} (baseline)", "muon", "sgd"]
    assert [image["id"] for image in page.all("img")] == ["curves", "aggregate"]
    for image in page.all("img"):
        assert len(image["alt"]) > 40
        svg = base64.b64decode(image["src"].partition(",")[2])
        assert svg == (made[0] / f"{image['id']}.svg").read_bytes()
    assert len(page.all("figcaption")) == 2 and len(page.all("caption")) == 2
    with (made[0] / "summary.csv").open(newline="") as file:
        remarks = [words for row in csv.DictReader(file) for words in row["remarks"].split("; ")]
    items = page.text["li"]
    assert all(words in items for words in remarks if words)
    for fact in ("muon-rl compare walk hop", "sqlite:///", "500", "arXiv:2108.13264"):
        assert fact in " ".join(page.text["main"])
    assert len(page.all("tr")) == 2 + 2 * 3 + 26  # heads, groups, runs


def test_the_claim_stands_in_the_report_and_no_other(made):
    lede = Page((made[0] / "report.html").read_text()).text["p"][0]
    assert lede == (f"3 groups, 26 runs that count. A difference from {ODD} is shown for muon.")


def test_pictures_are_drawn(made):
    for name in ("curves", "aggregate"):
        picture = imread(made[0] / f"{name}.png")[..., :3]
        height, width, _ = picture.shape
        assert width > height > 300
        assert 0.02 < (picture.min(axis=2) < 0.9).mean() < 0.5  # lines on white
        root = ElementTree.parse(made[0] / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    # All tasks together and each alone, over frames, over time and frames to a score.
    assert len(_groups(made[0] / "curves.svg", "axes_")) == 9
    # Final score, area, improvement, profile.
    assert len(_groups(made[0] / "aggregate.svg", "axes_")) == 4


def _groups(path: Path, prefix: str) -> list[str]:
    found = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")
    return [group.get("id") for group in found if (group.get("id") or "").startswith(prefix)]


def test_markdown_has_a_row_a_group(made):
    text = (made[0] / "summary.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "pilot: no claim (3 seeds)" in table[4]
    assert "89% (n = 5)" in text


def test_latex_escapes_what_it_takes_for_its_own(made):
    text = (made[0] / "summary.tex").read_text()
    signs = r"\textless{}b\textgreater{}w\textless{}/b\textgreater{}\_1\%"
    assert rf"adam \& {signs} (baseline) & 10 & 5" in text
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    columns = re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", text)[1]
    assert [len(re.findall(r"(?<!\\)&", line)) + 1 for line in body] == [len(columns)] * 3
    assert text.count("{") == text.count("}")
    assert not re.search(r"(?<!\\)[%#_]", text.partition("\n")[2].replace("{%\n", "{\n"))


def test_the_same_data_give_the_same_pictures(made, tmp_path):
    folder, store = made
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    compare(store, "--no-log")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in FILES if before[name] != after[name]} <= {"report.html"}


def test_the_comparison_is_a_run_with_all_files_that_no_comparison_counts(made):
    folder, store = made
    experiment = store.client.get_experiment_by_name("walk")
    (run,) = [
        run
        for run in store.client.search_runs([experiment.experiment_id])
        if run.data.tags.get("muon_rl.kind") == "comparison"
    ]
    assert run.info.status == "FINISHED"
    assert {file.path for file in store.client.list_artifacts(run.info.run_id)} == FILES
    assert run.data.params["resamples"] == "500"
    with (folder / "summary.csv").open(newline="") as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}
    assert run.data.metrics["muon/final_iqm"] == pytest.approx(float(rows["muon"]["final_iqm"]))
    assert rows["muon"]["runs"] == "10"
    assert "| muon |" in run.data.tags["mlflow.note.content"]


def test_a_store_that_cannot_keep_files_leaves_those_written(store, capsys):
    """The experiment's artifacts would lie below a file."""
    (store.folder / "artifacts").write_text("in the way")
    store.group("muon", [1.0, 2.0])
    main(["compare", "walk", "--group-by=optimizer", "--output=out", "--resamples=10"])
    assert {path.name for path in (store.folder / "out").iterdir()} == FILES
    assert "but not logged in MLflow" in capsys.readouterr().err


def test_runs_without_times_or_with_one_evaluation_are_drawn(store):
    for seed in range(2):
        store.run([1.0], seed=seed, tags={"optimizer": "single"})
        store.run([1.0, 2.0], seed=seed, seconds=0.0, start=START, tags={"optimizer": "timeless"})
    rows = store.compare()
    assert rows["timeless"]["frames_per_second"] == ""


def browse(address: str, *options: str) -> tuple[str, list[str]]:
    """Return a page's elements as Chromium has them, and what it wrote to the console."""
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", *options, address],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


TROUBLE = re.compile("error|uncaught|failed|refused|denied", re.I)
LOOK = """<script>document.body.dataset.seen = JSON.stringify({
  drawn: [...document.images].map(i => i.naturalWidth > 100 && i.clientWidth > 100),
  rows: document.querySelectorAll("#summary tbody th").length,
  overflows: document.documentElement.scrollWidth > window.innerWidth,
  outside: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
});</script>"""


@in_chromium
@pytest.mark.parametrize("width", [500, 1400])
def test_the_report_is_drawn_by_chromium_at_any_width(made, tmp_path, width):
    page = tmp_path / "report.html"
    text = (made[0] / "report.html").read_text()
    page.write_text(text.replace("</body>", f"{LOOK}</body>"))
    elements, console = browse(page.as_uri(), f"--window-size={width},900")
    seen = Page(elements).all("body")[0]["data-seen"]
    assert seen == '{"drawn":[true,true],"rows":3,"overflows":false,"outside":0}'
    assert console == []


@in_chromium
def test_the_comparison_s_page_in_mlflow_shows_table_and_plots(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, address = server
    store = Store(tmp_path, address)
    store.group("muon", [4.0, 5, 6], experiment="shown")
    main(["compare", "shown", f"--tracking-uri={address}", "--group-by=optimizer", "--output=out"])
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("shown").experiment_id
    (run,) = client.search_runs([experiment], "tags.`muon_rl.kind` = 'comparison'")
    place = f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}"
    elements, console = browse(place)
    assert "comparison by optimizer" in elements
    assert "pilot: no claim (3 seeds)" in elements
    assert not [line for line in console if TROUBLE.search(line)]
    elements, console = browse(f"{place}/artifacts/curves.png")
    assert all(name in elements for name in FILES)
    assert re.search(r'<img[^>]*src="(blob|http)', elements)
    assert not [line for line in console if TROUBLE.search(line)]


DOCS = Path(__file__).parents[2] / "docs" / "compare.md"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "interval_coverage.csv"


def test_the_docs_explain_every_column():
    table = DOCS.read_text().partition("## `summary.csv`")[2].partition("**Final score**")[0]
    named = re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.M)))
    whole = [name for name in named if not name.startswith("_")]
    halves = [name for name in named if name.startswith("_")]
    assert halves == ["_low", "_high"] * 2
    spread = [f"{name}{end}" for name in ("final_iqm", "auc_iqm") for end in ("_low", "_high")]
    assert sorted([*whole, *spread]) == sorted(COLUMNS)


def test_the_table_of_coverage_is_what_was_measured():
    with RESULTS.open() as file:
        measured = {int(row["seeds"]): row for row in csv.DictReader(file)}
    table = DOCS.read_text().partition("<!-- coverage -->")[2].partition("<!-- /coverage")[0]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+)% \| ([\d.]+)% \|$", table, re.M)
    assert {int(seeds): (normal, failing) for seeds, normal, failing in rows} == {
        seeds: (f"{float(row['normal']):.1%}"[:-1], f"{float(row['with_failures']):.1%}"[:-1])
        for seeds, row in measured.items()
    }
    for seeds, share in COVERAGE.items():
        assert float(measured[seeds]["normal"]) == pytest.approx(share, abs=0.006)
