"""Two runs side by side: what is the same, what differed before, each value beside its counterpart, and refusals."""

import json
import pathlib

import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.files import StageWriter
from psycopref.core.stages import Run
from psycopref.core.tables import Label
from psycopref.reporting import compare
from psycopref.reporting.compare import compare_runs, comparison_lines, comparison_page
from psycopref.run.cli import main

RATES = pd.DataFrame(
    {
        "model": ["free, against R", "base", "+ DPO", "equal length, against R", "base", "+ DPO"],
        "Overall": [None, 25.0, 40.0, None, 30.0, 50.0],
        "95% interval": [None, "15.0 to 35.0", "30.0 to 50.0", None, "20.0 to 40.0", "40.0 to 60.0"],
        "judge prefers it, %": [None, "60.0 (20.9 to 90.6)", "61.0", None, "62.0", "63.0"],
    }
)


def finish(name, frame=RATES, stage="07_win_rates", number="2", seed=0, settings=None, files=None, **facts):
    "Sign a stage with one table, as a chapter does."
    with StageWriter(Run(name), stage, "tiny", seed, {"dpo": {"beta": 0.1} | (settings or {})}) as writer:
        writer.table(number, "rates", frame, f"Table {number}: rates", Label("tiny"))
        writer.inputs += files or []
        writer.facts |= {"rater": "offline rubric (stand-in)", "models": {"local:m": {"label": "M"}}} | facts
    return Run(name)


def changed(first="a", second="b", **given):
    [table] = compare_runs(first, second, **given).tables
    return {(pair.row, pair.column): pair for pair in table.changes}


def test_the_same_tables_exit_with_0_and_different_ones_with_1(capsys, tmp_path):
    finish("a"), finish("b"), finish("c", RATES.assign(Overall=[None, 26.0, 40.0, None, 30.0, 50.0]))
    assert main(["compare", "a", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "same         table_2_rates.csv"
    assert main(["compare", "a", "c"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "different    table_2_rates.csv" and said[-1].endswith("outputs/compare/a+c.html")
    assert any(line.split("  ")[1:3] == ["free · base · Overall", "25.0 (15.0 to 35.0)"] for line in said)
    assert (tmp_path / "outputs/compare/a+c.html").is_file() and (tmp_path / "outputs/compare/a+b.html").is_file()


def test_values_stand_side_by_side_with_difference_and_both_intervals():
    finish("a")
    spans = ["15.0 to 35.0", "51.0 to 71.0", None, "20.0 to 40.0", "40.0 to 60.0"]
    finish("b", RATES.assign(**{"Overall": [None, 25.0, 61.0, None, 30.5, 50.0], "95% interval": [None, *spans]}))
    found = changed()
    assert [*found] == [("free · + DPO", "Overall"), ("equal length · base", "Overall")]
    one, other = found.values()
    assert (str(one.first), str(one.second)) == ("40.0 (30.0 to 50.0)", "61.0 (51.0 to 71.0)")
    assert (one.difference, one.intervals) == ("+21.0", "apart")
    assert (other.difference, other.intervals) == ("+0.5", "overlap")
    told = " ".join(comparison_lines(compare_runs("a", "b")))
    assert "+21.0  apart" in told and "intervals apart are no test" in told and "2 of 8 values differ" in told


def test_an_interval_that_alone_changed_is_a_change():
    finish("a"), finish("b", RATES.assign(**{"95% interval": RATES["95% interval"].str.replace("15.0", "16.0")}))
    assert [*changed()] == [("free · base", "Overall")] and changed()["free · base", "Overall"].difference == "+0.0"


@pytest.mark.parametrize(
    "columns, cells, said",
    [
        (["v %", "95% interval"], [70.0, "60.0 to 80.0"], "70.0 (60.0 to 80.0)"),
        (["v %", "low", "high"], [70.04, 60.02, 80.03], "70.04 (60.0 to 80.0)"),
        (["v %"], ["70.0 (60.0 to 80.0)"], "70.0 (60.0 to 80.0)"),
        (["v %"], ["-7.5 (-12.0 to +3.0)"], "-7.5 (-12.0 to -3.0)".replace("-3", "3")),
        (["v %", "ties", "95% interval of the v"], [70.0, 1, "60.0 to 80.0"], "70.0 (60.0 to 80.0)"),
        (["v %"], ["0.07 (no interval: too few)"], "0.07 (no interval: too few)"),
    ],
)
def test_every_form_of_interval_is_read(columns, cells, said, tmp_path):
    frame = pd.DataFrame([["m", *cells]], columns=["model", *columns])
    run = finish("a", frame)
    [(_, values)] = compare.read_csv_table(run.tables / "table_2_rates.csv").rows
    value = values["v %"]
    assert value.number is not None and said in (str(value), value.text)
    assert value.has_interval == ("to" in said.replace("too", ""))


def test_rows_are_matched_by_their_names_in_any_order():
    frame = pd.DataFrame({"claim": ["x wins", "y wins"], "outcome": ["holds", "holds"], "estimate": [1.0, 2.0]})
    finish("a", frame), finish("b", frame[::-1].assign(outcome=["holds", "can't tell"]))
    assert {key: (pair.first.text, pair.second.text) for key, pair in changed().items()} == {
        ("x wins", "outcome"): ("holds", "can't tell")
    }


def test_rows_and_columns_of_one_run_are_shown_with_it():
    finish("a", RATES[:3]), finish("b", RATES[:2].assign(words=[None, 9]))
    found = changed()
    assert found["free · + DPO", "Overall"].second is None and found["free · base", "words"].first is None
    assert ("free · base", "Overall") not in found


def test_equal_rows_are_matched_by_their_order():
    frame = pd.DataFrame({"model": ["m", "m", "m"], "share %": [0.5, 0.25, 0.75]})
    finish("a", frame), finish("b", frame.assign(**{"share %": [0.5, 0.5, 0.75]}))
    assert [*changed()] == [("m (2)", "share %")]


def test_what_differed_before_is_told_by_part(tmp_path, monkeypatch):
    places = {name: tmp_path / name / "speeches.csv" for name in ("one", "two")}
    for name, path in places.items():
        path.parent.mkdir()
        path.write_text(name)
    finish("a", files=[places["one"]])
    finish("b", seed=3, settings={"beta": 0.2}, files=[places["two"]], judge="J", models={"x": {"label": "GPT"}})
    path = tmp_path / "outputs/b/07_win_rates/receipt.json"
    signed = json.loads(path.read_text())
    path.write_text(json.dumps(signed | {"versions": signed["versions"] | {"torch": "9.9"}, "processor": "P"}))
    found = {(own.part, own.name): own.second for own in compare_runs("a", "b").differences}
    assert found["parameters", "seed"] == "3" and found["parameters", "dpo.beta"] == "0.2"
    assert found["versions", "torch"] == "9.9" and found["versions", "processor"] == "P"
    assert found["models and rater", "models, 07_win_rates"] == "GPT"
    assert found["models and rater", "judge, 07_win_rates"] == "J"
    assert sum(part == "inputs" for part, _ in found) == 2, "a source by another name is another source"
    told = comparison_lines(compare_runs("a", "b"))
    assert "  dpo.beta: 0.1 | 0.2" in told and any("the same in all stages" in line for line in told)


def test_a_source_whose_content_changed_is_told_by_its_hash(tmp_path):
    place = tmp_path / "speeches.csv"
    for name in "ab":
        place.write_text(name)
        finish(name, files=[place])
    [own] = compare_runs("a", "b").differences
    assert (own.part, own.name) == ("inputs", "speeches.csv") and own.first != own.second and len(own.first) == 12


def test_tables_and_stages_of_one_run_are_named_with_it():
    "As where a run starts from the released dataset, which needs no responses and no ratings."
    finish("full"), finish("released")
    finish("full", stage="03_ratings", number="S1")
    compared = compare_runs("full", "released")
    assert [(table.name, table.verdict) for table in compared.tables] == [
        ("table_2_rates", "same"),
        ("table_S1_rates", "only in full"),
    ]
    assert not compared.same and "finished only in full: 03_ratings" in comparison_lines(compared)
    assert "Tables only in full" in comparison_page(compared)


def test_a_table_edited_since_it_was_signed_is_told(tmp_path):
    finish("a"), finish("b")
    with open(tmp_path / "outputs/b/tables/table_2_rates.csv", "a") as file:
        file.write("one more row\n")
    lines = comparison_lines(compare_runs("a", "b"))
    assert "b: table_2_rates changed since signed; run 07_win_rates again" in lines


def test_one_table_or_one_stage_can_be_asked_for(capsys):
    for name, rates in (("a", RATES), ("b", RATES[:3])):
        finish(name, rates), finish(name, RATES[:2], "05_reward", "1")
    assert main(["compare", "a", "b", "--table", "1"]) == 0 and main(["compare", "a", "b", "--table", "2"]) == 1
    capsys.readouterr()
    assert main(["compare", "a", "b", "--stage", "05_reward"]) == 0
    page = pathlib.Path(capsys.readouterr().out.split()[-1]).read_text()
    assert "table_1_rates" in page and "table_2_rates" in page, "the page holds all, whatever was asked for"
    main(["compare", "a", "b", "--stage", "05_reward"])
    assert "table_2" not in capsys.readouterr().out
    for given, said in (
        ({"table": "3"}, "no run has a table '3'. Known: 1, 2."),
        ({"stage": "05_rewards"}, "Did you mean 05_reward?"),
        ({"stage": "05_reward", "table": "2"}, "table 2 is of 07_win_rates, not of 05_reward; leave --stage out"),
    ):
        assert said in one_line(lambda given=given: compare_runs("a", "b", **given))


def test_the_terminal_shows_the_beginning_and_the_page_all():
    long = pd.DataFrame({"model": [f"model {i}" for i in range(500)], "share": [i / 7 for i in range(500)]})
    finish("a", long), finish("b", long.assign(share=long.share + 1))
    compared = compare_runs("a", "b")
    lines = comparison_lines(compared)
    assert len(lines) < 20 and "  … and 494 more" in lines and max(map(len, lines[:-2])) < 130
    assert comparison_page(compared).count("<tr><th colspan=5>") == 500


def test_what_models_wrote_is_escaped():
    frame = pd.DataFrame({"<b>": ["<script>x</script>", "response"], "it's": ["<img src=x>", '"a" & b']})
    finish("a", frame, rater="<i>rater</i>")
    finish("b", frame.assign(**{"it's": ["y" * 900, "'"]}), settings={"beta": "<u>"})
    page = comparison_page(compare_runs("a", "b"))
    assert not any(mark in page for mark in ("<script>", "<img", "<i>", "<b>", "<u>"))
    assert "&lt;script&gt;" in page and "http" not in page and "<script" not in page
    assert max(map(len, comparison_lines(compare_runs("a", "b"))[:-2])) < 200


def test_further_seeds_are_compared_with_their_run(tmp_path):
    finish("a"), finish("a", RATES[:3], "01_speeches", "4")
    finish("a/seeds/1", RATES.assign(Overall=[None, 35.0, 40.0, None, 30.0, 50.0]), seed=1)
    compared = compare_runs("a", "a/seeds/1", table="2")
    assert not compared.same and [own.name for own in compared.differences] == ["seed"]
    assert compared.page == tmp_path / "outputs/compare/a+a,seeds,1.html"


def test_runs_that_can_not_be_compared_are_refused_with_what_to_do(tmp_path):
    finish("a")
    refused = lambda second: one_line(lambda: compare_runs("a", second))
    assert "no run 'b'" in refused("b") and "Known: a" in refused("b")
    assert "a is named twice, expected two runs; name another one" in refused("a")
    (tmp_path / "outputs/begun/05_reward.partial").mkdir(parents=True)
    assert "begun has no finished stage; run it first, e.g. by `make reproduce RUN=begun`" in refused("begun")
    with StageWriter(Run("bare"), "04_pairs", "tiny", 0, {}):
        pass
    assert "bare has no tables; run it first" in refused("bare")
    (tmp_path / "outputs/old/05_speeches").mkdir(parents=True)
    assert "no stage of this version" in refused("old") and "; name another RUN" in refused("old")
    assert "use letters, digits" in refused("../a")
    broken = finish("broken").tables / "table_2_rates.csv"
    broken.write_text('model,"Overall\n')
    assert "table_2_rates.csv: can't be read as a table" in refused("broken")
    assert "; run its stage again" in refused("broken")
