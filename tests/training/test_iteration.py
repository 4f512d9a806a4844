"""DPO-Iter: speeches and pairs by properties, starts and references, what is kept, and whole bytes after kills."""

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterating
from psycopref.core.files import Kept, read_json, sha256_file
from psycopref.core.settings import DpoSettings, EvaluationSettings, IterSettings
from psycopref.models.generation import Sample
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training import iteration
from psycopref.training.iteration import DROP_REASONS, Online, best_point, choose_pair, iterate
from psycopref.training.iteration import iteration_prompts, online_pairs, prune, run_iteration
from psycopref.training.jobs import STEP_FACTS
from psycopref.training.scoring import load_reward_model
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = IterSettings(iterations=4, prompts=4, candidates=2)


def online(folder, own=FOUR, dpo=DpoSettings(batch_size=2)):
    speeches = {f"s-{i}": f"I count the stairs for the {i}th time." for i in range(6)}
    return Online(
        folder,
        find_weights("random-tiny"),
        "scorer",
        speeches,
        dpo,
        own,
        EvaluationSettings(max_tokens=7),
        "float32",
        0,
    )


# Speeches

SIZES = st.integers(1, 12).flatmap(lambda known: st.tuples(st.just(known), st.integers(1, known)))


@given(SIZES, st.integers(0, 9), st.integers(0, 3), st.sampled_from(["rounds", "fresh"]))
@settings(deadline=None, max_examples=300)
def test_an_iteration_s_speeches_are_all_different_and_hang_on_no_order(sizes, number, seed, draw):
    names, n = [f"s-{i}" for i in range(sizes[0])], sizes[1]
    drawn = iteration_prompts(names, n, number, seed, draw)
    assert len(drawn) == n == len(set(drawn)) and set(drawn) <= set(names)
    assert drawn == iteration_prompts(names[::-1], n, number, seed, draw)


@given(SIZES, st.integers(0, 3))
@settings(deadline=None)
def test_every_round_uses_every_speech_once(sizes, seed):
    "Draws behind one another, cut into rounds: each is all speeches, whether or not iterations end where rounds do."
    (known, n), names = sizes, [f"s-{i}" for i in range(sizes[0])]
    numbers = range(3 * known // n + 1)
    drawn = list(itertools.chain.from_iterable(iteration_prompts(names, n, number, seed) for number in numbers))
    rounds = [drawn[start : start + known] for start in range(0, len(drawn) - known + 1, known)]
    assert len(rounds) >= 3 and all(sorted(own) == sorted(names) for own in rounds)
    assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1


def test_rounds_and_seeds_have_orders_of_their_own_and_fresh_draws_know_nothing_of_one_another():
    "Two halves of eight speeches have two in common on average; in rounds none, for they are one round."
    names = [f"s-{i}" for i in range(8)]
    assert len({tuple(iteration_prompts(names, 8, number, seed)) for number in range(3) for seed in range(3)}) == 9
    draws = {draw: [{*iteration_prompts(names, 4, k, 0, draw)} for k in range(200)] for draw in ("rounds", "fresh")}
    common = {draw: [len(a & b) for a, b in zip(own[::2], own[1::2])] for draw, own in draws.items()}
    assert set(common["rounds"]) == {0} and 1.7 < np.mean(common["fresh"]) < 2.3
    drawn = Counter(itertools.chain.from_iterable(draws["fresh"]))
    assert min(drawn.values()) > 70 and max(drawn.values()) < 130, "100 each"


# Pairs

TEXTS = ["", " ", "yes", "no", "I see it", "I hear you", "what would help you now", "tell me more about the stairs"]
REWARDS = st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-5, 5, allow_nan=False))
GROUPS = st.lists(st.tuples(st.sampled_from(TEXTS), REWARDS), min_size=2, max_size=6).map(lambda own: tuple(zip(*own)))
CHOICES = st.builds(
    IterSettings,
    pair_choice=st.sampled_from(["best-worst", "similar-length"]),
    length_slack=st.sampled_from([0.0, 0.2, 1.0]),
    min_gap=st.sampled_from([0.0, 0.4, 3.0]),
)


@given(GROUPS, CHOICES)
@settings(deadline=None, max_examples=300)
def test_a_pair_is_one_that_may_be_and_of_those_the_widest(group, own):
    answers, rewards = group
    words = [max(1, len(text.split())) for text in answers]
    gaps = {(i, j): rewards[i] - rewards[j] for i, j in itertools.permutations(range(len(answers)), 2)}
    allowed = [(i, j) for i, j in gaps if answers[i].strip() and answers[i] != answers[j] and gaps[i, j] > own.min_gap]
    found = choose_pair(answers, rewards, own)
    if own.pair_choice == "similar-length":
        like = [p for p in allowed if max(words[k] for k in p) <= (1 + own.length_slack) * min(words[k] for k in p)]
        assert (found in like and gaps[found] == max(gaps[p] for p in like)) if like else found in DROP_REASONS
        return
    best, worst = int(np.argmax(rewards)), len(rewards) - 1 - int(np.argmin(rewards[::-1]))
    if isinstance(found, tuple):
        assert found in allowed and gaps[found] == max(rewards) - min(rewards)
    else:  # refused for a reason that can be seen
        seen = {"no gap": max(rewards) - min(rewards) <= own.min_gap, "same text": answers[best] == answers[worst]}
        assert (seen | {"empty answer": not answers[best].strip()})[found]


@given(st.lists(GROUPS, max_size=6), CHOICES)
@settings(deadline=None)
def test_each_group_is_a_pair_or_is_counted(groups, own):
    answers, rewards = ({f"s-{i}": group[side] for i, group in enumerate(groups)} for side in (0, 1))
    frame, dropped = online_pairs({name: name.upper() for name in answers}, answers, rewards, own)
    assert set(dropped) == set(DROP_REASONS) and sum(dropped.values()) + len(frame) == len(groups)
    assert frame.prefID.tolist() == list(range(len(frame))) and frame.ID.is_unique
    for row in frame.itertuples():
        scored = list(zip(answers[row.ID], rewards[row.ID]))
        assert row.question == row.ID.upper() and row.chosen_reward > row.rejected_reward
        assert (row.chosen, row.chosen_reward) in scored and (row.rejected, row.rejected_reward) in scored


# An iteration, with stand-ins for what is slow


@pytest.fixture
def stand_ins(monkeypatch):
    "Candidates, rewards and trainings without models; what they were asked for is kept."
    seen = SimpleNamespace(sampled=[], trained=[], gap=1.0, same=())

    def sample(policy, speeches, folder, own, decoding, n, dtype, name):
        seen.sampled.append((policy.location, decoding))
        texts = {key: [f"{key} answer {0 if key in seen.same else i}" for i in range(n)] for key in speeches}
        return {key: [Sample(f"{text} of {decoding.seed}", "stop", 3) for text in own] for key, own in texts.items()}

    def score(scorer, speeches, answers, folder, dtype, name):
        return {key: [seen.gap * i for i in range(len(group))] for key, group in answers.items()}

    def train(start, pairs, how, goal, scratch, dtype, seed, **more):
        if not goal.is_dir():
            seen.trained.append(SimpleNamespace(start=start.location, how=how, seed=seed, **more))
            shutil.copytree(start.location, goal)
            (scratch / "checkpoints").mkdir(parents=True)
            if more["optimiser"] is not None:
                (scratch / "optimiser.pt").write_text(goal.parent.name)
        facts = {"pairs": len(pairs), "too_long": [], "same_tokens": 0, "pack_size": 2}
        facts |= dict.fromkeys(STEP_FACTS, 0) | {"steps": how.steps or len(pairs) // how.batch_size}
        return facts | {"log": [], "seconds": {"train": 0.0}}

    for name, own in {"sample_candidates": sample, "score_candidates": score, "train_policy": train}.items():
        monkeypatch.setattr(iteration, name, own)
    return seen


@pytest.mark.parametrize("init", ["previous", "base"])
@pytest.mark.parametrize("reference", ["previous", "base"])
def test_an_iteration_starts_and_is_held_where_the_settings_say_and_the_newest_policy_answers(
    init, reference, stand_ins, tmp_path
):
    own = online(tmp_path, replace(FOUR, init=init, reference=reference))
    for number in (1, 2, 3):
        run_iteration(own, number)
    places = {"previous": [own.base.location, *(str(tmp_path / f"iteration-{n}" / "policy") for n in (1, 2))]}
    places["base"] = [own.base.location] * 3
    assert [seen.start for seen in stand_ins.trained] == places[init]
    assert [seen.reference.location for seen in stand_ins.trained] == places[reference]
    assert [location for location, _ in stand_ins.sampled] == places["previous"]
    seeds = [seen.seed for seen in stand_ins.trained], [decoding.seed for _, decoding in stand_ins.sampled]
    assert list(map(len, map(set, seeds))) == [3, 3]


def test_longest_candidates_come_from_the_settings_or_the_run(tmp_path):
    assert online(tmp_path).decoding(1).max_tokens == 7
    own = online(tmp_path, IterSettings(max_tokens=3, temperature=0.9, top_k=5, top_p=0.8)).decoding(2)
    assert (own.max_tokens, own.temperature, own.top_k, own.top_p) == (3, 0.9, 5, 0.8)


def test_training_is_told_what_the_settings_say(stand_ins, tmp_path):
    more = dict(epochs=2.0, learning_rate=0.5, checkpoints=3, nll_weight=0.2, schedule="across", optimiser="keep")
    for number in (1, 2, 3):
        run_iteration(online(tmp_path, replace(FOUR, iterations=3, **more)), number)
    plain = online(
        tmp_path / "plain", replace(FOUR, checkpoints=0, schedule="each"), DpoSettings(batch_size=2, learning_rate=0.25)
    )
    run_iteration(plain, 1)

    def told(seen):
        return seen.how.epochs, seen.how.learning_rate, seen.how.checkpoints, seen.nll_weight

    *three, last = stand_ins.trained
    assert {told(seen) for seen in three} == {(2.0, 0.5, 4, 0.2)}
    assert [seen.schedule for seen in three] == [(0, 12), (4, 12), (8, 12)]
    moments = [str(tmp_path / f"iteration-{n}" / "optimiser.pt") for n in (1, 2)]
    assert [str(seen.optimiser) for seen in three] == ["", *moments]
    assert (*told(last), last.schedule, last.optimiser) == (1.0, 0.25, 0, 0.0, None, None)


def test_an_iteration_keeps_its_steps_where_groups_give_no_pair_and_the_schedule_counts_them(stand_ins, tmp_path):
    "Not the offline count; and where steps are not counted, the receipt shows how many were planned."
    dpo = DpoSettings(batch_size=2, steps=9)
    stand_ins.same = ("s-1", "s-2")
    for steps, taken, planned in ((5, 5, 5), (None, 2, 3)):
        own = online(tmp_path / str(steps), replace(FOUR, prompts=6, steps=steps), dpo)
        done, seen = [run_iteration(own, number) for number in (1, 2)][1], stand_ins.trained[-1]
        assert (done["pairs"], done["planned"], done["steps"]) == (4, planned, taken)
        assert (seen.how.steps, seen.schedule) == (steps, (planned, 4 * planned))


def test_a_receipt_names_its_files_by_their_hashes(stand_ins, tmp_path):
    own = online(tmp_path)
    done = run_iteration(own, 1)
    assert {"prompts.json", "pairs.parquet", "policy/model.safetensors"} <= set(done["files"])
    assert all(sha256_file(own.place(1) / name) == digest for name, digest in done["files"].items())
    assert done["groups"] == done["pairs"] == 4
    assert run_iteration(own, 1) == done and len(stand_ins.trained) == 1, "a finished iteration is read"


def test_too_few_pairs_are_refused_with_the_reasons(stand_ins, tmp_path):
    few = online(tmp_path / "few", replace(FOUR, prompts=2), DpoSettings(batch_size=3))
    said = one_line(lambda: run_iteration(few, 1))
    assert "2 of 2 groups" in said and "a batch of 3" in said and "dropped: none" in said
    stand_ins.gap = 0.0
    said = one_line(lambda: run_iteration(online(tmp_path), 1))
    assert "DPO-Iter 1" in said and "0 of 4 groups" in said and "4 no gap" in said
    assert not (tmp_path / "iteration-1" / "job").exists()


def watching(rewards, stop=None):
    "A look that gives rewards by iteration, the backbone's first, and is interrupted before one."

    def look(find, name, pairs, **more):
        number = 0 if name == "base" else int(name.split("-")[1])
        if number == stop:
            raise KeyboardInterrupt
        return {"reward": rewards[number], "judged": 100 - rewards[number], "pairs": pairs, **more}

    return look


def standing(folder):
    return [n for n in range(1, 9) if (folder / f"iteration-{n}" / "policy").is_dir()]


@pytest.mark.parametrize(
    "keep, select, rewards, kept, best",
    [
        (1, "reward", [0, 5, 1, 2, 3], [1, 4], 1),
        (2, "reward", [0, 5, 1, 2, 3], [1, 3, 4], 1),
        (1, "reward", [9, 1, 2, 3, 4], [4], 4),
        (None, "reward", [0, 5, 1, 2, 3], [1, 2, 3, 4], 1),
        (1, "win-rate", [0, 5, 1, 2, 3], [2, 4], 2),
    ],
)
def test_the_best_policy_and_the_last_ones_are_kept(keep, select, rewards, kept, best, stand_ins, tmp_path):
    result = iterate(online(tmp_path, replace(FOUR, keep_last=keep, select=select)), watching(rewards))
    assert result["kept"] == kept == standing(tmp_path) and result["best"] == best
    assert [point["pairs"] for point in result["points"]] == [0, 4, 8, 12, 16]
    assert all(read_json(tmp_path / f"iteration-{n}" / "done.json") for n in range(1, 5))


def test_a_run_goes_on_after_weights_were_taken_away(stand_ins, tmp_path):
    "Interrupted before the third look, and prolonged by two iterations."
    four, rewards = online(tmp_path, replace(FOUR, keep_last=1)), [0, 1, 5, 2, 3, 4, 1]
    with pytest.raises(KeyboardInterrupt):
        iterate(four, watching(rewards, stop=3))
    assert standing(tmp_path) == [2, 3] and len(stand_ins.trained) == 3
    assert iterate(four, watching(rewards))["kept"] == [2, 4] and len(stand_ins.trained) == 4
    more = iterate(replace(four, settings=replace(four.settings, iterations=6)), watching(rewards))
    assert more["kept"] == [2, 6] and more["best"] == 2 and len(stand_ins.trained) == 6
    assert stand_ins.trained[4].start.endswith("iteration-4/policy")


EACH = replace(FOUR, schedule="each")
PROLONGED = {
    "another one": (EACH, {"iterations": 5}, [5]),
    "across all": (replace(EACH, schedule="across"), {"iterations": 5}, [1, 2, 3, 4, 5]),
    "moments": (replace(EACH, optimiser="keep"), {"iterations": 5}, [1, 2, 3, 4, 5]),
    "chosen otherwise": (EACH, {"select": "win-rate", "keep_last": 2}, []),
    "weights that are gone": (replace(EACH, keep_last=1), {"iterations": 5}, [1, 2, 3, 5]),
    "learning rate": (EACH, {"learning_rate": 0.5}, [1, 2, 3, 4]),
    "code": (EACH, {}, [1, 2, 3, 4]),
}


@pytest.mark.parametrize("change", PROLONGED)
def test_an_iteration_is_run_again_only_where_what_it_hangs_on_changed(
    change, stand_ins, scorer, tmp_path, monkeypatch
):
    "The stage's folder is empty at first, as after a changed setting."
    first, more, again = PROLONGED[change]

    def run(folder, own):
        kept = Kept(tmp_path / "kept")
        iterate(replace(online(tmp_path / folder, own), scorer=scorer, kept=kept), watching([0, 1, 2, 3, 4, 5]))
        names = [Path(seen.start).parent.name for seen in stand_ins.trained]
        stand_ins.trained.clear()
        return [1 + int(name.rpartition("-")[2]) if name.startswith("iteration") else 1 for name in names]

    assert run("one", first) == [1, 2, 3, 4]
    if change == "code":
        monkeypatch.setattr(iteration, "modules_hash", lambda *names: "other code")
    assert run("two", replace(first, **more)) == again
    n = more.get("iterations", 4)
    assert standing(tmp_path / "two")[-1] == n and read_json(tmp_path / "two" / f"iteration-{n}" / "done.json")
    assert run("two", replace(first, **more)) == [], "what stands there is not run again either"


def test_moments_are_handed_on_once_and_jobs_are_cleared(stand_ins, tmp_path):
    "They stand in the newest iteration until the next one is done; at the end nobody needs them."
    found = []

    def look(find, name, pairs, **more):
        found.append(sorted(path.parent.name for path in tmp_path.glob("*/optimiser.pt")))
        assert not list(tmp_path.glob("*/job"))
        return {"reward": 0.0, "judged": None}

    iterate(online(tmp_path, replace(FOUR, iterations=3, optimiser="keep")), look)
    assert found == [[], ["iteration-1"], ["iteration-2"], []]


@pytest.mark.parametrize("name", ["os.replace", "iteration.write_json", "shutil.rmtree"])
def test_interrupted_at_the_end_of_an_iteration_it_is_finished_by_the_next_start(
    name, stand_ins, tmp_path, monkeypatch
):
    "Between moving the moments, writing the receipt and clearing the job."
    place, other = tmp_path / "own", tmp_path / "other"
    own = online(place, replace(FOUR, iterations=2, optimiser="keep"))
    run_iteration(own, 1)
    shutil.copytree(place, other)
    expected = run_iteration(replace(own, folder=other), 2)
    module, deed = {"os": os, "shutil": shutil, "iteration": iteration}[name.split(".")[0]], name.split(".")[1]
    real = getattr(module, deed)

    def pulled(path, *more, **how):
        if str(place / "iteration-2") in str(path) and Path(path).name in ("job", "done.json", "optimiser.pt"):
            raise KeyboardInterrupt
        return real(path, *more, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, deed, pulled)
        run_iteration(own, 2)
    done = run_iteration(own, 2)
    assert done == read_json(place / "iteration-2" / "done.json") and done | {"seconds": 0} == expected | {"seconds": 0}
    assert not list(place.glob("*/job")) and not list(place.glob("*/optimiser.pt"))


def test_nothing_is_pruned_twice(stand_ins, tmp_path):
    own = online(tmp_path, replace(FOUR, iterations=3))
    iterate(own, watching([0, 1, 2, 3]))
    one = replace(own, settings=replace(own.settings, keep_last=1))
    assert prune(own, 3, 3) == []
    assert [prune(one, 3, 2), prune(one, 3, 2), standing(tmp_path)] == [[1], [], [2, 3]]


def test_the_best_point_is_by_reward_or_by_win_rate_and_the_earlier_of_equals():
    points = [{"reward": r, "judged": j} for r, j in ((1.0, 50.0), (3.0, 40.0), (3.0, 60.0), (2.0, 60.0))]
    assert (best_point(points, "reward"), best_point(points, "win-rate")) == (1, 2)
    assert "watch.judged" in one_line(lambda: best_point([{"reward": 1.0, "judged": None}], "win-rate"))
    trained_on = [point | {"split": "train"} for point in points]
    assert best_point(trained_on, "reward") == len(points) - 1, "nothing is selected where all was trained on"


# Killed, and started again

MOMENTS = [
    "iter/iteration-1/candidates/block-0000.json",
    "iter/iteration-1/policy.saving",
    "points/iteration-1/block-0000.json",
    "iter/iteration-2/job/checkpoints/checkpoint-1/trainer_state.json",
]


@pytest.fixture
def scorer(tmp_path):
    "An untrained reward model: what is chosen by it is arbitrary, and always the same."
    tiny = find_weights("random-tiny")
    load_reward_model(tiny.location, load_tokenizer(tiny), "float32", new_head=3).save_pretrained(tmp_path / "scorer")
    load_tokenizer(tiny).save_pretrained(tmp_path / "scorer")
    return str(tmp_path / "scorer")


def what_was_made(folder):
    "All that a kill must not change: texts, rewards, pairs, weights, points; not seconds, nor the paths of a place."
    readers = dict.fromkeys(("*/block-*.json", "*/rewards.json", "*/point.json", "*/prompts.json"), Path.read_text)
    readers |= {"iter/*/done.json": read_json, "result.json": read_json, "policy/adapter/*.safetensors": sha256_file}
    readers |= {"*/pairs.parquet": lambda path: pd.read_parquet(path).to_json()}
    found = {str(path.relative_to(folder)): read(path) for name, read in readers.items() for path in folder.rglob(name)}
    receipts = [own for name, own in found.items() if name.endswith("done.json")]
    for own in (*receipts, *found["result.json"]["iterations"]):
        own.pop("seconds")
        for entry in own["log"]:
            entry.pop("num_tokens", None)  # trl counts them anew from each start
    return found


def test_killed_again_and_again_it_ends_with_the_bytes_of_no_interruption(scorer, tmp_path):
    "Each start is killed at the next moment, without warning; the last one does the rest, in another order of hashing."
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    whole.mkdir()
    command = [sys.executable, iterating.__file__, scorer, str(broken), *MOMENTS]
    own = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    run = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    iterating.work(scorer, whole)
    said, _ = run.communicate(timeout=400)
    assert run.returncode == 0, said[-3000:]
    expected, found = what_was_made(whole), what_was_made(broken)
    assert {name: found.get(name) for name in expected if found.get(name) != expected[name]} == {}
    ends = Counter(Path(name).suffix for name in expected)
    assert found.keys() == expected.keys() and ends[".safetensors"] == 2 and ends[".parquet"] == 2
    assert sum(name.endswith("point.json") for name in expected) == 3
    weights = {own for name, own in expected.items() if name.endswith(".safetensors")}
    assert len(weights) == 2, "the second iteration trained"
