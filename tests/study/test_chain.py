"""The whole chain in the `tiny` profile, in a copy of the repository: contracts, no-op, selective re-runs, report."""

import json
import shutil
from pathlib import Path

import pandas as pd

from psycopref.core.files import SCHEMAS, read_rows, sha256_file
from psycopref.core.stages import STAGES

from chains import bad, chain, planned, receipt, run, run_stage


def test_every_stage_is_signed_and_inputs_are_what_upstream_signed(copy):
    for stage in STAGES:
        signed = receipt(copy, stage)
        assert (
            signed["stage"] == stage and signed["seed"] == 0 and signed["seconds"] >= 0 and signed["versions"]["torch"]
        )
        for path, digest in signed["inputs"].items():
            if path.startswith("outputs/") and not path.endswith("receipt.json"):
                _, _, upstream, *rest = Path(path).parts
                assert receipt(copy, upstream)["outputs"]["/".join(rest)] == digest, (stage, path)
        for name, digest in signed["outputs"].items():
            assert sha256_file(copy / "outputs" / "tiny" / stage / name) == digest


def test_rows_keep_their_contracts(copy):
    folder = copy / "outputs" / "tiny"
    speeches = read_rows(folder / "01_speeches" / "speeches.parquet", "speeches")
    responses = read_rows(folder / "02_responses" / "responses.parquet", "responses")
    ratings = read_rows(folder / "03_ratings" / "ratings.parquet", "ratings")
    train, test = (read_rows(folder / "04_pairs" / f"{name}.parquet", "pairs") for name in ("train", "test"))
    assert set(responses.speech_id) == set(speeches.speech_id) and (responses.groupby("speech_id").size() == 4).all()
    assert len(ratings) == 7 * len(responses) and ratings.rating.between(1, 5).all()
    split = dict(zip(speeches.speech_id, speeches.split))
    assert (
        {split[i] for i in train.ID} <= {"train", "dev"}
        and {split[i] for i in test.ID} == {"test"}
        and test.ID.is_unique
    )
    sides = {
        side: [c for c in train if c.startswith(f"{side}_") and c.endswith("_rating")]
        for side in ("chosen", "rejected")
    }
    for pairs in (train, test):
        assert (pairs[sides["chosen"]].sum(axis=1) - pairs[sides["rejected"]].sum(axis=1) >= 7).all()
    assert list(train.columns) == list(SCHEMAS["pairs"])
    battles = read_rows(folder / "07_win_rates" / "battles.parquet", "battles")
    assert set(battles.verdict) <= {"win", "loss"} and set(battles.speech_id) == set(
        speeches.speech_id[speeches.split == "test"]
    )
    assert (battles.groupby(["policy", "setting", "speech_id"]).size() == 2).all()


def test_every_promised_table_and_figure_is_there(copy):
    absent = json.loads((copy / "outputs/tiny/13_report/absent.json").read_text())
    excused = {(item["kind"], item["number"]) for item in absent}
    assert excused <= {("table", "3"), ("table", "6")}, (
        "only cases may be missing, where no battle was won in both orders"
    )
    for kind, folder, prefix, numbers in (
        ("table", "outputs/tiny/tables", "table", [*"123456", *(f"S{i}" for i in (4, *range(24, 39)))]),
        ("figure", "figures/tiny", "fig", [*"23456", "S3", "S4", "S11", "S12", "S13", "S14"]),
    ):
        for number in numbers:
            if (kind, number) not in excused:
                labels = [json.loads(p.read_text())["label"] for p in (copy / folder).glob(f"{prefix}_{number}_*.json")]
                assert labels and all("profile: tiny" in label for label in labels), (kind, number)


def test_what_was_simulated_says_so_and_is_nobody_s_headline(copy):
    for place in (
        "outputs/tiny/tables/table_S33_agreement.json",
        "outputs/tiny/tables/table_S34_agreement_by_principle.json",
        "figures/tiny/fig_2_comparison.json",
        "figures/tiny/fig_3_scores.json",
    ):
        shown = json.loads((copy / place).read_text())
        assert "simulated" in shown["label"] and "no human took part" in shown["caption"], place
    table = pd.read_csv(copy / "outputs/tiny/tables/table_S7_headlines.csv")
    experts = table[table.result.str.contains("expert")]
    assert (
        len(experts) == 4 and experts.ours.isna().all() and experts["95% interval"].str.contains("not measured").all()
    )


def test_the_paper_never_fills_our_columns(copy):
    table = pd.read_csv(copy / "outputs/tiny/tables/table_1_reward.csv")
    published = table[table.kind.str.startswith("paper")]
    assert published["accuracy %"].isna().all() and published["paper accuracy %"].notna().all()
    assert table[~table.kind.str.startswith("paper")]["paper accuracy %"].isna().all()


def test_a_finished_run_has_nothing_to_do(copy):
    assert "Nothing to be done" in chain(copy, "--dry-run")


def test_a_parameter_re_runs_its_stage_and_what_follows(copy):
    output = chain(copy, "--dry-run", overrides='{"reward.learning_rate": 0.002}')
    assert planned(output) == [
        "00_study",
        "05_reward",
        "06_policy",
        "07_win_rates",
        "08_ablations",
        "09_mixing",
        "10_judges",
        "11_experts",
        "13_report",
    ]
    output = chain(copy, "--dry-run", overrides='{"evaluation.judge": "rules:rubric", "ablation.pairs": 4}')
    assert planned(output) == ["00_study", "08_ablations", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"judges.speeches": 3}')
    assert planned(output) == ["00_study", "10_judges", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"agreement.scored": 3}')
    assert planned(output) == ["00_study", "11_experts", "13_report"]
    output = chain(copy, "--dry-run", overrides='{"mixing.budget": 12}')
    assert planned(output) == ["00_study", "09_mixing", "13_report"] and output.count("09_mixing_cell") >= 1


def test_code_re_runs_its_stage_and_what_follows(copy):
    path = copy / "nbs" / "07_win_rates.ipynb"
    before = path.read_text()
    try:
        path.write_text(before.replace("stage.keep(answers=answers", "stage.keep( answers=answers"))
        assert path.read_text() != before
        assert planned(chain(copy, "--dry-run")) == ["07_win_rates", "10_judges", "11_experts", "13_report"]
    finally:
        path.write_text(before)


def test_prose_and_saved_outputs_re_run_nothing(copy):
    path = copy / "nbs" / "07_win_rates.ipynb"
    before = path.read_text()
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = ["Other words.\n"]
        else:
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["other\n"]}]
    try:
        path.write_text(json.dumps(notebook))
        assert "Nothing to be done" in chain(copy, "--dry-run")
    finally:
        path.write_text(before)


def test_a_run_folder_of_an_older_layout_is_refused_in_one_line(copy):
    (copy / "outputs/old/05_speeches").mkdir(parents=True)
    line = run_stage(copy, "01_speeches", "-p", "RUN=old")
    assert "outputs/old: holds '05_speeches'" in line and "expected such as '00_study'" in line
    assert "outputs/old: holds '05_speeches'" in bad(
        copy, "snakemake", "--cores", "2", "--nolock", "--config", "profile=tiny", "run=old"
    )


def test_report_is_self_contained(copy):
    chain(copy, "--report", "outputs/tiny/report.html")
    page = (copy / "outputs/tiny/report.html").read_text()
    for name in (
        "table_1_reward",
        "table_2_win_rates",
        "fig_4_online_offline",
        "table_S7_headlines",
        "table_S15_spending",
    ):
        assert name in page
    assert 'src="http' not in page and '<link rel="stylesheet" href="http' not in page


def test_the_report_says_what_was_asked_and_that_it_was_free(copy):
    table = pd.read_csv(copy / "outputs/tiny/tables/table_S15_spending.csv", keep_default_na=False, dtype=str)
    books = [row for stage in STAGES if stage != "13_report" for row in receipt(copy, stage).get("books", [])]
    assert (
        {row["stage"] for row in books}
        == set(table.stage) - {"all"}
        == {"02_responses", "03_ratings", "05_reward", "06_policy", "07_win_rates", "10_judges", "08_ablations"}
    )
    for stage in set(table.stage) - {"all"}:
        assert table[table.stage == stage].calls.astype(int).sum() == sum(
            row["calls"] for row in books if row["stage"] == stage
        )
    assert table[table.stage == "02_responses"].calls.tolist() == ["168"] and table[
        table.stage == "03_ratings"
    ].calls.tolist() == ["294"]
    assert int(table.calls.iloc[-1]) == sum(row["calls"] for row in books) and set(table["US dollars"]) == {"0.00"}
    page = (copy / "outputs/tiny/13_report/overview.html").read_text()
    assert "nothing was paid: no model asked has a price" in page and str(copy) not in "".join(table.model)


def test_broken_files_are_one_line(copy):
    shutil.copytree(copy / "outputs/tiny", copy / "outputs/broken", ignore=shutil.ignore_patterns("1*", "cache"))
    (copy / "outputs/broken/03_ratings/receipt.json").unlink()
    assert "has no receipt.json" in run_stage(copy, "04_pairs", "-p", "RUN=broken")
    path = copy / "outputs/broken/02_responses/responses.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert "was changed since" in run_stage(copy, "03_ratings", "-p", "RUN=broken")


def test_trace_and_compare(copy):
    lines = run(copy, "psycopref", "trace", "outputs/tiny/04_pairs").splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")][0] == "04_pairs" and any(
        line.startswith("01_speeches") for line in lines
    )
    assert set(line.split()[0] for line in run(copy, "psycopref", "compare", "tiny", "tiny").splitlines()) == {"same"}
