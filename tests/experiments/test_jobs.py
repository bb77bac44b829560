"""What points and jobs are called."""

from __future__ import annotations

from muon_rl.experiments import expand
from muon_rl.experiments.jobs import Job, Point, jobs_of

RATES = {"m.{trunk,actor,critic}.lr": 0.000123456789, "m.trunk.muon.lr": 0.02, "m.clip": 0.1}


def test_the_text_of_a_point_loses_nothing_and_braces_what_moves_together():
    point = Point.of(expand(RATES))
    assert point.text == "m.{actor,critic,trunk}.lr=0.000123456789 m.clip=0.1 m.trunk.muon.lr=0.02"
    read = expand(dict(word.split("=") for word in point.text.split()))
    assert Point.of(read) == point
    assert Point().text == "default"


def test_the_name_of_a_point_is_a_few_words():
    assert Point.of(expand(RATES)).name == "actor.lr=0.0001235 clip=0.1 muon.lr=0.02"
    assert Point.of({"a.case": "muon", "b.case": "muon"}).name == "case=muon"
    assert Point.of({"a.case": "muon", "b.case": "adam"}).name == "a.case=muon b.case=adam"
    assert Job(Point.of({"betas": [0.9, 0.999]}, task="walk"), 3).name == (
        "walk betas=[0.9,0.999] seed=3"
    )


def test_the_order_of_keys_and_the_kind_of_values_make_no_other_point():
    assert Point.of({"a": 1, "b": "x"}) == Point.of({"b": "x", "a": "1"})
    assert Point.of({"a": True}).options() == ["--a=true"]


def test_files_of_different_points_have_different_names():
    points = [
        Point.of({"a.lr": 1}), Point.of({"b.lr": 1}), Point.of({"a.lr": 1}, task="t"),
        Point.of({"a.lr": 1}, trial=0), Point.of({"a.lr": 1}, trial=1),
        Point.of({"a.lr": 0.123456}), Point.of({"a.lr": 0.1234561}),
        Point.of({"a": "/../" * 30}), Point.of({"a": "/../" * 31}),
        Point.of({}, task="t" * 70 + "1"), Point.of({}, task="t" * 70 + "2"),
    ]  # fmt: skip
    slugs = [Job(point, 0).slug for point in points]
    assert len(set(slugs)) == len(points)
    assert not any("/" in slug or len(slug) > 100 for slug in slugs)


def test_jobs_are_seed_by_seed_and_none_is_twice():
    a, b = Point.of({"a": 1}), Point.of({"a": 2})
    assert jobs_of([a, b, a], [0, 1, 0]) == [Job(a, 0), Job(b, 0), Job(a, 1), Job(b, 1)]
