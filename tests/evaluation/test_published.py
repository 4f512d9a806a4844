"""Every published value has a row; a value changed in the file, or in the run, turns its state and no other."""

import json
from pathlib import Path

import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.files import StageWriter
from psycopref.core.paper import paper_remarks, published_values, resource_path
from psycopref.core.settings import load_profile
from psycopref.core.stages import Run, as_dotted, stage_settings
from psycopref.core.tables import Label
from psycopref.evaluation.published import DIFFERS, NOT_RUN, REPRODUCED, RunValues, describe_published
from psycopref.evaluation.published import other_than_the_paper, published_frame, published_note, published_state
from psycopref.evaluation.published import published_results, run_values, standing_in, table_of_texts

TEXT = resource_path("paper.yaml").read_text(encoding="utf-8")
KEYS = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
LAPTOP = Path(__file__).resolve().parents[2] / "results/laptop/seed-0.json"
HEADING = "model,Mental Issues,Overall,95% interval\n"

CSV = {
    "1_reward": "model,kind,accuracy %,95% interval,AUC,ECE,Brier\n"
    "longer answer wins,baseline,42.1,29.9 to 55.0,0.447,,\n"
    "Bradley-Terry on Tiny-1B,reward model,96.0,94.0 to 97.4,0.99,0.05,0.02\n"
    "Bradley-Terry on Big-2B,reward model,98.0,97.0 to 98.5,0.997,0.060,0.016\n"
    "Nvidia/Llama-3.1-Nemotron-70B-Reward (hub),baseline,87.0,85.0 to 89.0,0.93,0.05,0.2\n"
    "Skywork-Reward-Gemma-2-27B,paper: reward model,,not run here,,,\n",
    "2_win_rates": HEADING + '"w/o length constraint, against R",,,\nTiny-1B,20,21.0,17.0 to 25.0\n'
    "'+ DPO,50,58.0,54.0 to 62.0\nBig-2B,20,29.0,25.0 to 33.0\n'+ DPO,70,60.0,55.0 to 65.0\n"
    '\'+ DPO-Iter,86,88.0,84.0 to 92.0\n"w/ length constraint, against R",,,\nBig-2B,20,18.0,15.0 to 21.0\n'
    '"paper: w/o length constraint, against GPT-4o",,,\npaper: Llama3-3B,30.5,28.5,\n',
    "S26_coarse_topics": "setting,model,coarse topic,n,wins,win rate %,95% interval\n"
    "w/o length constraint,Big-2B,Safety,10,3,30.0,10.0 to 60.0\nw/o length constraint,Big-2B,Youth,0,0,,\n",
    "S2_pairs": "what,ours,paper\nclient speeches for testing,3291,3291\ntraining pairs,34328,34329\n",
    "4_topics": "coarse topic,topic,speeches\nSocial Issues,lgbtq,335\nSocial Issues,culture,100\nAll,,435\n",
    "5_pool": "size,member,answered by\n8B,gpt-4o-mini,openai:gpt-4o-mini-2024\n8B,x,server:gemma-2-9b-it\n",
    "S20_mixing": 'model,data,counselling %,"counselling, 95%",AUC,Brier,RewardBench %,later version: row\n'
    'Big-2B,g,82.0,80.0 to 84.0,0.9,0.13,,"HelpSteer2, Llama-8B"\n',
    "S33_agreement": "what,setting,between,n,agree,agreement %,95% interval\n"
    "preference pairs (§3.4),,annotator 1 with annotator 2,200,170,85.0,80.0 to 89.0\n"
    "preference pairs (§3.4),,annotator 2 with the labels,200,190,95.0,91.0 to 97.0\n",
}
SETTINGS = {"05_reward": {"reward.epochs": 2, "reward.learning_rate": 1e-5}, "06_policy": {"dpo.steps": None}}


def values(**changes):
    return RunValues({name: table_of_texts(text) for name, text in (CSV | changes).items()}, SETTINGS, KEYS)


def rows(frame):
    return {(own["section"], *own["path"]): row for own, row in zip(published_values(), frame.to_dict("records"))}


FOUND = rows(published_frame(values()))

EXPECTED = {
    ("table_1", "PsychoCounsel-Llama3-8B-Reward", "accuracy"): (REPRODUCED, "inside the interval"),  # 97.8
    ("table_1", "PsychoCounsel-Llama3-3B-Reward", "accuracy"): (DIFFERS, "outside the interval"),  # 98.1
    ("table_1", "PsychoCounsel-Llama3-8B-Reward", "auc"): (REPRODUCED, "at most 0.01 apart"),
    ("table_1", "PsychoCounsel-Llama3-8B-Reward", "ece"): (DIFFERS, "more than 0.01 apart"),  # 0.045, 0.060
    ("table_1", "Llama-3.1-Nemotron-70B-Reward", "accuracy"): (REPRODUCED, "inside the interval"),  # scored by the run
    ("table_1", "Skywork-Reward-Gemma-2-27B", "accuracy"): (NOT_RUN, "this model was not asked in this run"),
    ("table_2", "free", "Llama3-3B", "overall"): (DIFFERS, "outside the interval"),  # 28.5, and 21.0 of Tiny-1B
    ("table_2", "free", "Llama3-3B + DPO", "overall"): (REPRODUCED, "inside the interval"),  # 58.5
    ("table_2", "free", "Llama3-3B + DPO-Iter", "overall"): (NOT_RUN, "this run has no DPO-Iter in Table 2"),
    ("table_2", "free", "Llama3-8B", "overall"): (REPRODUCED, "inside the interval"),  # 29.3
    ("table_2", "free", "Llama3-8B + DPO", "overall"): (DIFFERS, "outside the interval"),  # 72.9
    ("table_2", "free", "Llama3-8B + DPO-Iter", "overall"): (REPRODUCED, "inside the interval"),  # 87.0
    ("table_2", "length", "Llama3-8B", "overall"): (REPRODUCED, "inside the interval"),  # 18.5
    ("table_2", "length", "Llama3-8B + DPO", "overall"): (NOT_RUN, "this run has no DPO in Table 2"),
    ("table_2", "free", "Llama3-8B", "crisis-and-safety"): (REPRODUCED, "inside the interval"),  # 33.8
    ("table_2", "free", "Llama3-8B", "youth-and-development"): (NOT_RUN, "not measured in this run"),
    ("table_2", "free", "Llama3-8B", "social-issues"): (NOT_RUN, "no test speech of this topic"),
    ("later_version", "win_rates", "free, Llama3-8B", "dpo-iter"): (REPRODUCED, "inside the interval"),
    ("later_version", "reward", "PsyCo-Llama3-3B-Reward", "accuracy"): (DIFFERS, "outside the interval"),
    ("later_version", "helpsteer", "Llama-8B, HelpSteer2", "accuracy"): (REPRODUCED, "inside the interval"),  # 81.7
    ("later_version", "helpsteer", "Llama-8B, HelpSteer2", "rewardbench"): (
        NOT_RUN,
        "RewardBench is not part of this run",
    ),
    ("later_version", "budget_10k", "Psy10k", "average"): (NOT_RUN, "this run has no table S21"),
    ("dataset", "test_speeches"): (REPRODUCED, "the same"),
    ("dataset", "train_pairs"): (DIFFERS, "not the same"),  # by one
    ("dataset", "mean_characters"): (NOT_RUN, "no table of a run holds it"),
    ("taxonomy", "social-issues", "topics", "lgbtq"): (REPRODUCED, "the same"),
    ("taxonomy", "social-issues", "topics", "culture"): (DIFFERS, "not the same"),
    ("taxonomy", "social-issues", "count"): (DIFFERS, "not the same"),
    ("table_5", "commercial", "GPT-4o"): (DIFFERS, "wrote no answers in this run"),  # its smaller kin did
    ("table_5", "commercial", "GPT-4o-mini"): (REPRODUCED, "wrote answers"),
    ("table_5", "7-9B", "gemma-2-9b-it"): (REPRODUCED, "wrote answers"),
    ("agreement", "experts_agree"): (REPRODUCED, "inside the interval"),  # 174 of 200
    ("agreement", "expert_2_with_labels"): (DIFFERS, "outside the interval"),  # 170 of 200
    ("agreement", "expert_1_with_labels"): (NOT_RUN, "nobody annotated"),
    ("agreement", "pairs"): (REPRODUCED, "the same"),
    ("design", "reward_epochs"): (REPRODUCED, "the same"),
    ("design", "reward_rate"): (DIFFERS, "not the same"),
    ("design", "policy_steps"): (NOT_RUN, "dpo.steps is not set in this run"),
    ("design", "principles"): (REPRODUCED, "the same"),
}


@pytest.mark.parametrize("place", EXPECTED, ids=lambda place: " ".join(place))
def test_a_value_has_the_state_that_its_tolerance_gives(place):
    assert (FOUND[place]["state"], FOUND[place]["why"]) == EXPECTED[place], FOUND[place]


def test_every_value_has_one_row_and_a_reason_and_nothing_is_filled_in():
    frame = published_frame(values())
    assert len(frame) == len(published_values()) and frame.why.notna().all()
    assert set(frame.state) == {REPRODUCED, DIFFERS, NOT_RUN} and "paper" not in frame.columns
    gone = frame[frame.state == NOT_RUN]
    assert gone[["this run", "95% interval", "difference", "measured on"]].isna().all().all()
    assert frame[frame.state != NOT_RUN]["this run"].notna().all()
    row = FOUND["table_2", "free", "Llama3-8B + DPO", "overall"]
    assert (row["published"], row["this run"], row["difference"]) == ("72.9", "60.0", "-12.9")
    assert (row["95% interval"], row["measured on"]) == ("55.0 to 65.0", "Big-2B + DPO")
    assert FOUND["agreement", "experts_agree"]["published"] == "174 of 200"
    assert FOUND["agreement", "experts_agree"]["difference"] == "-2.0"


CHANGES = [  # in the file of published values: old, new, whose row, new state
    ("dpo-iter: 87.0}", "dpo-iter: 97.0}", ("later_version", "win_rates", "free, Llama3-8B", "dpo-iter"), DIFFERS),
    ("train_pairs: {value: 34329", "train_pairs: {value: 34328", ("dataset", "train_pairs"), REPRODUCED),
    ("lgbtq: 335", "lgbtq: 334", ("taxonomy", "social-issues", "topics", "lgbtq"), DIFFERS),
    ("experts_agree: {value: 174", "experts_agree: {value: 150", ("agreement", "experts_agree"), DIFFERS),
    ("reward_rate: {value: 9.0e-6", "reward_rate: {value: 1.0e-5", ("design", "reward_rate"), REPRODUCED),
]


@pytest.mark.parametrize("old, new, place, state", CHANGES, ids=lambda own: str(own)[:24])
def test_a_value_changed_in_the_file_turns_its_row_and_no_other(old, new, place, state):
    assert TEXT.count(old) == 1 and FOUND[place]["state"] not in (state, NOT_RUN)
    found = rows(published_frame(values(), TEXT.replace(old, new)))
    assert found[place]["state"] == state
    assert {name for name in found if found[name] != FOUND[name]} == {place}


def test_a_value_changed_in_the_run_turns_its_row():
    found = rows(published_frame(values(**{"1_reward": CSV["1_reward"].replace("97.0 to 98.5", "97.9 to 98.5")})))
    turned = {name for name in found if found[name]["state"] != FOUND[name]["state"]}
    first, later = ("table_1", "PsychoCounsel-Llama3-8B-Reward"), ("later_version", "reward", "PsyCo-Llama3-8B-Reward")
    assert turned == {(*first, "accuracy"), (*later, "accuracy")}


def test_an_interval_holds_a_value_as_far_as_its_digits_say():
    rules, entry = paper_remarks()["tolerances"], {"kind": "percent", "of": None}
    ends = {"value": 0.0, "low": 87.05, "high": 90.0}
    assert published_state(entry | {"value": 87.0}, ends, rules)[0] == REPRODUCED, "87.0 may be 87.05"
    assert published_state(entry | {"value": 86.9}, ends, rules)[0] == DIFFERS
    assert published_state(entry | {"value": 87}, ends | {"low": 87.4}, rules)[0] == REPRODUCED, "87 may be 87.4"
    assert published_state({"kind": "percent", "value": 174, "of": 200}, ends, rules)[0] == DIFFERS, "a count is exact"


def test_simulated_annotators_are_no_experts():
    text = CSV["S33_agreement"].replace("annotator", "simulated")
    found = rows(published_frame(values(S33_agreement=text)))
    own = [row for name, row in found.items() if name[0] == "agreement" and name[1] != "scored_answers"]
    assert {(row["state"], row["why"]) for row in own} == {(NOT_RUN, "simulated annotators, no human took part")}


def test_one_size_stands_beside_the_larger_model_and_the_paper_s_own_beside_themselves():
    one = values(**{"1_reward": CSV["1_reward"].replace("Bradley-Terry on Tiny-1B,reward model", "x,baseline")})
    assert standing_in(one, "8B") == "Big-2B"
    found = rows(published_frame(one))
    assert found["table_2", "free", "Llama3-3B", "overall"]["why"] == "one size only, which stands beside Llama3-8B"
    names = CSV["1_reward"].replace("Tiny-1B", "Llama-3.1-8B-Instruct").replace("Big-2B", "Llama-3.2-3B-Instruct")
    both = values(**{"1_reward": names})  # in whatever order
    assert standing_in(both, "3B") == "Llama-3.2-3B-Instruct" and standing_in(both, "8B") == "Llama-3.1-8B-Instruct"


def test_under_other_principles_what_rests_on_them_is_not_run():
    own = RunValues(values().tables, SETTINGS, ("plain", "kind"), own_principles=True)
    found = rows(published_frame(own))
    for name, row in found.items():
        rests = name[0] in ("table_1", "table_2", "agreement", "later_version", "released_dataset")
        rests = rests or name in (("dataset", "train_pairs"), ("dataset", "test_pairs"), ("design", "least_gap"))
        assert (row["why"] == "other principles") == rests, name
    assert found["dataset", "test_speeches"]["state"] == REPRODUCED
    assert found["design", "principles"]["state"] == DIFFERS and found["design", "principles"]["this run"] == "2"
    assert "principles" in published_note(own)


def test_the_note_is_silent_only_where_models_judge_and_data_are_the_paper_s():
    names = ("01_speeches", "05_reward", "07_win_rates")
    paper = {name: as_dotted(stage_settings(load_profile("paper"), name)) for name in names}
    assert other_than_the_paper(RunValues({}, json.loads(json.dumps(paper)), KEYS)) == []
    assert "so a difference counts" in published_note(RunValues({}, paper, KEYS))
    laptop = {name: as_dotted(stage_settings(load_profile("laptop"), name)) for name in names}
    said = published_note(RunValues({}, laptop, KEYS))
    assert "no verdict on the paper" in said and "rules:rubric" in said and "smollm2-135m" in said and "demo" in said


# ---- a run's files ----


def sign(run, stage, principles=KEYS, **tables):
    settings = {"reward": {"epochs": 2}} if stage == "05_reward" else {}
    with StageWriter(run, stage, "tiny", 0, settings) as writer:
        writer.facts |= {"principles": list(principles)} if principles else {}
        for name, text in tables.items():
            number, _, slug = name.partition("_")
            writer.table(number, slug, table_of_texts(text), "caption", Label("tiny"))


def test_a_run_s_signed_tables_and_settings_are_read():
    run = Run("r")
    sign(run, "05_reward", **{"1_reward": CSV["1_reward"]})
    sign(run, "07_win_rates", **{"2_win_rates": CSV["2_win_rates"]})
    found, said = published_results(run, ("05_reward", "07_win_rates"))
    own = rows(found)
    for name in [("table_1", "PsychoCounsel-Llama3-8B-Reward", "accuracy"), ("design", "reward_epochs")]:
        assert own[name]["state"] == REPRODUCED, own[name]
    policy = own["table_2", "free", "Llama3-8B + DPO-Iter", "overall"]
    assert policy["this run"] == "88.0", "a + that was disarmed for spreadsheets is read"
    assert own["dataset", "test_speeches"]["why"] == "this run has no table S2"
    counts = found.state.value_counts()
    for state in (REPRODUCED, DIFFERS, NOT_RUN):
        assert str(counts[state]) in said[0]
    assert len(said) == 2 and said[0] == describe_published(found)


def test_a_table_that_was_changed_since_is_refused():
    run = Run("r")
    sign(run, "05_reward", **{"1_reward": CSV["1_reward"]})
    path = run.stage("05_reward") / "tables/table_1_reward.csv"
    path.write_text(path.read_text().replace("98.0", "97.8"))
    assert "was changed since 05_reward signed it" in one_line(lambda: run_values(run, ("05_reward",)))


@pytest.mark.parametrize("principles, own", [(KEYS, False), (None, False), (("plain", "kind"), True)])
def test_receipts_say_whose_principles_a_run_has(principles, own):
    run = Run("r")
    sign(run, "05_reward", principles)
    found = run_values(run, ("05_reward",))
    assert found.own_principles is own and len(found.principles) == (2 if own else 7)


def test_the_tables_that_are_published_are_all_understood():
    record = json.loads(LAPTOP.read_text(encoding="utf-8"))
    tables = {name: table_of_texts("\n".join(own["rows"])) for name, own in record["tables"].items()}
    settings = {name: own["settings"] for name, own in record["stages"].items()}
    frame = published_frame(RunValues(tables, settings, KEYS))
    assert not frame.why.str.contains("no table [0-9S]").any(), set(frame.why)
    overall = rows(frame)["table_2", "free", "Llama3-8B", "overall"]["this run"]
    won = next(row["values"] for row in record["rows"] if row["of"] == "win/base/free")
    assert overall == f"{100 * won.count('1') / len(won):.1f}"
    assert pd.Series(frame.state).value_counts()[NOT_RUN] >= 54, "one size stands beside one of the paper's two"
