"""A run of several seeds: what they share, what each has of its own, and what the report makes of it."""

import json
import re
from pathlib import Path

import pytest

from psycopref.core.files import StageWriter
from psycopref.core.settings import PAPER
from psycopref.core.stages import STAGES, Run, parse_seeds
from psycopref.run.chapter import open_stage
from psycopref.run.plan import plan_run, seed_line, usd
from psycopref.reporting.report_page import all_receipts, further_seeds
from psycopref.run.results import work_seconds
from psycopref.run.runner import stage_rules, trace

from refusals import one_line

TRAINED = ["05_reward", "06_policy", "07_win_rates", "08_ablations"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def in_repository(monkeypatch):
    "Where the chapters are, which rules hash."
    monkeypatch.setenv("PSYCOPREF_ROOT", str(REPOSITORY))


def test_the_graph_has_the_data_once_and_each_training_for_each_seed(in_repository):
    alone, three = stage_rules("tiny", "r"), stage_rules("tiny", "r", further=[1, 2])
    assert [rule["name"] for rule in three if rule["seeds"]] == TRAINED
    assert not any(rule["seeds"] for rule in alone), "one seed has no rules for more"
    assert [rule | {"seeds": None} for rule in three[:-1]] == alone[:-1], "the run itself is as with one seed"
    made = [rule["receipt"] for rule in three]
    made += [rule["seeds"]["receipt"].format(seed=seed) for rule in three if rule["seeds"] for seed in (1, 2)]
    names = [path.split("/")[-2] for path in made]
    assert {name: names.count(name) for name in STAGES} == {name: 3 if name in TRAINED else 1 for name in STAGES}
    for rule in (rule for rule in three if rule["seeds"]):
        needs = [need.format(seed=2) for need in rule["seeds"]["needs"]]
        assert set(needs) <= set(made)
        own = {need.split("/")[-2] for need in needs if "/seeds/2/" in need}
        assert own == {*TRAINED} & {*STAGES[rule["name"]].needs}
    assert set(made[len(three) :]) < set(three[-1]["needs"])
    told = [json.loads(rules[-1]["parameters"]).get("SEEDS") for rules in (alone, three)]
    assert told == [None, [0, 1, 2]]


@pytest.mark.parametrize("wrong", ["a,b", "0,0", "", None, "0,,1", "-1", "1.5", "0;1"])
def test_wrong_seeds_are_one_line(wrong):
    assert "expected different whole numbers from 0 on" in one_line(lambda: parse_seeds(wrong))


def test_the_report_s_seeds_begin_with_the_run_s():
    assert further_seeds(3) == () and further_seeds(3, [3, 0]) == (0,)
    assert "begin with 1, expected 0" in one_line(lambda: further_seeds(0, [1, 0]))


def sign(run, stage, seed=0, **kept):
    with StageWriter(run, stage, "tiny", seed, {"speeches": {"sources": ["demo"]}}) as writer:
        for name, value in kept.items():
            writer.json(name, value)


def test_a_further_seed_reads_the_run_s_data_and_writes_its_own_trainings():
    run = Run("r")
    sign(run, "01_speeches", 4, done={})
    early = open_stage("05_reward", "tiny", "r/seeds/1", 1)
    assert "r/05_reward: has no receipt.json" in one_line(early.first_seed), "the run's own goes first"
    sign(run, "05_reward", 4)
    stage = open_stage("05_reward", "tiny", "r/seeds/1", 1)
    assert (stage.shared_seed, stage.first_seed()) == (4, run.stage("05_reward"))
    assert stage.read_json("01_speeches", "done") == {}
    stage.finish()
    place = run.outputs / "seeds/1"
    assert [path.name for path in place.iterdir()] == ["05_reward"], "nothing of the run is copied"
    receipt = json.loads((place / "05_reward/receipt.json").read_text())
    inputs = [f"outputs/r/{path}" for path in ("05_reward/receipt.json", "01_speeches/done.json")]
    assert receipt["seed"] == 1 and [*receipt["inputs"]] == inputs
    assert trace(place / "05_reward")[0].startswith("05_reward: seed 1")
    first = open_stage("05_reward", "tiny", "r", 4)
    assert (first.shared_seed, first.first_seed()) == (4, None)
    for name, seed in (("05_reward", 0), ("04_pairs", 1)):
        said = one_line(lambda name=name, seed=seed: open_stage(name, "tiny", "r/seeds/1", seed))
        assert "expected SEED 1 and one of 05_reward" in said and "RUN=r" in said


def test_a_further_seed_sends_nothing_to_the_hub():
    "It would take the place of the run's own model there."
    named = {"reward.push_to_hub": "me/reward", "dpo.push_to_hub": "me/policy"}
    for run, seed, sent in (("r", 0, [*named.values()]), ("r/seeds/1", 1, ["", ""])):
        found = open_stage("06_policy", "tiny", run, seed, named).settings
        assert [found.reward.push_to_hub, found.dpo.push_to_hub] == sent


def test_a_further_seed_shares_cache_and_books_but_is_named():
    from psycopref.gateway.gateway import chat_model
    from psycopref.models.chat import ChatRequest

    asked = [ChatRequest(({"role": "user", "content": "My sister moved out in March."},))]
    sign(Run("r"), "01_speeches")
    open_stage("07_win_rates", "tiny", "r", 0).gateway.ask(chat_model("rules:phrases"), asked)
    again = open_stage("07_win_rates", "tiny", "r/seeds/1", 1).gateway
    again.ask(chat_model("rules:phrases"), asked)
    assert again.counts["rules:phrases"]["cached"] == 1 and again.stage == "07_win_rates, seed 1"
    assert not (Run("r").outputs / "seeds").exists()


def test_the_report_reads_the_receipts_of_all_seeds():
    run = Run("r")
    for stage in ("05_reward", "06_policy"):
        sign(run, stage)
        sign(run.further(1), stage, 1)
    signed = all_receipts(run, ("05_reward", "06_policy"), (1,))
    assert [*signed] == ["05_reward", "06_policy", "05_reward, seed 1", "06_policy, seed 1"]


def test_the_time_of_a_run_has_that_of_its_seeds():
    run = Run("r")
    for stage in STAGES:
        sign(run, stage)
    sign(run.further(1), "05_reward", 1)
    said = work_seconds(run)
    assert all(f" {name[:2]} 0" in said for name in STAGES) and "further seeds" not in said, "none took a second"
    path = run.further(1).stage("05_reward") / "receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 90}))
    assert work_seconds(run).startswith("2 minutes") and work_seconds(run).endswith(", further seeds 90")
    (run.stage("12_trial") / "receipt.json").unlink()
    assert "(1 chapters not finished)" in work_seconds(run)


def test_the_plan_says_what_a_further_seed_adds():
    rows = plan_run(PAPER, 26483).work()
    said = re.search(r"adds ([\d,.]+) US dollars", seed_line(PAPER, rows))
    again = re.compile("battles|safety of four answers")
    judged = sum(usd(row) or 0 for row in rows if row.stage in TRAINED and again.search(row.what))
    assert abs(float(said[1].replace(",", "")) - judged) < 0.01, "no reference answers, no rankers"
    three = sum(usd(row) or 0 for row in rows) + 2 * judged
    assert f"three make {three:,.2f} US dollars" in seed_line(PAPER, rows)
