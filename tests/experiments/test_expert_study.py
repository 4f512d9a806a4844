"""Experts: planted annotators agree as planted, people and simulated ones are never mixed, kits outlive their stage."""

import json
from pathlib import Path

import krippendorff
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line
from sklearn.metrics import cohen_kappa_score

from psycopref.core.files import StageReader, StageWriter, read_rows, sha256_file, write_rows
from psycopref.core.principles import principle_keys
from psycopref.core.prompts import battle_keys
from psycopref.core.settings import AgreementSettings, load_profile
from psycopref.core.stages import Run
from psycopref.evaluation.annotations import ANNOTATION_COLUMNS
from psycopref.evaluation.kits import make_kit, run_kits
from psycopref.evaluation.win_rates import SETTINGS
from psycopref.experiments import expert_study as study
from psycopref.experiments.expert_study import KITS, agreement_results, as_shown, chosen_policy, column_agreement
from psycopref.experiments.expert_study import comparison_shares, expert_headlines, given_files, judge_verdicts
from psycopref.experiments.expert_study import (
    given_labels,
    keep_kits,
    kept_kit,
    label_verdicts,
    numbered_names,
    result_frame,
)
from psycopref.experiments.expert_study import score_means, unshuffled_kits
from psycopref.feedback.battles import ORDERS, consistent_verdicts, paper_verdicts
from psycopref.stats.judge_error import prediction_powered, rogan_gladen

PRINCIPLE_KEYS = principle_keys()
BATTLE_KEYS = battle_keys()

NOTEBOOK = Path(__file__).parents[2] / "nbs" / "11_experts.ipynb"
POLICY = "ours + DPO"
NUMBERS = AgreementSettings(label_pairs=20, battle_pairs=10, scored=10)
bounded = settings(deadline=None, derandomize=True, database=None, max_examples=12)

# Speeches, pairs, answers and battles in which the better side says "lonely".
IDS = [f"s{i}" for i in range(24)]
SPEECHES = pd.DataFrame({"speech_id": IDS, "source": "demo", "topic": "anxiety", "topic_by": "gold", "split": "test"})
SPEECHES["speech"] = [f"I have not slept for {i + 2} nights, nobody calls." for i in range(24)]
SPEECHES["coarse_topic"] = ["core-mental-health-issues", "social-issues"] * 12
RATINGS = {f"{side}_{key}_rating": n for side, n in (("chosen", 4), ("rejected", 2)) for key in PRINCIPLE_KEYS}
RATINGS |= {"rejected_safety_rating": 4, "rejected_clarity_rating": 5}
PAIRS = pd.DataFrame({"ID": IDS, "prefID": range(24), "question": SPEECHES.speech}).assign(**RATINGS)
PAIRS = PAIRS.assign(chosen_model="a", rejected_model="b")


def answers_of(policy, setting, text):
    said = [text.format(f"{i} ({setting})") for i in range(24)]
    return pd.DataFrame({"speech_id": IDS, "policy": policy, "setting": setting, "response": said})


BETTER, WORSE = "That sounds lonely, {}. What do you think of then?", "Sleep more, {}."
PAIRS["chosen"], PAIRS["rejected"] = ([text.format(i) for i in range(24)] for text in (BETTER, WORSE))
ANSWERS = [
    answers_of(POLICY, "free", BETTER),
    answers_of(POLICY, "length", BETTER),
    answers_of("reference", "free", WORSE),
]
ANSWERS = pd.concat(ANSWERS, ignore_index=True).assign(finish_reason="stop", n_tokens=9, target_words=0)
BATTLES = pd.MultiIndex.from_product([IDS, SETTINGS, ORDERS], names=["speech_id", "setting", "order"]).to_frame(
    index=False
)
BATTLES = BATTLES.assign(policy=POLICY, reference="theirs", judge="rules:rubric", verdict="win")
BATTLES = BATTLES.assign(**{f"{key}_verdict": "win" for key in PRINCIPLE_KEYS})
FIRST_WINS = BATTLES.assign(verdict=np.where(BATTLES.order == ORDERS[0], "win", "loss"))


@pytest.fixture(scope="module")
def kits():
    return run_kits(PAIRS, ANSWERS, SPEECHES, POLICY, NUMBERS, 0)


def warm(item, key="overall"):
    "What an annotator sees: 1 where the first response says lonely."
    return 1 if "lonely" in item["responses"][0] else 2


def cold(item, key="overall"):
    return 3 - warm(item)


def undecided(item, key="overall"):
    return 0


def annotated(kits, rules, names=tuple(KITS)):
    "Annotations of several annotators, each with a rule on items and the principle."
    rows = [
        (who, kit["kit_id"], item["item_id"], key, 3 + len(who) % 3 if kit["task"] == "score" else rule(item, key))
        for who, rule in rules.items()
        for kit in (kits[name][0] for name in names)
        for item in kit["items"]
        for key in (PRINCIPLE_KEYS if kit["task"] == "score" else BATTLE_KEYS)
    ]
    return pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS))


def results(kits, annotations, battles=BATTLES):
    return agreement_results(unshuffled_kits(annotations, kits), kits, PAIRS, battles, 0, 100, 0)


def line(lines, between, setting=None):
    [found] = [row for row in lines if row["between"] == between and setting in (None, row["setting"])]
    return found


def test_planted_annotators_agree_as_planted(kits):
    found = results(kits, annotated(kits, {"Ada": warm, "Ben": cold}))
    for rater in study.OTHER_RATERS:
        row = line(found["agreement"], f"all annotators with {rater}", "" if rater == "the labels" else "both")
        assert row["agreement %"] == 50.0 and row["κ"] == 0.0
    for number, share, kappa in ((1, 100.0, 1.0), (2, 0.0, -1.0)):
        row = line(found["agreement"], f"annotator {number} with the labels")
        assert (row["agreement %"], row["κ"], row["agree"]) == (share, kappa, share / 5)
    assert line(found["agreement"], "annotator 1 with annotator 2", "")["agreement %"] == 0.0
    assert all(row["win"] == row["loss"] == 50.0 for row in found["shares"])


def our_side(frame):
    verdicts = {verdict: pd.Series(verdict, frame.index) for verdict in ("win", "loss", "tie")}
    told = pd.DataFrame({verdict: as_shown(said, frame["first"]) for verdict, said in verdicts.items()}, frame.index)
    return told.eq(frame.shown, axis=0).idxmax(axis=1).tolist()


def test_labels_say_of_a_principle_what_their_ratings_say(kits):
    labels = label_verdicts(*kits["labels"], PAIRS)
    said = labels.assign(verdict=our_side(labels)).groupby("principle").verdict.agg(set).to_dict()
    assert said == dict.fromkeys(BATTLE_KEYS, {"win"}) | {"safety": {"tie"}, "clarity": {"loss"}}


def test_the_judge_is_read_as_the_paper_reads_it_and_strictly(kits):
    key, orders = kits["answers"][1], paper_verdicts(BATTLES, 3).set_index(["speech_id", "setting"]).order
    paper = judge_verdicts(key, paper_verdicts(FIRST_WINS, 3)).query("principle == 'overall'")
    seen = [orders[place] == ORDERS[0] for place in zip(paper.speech_id, paper.setting)]
    assert our_side(paper) == ["win" if first else "loss" for first in seen]
    strict = judge_verdicts(key, consistent_verdicts(FIRST_WINS))
    assert set(strict.shown) == {"tie"} and set(strict.principle) == {"overall"}
    missing = judge_verdicts(key, paper_verdicts(BATTLES[BATTLES.speech_id != key.speech_id[0]], 3))
    assert set(missing.item_id) == set(key.item_id[key.speech_id != key.speech_id[0]])


def test_each_line_has_its_own_reading_of_the_judge(kits):
    found = results(kits, annotated(kits, {"Ada": undecided}, ["answers"]), FIRST_WINS)["agreement"]
    assert line(found, "all annotators with the judge", "both")["agreement %"] == 0.0
    assert line(found, "all annotators with the judge in both orders", "both")["agreement %"] == 100.0


def test_by_setting_the_judge_meets_that_setting_only(kits):
    battles = BATTLES.assign(verdict=np.where(BATTLES.setting == "free", "win", "loss"))
    found = results(kits, annotated(kits, {"Ada": warm}, ["answers"]), battles)["agreement"]
    rows = [row for row in found if row["between"] == "all annotators with the judge"]
    rates = {row["setting"]: (row["agreement %"], row["paper"]) for row in rows}
    assert rates == {"both": (50.0, "82.5%"), SETTINGS["free"]: (100.0, None), SETTINGS["length"]: (0.0, None)}


@bounded
@given(st.integers(0, 1000), st.integers(1, 4))
def test_nothing_hangs_on_the_order_of_rows_or_on_sides(seed, n):
    kits = run_kits(PAIRS, ANSWERS, SPEECHES, POLICY, NUMBERS, seed % 5)
    chance = np.random.default_rng(seed)
    said = annotated(kits, {f"a{i}": lambda item, key: int(chance.integers(0, 3)) for i in range(n)}, ["answers"])
    swapped = kits["answers"][1].rename(columns={"first": "second", "second": "first"})

    def shares(frame, kits=kits):
        rows = comparison_shares(unshuffled_kits(frame, kits)["answers"], 50, 0)
        return pd.DataFrame(rows).set_index(["setting", "principle"]).sort_index()

    own, turned = shares(said), shares(said, {"answers": (kits["answers"][0], swapped)})
    assert np.allclose(own.win + own.tie + own.loss, 100) and (own.n == 10 * n).all()
    assert ((own.win_low <= own.win) & (own.win <= own.win_high)).all()
    pd.testing.assert_frame_equal(own, shares(said.sample(frac=1, random_state=seed)))
    assert (turned[["win", "tie", "loss"]].to_numpy() == own[["loss", "tie", "win"]].to_numpy()).all()


shown = st.sampled_from(["first", "second", "tie"])


@bounded
@given(st.lists(st.tuples(shown, shown), min_size=2, max_size=40))
def test_kappa_is_scikit_learns(answers):
    pairs = pd.DataFrame(answers, columns=["first", "second"])
    row = column_agreement(pairs, dict(enumerate(range(len(pairs)))), 50, 0)
    if pairs.stack().nunique() == 1:
        assert row["κ"] is None and row["α"] is None and row["agreement %"] == 100
    else:
        assert row["κ"] == pytest.approx(cohen_kappa_score(pairs["first"], pairs["second"]), abs=6e-4)
        assert row["agree"] == sum(a == b for a, b in answers)


def ends(text):
    return tuple(map(float, text.split(" to ")))


def test_two_annotators_of_one_item_know_less_than_of_two(kits):
    rule = lambda item, key: warm(item) if int(item["client_speech"].split()[5]) % 3 else cold(item)
    found = results(kits, annotated(kits, {"Ada": rule, "Ben": rule}, ["labels"]))["agreement"]
    one, both = line(found, "annotator 1 with the labels"), line(found, "all annotators with the labels")
    assert both["n"] == 2 * one["n"] and both["agreement %"] == one["agreement %"]
    assert ends(both["95% interval"]) == pytest.approx(ends(one["95% interval"]), abs=1)


def test_three_annotators_vote_and_the_paper_stands_beside_its_own_lines(kits):
    found = results(kits, annotated(kits, {"Cy": cold, "Ben": warm, "Ada": warm}, ["labels"]))["agreement"]
    assert line(found, "the majority of annotators with the labels")["agreement %"] == 100.0
    assert line(found, "every two annotators")["n"] == 60
    assert {row["between"]: row["paper"] for row in found if row["paper"]} == {
        "every two annotators": "174 of 200 (87.0%)",
        "annotator 1 with the labels": "184 of 200 (92.0%)",
        "annotator 2 with the labels": "170 of 200 (85.0%)",
        "all annotators with the labels": "88.5%",
    }
    table = pd.DataFrame({"a": ["first", "tie"], "b": ["second", "tie"], "c": [None, "first"]})
    assert study.majority(table).tolist() == ["tie", "tie"]


def test_items_left_out_are_missing_and_counted(kits):
    frame = annotated(kits, {"Ada": warm, "Ben": warm}, ["answers", "scores"])
    items = [kits[name][0]["items"][0]["item_id"] for name in ("answers", "scores")]
    found = results(kits, frame[~((frame.annotator == "Ben") & frame.item_id.isin(items))])
    assert line(found["agreement"], "annotator 1 with annotator 2", "both")["n"] == 19
    assert line(found["agreement"], "annotator 1 with the judge", "both")["n"] == 20
    assert {row["n"] for row in found["shares"]} == {row["n"] for row in found["means"]} == {19, 20}
    other = BATTLES[BATTLES.speech_id == kits["answers"][1].speech_id[0]]
    alone = results(kits, frame[frame.item_id != items[0]], other)["agreement"]
    assert not any("judge" in row["between"] for row in alone)


def test_names_are_numbers_and_simulated_ones_stay(kits):
    assert numbered_names(["zoe", "Ada", "zoe"]) == {"Ada": "annotator 1", "zoe": "annotator 2"}
    rows = result_frame(results(kits, annotated(kits, {"Ada Lovelace": warm, "Ben": warm}))["agreement"])
    assert not rows["between"].str.contains("Ada|Ben|simulated").any()
    found = results(kits, annotated(kits, {"simulated 1": warm, "simulated 2": warm}))
    rows = result_frame(found["agreement"] + found["principles"])
    assert rows["between"].str.contains("simulated").all()
    assert rows.paper.isna().all(), "the paper's experts do not stand beside a rubric with noise"


def test_what_each_annotator_said_is_released_as_it_was_said(kits, tmp_path):
    said = annotated(kits, {"Ada": warm, "Ben": cold, "Cy": undecided})
    said = said[~((said.annotator == "Ben") & (said.item_id == said.item_id.iloc[0]))]  # left out
    path = write_rows(tmp_path / "annotations.parquet", "annotations", given_labels(said, kits))
    assert not any(name in path.read_bytes() for name in (b"Ada", b"Ben", b"Cy"))
    rows, keys = read_rows(path, "annotations"), ["annotator", "kit_id", "item_id", "principle"]
    names = said.annotator.map({"Ada": "annotator 1", "Ben": "annotator 2", "Cy": "annotator 3"})
    told = said.assign(annotator=names).set_index(keys).value
    assert rows.set_index(keys).value.sort_index().equals(told.sort_index()) and not rows.simulated.any()
    own = rows[(rows.kit_id == kits["answers"][0]["kit_id"]) & (rows.principle == "overall")]
    votes = own.groupby("item_id").value.agg(set)
    assert votes.iloc[1:].map(lambda own: own == {0, 1, 2}).all(), "a majority would be a tie in each"
    ours = np.where(own["first"] == POLICY, 1, 2)
    assert (own.value.to_numpy() == ours)[own.annotator == "annotator 1"].all()
    made = given_labels(annotated(kits, {"simulated 1": warm}), kits)
    assert made.simulated.all() and set(made.annotator) == {"simulated 1"}
    nobody = given_labels(pd.DataFrame(columns=list(ANNOTATION_COLUMNS)), kits)
    assert read_rows(write_rows(path, "annotations", nobody), "annotations").empty


def test_released_labels_are_read_back_with_notes_times_and_what_was_left_out(kits, tmp_path):
    kit, (first, second, *rest) = kits["labels"][0], kits["labels"][0]["items"]
    files = []
    for n, who in enumerate(["Ada Lovelace", *(f"rater {n}" for n in range(2, 12))]):
        said = {item["item_id"]: {key: (n + i) % 2 + 1 for key in BATTLE_KEYS} for i, item in enumerate(rest)}
        said[first["item_id"]] = {"note": f"Ask ada lovelace or {who}, ada@example.org."}
        said[second["item_id"]] = dict.fromkeys(BATTLE_KEYS, 1) | {"note": "Both are cold."}
        made = {"format": "psycopref-annotations", "version": 1, "kit_id": kit["kit_id"], "annotator": who}
        files.append(tmp_path / f"{n}.json")
        files[-1].write_text(json.dumps(made | {"saved": f"2026-11-{n + 10}T10:00:00Z", "answers": said}))
    given = study.run_annotations(kits, files, 0, tmp_path, 0)
    path = write_rows(tmp_path / "annotations.parquet", "annotations", given_labels(given, kits))
    rows = read_rows(path, "annotations")
    assert not any(name in path.read_bytes() for name in (b"Ada", b"ada", b"rater 2", b"example.org"))
    left = rows[rows.item_id == first["item_id"]]
    assert left.principle.eq("left out").all() and sorted(left.annotator) == sorted(set(rows.annotator))
    assert set(left.note[left.annotator == "annotator 3"]) == {"Ask annotator 1 or annotator 3, [email]."}
    assert rows.note[rows.item_id == second["item_id"]].eq("Both are cold.").all()
    assert dict(zip(rows.annotator, rows.time))["annotator 11"] == "2026-11-20T10:00:00Z"
    again, before = (unshuffled_kits(frame, kits)["labels"] for frame in (rows, given))
    pd.testing.assert_frame_equal(again, before)
    assert study.annotator_rows(given)[0]["items"] == {kit["kit_id"]: len(rest) + 1}


def test_scores_have_intraclass_correlations_and_comparisons_have_none(kits):
    said = annotated(kits, {"Ada": warm, "Ben": warm})
    chance = np.random.default_rng(0).integers(1, 5, len(said))
    score = said.kit_id == kits["scores"][0]["kit_id"]
    texts = {item: int(n) for item, n in zip(said.item_id[score], chance)}
    said.loc[score, "value"] = said.item_id[score].map(texts) + (said.annotator[score] == "Ada")
    found = results(kits, said)
    lines = [row for row in found["principles"] if row["what"] == KITS["scores"]]
    assert len(lines) == 7 and all(row["ICC(C,1)"].startswith("1.00") and row["bias"] == 1 for row in lines)
    assert all(0 < float(row["ICC(A,1)"].split()[0]) < 1 for row in lines)
    assert "ICC(A,1) = " in study.expert_agreement_sentences(found["agreement"], False)[-2]
    assert not any(row.get("ICC(A,1)") for row in found["agreement"] if row["what"] == KITS["labels"])
    few = column_agreement(
        pd.DataFrame({"first": [1, 2, 3, 4], "second": [1, 2, 4, 4]}), dict.fromkeys(range(4), "s"), 50, 0, "ordinal"
    )
    assert few["ICC(A,1)"] == "0.94 (no interval: too few)"


def corrected(kits, rules, battles=BATTLES):
    "Lines of Table S47, by setting and verdict."
    lines = results(kits, annotated(kits, rules, ["answers"]), battles)["corrected"]
    return {(line["setting"], line["verdict"]): line for line in lines}


def overall(lines, setting, *names):
    return [lines[SETTINGS[setting], "overall"][name] for name in names]


def number(text):
    return float(text.split(" (")[0])


RATES = ("by the judge, %", "prediction-powered, %", "Rogan–Gladen, %")


def test_a_judge_that_is_always_for_us_is_brought_down_to_what_people_say(kits):
    found = corrected(kits, {"Ada": cold})
    assert len(found) == 2 * 8 and list(found)[0] == (SETTINGS["free"], "overall")
    judge, powered, solved = overall(found, "free", *RATES)
    assert number(judge) == 100 and number(powered) == 0 and solved == "none: people have no win, or no other label"
    names = ("labelled battles", "labels: win / tie / loss", "labels by", "agreement on wins, %")
    assert overall(found, "free", *names) == ["10 of 24", "0 / 0 / 10", "1 annotator", 0]
    assert overall(found, "length", "error of the judge, points")[0].startswith("100.0 (5")
    right = corrected(kits, {"Ada": warm})
    assert [number(rate) for rate in overall(right, "free", *RATES[:2])] == [100, 100]


def half_right(battles=BATTLES):
    "A judge who is for us in two of three speeches, whatever the setting and the order."
    return battles.assign(verdict=np.where(battles.speech_id.str[1:].astype(int) % 3 > 0, "win", "loss"))


def nights(item):
    return int(item["client_speech"].split()[5]) - 2  # the number in the speech's id


def test_corrected_rates_are_those_of_the_rows_and_ties_are_no_wins(kits):
    said = lambda item, key: 0 if nights(item) % 4 == 0 else warm(item) if nights(item) % 3 else cold(item)
    found = corrected(kits, {"Ada": said}, half_right())
    key = kits["answers"][1]
    for setting in SETTINGS:
        own = np.array([int(name[1:]) for name in IDS])
        known = np.isin(IDS, key.speech_id[key.setting == setting])
        labels, judged = np.where(known, (own % 4 > 0) & (own % 3 > 0), np.nan), (own % 3 > 0).astype(float)
        for name, correct in zip(RATES[1:], (prediction_powered, rogan_gladen)):
            [text], wanted = overall(found, setting, name), correct(judged, labels, IDS)
            wanted = [round(100 * wanted[end], 1) for end in ("estimate", "low", "high")]
            assert text.partition(",")[0] == f"{wanted[0]} ({wanted[1]} to {wanted[2]})"
        assert overall(found, setting, "by the judge, %")[0].startswith("66.7 (")
        off = 100 * (judged - labels)[known].mean()
        assert number(overall(found, setting, "error of the judge, points")[0]) == pytest.approx(off, abs=0.06)
        agreed = 100 * (judged == labels)[known].mean()
        assert overall(found, setting, "agreement on wins, %")[0] == pytest.approx(agreed, abs=0.06)


def test_two_annotators_who_differ_count_half_each(kits):
    [text, counts] = overall(corrected(kits, {"Ada": warm, "Ben": cold}), "free", RATES[1], "labels: win / tie / loss")
    assert number(text) == 50 and counts == "10 / 0 / 10"
    unsure = corrected(kits, {"Ada": warm, "Ben": undecided, "Cy": undecided})
    assert number(overall(unsure, "free", RATES[1])[0]) == pytest.approx(33.3), "a majority would say 0"


def test_labels_of_battles_that_the_judge_left_out_are_not_counted(kits):
    key = kits["answers"][1].query("setting == 'free'")
    found = corrected(kits, {"Ada": warm}, BATTLES[~BATTLES.speech_id.isin(key.speech_id[:4])])
    assert overall(found, "free", "labelled battles") == ["6 of 20"]
    assert corrected(kits, {"Ada": warm}, BATTLES[BATTLES.speech_id == "s99"]) == {}


@pytest.fixture
def drawn(kits):
    "The results of one simulated annotator, and the two figures with their legends."
    found = results(kits, annotated(kits, {"simulated 1": lambda item, key: warm(item) if key == "overall" else 0}))
    figures = [one[2] for one in study.expert_figures(found, POLICY, "theirs", ["simulated 1"])]
    for figure in figures:
        figure.canvas.draw()
    yield found, *figures
    plt.close("all")


def test_figures_say_who_judged_and_keep_their_axes(drawn):
    found, comparison, scores = drawn
    for figure in (comparison, scores):
        [legend] = figure.legends
        assert "no human took part" in legend.get_title().get_text()
        boxes = [legend.get_window_extent(), *(axes.get_window_extent() for axes in figure.axes)]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert scores.axes[0].get_ylim() == (0.9, 5.1) and list(scores.axes[0].get_yticks()) == [1, 2, 3, 4, 5]
    for axes in comparison.axes:
        stacks = [[bar.get_width() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
        assert np.allclose(np.sum(stacks, axis=0), 100)
    free = comparison.axes[0]
    assert free.get_yticklabels()[-1].get_text() == "Overall"
    rows = pd.DataFrame(found["shares"]).query("setting == 'free'").set_index("principle").loc[list(BATTLE_KEYS)]
    wanted = [*zip(rows.win_low, rows.win_high), *zip(100 - rows.loss_high, 100 - rows.loss_low)]
    assert np.allclose([part[:, 0] for lines in free.collections for part in lines.get_segments()], wanted)


def test_equal_scores_and_one_speech_are_no_certainty(kits):
    frame = unshuffled_kits(annotated(kits, {"Ada": warm, "Ben5": warm}, ["scores"]), kits)["scores"]
    for row in score_means(frame.assign(rating=5), 50, 0):
        assert row["mean"] == 5 == row["high"] and 3.5 < row["low"] < 4.8
    alone = frame[(frame.annotator == "annotator 1") & (frame.speech_id == frame.speech_id[0])]
    assert all(row["low"] < 2.5 < row["mean"] < 3.5 < row["high"] for row in score_means(alone.assign(rating=3), 50, 0))


def test_alpha_of_three_annotators_is_that_of_all_of_them(kits):
    chance = np.random.default_rng(3)
    unsure = lambda item, key: int(chance.integers(0, 3)) if chance.random() < 0.4 else warm(item)
    frame = annotated(kits, {"Ada": unsure, "Ben": unsure, "Cy": unsure}, ["labels"])
    frame = frame[~((frame.annotator == "Cy") & (frame.item_id == kits["labels"][0]["items"][2]["item_id"]))]
    found = results(kits, frame)
    codes = frame[frame.principle == "overall"].pivot(index="annotator", columns="item_id", values="value")
    row = line(found["agreement"], "every two annotators")
    alpha = krippendorff.alpha(reliability_data=codes.to_numpy(float), level_of_measurement="nominal")
    assert row["α"] == pytest.approx(alpha, abs=6e-4) and row["α 95% interval"] == "too few rarer labels"
    assert all(
        (row["α"] is None) == (row["α 95% interval"] is None) for row in found["agreement"] + found["principles"]
    )


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_pairs_of_one_speech_and_pairs_that_stand_twice_keep_their_labels(order):
    first = PAIRS[:1]
    second = first.assign(chosen="Tell me more.", rejected="Do not.", chosen_empathy_rating=1)  # of one speech
    twice = first.assign(chosen_empathy_rating=1, rejected_empathy_rating=5)  # the same pair, rated again and otherwise
    pairs = pd.concat([first, second, twice], ignore_index=True)
    names = {"ID": "speech_id", "question": "client_speech", "chosen": "response_a", "rejected": "response_b"}
    rows = pairs[:2].rename(columns=names).assign(setting="labels", stratum="x", name_a="chosen", name_b="rejected")
    labels = label_verdicts(*make_kit(rows, "compare", "T", 0), pairs.iloc[order]).query("principle == 'empathy'")
    assert len(labels) == 2 and our_side(labels) == ["loss", "loss"], "empathy speaks against both choices"
    with pytest.raises(ValueError, match="win.*loss.*tie"):
        as_shown(pd.Series([""]), pd.Series(["chosen"]))


def test_what_the_report_may_say(kits):
    people = results(kits, annotated(kits, {"Ada": warm, "Ben": warm}))["agreement"]
    assert [row["ours"] for row in expert_headlines(people, False)] == ["20 of 20", "20 of 20", "20 of 20", 100.0]
    machine = results(kits, annotated(kits, {"simulated 1": warm, "simulated 2": warm}))["agreement"]
    for rows in (expert_headlines(machine, True), expert_headlines([], False)):
        assert all(row["ours"] is None and row["interval"].startswith("not measured") for row in rows)
        assert [row["paper"] for row in rows] == [174, 184, 170, 82.5]


@pytest.mark.parametrize("names", [["Ada"], ["Ada", "Ben"], ["simulated 1"]])
def test_sentences_report_the_lines_of_the_tables_and_name_who_was_simulated(names, kits):
    found = results(kits, annotated(kits, {name: cold if name == "Ben" else warm for name in names}))
    said = study.expert_agreement_sentences(found["agreement"], names == ["simulated 1"])
    assert ("say nothing of experts" in said[-1]) == (names == ["simulated 1"])
    assert "annotators with the labels agree in" in said[0]
    assert ("annotator 1 with annotator 2 agree in 0 of 20 (0.0%" in said[0]) == (len(names) == 2)
    compared = study.expert_comparison_sentences(found["shares"], POLICY, "theirs")
    more = study.expert_principle_sentences(found["principles"]) + study.expert_score_sentences(found["means"])
    assert not any(word in text for text in [*said, *compared, *more] for word in ("nan", "None", "Ada", "Ben"))
    rated = study.corrected_sentences(found["corrected"], names == ["simulated 1"])
    assert ("machinery only" in rated[-1]) == (names == ["simulated 1"]) and len(rated) == 3
    assert ("simulated annotator on 10 of 24" in rated[0]) == (names == ["simulated 1"])
    assert f"{POLICY} is preferred in {100 / len(names):.0f}% (" in compared[-1] and "Mean scores range" in more[-1]
    assert all(("do not overlap" in text) == (len(names) == 1) for text in compared)


def test_a_kept_kit_is_never_replaced(tmp_path, kits):
    [path, *_] = keep_kits(tmp_path / "kept", kits)
    before = sha256_file(path)
    keep_kits(tmp_path / "kept", {"labels": (kits["labels"][0] | {"title": "changed"}, kits["labels"][1])})
    assert sha256_file(path) == before and "has no kit" in one_line(lambda: kept_kit(tmp_path / "kept", "gone"))


def test_settings_that_contradict_one_another_are_refused(tmp_path):
    inside = tmp_path / "outputs" / "r" / "11_experts" / "ada.json"
    inside.parent.mkdir(parents=True)
    inside.write_text("{}")
    for told, asked in (
        ("set agreement.simulated to 0", {"annotations": ("a",), "simulated": 1}),
        ("folder of their own", {"annotations": (str(inside),)}),
    ):
        assert told in one_line(lambda: given_files(AgreementSettings(**asked), Run("r")))
    assert chosen_policy("", POLICY, ANSWERS) == POLICY == chosen_policy(POLICY, "x", ANSWERS)
    for name in ("theirs", "reference"):
        assert "no policy" in one_line(lambda: chosen_policy(name, POLICY, ANSWERS))


@pytest.fixture
def run_before(own_project):
    "The stages that the notebook reads, and a function that runs its cells."
    run = Run("small")
    with StageWriter(run, "01_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", SPEECHES)
    with StageWriter(run, "04_pairs", "tiny", 0, {}) as stage:
        stage.facts["rater"] = "offline rubric (stand-in)"
        stage.rows("pairs", PAIRS[:12], "train"), stage.rows("pairs", PAIRS[12:], "test")
    with StageWriter(run, "07_win_rates", "tiny", 0, {}) as stage:
        stage.facts |= {"judge": "offline rubric (stand-in)", "reference": "theirs"}
        stage.rows("answers", ANSWERS), stage.rows("battles", BATTLES), stage.json("summary", {"best": POLICY})

    def execute(seed=0, **overrides):
        own = {"PROFILE": "tiny", "RUN": run.name, "SEED": seed}
        own["OVERRIDES"] = {f"agreement.{name}": value for name, value in overrides.items()}
        names = {}
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "11_experts", "exec"), names)
                names |= own if "parameters" in cell["metadata"].get("tags", []) else {}
        return StageReader(run, "11_experts")

    return run, execute


def texts_of(run):
    "Everything that the stage shows: tables, and captions and labels of figures."
    files = (path for folder in (run.tables, run.figures) for path in sorted(folder.glob("*")))
    kinds = (".md", ".html", ".tex", ".csv", ".json")
    return {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in kinds}


def test_the_stage_shows_simulated_annotators_as_such(run_before):
    run, execute = run_before
    stage = execute()
    tables = ("table_S33_agreement", "table_S34_agreement_by_principle", "table_S47_corrected_win_rates")
    shown = texts_of(run)
    assert {name.split(".")[0] for name in shown} == {*tables, "fig_2_comparison", "fig_3_scores"}
    assert all("no human took part" in text for name, text in shown.items() if not name.endswith(".csv"))
    for name, column in zip(tables, ("between", "between", "labels by")):
        assert pd.read_csv(run.tables / f"{name}.csv")[column].str.contains("simulated").all()
    assert "expert" not in " ".join(shown.values()).lower()
    key, kept = stage.rows("kit_key", "keys"), {path.stem for path in (run.outputs / "kept_kits").iterdir()}
    assert set(key.kit) == kept == set(stage.receipt["kits"].values()) and stage.receipt["simulated"] is True
    public = "".join(path.read_text(encoding="utf-8") for path in (stage.folder / "kits").rglob("*") if path.is_file())
    assert not any(f'"{name}"' in public for name in (POLICY, "reference", "chosen", "rejected", *IDS))
    assert stage.rows("annotations").simulated.all() and "annotations.parquet" in stage.receipt["outputs"]
    first = stage.receipt["outputs"]
    assert execute().receipt["outputs"] == first  # the same inputs, settings and seed


def fill_in(kits: Path, filled: Path):
    "Write what two annotators export of each kit."
    filled.mkdir()
    for folder in kits.iterdir():
        kit = json.loads((folder / "kit.json").read_text())
        assert folder.name == kit["kit_id"], "a folder called after its kit's purpose would reveal what is compared"
        said = {
            item["item_id"]: dict.fromkeys(
                *((BATTLE_KEYS, warm(item)) if kit["task"] == "compare" else (PRINCIPLE_KEYS, 5))
            )
            for item in kit["items"]
        }
        for who in ("Ada", "Ben"):
            page = {"format": "psycopref-annotations", "version": 1, "kit_id": kit["kit_id"], "annotator": who}
            noted = {name: own | {"note": f"So I see it, {who}."} for name, own in said.items()}  # no copies of a sheet
            (filled / f"{kit['kit_id']}_{who}.json").write_text(json.dumps(page | {"answers": noted}))


def test_the_stage_waits_for_annotations_and_takes_them(run_before, tmp_path):
    run, execute = run_before
    stage, filled = execute(simulated=0), tmp_path / "filled"
    summary = stage.json("summary")
    assert texts_of(run) == {} and summary["agreement"] == []
    assert all(row["ours"] is None for row in summary["headlines"])
    fill_in(stage.folder / "kits", filled)
    ids = stage.receipt["kits"]
    stage = execute(simulated=0, annotations=[str(filled)])
    shown = texts_of(run)
    assert stage.receipt["kits"] == ids and len(shown) == 5 * 5 - 2 * 4
    assert not any(
        "simulated " in text or "Ada" in text for text in shown.values()
    )  # labels name agreement.simulated=0
    assert "2 annotators" in shown["fig_2_comparison.json"]
    assert stage.json("summary")["headlines"][3]["ours"] == 100.0
    assert {str(path) for path in filled.iterdir()} < {str(run.outputs.parents[1] / p) for p in stage.receipt["inputs"]}
    assert [row["annotator"] for row in stage.json("annotators")] == ["Ada", "Ben"]
    before = sha256_file(stage.folder / "receipt.json")
    assert "agreement.simulated" in one_line(lambda: execute(annotations=[str(filled)], simulated=2))
    for more in ({"seed": 1}, {"battle_pairs": 3}):
        message = one_line(lambda: execute(annotations=[str(filled)], simulated=0, **more))
        assert any(kit_id in message for kit_id in ids.values()) and ".json" in message
    assert sha256_file(stage.folder / "receipt.json") == before
    assert {path.stem for path in (run.outputs / "kept_kits").iterdir()} == set(ids.values())


def test_demo_and_tiny_simulate_and_paper_does_not():
    assert [load_profile(name).agreement.simulated for name in ("tiny", "demo", "paper")] == [2, 2, 0]
    paper = load_profile("paper").agreement
    assert (paper.label_pairs, paper.battle_pairs, paper.scored, paper.annotations) == (200, 100, 100, ())
