"""Judges see the same questions, are counted where they can't be read, and compared on what both judged; the stage runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from psycopref.evaluation import judging as judging
from psycopref.core.files import SCHEMAS, StageReader, StageWriter, read_json
from psycopref.feedback.battles import ORDERS, battle, battle_request
from psycopref.gateway.cache import ReplyCache
from psycopref.models.chat import ChatReply, Failure, FreeModel
from psycopref.core.stages import Run, derived_seed, stage_settings
from psycopref.core.settings import load_profile
from psycopref.gateway.gateway import Gateway
from psycopref.evaluation.judging import (
    KEYS,
    Judge,
    agreement_sentences,
    agreement_table,
    agreements,
    asked_verdicts,
    contests,
    disagreement_sentences,
    disagreement_table,
    disagreements,
    distinct_texts,
    judge_families,
    judge_names,
    judge_row,
    judged_speeches,
    judges_sentences,
    judges_table,
    kappa_figure,
    kappa_sentences,
    stored_verdicts,
    panel_alpha,
    parse_judge,
    read_judges,
    reward_scores,
    scored_verdicts,
    same_family_side,
    self_preference,
    verdicts_of,
    word_scores,
)
from psycopref.stats.scores import opposite
from psycopref.feedback.choosing import ranking_request
from psycopref.training.scoring import load_reward_model
from psycopref.training.texts import save_merged
from psycopref.models.weights import find_weights, load_tokenizer

from refusals import one_line

LOOKING = settings(deadline=None, derandomize=True, database=None, max_examples=40)
WORDS = "It sounds as if this has been heavy for a long while and I wonder what would help you most right now".split()
STAGE = Path(__file__).resolve().parents[2] / "nbs" / "10_judges.ipynb"


def make_answers(n=8, policies=("plain", "tuned"), reference=9):
    """Speeches, and answers of different lengths; the reference's has nine words."""
    speeches = pd.DataFrame(
        [
            {
                "speech_id": f"s{i}",
                "source": "demo",
                "speech": f"My brother called {i} times and I did not answer.",
                "topic": "family",
                "coarse_topic": "relationships",
                "topic_by": "gold",
                "split": "test" if i % 4 else "train",
            }
            for i in range(n)
        ]
    )
    rows = []
    for policy in ("reference", *policies):
        for setting in ("free",) if policy == "reference" else ("free", "length"):
            for i in range(n):
                words = (
                    reference if policy == "reference" else 3 + (7 * i + 5 * len(policy) + (setting == "length")) % 17
                )
                rows.append(
                    {
                        "speech_id": f"s{i}",
                        "policy": policy,
                        "setting": setting,
                        "response": " ".join(WORDS[:words]),
                        "finish_reason": "stop",
                        "n_tokens": words,
                        "target_words": 0,
                    }
                )
    return speeches, pd.DataFrame(rows)


@pytest.fixture
def table():
    return contests(*make_answers())


@pytest.fixture
def gateway(tmp_path):
    return Gateway(ReplyCache(tmp_path / "replies.sqlite"))


class Replying(FreeModel):
    """A judge of one's own making: `reply` is a function of the request."""

    def __init__(self, reply, uri="replying"):
        self.uri = self.identity = self.label = uri
        self.reply = reply

    async def answer(self, requests):
        return [
            found if isinstance(found := self.reply(request), Failure) else ChatReply(found) for request in requests
        ]


def speaking(monkeypatch, reply):
    monkeypatch.setattr(judging, "chat_model", lambda uri: Replying(reply, uri))


def likes_longer(request):
    first, second = (len(request.fields[f"response_{i}"].split()) for i in (1, 2))
    number = 1 if first >= second else 2
    return (
        str(number)
        if request.task == "rank"
        else json.dumps(dict.fromkeys(judging.PRINCIPLE_KEYS, number) | {"overall": number})
    )


def some_verdicts(words, judge="a", n=None):
    """Verdicts of an invented judge on invented battles, both orders of each."""
    n = n or len(words)
    keys = [
        {"speech_id": f"s{i // 4}", "setting": "free", "policy": f"p{i // 2 % 2}", "order": ORDERS[i % 2]}
        for i in range(n)
    ]
    return pd.DataFrame([{**key, "judge": judge, "verdict": word, "margin": np.nan} for key, word in zip(keys, words)])


# ---- who ----


@pytest.mark.parametrize(
    "spec, kind, place",
    [
        ("reward", "reward", ""),
        ("reward:me/mine", "reward", "me/mine"),
        ("longer", "longer", ""),
        ("openai:m@http://h:1/v1", "battle", "openai:m@http://h:1/v1"),
        ("choose:batch:gpt-4o", "choose", "batch:gpt-4o"),
        ("rules:rubric", "battle", "rules:rubric"),
    ],
)
def test_specs(spec, kind, place):
    assert parse_judge(spec) == Judge(spec, kind, place)


@pytest.mark.parametrize(
    "spec, hint",
    [
        ("rewards", "reward"),
        ("longest", "longer"),
        ("chose:rules:rubric", "choose:"),
        ("locl:smollm2-135m", "local:"),
        ("choose:longer", "Known:"),
        ("gpt-4o", "Known:"),
    ],
)
def test_an_unknown_judge_is_refused_with_a_hint(spec, hint):
    said = one_line(lambda: read_judges("rules:rubric", ["longer", spec]))
    assert repr(spec) in said and hint in said.partition("choose:URI.")[2]


def test_the_main_judge_stands_first_and_once():
    assert [judge.spec for judge in read_judges("rules:rubric", ["longer", "rules:rubric", "longer"])] == [
        "rules:rubric",
        "longer",
    ]


def test_names_are_each_judge_s_own_and_a_stand_in_keeps_its_name():
    names = judge_names(
        read_judges(
            "rules:rubric", ["choose:rules:rubric", "openai:m@http://a/v1", "openai:m@http://b/v1", "reward", "longer"]
        )
    )
    assert (
        len(set(names.values())) == len(names)
        and "stand-in" in names["rules:rubric"]
        and "stand-in" in names["choose:rules:rubric"]
        and "baseline" in names["longer"]
    )


# ---- what ----


def test_all_judges_see_the_same_and_the_same_again(table):
    assert not table.duplicated(KEYS).any() and len(table) == 8 * 2 * 2 * 2
    assert set(table.groupby(["speech_id", "setting", "policy"]).order.agg(frozenset)) == {frozenset(ORDERS)}
    assert all(len(text.split()) == 9 for text in table.against), "the reference's free answer, in both settings"


@LOOKING
@given(st.integers(1, 12), st.integers(0, 5), st.permutations(range(12)))
def test_the_subset_is_seeded_and_grows(n, seed, order):
    speeches, answers = make_answers(12)
    own = judged_speeches(speeches, answers, n, seed)
    assert set(own.split) == {"test"} and len(own) == min(n, 9)
    assert set(own.speech_id) == set(judged_speeches(speeches.iloc[list(order)], answers, n, seed).speech_id), (
        "shuffling changes nothing"
    )
    assert set(own.speech_id) <= set(judged_speeches(speeches, answers, n + 1, seed).speech_id)


def test_another_seed_draws_other_speeches():
    speeches, answers = make_answers(40)
    drawn = [frozenset(judged_speeches(speeches, answers, 10, seed).speech_id) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert drawn[0] == set(
        sorted(speeches.speech_id[speeches.split == "test"], key=lambda name: derived_seed(0, "judges", name))[:10]
    ), "by hash, so the same on every machine"


def test_a_speech_that_the_reference_did_not_answer_is_not_judged():
    speeches, answers = make_answers()
    answers = answers[(answers.policy != "reference") | (answers.speech_id != "s1")]
    assert "s1" not in set(judged_speeches(speeches, answers, None, 0).speech_id) and "s1" not in set(
        contests(speeches, answers).speech_id
    )


# ---- judges that are asked ----


@pytest.mark.parametrize("spec", ["local:any", "choose:local:any"])
def test_a_judge_who_likes_the_longer_says_what_the_baseline_says(table, gateway, monkeypatch, spec):
    speaking(monkeypatch, likes_longer)
    found, aside = asked_verdicts(gateway, parse_judge(spec), table)
    baseline = scored_verdicts(parse_judge("longer"), table, word_scores(table))
    both = found.merge(baseline, on=KEYS)
    both = both[both.verdict_y != "tie"]
    assert not aside and len(both) and (both.verdict_x == both.verdict_y).all()
    assert found.margin.isna().all() if spec.startswith("choose:") else set(found.margin) == {-1.0, 1.0}


def test_battles_and_choices_are_asked_as_the_stages_ask_them(table, gateway, monkeypatch):
    seen = []
    speaking(monkeypatch, lambda request: seen.append(request) or likes_longer(request))
    row = table.iloc[1]
    asked_verdicts(gateway, parse_judge("local:any"), table.iloc[1:2])
    asked_verdicts(gateway, parse_judge("choose:local:any"), table.iloc[1:2])
    pair = SimpleNamespace(question=row.speech, chosen=row.response, rejected=row.against)
    assert row.order == ORDERS[1] and seen == [
        battle_request(row.speech, row.response, row.against, ORDERS[1]),
        ranking_request(pair, "rejected first"),
    ]


@pytest.mark.parametrize("spec", ["rules:rubric", "choose:rules:rubric", "longer"])
def test_swapping_the_sides_flips_every_verdict(table, gateway, tmp_path, spec):
    distinct = table[table.response != table.against]
    swapped = distinct.assign(
        response=distinct.against, against=distinct.response, order=distinct.order.map(dict(zip(ORDERS, ORDERS[::-1])))
    )
    one, other = (verdicts_of(parse_judge(spec), part, gateway, "", tmp_path)[0] for part in (distinct, swapped))
    assert len(one) == len(distinct) and other.verdict.tolist() == opposite(one.verdict.tolist()).tolist()
    if spec != "choose:rules:rubric":
        assert other.margin.tolist() == (-one.margin).tolist()


def test_replies_that_can_t_be_read_are_counted_and_never_guessed(table, gateway, monkeypatch):
    replies = iter(["1", "2", "1 or 2", "I can't say.", "", Failure("the server hung up")] * len(table))
    speaking(monkeypatch, lambda request: next(replies))
    own = table.head(24).assign(
        speech=[f"This is question {i}." for i in range(24)]
    )  # no two alike, so none is answered from the cache
    found, aside = asked_verdicts(gateway, parse_judge("choose:local:any"), own)
    assert (
        len(found) == 8
        and len(aside) == 16
        and pd.Series([entry["kind"] for entry in aside]).value_counts().to_dict() == {"unreadable": 12, "failed": 4}
    )
    assert not set(map(tuple, found[KEYS].values)) & {tuple(entry[key] for key in KEYS) for entry in aside}
    row = judge_row(found, own, aside, 50)
    assert (row["coverage %"], row["unreadable"], row["failed calls"]) == (33.3, 12, 4)


def test_battles_that_were_asked_before_are_not_asked_again(gateway):
    speeches, answers = make_answers()
    table, told = contests(speeches, answers), answers[answers.policy != "reference"]
    fought = pd.concat(
        [
            battle(gateway, "rules:rubric", speeches, own, answers[answers.policy == "reference"], "reference")[0]
            for _, own in told.groupby(["policy", "setting"], sort=False)
        ]
    )
    calls = gateway.counts["rules:rubric"]["calls"]
    again, _ = asked_verdicts(gateway, parse_judge("rules:rubric"), table)
    assert gateway.counts["rules:rubric"]["calls"] == calls
    assert stored_verdicts(parse_judge("rules:rubric"), fought, table).equals(again)


def test_battles_of_another_judge_are_refused(table, gateway):
    speeches, answers = make_answers()
    fought, _ = battle(
        gateway,
        "rules:rubric",
        speeches,
        answers[answers.policy == "plain"].query("setting == 'free'"),
        answers[answers.policy == "reference"],
        "reference",
    )
    said = one_line(lambda: stored_verdicts(parse_judge("openai:gpt-4o"), fought, table))
    assert "rules:rubric" in said and "07_win_rates" in said


# ---- judges that score ----


def test_longer_is_right_by_construction_and_equal_is_a_tie(table):
    found = scored_verdicts(parse_judge("longer"), table, word_scores(table))
    extra = table.response.str.split().str.len() - 9
    assert found.margin.tolist() == extra.tolist() and found.verdict.tolist() == [
        "win" if n > 0 else "loss" if n < 0 else "tie" for n in extra
    ]
    assert "tie" in set(found.verdict)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, shared_cache):
    """A reward model with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        weights = find_weights("random-tiny")
        tokenizer, folder = load_tokenizer(weights), tmp_path_factory.mktemp("reward")
        save_merged(load_reward_model(weights.location, tokenizer, "float32", new_head=3), tokenizer, folder)
    return folder


def test_a_reward_model_scores_each_answer_once_and_equal_answers_tie(
    table, reward_folder, tmp_path, monkeypatch, one_thread
):
    asked, real = [], judging.score_candidates
    monkeypatch.setattr(
        judging,
        "score_candidates",
        lambda scorer, speeches, texts, *more: asked.append(texts) or real(scorer, speeches, texts, *more),
    )
    scores = reward_scores(str(reward_folder), table, tmp_path / "kept", "float32", "")
    assert all(len(set(texts)) == len(texts) for own in asked for texts in own.values()) and len(scores) == sum(
        map(len, distinct_texts(table).values())
    )
    found = scored_verdicts(parse_judge("reward"), table, scores)
    own = found.set_index(KEYS).verdict.unstack("order")
    assert (own[ORDERS[0]] == own[ORDERS[1]]).all() and {"win", "loss", "tie"} >= set(found.verdict)
    assert (found.verdict == "tie").tolist() == (table.response == table.against).tolist()
    monkeypatch.setattr("psycopref.training.sampling._rewards_now", lambda *arguments: pytest.fail("scored again"))
    assert reward_scores(str(reward_folder), table, tmp_path / "kept", "float32", "") == scores, (
        "an interrupted stage reads what it has scored"
    )


def test_each_reward_model_keeps_its_own_rewards(table, reward_folder, tmp_path, one_thread):
    own, _ = verdicts_of(parse_judge("reward"), table, None, str(reward_folder), tmp_path, "float32")
    named, _ = verdicts_of(parse_judge(f"reward:{reward_folder}"), table, None, "nowhere", tmp_path, "float32")
    assert (
        named.drop(columns="judge").equals(own.drop(columns="judge"))
        and len(list(tmp_path.glob("*/rewards.json"))) == 2
    )


# ---- agreement ----

BOTH = st.lists(st.sampled_from(["win", "loss"]), min_size=8, max_size=40).filter(lambda words: len(set(words)) == 2)


@settings(LOOKING, max_examples=15)
@given(BOTH)
def test_a_mirror_has_kappa_one_and_its_opposite_minus_one_where_chance_allows(words):
    own = some_verdicts(words)
    names = dict.fromkeys(["a", "mirror", "inverted"])
    judged = pd.concat([own, own.assign(judge="mirror"), own.assign(judge="inverted", verdict=opposite(words))])
    pairs = agreements(judged, {name: name for name in names}, 20).set_index(["first", "second"])
    assert (
        pairs.kappa["a", "mirror"] == pytest.approx(1)
        and pairs.agreement["a", "mirror"] == 100
        and pairs.agreement["a", "inverted"] == 0
    )
    assert (
        pairs.kappa["a", "inverted"] == pytest.approx(cohen_kappa_score(words, opposite(words)))
        and pairs.kappa["a", "inverted"] < 0
    )
    if words.count("win") * 2 == len(words):
        assert pairs.kappa["a", "inverted"] == pytest.approx(-1)
    assert panel_alpha(pd.concat([own, own.assign(judge="mirror")]), 20)["alpha"] == pytest.approx(1)


@LOOKING
@given(st.data())
def test_agreement_counts_what_both_judged(data):
    words = data.draw(st.lists(st.sampled_from(["win", "loss", "tie"]), min_size=8, max_size=30))
    others = data.draw(
        st.lists(st.sampled_from(["win", "loss", "tie", None]), min_size=len(words), max_size=len(words))
    )
    judged = pd.concat([some_verdicts(words), some_verdicts(others, "b").dropna(subset=["verdict"])])
    judged = judged.sample(frac=1, random_state=len(words))
    row = agreements(judged, {"a": "A", "b": "B"}, 20).iloc[0]
    both = [(x, y) for x, y in zip(words, others) if y]
    assert row.n == len(both)
    if not both:
        assert row.remark == "no battle was judged by both" and np.isnan(row.agreement)
        return
    assert (
        row.agreement == pytest.approx(100 * np.mean([x == y for x, y in both]))
        and row.low <= row.agreement <= row.high
    )
    single = [name for name, side in zip("AB", zip(*both)) if len(set(side)) == 1]
    assert np.isnan(row.kappa) == bool(single) and all(f"{name} always says" in row.remark for name in single)
    if not single:
        assert (
            row.kappa == pytest.approx(cohen_kappa_score(*zip(*both))) and row.kappa_low <= row.kappa <= row.kappa_high
        )


def test_a_judge_of_one_word_is_missing_with_its_reason_everywhere():
    mixed = some_verdicts(["win", "loss"] * 8)
    judged, names = (
        pd.concat([mixed, mixed.assign(judge="yes", verdict="win")]),
        {"a": "A", "yes": "Yes", "mute": "Mute"},
    )
    pairs = agreements(judged, names, 20)
    shown = agreement_table(pairs, panel_alpha(judged, 20), names)
    assert shown["κ"].isna().all() and shown.remark.tolist()[:3] == [
        "no κ: Yes always says win",
        "no battle was judged by both",
        "no battle was judged by both",
    ]
    figure = kappa_figure(pairs, names)
    assert [text.get_text() for text in figure.axes[0].texts] == ["—"] * 6
    alone = agreements(mixed, {"a": "A", "mute": "Mute"}, 20)
    assert alone.n.tolist() == [0] and panel_alpha(mixed, 20)["alpha"] is None


def test_the_paper_s_number_stands_only_in_its_column():
    judged = pd.concat(
        [some_verdicts(["win", "loss", "loss", "win"] * 4), some_verdicts(["win", "win", "loss", "win"] * 4, "b")]
    )
    shown = agreement_table(agreements(judged, {"a": "A", "b": "B"}, 20), panel_alpha(judged, 20), {"a": "A", "b": "B"})
    [place] = np.flatnonzero(shown["paper agreement %"].notna())
    assert (
        shown["paper agreement %"][place] == 82.5
        and shown.loc[place, ["n", "agreement %", "κ", "Krippendorff's α"]].isna().all()
    )


def test_orders_of_policies_and_margins_are_compared_where_there_are_enough():
    frames = []
    for judge, rates in (("a", (0.2, 0.5, 0.9)), ("b", (0.1, 0.4, 0.8)), ("c", (0.9, 0.5, 0.1))):
        for place, rate in enumerate(rates):
            frames += [
                {
                    "speech_id": f"s{i}",
                    "setting": "free",
                    "policy": f"p{place}",
                    "order": order,
                    "judge": judge,
                    "verdict": "win" if i < 10 * rate else "loss",
                    "margin": (i - 5) * (-1 if judge == "c" else 1),
                }
                for i in range(10)
                for order in ORDERS
            ]
    pairs = agreements(pd.DataFrame(frames), {name: name for name in "abc"}, 20).set_index(["first", "second"])
    assert (
        pairs.tau["a", "b"] == 1
        and pairs.tau["a", "c"] == -1
        and pairs.rho["a", "b"] == pytest.approx(1)
        and pairs.rho["a", "c"] == pytest.approx(-1)
    )
    assert pairs.places.eq(3).all() and pairs.answers.eq(30).all()
    shown = agreement_table(
        pairs.reset_index(), {"alpha": None, "low": None, "high": None, "n": 0}, {name: name for name in "abc"}
    )
    assert shown["order of policies, τ"][0] == "1.00" and shown["margins, ρ"][1] == "-1.00", "two digits in every row"


def test_the_order_of_policies_is_that_of_the_battles_that_both_judged():
    rates = {"p0": 0.2, "p1": 0.5, "p2": 0.8}
    full = pd.DataFrame(
        [
            {
                "speech_id": f"s{i}",
                "setting": "free",
                "policy": policy,
                "order": order,
                "judge": "a",
                "verdict": "win" if i < 10 * rate else "loss",
                "margin": np.nan,
            }
            for policy, rate in rates.items()
            for i in range(10)
            for order in ORDERS
        ]
    )
    left = full[(full.policy != "p0") | (full.verdict == "win")].assign(judge="b")  # the losses of p0 could not be read
    row = agreements(pd.concat([full, left]), {"a": "A", "b": "B"}, 20).iloc[0]
    assert row.n == len(left) and row.tau == 1, "by all that each judged, p0 would be b's best and a's worst"


# ---- each judge ----


def test_self_preference_is_found_where_it_was_planted():
    rng = np.random.default_rng(0)
    fair = np.where(rng.random(400) < 0.5, "win", "loss")
    vain = np.where(rng.random(400) < 0.3, "loss", fair)
    judged = pd.concat(
        [
            some_verdicts(fair, "fair"),
            some_verdicts(np.where(rng.random(400) < 0.1, "win", fair), "other"),
            some_verdicts(vain, "vain"),
            some_verdicts(["win"] * 400, "longer"),
        ]
    )
    families = {
        "fair": "",
        "other": "qwen",
        "vain": "gpt",
        "longer": "",
        "p0": "llama",
        "p1": "llama",
        "reference": "gpt",
    }
    found = self_preference(judged, "vain", families, 200)
    others = np.mean([judged[judged.judge == name].verdict.eq("loss").mean() for name in ("fair", "other")])
    assert (
        found["side"] == "reference"
        and found["n"] == 400
        and found["points"] == pytest.approx(100 * ((vain == "loss").mean() - others))
    )
    assert 10 < found["low"] < found["points"] < found["high"] < 30
    modest = self_preference(
        judged[judged.judge != "vain"].replace({"judge": {"other": "vain"}}), "vain", families, 200
    )
    assert modest["points"] < 0
    assert self_preference(judged, "fair", families)["points"] is None
    assert self_preference(judged, "vain", families | {"p0": "gpt", "p1": "gpt"})["side"] == "both"
    assert self_preference(judged, "vain", families | {"p1": "gpt"}, 50)["n"] == 200, (
        "only the policy of another family tells something"
    )
    assert self_preference(judged, "vain", families | {"fair": "gpt", "other": "gpt"})["points"] is None, (
        "nobody else to compare with"
    )


def test_families_come_from_who_answers():
    _, answers = make_answers(policies=("Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct + DPO"))
    judges = read_judges(
        "openai:gpt-4o-2024-08-06",
        ["reward", "rules:rubric", "longer", "choose:openai:Qwen/Qwen2.5-72B-Instruct@http://h/v1"],
    )
    found = judge_families(judges, "meta-llama/Llama-3.2-3B-Instruct", answers, "openai:gpt-4o-mini")
    assert (
        found["openai:gpt-4o-2024-08-06"] == found["reference"]
        and found["reward"] == found["Llama-3.2-3B-Instruct + DPO"] != ""
    )
    assert found["rules:rubric"] == found["longer"] == "" and found[judges[-1].spec] not in (
        "",
        found["reward"],
        found["reference"],
    )


def test_a_model_and_its_trained_copies_are_one_family():
    for backbone in ("random-tiny", "smollm2-135m"):
        short = find_weights(backbone).short
        _, answers = make_answers(policies=(short, f"{short} + DPO"))
        found = judge_families(
            read_judges(f"local:{backbone}", ["reward", f"choose:local:{backbone}"]),
            backbone,
            answers,
            f"local:{backbone}",
        )
        assert len(set(found.values())) == 1, "by its name in a URI, in a folder and in a table"


def test_the_table_of_judges_tells_their_faults(table):
    first = table[KEYS].assign(judge="first", verdict=np.where(table.order == ORDERS[0], "win", "loss"), margin=np.nan)
    longer = scored_verdicts(parse_judge("longer"), table, word_scores(table))
    families = dict.fromkeys(["first", "longer", "plain", "tuned", "reference"], "")
    shown = judges_table(pd.concat([first, longer]), table, [], {"first": "First", "longer": "Longer"}, families, 50)
    assert len(shown) == 4 and shown.n.tolist() == [32] * 4
    of = {name: own.iloc[0] for name, own in shown.groupby("judge")}
    assert (
        of["First"]["flips %"] == 100
        and of["First"]["for the first shown %"].startswith("100.0")
        and of["First"]["plain: win rate %"].startswith("50.0")
    )
    assert (
        of["Longer"]["flips %"] == 0
        and of["Longer"]["for the longer %"].startswith("100.0")
        and of["Longer"]["ties %"] > 0
    )


@settings(LOOKING, max_examples=8)
@given(st.randoms(use_true_random=False))
def test_shuffling_verdicts_changes_no_table(random):
    words = [random.choice(["win", "loss", "tie"]) for _ in range(24)]
    judged = pd.concat(
        [some_verdicts(words), some_verdicts(words[::-1], "b"), some_verdicts(["loss"] * 24, "c")], ignore_index=True
    )
    order = list(range(len(judged)))
    random.shuffle(order)
    names = {name: name for name in "abc"}
    one, other = (
        (agreements(own, names, 20), panel_alpha(own, 20), disagreements(own, "a"))
        for own in (judged, judged.iloc[order])
    )
    pd.testing.assert_frame_equal(one[0], other[0])
    assert one[1] == pytest.approx(other[1]) and one[2].fillna("").equals(other[2][one[2].columns].fillna(""))


def test_a_judge_that_differs_everywhere_by_the_same_is_still_a_sample():
    judged = pd.concat([some_verdicts(["win"] * 16), some_verdicts(["loss"] * 16, "vain")])
    found = self_preference(
        judged, "vain", {"a": "", "vain": "gpt", "p0": "llama", "p1": "llama", "reference": "gpt"}, 50
    )
    assert found["points"] == 100 == found["high"] and found["low"] < 90, (
        "four speeches do not prove that it is always so"
    )


def test_replies_that_another_stage_put_aside_are_not_reported_as_none(table):
    known = table[KEYS].assign(judge="main", verdict="win", margin=np.nan)[3:]
    row = judge_row(known, table, [], 20)
    assert row["coverage %"] < 100 and row["unreadable"] is None and row["failed calls"] is None
    aside = [{**entry, "kind": "unreadable"} for entry in table[KEYS][:3].to_dict("records")]
    assert (
        judge_row(known, table, aside, 20)["unreadable"] == 3
        and judge_row(known, table, aside, 20)["failed calls"] == 0
    )


def test_the_baseline_has_no_vote():
    own = some_verdicts(["win", "win", "loss", "loss"] * 4)
    judged = pd.concat([own, own.assign(judge="mirror"), own.assign(judge="longer", verdict=opposite(own.verdict))])
    assert panel_alpha(judged, 20)["alpha"] == 1 and panel_alpha(judged[judged.judge != "mirror"], 20)["alpha"] is None
    assert disagreements(judged, "a").empty, "the rule that the longer wins is not a judge who disagrees"
    against = disagreements(
        pd.concat([judged, judged[judged.judge == "longer"].assign(judge="third")]).query("judge != 'mirror'"), "a"
    )
    assert (
        against.opposed.eq(1).all()
        and against.judges.eq(1).all()
        and set(against.longer) <= {"win", "loss"}
        and len(against)
    ), "but what it says is shown"


def test_margins_are_compared_where_both_orders_were_read():
    rows = [
        {
            "speech_id": f"s{i}",
            "setting": "free",
            "policy": "p",
            "order": order,
            "judge": judge,
            "verdict": "win",
            "margin": i + 10.0 * (order == ORDERS[0]) * (judge == "b"),
        }
        for i in range(6)
        for order in ORDERS
        for judge in "ab"
    ]
    judged = pd.DataFrame(rows)
    lost = (judged.judge == "b") & (judged.order == ORDERS[0]) & judged.speech_id.isin(["s4", "s5"])
    [row] = agreements(judged[~lost], {"a": "A", "b": "B"}, 20).itertuples()
    assert row.rho == 1 and row.answers == 4, "with one order of s4 and s5 b would seem to rank them lowest"


def test_the_side_of_the_family_is_the_one_that_is_of_it_alone():
    assert (
        same_family_side("gpt", "llama", "gpt") == "reference" and same_family_side("llama", "llama", "gpt") == "policy"
    )
    assert (
        same_family_side("llama", "llama", "llama") == "both"
        and same_family_side("", "", "") == same_family_side("gpt", "llama", "llama") == "neither"
    )


@settings(LOOKING, max_examples=8)
@given(st.randoms(use_true_random=False))
def test_sentences_hold_for_any_verdicts_and_for_none(random):
    words = [random.choice(["win", "loss", "tie"]) for _ in range(16)]
    names = {"a": "Ann", "b": "Ben", "mute": "Mute", "longer": "longer answer (baseline)"}
    judged = pd.concat([some_verdicts(words), some_verdicts(words[::-1], "b"), some_verdicts(["win"] * 16, "longer")])
    asked = judged[judged.judge == "a"][KEYS].assign(speech="Nobody called.", response="I hear you.", against="Hm.")
    for own in (judged, judged[judged.judge == "a"], judged.head(0)):
        pairs, alpha = agreements(own, names, 20), panel_alpha(own, 20)
        each = judges_table(own, asked, [], names, dict.fromkeys([*names, *asked.policy, "reference"], ""), 20)
        found = disagreements(own, "a")
        said = [
            *judges_sentences(each),
            *agreement_sentences(pairs, alpha, names),
            *kappa_sentences(pairs, names),
            *disagreement_sentences(found, 4),
        ]
        assert not any(word in text for text in said for word in ("nan", "None", "inf"))
        assert "Mute (0.0%)" in said[0] and (
            pairs.kappa.notna().any() or "Not measured: no two judges have a κ." in said
        )
    first = each.assign(**{"for the first shown %": "80.0 (60.0 to 90.0)"})
    assert "A preference for one place, beyond chance: Ann, Ben" in judges_sentences(first)[2]


def test_sentences_name_the_judges_that_differ_most():
    judged = pd.concat(
        [some_verdicts(["win", "win", "loss", "loss"] * 4), some_verdicts(["win", "win", "win", "win"] * 4, "b")]
    )
    names, asked = (
        {"a": "Ann", "b": "Ben"},
        judged[judged.judge == "a"][KEYS].assign(speech="x", response="y", against="z"),
    )
    said = judges_sentences(
        judges_table(judged, asked, [], names, dict.fromkeys([*names, "p0", "p1", "reference"], ""), 20)
    )
    assert (
        "The judges differ most on p1, w/o length constraint: the win rate is 0.0% for Ann and 100.0% for Ben." in said
    )
    assert any(
        "Ben 50.0 (" in text
        for text in agreement_sentences(agreements(judged, names, 20), panel_alpha(judged, 20), names)
    )


# ---- disagreements ----


@pytest.mark.parametrize("half", ["a", "b"])
def test_a_judge_read_in_one_order_only_neither_agrees_nor_disagrees(half):
    judged = pd.concat(
        [some_verdicts(["win"] * 16), some_verdicts(["loss"] * 16, "b"), some_verdicts(["loss"] * 16, "c")]
    )
    left = judged[(judged.judge != half) | (judged.order == ORDERS[0])]
    found = disagreements(left, "a")
    assert found.empty if half == "a" else found.opposed.eq(1).all() and found.judges.eq(1).all() and len(found) == 3
    assert disagreements(judged.head(0), "a").empty


def test_examples_follow_their_rule():
    opposed = {"s0": 3, "s1": 1, "s2": 2, "s3": 3}
    rows = []
    for speech, against in opposed.items():
        for place, judge in enumerate(("main", "a", "b", "c")):
            verdict = "win" if judge == "main" or place > against else "loss"
            rows += [
                {
                    "speech_id": speech,
                    "setting": "free",
                    "policy": "p",
                    "order": order,
                    "judge": judge,
                    "verdict": "loss" if (speech, judge, order) == ("s3", "main", ORDERS[1]) else verdict,
                    "margin": np.nan,
                }
                for order in ORDERS
            ]
    found = disagreements(pd.DataFrame(rows), "main", 5)
    assert (
        found.speech_id.tolist() == ["s0", "s2"]
        and found.opposed.tolist() == [3, 2]
        and found.judges.tolist() == [3, 3]
    ), "one of three is no majority, and in s3 the main judge contradicts itself"
    texts = pd.DataFrame(
        [
            {
                "speech_id": name,
                "setting": "free",
                "policy": "p",
                "speech": "word " * 200,
                "response": "I hear you. " * 100,
                "against": "Hm.",
            }
            for name in opposed
        ]
    )
    shown = disagreement_table(found, texts, {"main": "Main", "a": "A", "b": "B", "c": "C"})
    assert (
        shown["main judge: Main"].tolist() == ["policy better"] * 2
        and shown.others[0] == "A: reference better; B: reference better; C: reference better"
        and shown["against the main judge"].tolist() == ["3 of 3", "2 of 3"]
    )
    assert (
        all(len(text) <= 320 for name in shown if "machine text" in name for text in shown[name])
        and sum("machine text" in name for name in shown) == 2
    )
    assert len(disagreements(pd.DataFrame(rows), "main", 1)) == 1


# ---- the stage ----


@pytest.fixture
def finished(tmp_path, gateway, reward_folder):
    """What the stage reads, signed as the chain signs it."""
    profile, run = (
        load_profile(
            "tiny", {"judges.others": ["reward", "choose:local:random-tiny", "longer"], "evaluation.bootstrap": 20}
        ),
        Run("tiny"),
    )
    speeches, answers = make_answers()
    with StageWriter(run, "01_speeches", "tiny", 0, {}) as stage:
        stage.rows("speeches", speeches)
    with StageWriter(run, "05_reward", "tiny", 0, {}) as stage:
        for file in reward_folder.iterdir():
            (stage.work / "random-tiny" / file.name).parent.mkdir(exist_ok=True)
            (stage.work / "random-tiny" / file.name).write_bytes(file.read_bytes())
        stage.facts["rater"] = "offline rubric (stand-in)"
    told, reference = answers[answers.policy != "reference"], answers[answers.policy == "reference"]
    with StageWriter(run, "07_win_rates", "tiny", 0, {}) as stage:
        stage.rows("answers", answers)
        stage.rows(
            "battles",
            pd.concat(
                [
                    battle(gateway, profile.evaluation.judge, speeches, own, reference, "reference")[0]
                    for _, own in told.groupby(["policy", "setting"], sort=False)
                ]
            ),
        )
        stage.facts["reference"] = "random weights"
    return run


def execute(**parameters):
    """Run the stage's cells in this process."""
    here = {"display": lambda *shown: None}
    for cell in json.loads(STAGE.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "10_judges", "exec"), here)
            here |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
    return here


def test_the_stage_writes_what_it_says(finished, one_thread):
    execute(PROFILE="tiny", RUN="tiny", OVERRIDES={"evaluation.bootstrap": 20})
    reader = StageReader(finished, "10_judges")
    found = reader.rows("verdicts")
    assert (
        list(found) == list(SCHEMAS["verdicts"])
        and set(found.judge) >= {"rules:rubric", "reward", "longer"}
        and found.speech_id.nunique() == 6
        and not found.duplicated([*KEYS, "judge"]).any()
    )
    aside = reader.json("quarantine")
    assert len(aside) + (found.judge == "choose:local:random-tiny").sum() == 6 * 2 * 2 * 2, (
        "what a model of random weights says is read or counted"
    )
    assert sorted(path.name for path in finished.tables.glob("*.csv")) == [
        "table_S29_judges.csv",
        "table_S30_judges_agreement.csv",
        "table_S37_disagreements.csv",
    ]
    assert [path.name for path in finished.figures.glob("*.png")] == ["fig_S13_judges_kappa.png"]
    each = pd.read_csv(finished.tables / "table_S29_judges.csv")
    assert len(each) == 2 * 4 and each["unreadable"].sum() + each["failed calls"].sum() == len(aside)
    label = read_json(finished.tables / "table_S30_judges_agreement.json")["label"]
    assert "learned from ratings by offline rubric (stand-in)" in label and "6 test speeches" in label
    assert (
        [*reader.receipt["judges"]]
        == ["rules:rubric", "reward", "choose:local:random-tiny", "longer"]
        == [*reader.json("summary")["judges"]]
    )
    assert reader.receipt["put_aside"] == len(aside) and len(reader.receipt["inputs"]) == 4 and reader.receipt["books"]
    assert reader.receipt["settings"] == json.loads(
        json.dumps(stage_settings(load_profile("tiny", {"evaluation.bootstrap": 20}), "10_judges"))
    )


def test_the_stage_refuses_a_judge_that_does_not_exist_before_anybody_is_asked(finished):
    said = one_line(lambda: execute(PROFILE="tiny", RUN="tiny", OVERRIDES={"judges.others": ["longer", "rewards"]}))
    assert "'rewards'" in said and "Did you mean reward" in said and not finished.stage("10_judges").exists()
    assert "Did you mean rubric?" in one_line(
        lambda: execute(PROFILE="tiny", RUN="tiny", OVERRIDES={"judges.others": ["choose:rules:rubrik"]})
    )
