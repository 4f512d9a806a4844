"""Experts: planted annotators agree as planted, people and simulated ones are never mixed, kits outlive their stage."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line
from sklearn.metrics import cohen_kappa_score

from psycopref.experiments import expert_study as study
from psycopref.experiments.expert_study import (
    KITS,
    agreement_lines,
    agreement_results,
    annotator_table,
    as_shown,
    chosen_policy,
    column_agreement,
    comparison_figure,
    comparison_shares,
    expert_headlines,
    given_files,
    judge_verdicts,
    keep_kits,
    kept_kit,
    label_verdicts,
    majority,
    result_frame,
    score_figure,
    score_means,
    numbered_names,
    unshuffled_kits,
    with_another,
)  # fmt: skip
from psycopref.evaluation.annotations import simulate, verdict_from_our_side
from psycopref.evaluation.win_rates import SETTINGS
from psycopref.core.files import PRINCIPLE_KEYS, StageReader, StageWriter, sha256_file
from psycopref.feedback.battles import ORDERS, consistent_verdicts, paper_verdicts
from psycopref.core.settings import AgreementSettings, load_profile
from psycopref.core.stages import Run
from psycopref.evaluation.kits import make_kit, run_kits
from psycopref.core.prompts import BATTLE_KEYS

NOTEBOOK = Path(__file__).parents[2] / "nbs" / "11_experts.ipynb"
IDS = [f"s{i}" for i in range(24)]
POLICY = "ours + DPO"
NUMBERS = AgreementSettings(label_pairs=20, battle_pairs=10, scored=10)
bounded = settings(deadline=None, derandomize=True, database=None, max_examples=12)


def inputs():
    "Speeches, pairs, answers and battles in which the better side says 'lonely'."
    speeches = pd.DataFrame(
        [
            dict(
                speech_id=name,
                source="demo",
                speech=f"I have not slept for {i + 2} nights, nobody calls.",
                topic="anxiety",
                topic_by="gold",
                split="test",
                coarse_topic=("core-mental-health-issues", "social-issues")[i % 2],
            )
            for i, name in enumerate(IDS)
        ]
    )
    better, worse = "That sounds lonely, {}. What do you think of then?", "Sleep more, {}."
    high, low = (
        {f"{side}_{key}_rating": rating for key in PRINCIPLE_KEYS} for side, rating in (("chosen", 4), ("rejected", 2))
    )
    pairs = pd.DataFrame(
        [
            dict(
                ID=name,
                prefID=i,
                question=speeches.speech[i],
                chosen=better.format(i),
                rejected=worse.format(i),
                chosen_model="a",
                rejected_model="b",
                **high,
                **low,
            )
            for i, name in enumerate(IDS)
        ]
    ).assign(rejected_safety_rating=4, rejected_clarity_rating=5)
    answers = pd.DataFrame(
        [
            dict(
                speech_id=name,
                policy=who,
                setting=setting,
                response=text.format(f"{i} ({setting})"),
                finish_reason="stop",
                n_tokens=9,
                target_words=0,
            )
            for i, name in enumerate(IDS)
            for who, text, own in ((POLICY, better, SETTINGS), ("reference", worse, ["free"]))
            for setting in own
        ]
    )
    battles = pd.DataFrame(
        [
            dict(
                speech_id=name,
                setting=setting,
                policy=POLICY,
                reference="theirs",
                order=order,
                verdict="win",
                **{f"{key}_verdict": "win" for key in PRINCIPLE_KEYS},
                judge="rules:rubric",
            )
            for name in IDS
            for setting in SETTINGS
            for order in ORDERS
        ]
    )
    return speeches, pairs, answers, battles


SPEECHES, PAIRS, ANSWERS, BATTLES = inputs()


@pytest.fixture(scope="module")
def kits():
    return run_kits(PAIRS, ANSWERS, SPEECHES, POLICY, NUMBERS, 0)


def warm(item):
    "What an annotator sees: 1 where the first response says lonely."
    return 1 if "lonely" in item["responses"][0] else 2


def annotated(kits, rules, names=tuple(KITS)):
    "Annotations of several annotators, each with a rule on items and the principle."
    rows = [
        (
            who,
            kits[name][0]["kit_id"],
            item["item_id"],
            key,
            rule(item, key) if kits[name][0]["task"] == "compare" else 3 + len(who) % 3,
        )
        for who, rule in rules.items()
        for name in names
        for item in kits[name][0]["items"]
        for key in (BATTLE_KEYS if kits[name][0]["task"] == "compare" else PRINCIPLE_KEYS)
    ]
    return pd.DataFrame(rows, columns=["annotator", "kit_id", "item_id", "principle", "value"])


def results(kits, annotations, battles=BATTLES):
    return agreement_results(unshuffled_kits(annotations, kits), kits, PAIRS, battles, 0, 100, 0)


def line(lines, between, setting=None):
    [found] = [row for row in lines if row["between"] == between and setting in (None, row["setting"])]
    return found


def test_planted_annotators_agree_as_planted(kits):
    found = results(
        kits, annotated(kits, {"Ada": lambda item, key: warm(item), "Ben": lambda item, key: 3 - warm(item)})
    )
    for voice in ("the labels", "the judge", "the judge in both orders"):
        all_of_them = line(found["agreement"], f"all annotators with {voice}", "" if voice == "the labels" else "both")
        assert all_of_them["agreement %"] == 50.0 and all_of_them["κ"] == 0.0
    first, second = (line(found["agreement"], f"annotator {n} with the labels") for n in (1, 2))
    assert (first["agreement %"], first["κ"], first["agree"]) == (100.0, 1.0, 20) and (
        second["agreement %"],
        second["κ"],
    ) == (0.0, -1.0)
    assert line(found["agreement"], "annotator 1 with annotator 2", "")["agreement %"] == 0.0
    assert all(row["win"] == row["loss"] == 50.0 for row in found["shares"])


def test_labels_say_of_a_principle_what_their_ratings_say(kits):
    labels = label_verdicts(*kits["labels"], PAIRS).merge(kits["labels"][1], on="item_id")
    verdicts = {
        name: {
            verdict_from_our_side(row.shown, row.first)
            for row in own.rename(columns={"first": "_f"}).assign(first=own["first"]).itertuples()
        }
        for name, own in labels.groupby("principle")
    }
    assert verdicts == {name: {"tie"} if name == "clarity" else {"win"} for name in BATTLE_KEYS} | {
        "safety": {"tie"},
        "clarity": {"loss"},
    }


def test_the_judge_is_read_as_the_paper_reads_it_and_strictly(kits):
    key = kits["answers"][1]
    always_first = BATTLES.assign(verdict=np.where(BATTLES.order == ORDERS[0], "win", "loss"))
    paper = judge_verdicts(key, paper_verdicts(always_first, 3))
    orders = paper_verdicts(BATTLES, 3).set_index(["speech_id", "setting"]).order
    for row in paper[paper.principle == "overall"].merge(key, on="item_id").to_dict("records"):
        verdict = "win" if orders[row["speech_id"], row["setting"]] == ORDERS[0] else "loss"
        assert row["shown"] == as_shown(verdict, row["first"])
    strict = judge_verdicts(key, consistent_verdicts(always_first))
    assert set(strict.shown) == {"tie"} and set(strict.principle) == {"overall"}
    missing = judge_verdicts(key, paper_verdicts(BATTLES[BATTLES.speech_id != key.speech_id[0]], 3))
    assert set(key.item_id) - set(missing.item_id) == set(key.item_id[key.speech_id == key.speech_id[0]])


def test_each_line_has_its_own_reading_of_the_judge(kits):
    always_first = BATTLES.assign(verdict=np.where(BATTLES.order == ORDERS[0], "win", "loss"))
    found = results(kits, annotated(kits, {"Ada": lambda item, key: 0}, ["answers"]), always_first)["agreement"]
    assert (
        line(found, "all annotators with the judge", "both")["agreement %"] == 0.0
        and line(found, "all annotators with the judge in both orders", "both")["agreement %"] == 100.0
    )


def test_by_setting_the_judge_meets_that_setting_only(kits):
    battles = BATTLES.assign(verdict=np.where(BATTLES.setting == "free", "win", "loss"))
    found = results(kits, annotated(kits, {"Ada": lambda item, key: warm(item)}, ["answers"]), battles)["agreement"]
    rates = {row["setting"]: row["agreement %"] for row in found if row["between"] == "all annotators with the judge"}
    assert rates == {"both": 50.0, SETTINGS["free"]: 100.0, SETTINGS["length"]: 0.0}
    assert [row["paper"] for row in found if row["between"] == "all annotators with the judge"] == ["82.5%", None, None]


@bounded
@given(st.integers(0, 1000), st.integers(1, 4))
def test_nothing_hangs_on_the_order_of_rows_or_on_sides(seed, n):
    kits = run_kits(PAIRS, ANSWERS, SPEECHES, POLICY, NUMBERS, seed % 5)
    chance = np.random.default_rng(seed)
    frame = annotated(kits, {f"a{i}": lambda item, key: int(chance.integers(0, 3)) for i in range(n)}, ["answers"])
    unshuffled, again = (
        unshuffled_kits(part, kits)["answers"] for part in (frame, frame.sample(frac=1, random_state=seed))
    )
    shares = comparison_shares(unshuffled, 50, 0)
    assert all(
        abs(row["win"] + row["tie"] + row["loss"] - 100) < 1e-9
        and row["n"] == 10 * n
        and row["win_low"] <= row["win"] <= row["win_high"]
        for row in shares
    )

    def by_place(rows):
        return {(row["setting"], row["principle"]): row for row in rows}

    assert by_place(shares) == by_place(comparison_shares(again, 50, 0))
    swapped = {
        "answers": (kits["answers"][0], kits["answers"][1].rename(columns={"first": "second", "second": "first"}))
    }
    for place, row in by_place(comparison_shares(unshuffled_kits(frame, swapped)["answers"], 50, 0)).items():
        assert (row["win"], row["tie"], row["loss"]) == tuple(
            by_place(shares)[place][name] for name in ("loss", "tie", "win")
        )


@bounded
@given(
    st.lists(
        st.tuples(st.sampled_from(["first", "second", "tie"]), st.sampled_from(["first", "second", "tie"])),
        min_size=2,
        max_size=40,
    )
)
def test_kappa_is_scikit_learns(pairs):
    first, second = map(list, zip(*pairs))
    row = column_agreement(first, second, list(range(len(pairs))), 50, 0)
    if len({*first, *second}) == 1:
        assert row["κ"] is None and row["α"] is None and row["agreement %"] == 100
    else:
        assert row["κ"] == pytest.approx(cohen_kappa_score(first, second), abs=6e-4) and row["agree"] == sum(
            a == b for a, b in pairs
        )


def test_two_annotators_of_one_item_know_less_than_of_two(kits):
    def width(row):
        low, high = map(float, row["95% interval"].split(" to "))
        return high - low

    rule = lambda item, key: warm(item) if int(item["client_speech"].split()[5]) % 3 else 3 - warm(item)
    found = results(kits, annotated(kits, {"Ada": rule, "Ben": rule}, ["labels"]))["agreement"]
    one, both = line(found, "annotator 1 with the labels"), line(found, "all annotators with the labels")
    assert both["n"] == 2 * one["n"] and both["agreement %"] == one["agreement %"] and abs(width(both) - width(one)) < 2


def test_three_annotators_vote_and_the_paper_stands_beside_its_own_lines(kits):
    turncoat = lambda item, key: 3 - warm(item)
    found = results(
        kits,
        annotated(
            kits, {"Cy": turncoat, "Ben": lambda item, key: warm(item), "Ada": lambda item, key: warm(item)}, ["labels"]
        ),
    )["agreement"]
    assert (
        line(found, "the majority of annotators with the labels")["agreement %"] == 100.0
        and line(found, "every two annotators")["n"] == 60
    )
    papers = {row["between"]: row["paper"] for row in found if row["paper"]}
    assert papers == {
        "every two annotators": "174 of 200 (87.0%)",
        "annotator 1 with the labels": "184 of 200 (92.0%)",
        "annotator 2 with the labels": "170 of 200 (85.0%)",
        "all annotators with the labels": "88.5%",
    }
    assert majority(pd.DataFrame({"a": ["first", "tie"], "b": ["second", "tie"], "c": [None, "first"]})).tolist() == [
        "tie",
        "tie",
    ]


def test_items_left_out_are_missing_and_counted(kits):
    frame = annotated(
        kits, {"Ada": lambda item, key: warm(item), "Ben": lambda item, key: warm(item)}, ["answers", "scores"]
    )
    items = [kits[name][0]["items"][0]["item_id"] for name in ("answers", "scores")]
    found = results(kits, frame[~((frame.annotator == "Ben") & frame.item_id.isin(items))])
    assert (
        line(found["agreement"], "annotator 1 with annotator 2", "both")["n"] == 19
        and line(found["agreement"], "annotator 1 with the judge", "both")["n"] == 20
    )
    assert {row["n"] for row in found["shares"]} == {19, 20} and sorted({row["n"] for row in found["means"]}) == [
        19,
        20,
    ]
    table = annotator_table(unshuffled_kits(frame[frame.item_id != items[0]], kits)["answers"])
    assert len(with_another(table, pd.Series({items[0]: "first"}))) == 0


def test_names_are_numbers_and_simulated_ones_stay(kits):
    assert numbered_names(["zoe", "Ada", "zoe"]) == {"Ada": "annotator 1", "zoe": "annotator 2"}
    rows = result_frame(
        results(
            kits, annotated(kits, {"Ada Lovelace": lambda item, key: warm(item), "Ben": lambda item, key: warm(item)})
        )["agreement"]
    )
    assert not rows["between"].str.contains("Ada|Ben|simulated").any()
    rows = pd.concat(
        [
            result_frame(part)
            for part in list(
                results(
                    kits,
                    annotated(
                        kits, {"simulated 1": lambda item, key: warm(item), "simulated 2": lambda item, key: warm(item)}
                    ),
                ).values()
            )[:2]
        ]
    )
    assert rows["between"].str.contains("simulated").all() and rows.paper.isna().all(), (
        "the paper's experts do not stand beside a rubric with noise"
    )


def test_figures_say_who_judged_and_keep_their_axes(kits):
    import matplotlib.pyplot as plt

    found = results(kits, annotated(kits, {"simulated 1": lambda item, key: warm(item) if key == "overall" else 0}))
    people = study.who_judged(["simulated 1"])
    for figure in (comparison_figure(found["shares"], POLICY, "theirs", people), score_figure(found["means"], people)):
        figure.canvas.draw()
        [legend] = figure.legends
        assert "no human took part" in legend.get_title().get_text()
        boxes = [legend.get_window_extent(), *(axes.get_window_extent() for axes in figure.axes)]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        if len(figure.axes) == 2:
            for axes in figure.axes:
                widths = np.array(
                    [[bar.get_width() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
                )
                assert np.allclose(widths.sum(axis=0), 100)
            assert figure.axes[0].get_yticklabels()[-1].get_text() == "Overall"
            rows = {row["principle"]: row for row in found["shares"] if row["setting"] == "free"}
            ends = [segment[:, 0] for lines in figure.axes[0].collections for segment in lines.get_segments()]
            bounds = [
                (rows[name][f"{verdict}_low"], rows[name][f"{verdict}_high"])
                for verdict in ("win", "loss")
                for name in BATTLE_KEYS
            ]
            wanted = bounds[:8] + [(100 - high, 100 - low) for low, high in bounds[8:]]
            assert np.allclose(ends, wanted)
        else:
            assert figure.axes[0].get_ylim() == (0.9, 5.1) and list(figure.axes[0].get_yticks()) == [1, 2, 3, 4, 5]
        plt.close(figure)
    one = score_means(
        unshuffled_kits(annotated(kits, {"Ada": lambda item, key: 1}, ["scores"]), kits)["scores"].query(
            "speech_id == @kits['scores'][1].speech_id[0]"
        ),
        50,
        0,
    )
    assert all(row["low"] < 2.5 < row["mean"] < 3.5 < row["high"] for row in one), (
        "one speech is known badly, and says so"
    )


def test_equal_scores_are_no_certainty(kits):
    means = score_means(
        unshuffled_kits(annotated(kits, {"Ada": lambda item, key: 1, "Ben5": lambda item, key: 1}, ["scores"]), kits)[
            "scores"
        ].assign(rating=5),
        50,
        0,
    )
    assert all(row["mean"] == 5 == row["high"] and 3.5 < row["low"] < 4.8 for row in means)
    assert all(
        caption.count("95% intervals by speech, Bayesian bootstrap") == 1
        for caption in (
            study.annotator_caption("Figure 3", ["annotator 1"]),
            study.annotator_caption("Figure 3", ["simulated 1"]),
        )
    )
    assert "outside (1, 5)" in one_value_error(lambda: study.score_interval([0, 5], ["a", "b"], 50, 0))


def one_value_error(call):
    "The message of the ValueError that a call raises."
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_scores_have_intervals_that_cover():
    chance, held = np.random.default_rng(0), 0
    for seed in range(200):
        means = np.repeat(
            chance.choice([2, 3, 4, 5], 20, p=[0.05, 0.1, 0.35, 0.5]), 2
        )  # two annotators of one answer nearly agree
        ratings = np.clip(means + chance.choice([-1, 0, 0, 0], 40), 1, 5)
        low, high = study.score_interval(ratings, np.repeat(np.arange(20), 2), 300, seed)
        held += low <= 4.3 - 0.25 <= high
    assert 180 <= held <= 198  # 190 of 200 expected


def test_alpha_of_three_annotators_is_that_of_all_of_them(kits):
    import krippendorff

    chance = np.random.default_rng(3)
    frame = annotated(
        kits,
        {
            who: lambda item, key: int(chance.integers(0, 3)) if chance.random() < 0.4 else warm(item)
            for who in ("Ada", "Ben", "Cy")
        },
        ["labels"],
    )
    gone = kits["labels"][0]["items"][2]["item_id"]
    frame = frame[~((frame.annotator == "Cy") & (frame.item_id == gone))]
    found = results(kits, frame)
    table = annotator_table(unshuffled_kits(frame, kits)["labels"])
    codes = table.map({"first": 0, "second": 1, "tie": 2}.get).to_numpy(float).T
    row = line(found["agreement"], "every two annotators")
    assert row["α"] == pytest.approx(
        krippendorff.alpha(reliability_data=codes, level_of_measurement="nominal"), abs=6e-4
    )
    low, high = map(float, row["α 95% interval"].split(" to "))
    assert low < row["α"] < high
    assert all(
        ("α 95% interval" in row) and (row["α"] is None) == (row["α 95% interval"] is None)
        for row in found["agreement"] + found["principles"]
    )


def test_pairs_of_one_speech_and_pairs_that_stand_twice_keep_their_labels():
    first = PAIRS[PAIRS.ID == "s0"]
    second = first.assign(
        chosen="Tell me more.", rejected="Do not.", chosen_empathy_rating=1
    )  # of one speech; empathy speaks against the choice
    twice = first.assign(chosen_empathy_rating=1, rejected_empathy_rating=5)  # the same pair, rated again and otherwise
    pairs = pd.concat([first, second, twice], ignore_index=True)
    rows = pd.DataFrame(
        [
            dict(
                speech_id="s0",
                setting="labels",
                stratum="x",
                client_speech=row.question,
                name_a="chosen",
                response_a=row.chosen,
                name_b="rejected",
                response_b=row.rejected,
            )
            for row in pairs[:2].itertuples()
        ]
    )
    kit, key = make_kit(rows, "compare", "T", 0)
    for order in ([0, 1, 2], [2, 1, 0]):
        labels = label_verdicts(kit, key, pairs.iloc[order]).query("principle == 'empathy'").merge(key, on="item_id")
        texts = {item["item_id"]: item["responses"] for item in kit["items"]}
        said = {
            texts[row["item_id"]][0 if row["first"] == "chosen" else 1]: verdict_from_our_side(
                row["shown"], row["first"]
            )
            for row in labels.to_dict("records")
        }
        assert said == {first.chosen.iloc[0]: "loss", "Tell me more.": "loss"}
    assert "expected one of win, loss, tie" in one_value_error(lambda: as_shown("", "chosen"))


def test_what_the_report_may_say(kits):
    people = results(kits, annotated(kits, {"Ada": lambda item, key: warm(item), "Ben": lambda item, key: warm(item)}))[
        "agreement"
    ]
    assert [row["ours"] for row in expert_headlines(people, False)] == ["20 of 20", "20 of 20", "20 of 20", 100.0]
    machine = results(
        kits,
        annotated(kits, {"simulated 1": lambda item, key: warm(item), "simulated 2": lambda item, key: warm(item)}),
    )["agreement"]
    for lines, simulated in ((machine, True), ([], False)):
        rows = expert_headlines(lines, simulated)
        assert all(row["ours"] is None and row["interval"].startswith("not measured") for row in rows) and [
            row["paper"] for row in rows
        ] == [174, 184, 170, 82.5]


def test_sentences_report_the_lines_of_the_tables_and_name_who_was_simulated(kits):
    rules = {"Ada": lambda item, key: warm(item), "Ben": lambda item, key: 3 - warm(item)}
    for names in (("Ada",), ("Ada", "Ben"), ("simulated 1",)):
        found = results(kits, annotated(kits, {name: rules.get(name, rules["Ada"]) for name in names}))
        simulated = names[0].startswith("simulated")
        said = study.expert_agreement_sentences(found["agreement"], simulated)
        assert ("say nothing of experts" in said[-1]) == simulated and (
            "annotators with the labels agree in" in said[0]
        )
        more = [
            *study.expert_principle_sentences(found["principles"]),
            *study.expert_comparison_sentences(found["shares"], POLICY, "theirs"),
            *study.expert_score_sentences(found["means"]),
        ]
        assert not any(word in text for text in [*said, *more] for word in ("nan", "None", "Ada", "Ben"))
        overall = next(row for row in found["shares"] if row["principle"] == "overall")
        assert f"{POLICY} is preferred in {overall['win']:.0f}% (" in more[-3] and "Mean scores range from" in more[-1]
    assert (
        "annotator 1 with annotator 2 agree in 0 of 20 (0.0%"
        in study.expert_agreement_sentences(results(kits, annotated(kits, rules))["agreement"], False)[0]
    )
    one = results(kits, annotated(kits, {"Ada": rules["Ada"]}, ["labels"]))
    assert study.expert_comparison_sentences(one["shares"], POLICY, "theirs") == [
        "Not measured: nobody answered the kit of answers."
    ]
    assert study.expert_score_sentences(one["means"]) == ["Not measured: nobody answered the kit of scores."]
    assert (
        "do not overlap"
        in study.expert_comparison_sentences(
            results(kits, annotated(kits, {"Ada": rules["Ada"]}))["shares"], POLICY, "theirs"
        )[0]
    )


def test_a_kept_kit_is_never_replaced(tmp_path, kits):
    [path, *_] = keep_kits(tmp_path / "kept", kits)
    before = sha256_file(path)
    kit, key = kept_kit(tmp_path / "kept", path.stem)
    assert kit == json.loads(json.dumps(kits["labels"][0])) and key.equals(kits["labels"][1].reset_index(drop=True))
    keep_kits(tmp_path / "kept", {"labels": (kits["labels"][0] | {"title": "changed"}, kits["labels"][1])})
    assert sha256_file(path) == before and "has no kit" in one_line(lambda: kept_kit(tmp_path / "kept", "gone"))


def test_settings_that_contradict_one_another_are_refused(tmp_path):
    (tmp_path / "outputs" / "r" / "11_experts").mkdir(parents=True)
    inside = tmp_path / "outputs" / "r" / "11_experts" / "ada.json"
    inside.write_text("{}")
    assert "set agreement.simulated to 0" in one_line(
        lambda: given_files(AgreementSettings(annotations=("a",), simulated=1), Run("r"))
    )
    assert "folder of their own" in one_line(
        lambda: given_files(AgreementSettings(annotations=(str(inside),)), Run("r"))
    )
    assert "0 or more" in one_line(lambda: given_files(AgreementSettings(simulated=-1), Run("r")))
    assert "no policy" in one_line(lambda: chosen_policy("theirs", POLICY, ANSWERS)) and chosen_policy(
        "", POLICY, ANSWERS
    ) == POLICY == chosen_policy(POLICY, "x", ANSWERS)
    assert "no policy" in one_line(lambda: chosen_policy("reference", POLICY, ANSWERS))


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
        own = {
            "PROFILE": "tiny",
            "RUN": run.name,
            "SEED": seed,
            "OVERRIDES": {f"agreement.{name}": value for name, value in overrides.items()},
        }
        names = {}
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "11_experts", "exec"), names)
                names |= own if "parameters" in cell["metadata"].get("tags", []) else {}
        return StageReader(run, "11_experts")

    return run, execute


def texts_of(run):
    "Everything that the stage shows: tables, and captions and labels of figures."
    return {
        path.name: path.read_text(encoding="utf-8")
        for folder in (run.tables, run.figures)
        for path in sorted(folder.glob("*"))
        if path.suffix in (".md", ".html", ".tex", ".csv", ".json")
    }


def test_the_stage_shows_simulated_annotators_as_such(run_before):
    run, execute = run_before
    stage = execute()
    shown = texts_of(run)
    assert {name.split(".")[0] for name in shown} == {
        "table_S33_agreement",
        "table_S34_agreement_by_principle",
        "fig_2_comparison",
        "fig_3_scores",
    }
    assert all("no human took part" in text for name, text in shown.items() if not name.endswith(".csv"))
    assert all(
        "simulated" in value
        for name in ("S33_agreement", "S34_agreement_by_principle")
        for value in pd.read_csv(run.tables / f"table_{name}.csv")["between"]
    )
    assert "expert" not in " ".join(shown.values()).lower()
    key, kept = stage.rows("kit_key", "keys"), {path.stem for path in (run.outputs / "kept_kits").iterdir()}
    assert set(key.kit) == kept == set(stage.receipt["kits"].values()) and stage.receipt["simulated"] is True
    public = "".join(path.read_text(encoding="utf-8") for path in (stage.folder / "kits").rglob("*") if path.is_file())
    assert not any(f'"{name}"' in public for name in (POLICY, "reference", "chosen", "rejected", *IDS))
    first = stage.receipt["outputs"]
    assert execute().receipt["outputs"] == first  # the same inputs, settings and seed


def test_the_stage_waits_for_annotations_and_takes_them(run_before, tmp_path):
    run, execute = run_before
    stage = execute(simulated=0)
    assert (
        texts_of(run) == {}
        and stage.json("summary")["agreement"] == []
        and all(row["ours"] is None for row in stage.json("summary")["headlines"])
    )
    filled = tmp_path / "filled"
    filled.mkdir()
    for folder in (stage.folder / "kits").iterdir():
        kit = json.loads((folder / "kit.json").read_text())
        assert folder.name == kit["kit_id"], "a folder called after its kit's purpose would reveal what is compared"
        for who in ("Ada", "Ben"):
            values = {
                item["item_id"]: {key: warm(item) for key in BATTLE_KEYS}
                if kit["task"] == "compare"
                else {key: 5 for key in PRINCIPLE_KEYS}
                for item in kit["items"]
            }
            document = {
                "format": "psycopref-annotations",
                "version": 1,
                "kit_id": kit["kit_id"],
                "annotator": who,
                "started": "",
                "saved": "",
                "answers": values,
            }
            (filled / f"{kit['kit_id']}_{who}.json").write_text(json.dumps(document))
    ids = stage.receipt["kits"]
    stage = execute(simulated=0, annotations=[str(filled)])
    shown = texts_of(run)
    assert (
        stage.receipt["kits"] == ids
        and len(shown) == 4 * 5 - 2 * 4
        and not any(
            "simulated " in text or "Ada" in text for text in shown.values()
        )  # labels name agreement.simulated=0
    )
    assert (
        "2 annotators" in shown["fig_2_comparison.json"]
        and [row["ours"] for row in stage.json("summary")["headlines"]][3] == 100.0
    )
    assert {str(path) for path in filled.iterdir()} < {
        str(Path(run.outputs.parents[1] / name)) if not Path(name).is_absolute() else name
        for name in stage.receipt["inputs"]
    }
    assert [row["annotator"] for row in stage.json("annotators")] == ["Ada", "Ben"]
    before = sha256_file(stage.folder / "receipt.json")
    for more in ({"simulated": 2}, {"simulated": 0, "seed": 1}, {"simulated": 0, "battle_pairs": 3}):
        message = one_line(lambda: execute(annotations=[str(filled)], **more))
        assert (
            "agreement.simulated" in message
            if more["simulated"]
            else any(kit_id in message for kit_id in ids.values()) and ".json" in message
        )
    assert sha256_file(StageReader(run, "11_experts").folder / "receipt.json") == before
    assert {path.stem for path in (run.outputs / "kept_kits").iterdir()} == set(ids.values())


def test_demo_and_tiny_simulate_and_paper_does_not():
    assert [load_profile(name).agreement.simulated for name in ("tiny", "demo", "paper")] == [2, 2, 0]
    paper = load_profile("paper").agreement
    assert (paper.label_pairs, paper.battle_pairs, paper.scored, paper.annotations) == (200, 100, 100, ())


def test_simulated_annotators_know_the_rubric_alone(kits):
    kit, key = kits["labels"]
    frame = pd.DataFrame(
        [
            ("simulated 1", kit["kit_id"], item, name, value)
            for item, said in simulate(kit, 1, 0, noise=0.0)["answers"].items()
            for name, value in said.items()
        ],
        columns=["annotator", "kit_id", "item_id", "principle", "value"],
    )
    lines = agreement_lines(
        "labels", unshuffled_kits(frame, kits)["labels"], {"labels": label_verdicts(kit, key, PAIRS)}, 50, 0
    )
    assert line(lines, "simulated 1 with the labels")["agreement %"] == 100.0
