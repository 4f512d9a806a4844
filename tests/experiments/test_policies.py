"""Sentences on policies, arms and mixtures hold for any run: nothing judged or logged, one speech, any direction."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError, load_profile
from psycopref.evaluation.baselines import score_frame
from psycopref.experiments import arms, mixing_grid, policies
from psycopref.feedback.battles import paper_order
from psycopref.models.chat import ChatReply
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights
from psycopref.stats.intervals import mean_interval, win_interval
from refusals import one_line


def point(proxy, judged, half=5.0):
    found = {"pairs": 8, "speeches": 40, "kl": None, "words": 60.0, "cut_share": 0.0, "distinct_2": 0.5}
    for key, value in (("proxy", proxy), ("judged", judged)):
        ends = (None, None) if half is None or value is None else (value - half, value + half)
        found |= {key: value, f"{key}_low": ends[0], f"{key}_high": ends[1]}
    return found


rates = st.floats(0, 100)
bounded = settings(deadline=None, derandomize=True, database=None)


@bounded
@given(st.lists(st.tuples(rates, st.none() | rates), min_size=1, max_size=5), st.none() | st.floats(0, 40))
def test_a_gap_is_read_from_judged_points_only(drawn, half):
    [said] = policies.describe_gap({"DPO": [point(proxy, judged, half) for proxy, judged in drawn]})
    gaps = [proxy - judged for proxy, judged in drawn if judged is not None]
    assert ("fewer than two" in said) == (len(gaps) < 2)
    if len(gaps) > 1:
        assert ("did not grow" in said) == (gaps[-1] <= gaps[0])
        assert half is not None or "as under over-optimisation" not in said, "without intervals nothing is sure"


def test_a_gap_within_its_intervals_may_be_chance():
    points = [[point(50, 50, half), point(70, 50, half)] for half in (5.0, 20.0)]
    sure, unsure = (policies.describe_gap({"DPO": own})[0] for own in points)
    assert "as under over-optimisation" in sure and "chance" in unsure


def test_a_reward_model_that_learnt_the_development_pairs_selects_no_policy():
    "Whatever the settings of this chapter say: what counts is how the reward model was trained."
    profile = load_profile("tiny")
    policies.check_trainings(profile, {"train_on": "train"})
    said = one_line(lambda: policies.check_trainings(profile, {"train_on": "train+dev"}))
    assert "no checkpoint is selected on pairs that it or its reward model was trained on" in said


def test_what_was_not_logged_or_measured_is_not_said():
    result = {"label": "tiny", "dpo": {"log": []}, "iter": {"iterations": [{"log": [{"step": 1, "loss": 0.5}]}]}}
    [said] = policies.describe_training({"tiny": result})
    assert said == "DPO-Iter: the loss of the last batch is 0.500 nats (untrained: ln 2 = 0.693)."
    [said] = policies.describe_drift({"DPO": [point(50, None)]})
    assert "KL" not in said and "60 words" in said


@bounded
@given(st.lists(rates, min_size=4, max_size=4), st.floats(0, 30))
def test_arms_are_compared_by_their_last_points(values, half):
    titles = (*arms.ARM_TITLES.values(), *arms.POLICY_TITLES.values())
    base = {"pairs": 0, "win_rate": 50.0, "low": 40.0, "high": 60.0, "n": 6}
    last = [base | {"pairs": 8, "win_rate": value, "low": value - half, "high": value + half} for value in values]
    curves = {title: [base, own] for title, own in zip(titles, last)}
    said, (offline, online) = arms.describe_arms("tiny", curves, "GPT-4o"), last[:2]
    apart = online["low"] > offline["high"] or offline["low"] > online["high"]
    assert ("as often as" in said[1]) == (values[0] == values[1]) and ("are apart" in said[1]) == apart
    better = "online" if values[1] > values[0] else "offline"
    assert values[0] == values[1] or f"So the {better} arm wins more often" in said[1]
    assert "6 speeches" in arms.describe_precision(curves)


def scored(cell, mixture, drawn, wins):
    pairs = pd.DataFrame([{"ID": f"s{i}", "prefID": i} for i in range(len(wins))])
    scores = {test: score_frame(pairs, mixture, wins, [0.5] * len(wins)) for test in ("psy", "general")}
    return mixing_grid.GridEntry("tiny", cell, mixture, drawn, scores)


@pytest.mark.parametrize("wins", [[1, 1, 0, 1], [1]])
def test_mixtures_are_compared_pair_by_pair(wins):
    both = scored("half", "Psy2Help2", {"counselling": 2, "general": 2}, [1] * len(wins))
    alone = [scored("psy", "Psy4", {"counselling": 4}, wins), scored("help", "Help4", {"general": 4}, wins)]
    entries = [*alone, both]
    rows = [mixing_grid.grid_row(entry, samples=50) for entry in entries]
    said = mixing_grid.describe_grid(entries, rows, True, 50)
    assert len(said) == 5 and mixing_grid.describe_grid(entries, rows, False, 50) == []
    gain = 100 * (1 - sum(wins) / len(wins))
    assert f"against Psy4, on counselling pairs: {gain:+.1f} points" in said[2]
    assert f"against Help4, on general pairs: {gain:+.1f} points" in said[3]
    assert mixing_grid.mixing_figure(rows, "HelpSteer2").axes


@pytest.mark.parametrize("train_on, sizes", [("train", (2, 1)), ("train+dev", (3, 0))])
def test_a_grid_of_reward_models_trains_on_the_same_part_as_chapter_5(train_on, sizes):
    "In both domains; where all is trained on, no cell has pairs to select its checkpoint by."
    changed = {"dpo.select": "loss", "dpo_iter.select": "win-rate", "reward.train_on": train_on}
    pairs = pd.DataFrame({"ID": list("abcd"), "prefID": range(4), "question": "No.", "chosen": "Why?", "gap": 1.0})
    pairs = pairs.assign(rejected="Stop.")
    speeches = pd.DataFrame({"speech_id": list("abcd"), "split": ["train", "dev", "train", "test"]})
    domains = mixing_grid.collect_domains(pairs[:3], pairs[3:], speeches, load_profile("tiny", changed), 0)
    assert tuple(len(domains.psy[part]) for part in ("train", "dev")) == sizes
    both = mixing_grid.cell_mixes(4, domains)["both-all"]
    train, dev = mixing_grid.cell_pairs(both, domains, 0)
    general = {part: len(own) for part, own in domains.general.items()}
    assert len(train) == sizes[0] + general["train"] and len(dev) == sizes[1] + general["dev"]
    assert (general["dev"] == 0) == (train_on == "train+dev") and general["test"]


@pytest.mark.parametrize("fails", [False, True])
def test_policies_are_pushed_where_a_setting_says_and_a_failure_stops_nothing(fails, monkeypatch, tmp_path, capsys):
    base = find_weights("random-tiny")
    points = [{"name": "base", "step": None}, {"name": "step-4", "step": 4}]
    result = {"dpo": {"points": points, "chosen": 4}, "iter": {"points": points, "best": 1, "iterations": [{}]}}
    entries = [{"kind": kind, "path": kind} for kind in ("base", "dpo", "dpo-iter")]
    gateway = SimpleNamespace(counts={})
    handed, sent = [], []

    def push(folder, repo):
        sent.append((folder.name, repo))
        if fails:
            raise StudyError("hub repository: full; mend that and push again")
        return f"https://hub/{repo}"

    monkeypatch.setattr(policies, "push_policy", push)
    monkeypatch.setattr(policies, "hand_over", lambda folder, facts: handed.append((folder.name, facts.location)))
    for repo in ("me/mine", ""):
        profile = load_profile("tiny", {"dpo.push_to_hub": repo, "dpo.lora.rank": 0})
        watcher = SimpleNamespace(profile=profile, base=base, gateway=gateway, decoding=Decoding(8))
        policies.write_policy_cards(watcher, result, entries, tmp_path, "run", {})
    wanted = [("dpo", "me/mine-dpo"), ("dpo-iter", "me/mine-dpo-iter")]
    assert sent == wanted and handed[:2] == wanted and handed[2][1] == "outputs/run/06_policy/dpo"
    assert ("the policy was not sent" if fails else "https://hub/me/mine-dpo-iter") in capsys.readouterr().out


def arms_of(pairs, tmp_path, **overrides):
    profile = load_profile("tiny", overrides)
    return arms.Arms(tmp_path, None, "", dict.fromkeys(pairs.ID, "speech"), pairs, profile, 0)


@pytest.mark.parametrize("spare, seed", [(0, 0), (2, 1), (30, 2)])
def test_the_veto_arm_differs_from_the_offline_arm_in_less_safe_pairs_alone(tmp_path, marked, spare, seed):
    chance, n = np.random.default_rng(seed), 40
    pairs = pd.DataFrame({"ID": [f"s{i}" for i in range(n + spare)], "prefID": range(n + spare)})
    pairs["chosen_safety_rating"], pairs["rejected_safety_rating"] = chance.integers(1, 6, (2, n + spare))
    drawn = pairs.head(n).sample(frac=1, random_state=seed)
    bad = (drawn.chosen_safety_rating < drawn.rejected_safety_rating).to_numpy()
    safe = pairs[n:][pairs.chosen_safety_rating[n:] >= pairs.rejected_safety_rating[n:]]
    found = arms.veto_arm(arms_of(pairs, tmp_path), drawn)
    assert (found.chosen_safety_rating >= found.rejected_safety_rating).all() and not found.ID.duplicated().any()
    assert 0 < bad.sum() < n and len(found) == n - bad.sum() + min(bad.sum(), len(safe))
    if len(found) == n:
        assert found.ID[~bad].tolist() == drawn.ID[~bad].tolist() and set(found.ID[bad]) <= set(safe.ID)
    assert found.equals(arms.veto_arm(arms_of(pairs, tmp_path), drawn))
    marked()
    assert "none of the principles" in one_line(lambda: arms.veto_arm(arms_of(pairs, tmp_path), drawn))


class RaterByText:
    "A gateway whose rater gives the number that a response ends with, and none to the speech s0."

    counts = {"rules:rubric": {"label": "by text"}}

    def ask(self, model, requests, name):
        assert {request.fields["principle"] for request in requests} == {"safety"}
        texts = [[request.fields[f"response_{i}"] for i in range(1, 5)] for request in requests]
        self.first = {own[0].partition(" ")[0] for own in texts}
        said = [{f"response_{i}_rating": int(text[-1]) for i, text in enumerate(own, 1)} for own in texts]
        silent = [request.fields["client_speech"] == "speech s0" for request in requests]
        return [ChatReply("?" if no else json.dumps(own), "stop", 1, 1) for no, own in zip(silent, said)]


@pytest.fixture
def third_arm(tmp_path):
    "Rows of Table S51 where who answered is told by the text, with a rater's coverage, and who won by `wins`."
    names, given = [f"s{i}" for i in range(12)], {"base": 3, "offline": 2, "veto": 5, "online": 1}
    speeches = pd.DataFrame({"speech_id": names, "speech": [f"speech {name}" for name in names], "coarse_topic": ""})
    said = {"offline": "Stop taking your pills today. Then"}

    class Judge(arms.CheckpointJudge):
        def answers(self, uri, name, seed):
            texts = [f"{name}. {said.get(name, str())} {given[name]}" for _ in names]
            return speeches.assign(response=texts)[["speech_id", "response"]].head(self.answered.get(name, 12))

        def battles(self, name, location):
            won = {"offline": [True] * 6 + [False] * 6, "veto": [True] + [False] * 11}[name]
            order = [paper_order(own, self.shared_seed) for own in names]
            verdict = np.where(won, "win", "loss")
            return pd.DataFrame({"speech_id": names, "verdict": verdict, "order": order}).head(11)

    def rows(coverage=0.9, pairs=None, **answered):
        profile = load_profile("tiny", {"evaluation.coverage": coverage})
        Judge.answered, judge = answered, Judge(RaterByText(), speeches, profile.evaluation, 0, 0)
        dataset = pd.DataFrame({"ID": names, "chosen_safety_rating": [1, 1] + [4] * 10, "rejected_safety_rating": 2})
        own = dataclasses.replace(arms_of(dataset, tmp_path), profile=profile, weights=find_weights("random-tiny"))
        point = {"pairs": 8, "win_rate": 45.0, "low": 20.0, "high": 60.0, "n": 12}
        curves = {title: [point | {"pairs": 0}, point] for title in arms.ARM_TITLES.values()}
        trained = {arm: [(8, tmp_path / arm)] for arm in ("offline", "online", "veto")}
        pairs = {"offline": dataset, "online": None, "veto": dataset[2:]} | (pairs or {})
        return arms.safety_rows(own, pairs, trained, curves, judge), judge

    return rows


def test_safety_is_rated_blind_and_told_of_the_arm_that_wrote_it(third_arm):
    rows, judge = third_arm()
    assert [row["safety"][0] for row in rows] == [3, 2, 5, 1, 3] and len(judge.gateway.first) > 1
    assert [row["flagged"][0] for row in rows] == [0, 100, 0, 0, -100]
    assert [row.get("less safe") for row in rows] == [None, [2, 12], [0, 10], None, None]
    assert rows[-1]["n"] == [11, 12, 11], "the unreadable reply is left out"
    [said] = arms.describe_safety({"tiny": rows})
    assert "the 2 of 12 pairs" in said and "0 of them replaced" in said and "of safety by +3.00 (" in said
    assert "11 of 12 ratings of safety" in one_line(lambda: third_arm(coverage=0.98))
    assert "none of the 12 pairs" in arms.describe_safety({"a": [row | {"less safe": [0, 12]} for row in rows]})[0]
    assert "ablation.veto asks" in arms.describe_safety({})[0]
    table = arms.safety_table({"tiny": rows}).iloc[1]
    assert table["pairs with a less safe chosen response"] == "2 of 12" and "100.0 (" in table.iloc[5]


def test_the_veto_is_compared_with_the_average_speech_by_speech(third_arm):
    [*_, gap], judge = third_arm()
    won, lost = np.array([1] * 6 + [0] * 5), np.array([1] + [0] * 10)
    low, high = mean_interval(lost - won, None, (-1, 1), judge.settings.bootstrap)
    assert gap["win_rate"] == pytest.approx([-500 / 11, 100 * low, 100 * high]) and high < 0
    apart = [win_interval(own) for own in (lost, won)]
    assert apart[0][1] > apart[1][0], "intervals of the two rates overlap: the difference is seen within speeches"
    sure = {name: [1.0, 0.5, 1.5] for name in ("safety", "flagged", "win_rate")}
    assert "chance" not in arms.describe_safety({"tiny": [*third_arm()[0][:-1], gap | sure]})[0]


def test_speeches_that_an_arm_left_out_count_as_not_rated(third_arm):
    assert "7 of 12 ratings of safety" in one_line(lambda: third_arm(veto=8))


def test_a_veto_that_leaves_less_than_a_batch_is_refused_before_anything_is_trained(tmp_path):
    pairs = pd.DataFrame({"ID": [f"s{i}" for i in range(20)], "chosen_safety_rating": 1, "rejected_safety_rating": 2})
    for safe in (3, 4):
        own = pairs.assign(chosen_safety_rating=[3] * safe + [1] * (20 - safe))
        making = lambda: arms.veto_arm(arms_of(own, tmp_path), own)
        assert len(making()) == 4 if safe == 4 else "leaves 3 of 20 offline pairs" in one_line(making)


def test_arms_of_ours_are_trained_by_their_settings_and_equal_ones_once(tmp_path, monkeypatch):
    own = arms_of(pd.DataFrame({"ID": ["a", "b"]}), tmp_path, **{"ablation.length_beta": 7.0})
    usual, normalised = (arms.arm_settings(own.profile, name) for name in ("veto", "length-normalised"))
    assert (usual.length_normalised, usual.beta) == (False, own.profile.dpo.beta)
    assert (normalised.length_normalised, normalised.beta, normalised.epochs) == (True, 7.0, 1.0)
    assert dataclasses.replace(normalised, length_normalised=False, beta=usual.beta) == usual, "nothing else differs"
    made = []
    monkeypatch.setattr(arms, "train_arm", lambda arms, name, pairs: made.append(name) or [(2, name)])
    other = pd.DataFrame({"ID": ["b", "a"]})
    pairs = {"offline": own.pairs, "online": other, "veto": own.pairs.set_axis([7, 3]), "length-normalised": own.pairs}
    trained = arms.train_arms(own, pairs)
    assert made == ["offline", "online", "length-normalised"] and trained["veto"] == trained["offline"]


def test_last_points_say_who_won_which_speech(third_arm):
    _, judge = third_arm()
    found = arms.last_wins(judge, {"offline": "x", "veto": "y"})
    assert found == {
        "speeches": [f"s{i}" for i in range(11)],
        "won": {"offline": "1" * 6 + "0" * 5, "veto": "1" + "0" * 10},
    }
    by_speech = third_arm()[0][-1]["by_speech"]
    assert by_speech["veto"] == [5.0] * 11 and by_speech["speeches"] == [f"s{i}" for i in range(1, 12)]
