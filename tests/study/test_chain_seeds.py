"""A second seed of the `tiny` chain trains again on the same data; CI runs it."""

import pandas as pd
import pytest

from chains import chain, planned, receipt
from psycopref.core.files import read_rows
from psycopref.core.stages import STAGES, Run
from psycopref.experiments import seeds

pytestmark = pytest.mark.chain


def test_a_second_seed_trains_again_on_the_same_data(copy, monkeypatch):
    before = {stage: receipt(copy, stage) for stage in STAGES}
    chain(copy, more_config=("seeds=0,1",))
    assert all(receipt(copy, stage) == signed for stage, signed in before.items() if stage != "13_report")
    place = copy / "outputs/tiny/seeds/1"
    made = sorted(path.parent.name for path in place.glob("*/receipt.json"))
    assert made == ["05_reward", "06_policy", "07_win_rates", "08_ablations"]
    for stage in made:
        signed = receipt(copy, stage, "tiny/seeds/1")
        weights = [name for name in signed["outputs"] if name.endswith(".safetensors")]
        assert signed["seed"] == 1 and all(signed["outputs"][n] != before[stage]["outputs"].get(n) for n in weights)
    places = [copy / "outputs" / run / "07_win_rates/answers.parquet" for run in ("tiny", "tiny/seeds/1")]
    first, second = (read_rows(path, "answers") for path in places)
    said = [own[own.policy == "reference"].reset_index(drop=True) for own in (first, second)]
    assert said[0].equals(said[1]) and not first.equals(second), "the reference answers once"
    table = pd.read_csv(copy / "outputs/tiny/tables/table_S50_seeds.csv")
    assert (table["each seed"].dropna().str.count("·") == 1).all() and table["SD over seeds"].notna().any()
    claims = pd.read_csv(copy / "outputs/tiny/tables/table_S55_findings.csv").set_index("claim")
    assert set(claims.outcome) <= {"not decided: profile tiny", "not measured", "can't tell: not run"}
    assert claims.seeds["DPO-Iter wins more often than DPO"] == 2, "claims are paired by speech and seed"
    assert not planned(chain(copy, "--dry-run", more_config=("seeds=0,1",)))
    monkeypatch.setenv("PSYCOPREF_ROOT", str(copy))
    files = [seeds.write_seed(seeds.seed_record(Run(run))) for run in ("tiny", "tiny/seeds/1")]
    records = seeds.read_seeds("tiny")
    assert [record["seed"] for record in records] == [0, 1] and all(
        own["code"] for own in records[1]["stages"].values()
    )
    assert records[0]["pairs"] == records[1]["pairs"], "further seeds of a run share its pairs"
    measured = [{row["of"].partition("/")[0] for row in record["rows"]} for record in records]
    assert measured == [{"win", "right", "arm", "safety", "mixed"}, {"win", "right", "arm", "safety"}]
    kept = "".join(file.read_text() for file in files)
    said = [text[:40] for own in (first, second) for text in own.response if len(text) > 40]
    assert said and not any(text in kept for text in said) and str(copy) not in kept
