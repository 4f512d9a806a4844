"""A second judge sees the battles of the first, is of another family, and where they differ by topic is shown."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.files import SCHEMAS, StageReader, StageWriter
from psycopref.core.principles import principle_keys
from psycopref.core.settings import PROFILES, load_profile
from psycopref.core.stages import Run, stage_settings
from psycopref.evaluation.win_rates import read_verdicts
from psycopref.experiments.head_to_head import battle_all, second_opinion
from psycopref.feedback.battles import KEYS, ORDERS
from psycopref.gateway.gateway import PROVIDERS
from psycopref.models.chat import ChatReply, FreeModel
from psycopref.run.plan import asked_uris, plan_run, plan_text

PRINCIPLE_KEYS = principle_keys()

CHAPTER = Path(__file__).resolve().parents[2] / "nbs" / "07_win_rates.ipynb"
TOPICS = {"grief-and-loss": "emotional-well-being", "career": "life-transitions", "self-harm": "crisis-and-safety"}
ODD = "crisis-and-safety"  # where the two judges differ
WHO = {"reference": "fake:gpt-4o-mini", "judge": "fake:gpt-4o", "second_judge": "fake:claude-judge"}
POLICIES = [{"policy": "Llama-1B + DPO", "path": None, "backbone": "random-tiny", "kind": "dpo"}]
EACH = 42  # speeches of a topic where κ gets an interval
WHO_RATES = "openai:gpt-4o-2024-08-06"  # in the paper


class Fake(FreeModel):
    """A writer, or a judge to whom every third speech's answer of the policy is the worse; `claude` differs on ODD."""

    def __init__(self, name, broken=False):
        self.uri, self.label, self.identity, self.broken = f"fake:{name}", name, name, broken

    def reply(self, request):
        if request.task != "battle":
            return "The policy hears you." if self.label == "random-tiny" else "The reference hears you well."
        first = "policy" in request.fields["response_1"]
        number, topic = re.search(r"(\d+) of (\S+)", request.fields["client_speech"]).groups()
        won = (int(number) % 3 > 0) ^ (topic == ODD and "claude" in self.label)
        said = 1 if won == first else 2
        return "no" if self.broken else json.dumps(dict.fromkeys([*PRINCIPLE_KEYS, "overall"], said))

    async def answer(self, requests):
        return [ChatReply(self.reply(request)) for request in requests]


@pytest.fixture
def fakes(monkeypatch):
    """Let `fake:NAME` and the policies be models of the tests' own; the value is who says nothing readable."""
    broken = set()
    for provider in ("fake", "local"):
        monkeypatch.setitem(PROVIDERS, provider, lambda name: Fake(name, name in broken))
    return broken


def make_speeches(each):
    rows = [
        (f"{topic}-{i}", f"I count {i} of {coarse} today.", topic, coarse)
        for topic, coarse in TOPICS.items()
        for i in range(each)
    ]
    frame = pd.DataFrame(rows, columns=["speech_id", "speech", "topic", "coarse_topic"])
    return frame.assign(source="demo", topic_by="gold", split="test")


def profile(**changed):
    own = {f"evaluation.{name}": uri for name, uri in (WHO | changed).items()}
    return load_profile("tiny", own | {"evaluation.bootstrap": 200, "ratings.rater": "rules:rubric"})


def fought(gateway, rater="gpt-4o", each=6, **changed):
    speeches, settings = make_speeches(each), profile(**changed)
    found = battle_all(gateway, Run("tiny"), POLICIES, speeches, settings, 0, 0)
    return found, second_opinion(gateway, found, speeches, settings, 0, rater)


def numbers(cell):
    return [float(own) for own in re.findall(r"-?\d+\.\d+", cell)]


def test_two_judges_that_differ_on_one_topic_are_seen_to_differ_there_and_nowhere_else(gateway, fakes):
    found, second = fought(gateway, each=EACH)
    [(*_, each, _), (*_, topics, _)] = second.tables
    topics = topics.set_index(["setting", "topic"])
    for (_, topic), row in topics.iterrows():
        assert row.n == (3 * EACH if topic == "Overall" else EACH)
        differ = {"Safety": 100.0, "Overall": 100 / 3}.get(topic, 0.0)
        assert numbers(row["verdicts differ %"])[0] == pytest.approx(differ, abs=0.05)
        first, other = (numbers(row[f"{name}: win rate %"])[0] for name in ("gpt-4o", "claude-judge"))
        assert first == pytest.approx(200 / 3, abs=0.05), "the main judge's rate is Table 2's"
        assert other == pytest.approx({"Safety": 100 / 3, "Overall": 500 / 9}.get(topic, 200 / 3), abs=0.05)
    kappa = topics["κ"].dropna()
    assert all(
        numbers(cell)[0] == (-0.8 if topic == "Safety" else 1)
        for (_, topic), cell in kappa.items()
        if topic != "Overall"
    )
    assert len(topics) == 2 * 4 and any(f"({2 * EACH} of {2 * EACH})" in said for said in second.sentences)
    assert "Crisis and Safety" in " ".join(second.sentences)
    assert any("margins of gpt-4o and claude-judge" in said and "ICC(A,1) = " in said for said in second.sentences)
    assert each["coverage %"].tolist() == [100.0] * 4 and set(each.judge) == {"gpt-4o", "claude-judge"}


def test_kappa_is_shown_only_where_the_rule_allows_an_interval(gateway, fakes):
    _, second = fought(gateway)
    topics = second.tables[1][2]
    assert topics["κ"][topics.topic != "Overall"].isna().all() and "κ" in topics
    assert topics["verdicts differ %"].notna().all()


def test_the_second_judge_gets_exactly_the_first_one_s_battles_and_changes_nothing_of_them(gateway, fakes):
    found, second = fought(gateway)
    both = second.verdicts["two_judges"]
    assert set(both) == set(SCHEMAS["verdicts"])
    parts = {
        judge: own.drop(columns="judge").sort_values(KEYS, ignore_index=True) for judge, own in both.groupby("judge")
    }
    assert set(parts) == {WHO["judge"], WHO["second_judge"]} and set(found.battles.judge) == {WHO["judge"]}
    assert parts[WHO["judge"]][KEYS].equals(parts[WHO["second_judge"]][KEYS])
    alone, none = fought(gateway, second_judge="")
    pd.testing.assert_frame_equal(alone.battles, found.battles)
    assert none.tables == [] and none.verdicts == {} and set(alone.battles.order) == set(ORDERS)
    assert read_verdicts(found.battles, "one order", 0).equals(read_verdicts(alone.battles, "one order", 0))


def test_a_judge_of_the_reference_s_family_is_compared_with_the_other_for_self_preference(gateway, fakes):
    _, second = fought(gateway)
    each = second.tables[0][2].set_index(["setting", "judge"])["self-preference, points"]
    for (_, judge), cell in each.items():
        if judge == "gpt-4o":  # it lets the reference win in a third of ODD's battles, the other in two thirds
            assert numbers(cell)[0] == pytest.approx(-100 / 9, abs=0.05) and cell.endswith("reference of its family")
        else:
            assert cell.startswith("—") and "neither side" in cell
    assert "family claude" in second.note and "like" not in second.note


@pytest.mark.parametrize("second", ["fake:gpt-4.1", "batch:gpt-4o-mini", "openai:o1-mini", "fake:gpt-4o"])
def test_a_second_judge_of_the_first_one_s_family_is_refused_before_anybody_is_asked(gateway, fakes, second):
    said = one_line(lambda: fought(gateway, second_judge=second))
    assert "evaluation.second_judge" in said and repr(second) in said and "family" in said and not gateway.counts
    assert said == one_line(lambda: asked_uris(profile(second_judge=second))), "and the plan says the same"


@pytest.mark.parametrize("second", ["longer", "reward", "choose:fake:claude-judge"])
def test_a_second_judge_is_asked_as_the_first_one_is(gateway, fakes, second):
    said = one_line(lambda: fought(gateway, second_judge=second))
    assert "gateway URI" in said and "judges.others" in said and not gateway.counts


@pytest.mark.parametrize(
    "second, note",
    [
        ("fake:claude-judge", "(family claude)"),
        ("fake:somebody", "(family not known)"),
        ("fake:qwen-judge", "(family qwen, like the rater)"),
    ],
)
def test_the_family_of_a_second_judge_stands_in_every_caption(gateway, fakes, second, note):
    rater = "Qwen2.5-72B-Instruct" if "qwen" in second else "gpt-4o"
    _, said = fought(gateway, rater, second_judge=second)
    assert all(caption.endswith(note) for *_, caption in said.tables)


def test_where_one_judge_is_also_rater_and_reference_one_sentence_says_so(gateway, fakes):
    _, alone = fought(gateway, second_judge="", reference=WHO["judge"])
    assert alone.note == (
        "One judge only: gpt-4o, the same model that rated the pairs and gave the reference's answers"
    )
    _, other = fought(gateway, "a person", second_judge="")
    assert other.note == "One judge only: gpt-4o, of the family that gave the reference's answers"


def test_a_second_judge_that_can_t_be_read_stops_the_stage_and_loses_no_reply(gateway, fakes):
    fakes.add("claude-judge")
    said = one_line(lambda: fought(gateway))
    assert said.startswith("07_win_rates, second judge: 0 of ")
    before = gateway.counts[WHO["judge"]] | {}
    fakes.clear()
    fought(gateway, second_judge="")
    after = gateway.counts[WHO["judge"]]
    assert after["cached"] - before["cached"] == after["calls"] - before["calls"] or after["calls"] == before["calls"]


def test_a_key_in_the_environment_chooses_nobody(monkeypatch):
    plain = {name: asked_uris(own) for name, own in PROFILES.items()}
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "MISTRAL_API_KEY", "PSYCOPREF_SERVER_KEY"):
        monkeypatch.setenv(name, "a-key")
    assert all(own.evaluation.second_judge == "" for own in PROFILES.values())
    assert {name: asked_uris(load_profile(name)) for name in PROFILES} == plain


def test_the_plan_shows_what_a_second_judge_reads_and_costs():
    judges = {"evaluation.judge": "openai:claude-x@http://h/v1", "evaluation.second_judge": WHO_RATES}
    one, two = PROFILES["paper"], load_profile("paper", judges)
    [alone] = [row for row in plan_run(one, 26_483).battles() if "battles" in row.what]
    _, second = [row for row in plan_run(two, 26_483).battles() if "battles" in row.what]
    assert alone.who == WHO_RATES and second == replace(alone, what=second.what)
    said, other = (" ".join(plan_text(own, 26_483).split()) for own in (two, one))
    for part in ("battles, second judge", "reads every test speech", "like the rater and the reference"):
        assert part in said and part not in other
    assert "One judge only: gpt-4o-2024-08-06, the same model that rated the pairs" in other


def test_other_stages_are_not_made_again_for_a_second_judge():
    one, two = (load_profile("paper", {"evaluation.second_judge": uri}) for uri in ("", WHO["second_judge"]))
    changed = [
        name
        for name in ("06_policy", "07_win_rates", "08_ablations", "10_judges", "11_experts")
        if stage_settings(one, name) != stage_settings(two, name)
    ]
    assert changed == ["07_win_rates"]


@pytest.mark.chain
def test_the_chapter_shows_both_judges(gateway, fakes, tmp_path):
    run, speeches = Run("tiny"), make_speeches(6)
    with StageWriter(run, "01_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", speeches)
    with StageWriter(run, "04_pairs", "tiny", 0, {}) as stage:
        stage.facts["rater"] = "gpt-4o"
    with StageWriter(run, "06_policy", "tiny", 0, {}) as stage:
        stage.json("policies", POLICIES)
    here = {"display": lambda *shown: None}
    changed = {f"evaluation.{name}": uri for name, uri in WHO.items()} | {"evaluation.bootstrap": 20}
    for cell in json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "07_win_rates", "exec"), here)
            if "parameters" in cell["metadata"].get("tags", []):
                here |= {"PROFILE": "tiny", "RUN": "tiny", "OVERRIDES": changed}
    reader, note = StageReader(run, "07_win_rates"), "beside it by claude-judge (family claude)"
    assert reader.rows("verdicts", "two_judges").judge.nunique() == 2 and set(reader.rows("battles").judge) == {
        WHO["judge"]
    }
    assert reader.receipt["judges"] == ["gpt-4o", "claude-judge"] and note in reader.json("summary")["judges"]
    for table in ("table_2_win_rates", "table_S45_two_judges", "table_S46_two_judges_topics"):
        assert note in (run.tables / f"{table}.md").read_text(), table
    assert np.isfinite([row["Overall"] for row in reader.json("summary")["rows"]]).all()
