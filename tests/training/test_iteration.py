"""DPO-Iter: speeches and pairs by their properties, starts and references, what is kept, and the bytes of an unbroken run after twelve kills."""

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

from psycopref.training import iteration
from psycopref.core.files import read_json, sha256_file
from psycopref.core.settings import DpoSettings, IterSettings, LoraSettings
from psycopref.models.generation import Sample
from psycopref.training.iteration import (
    DROP_REASONS,
    Online,
    best_point,
    choose_pair,
    iterate,
    iteration_prompts,
    online_pairs,
    prune,
    run_iteration,
)
from psycopref.training.scoring import load_reward_model
from psycopref.models.weights import find_weights, load_tokenizer
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, shared_cache):
    "An untrained reward model: what is chosen by it is arbitrary, and always the same."
    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        tiny = find_weights("random-tiny")
        load_reward_model(tiny.location, load_tokenizer(tiny), "float32", new_head=3).save_pretrained(folder)
        load_tokenizer(tiny).save_pretrained(folder)
    return str(folder)


def online(folder, own=IterSettings(), dpo=DpoSettings(batch_size=2), n=6, scorer="scorer"):
    return Online(
        folder,
        find_weights("random-tiny"),
        scorer,
        {f"s-{i}": f"I count the stairs for the {i}th time." for i in range(n)},
        dpo,
        own,
        7,
        "float32",
        0,
    )


# Speeches


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.integers(0, 3), st.sampled_from(["rounds", "fresh"])
)
@settings(deadline=None)
def test_an_iteration_s_speeches_are_all_different_and_hang_on_no_order(known, n, number, seed, draw):
    names, n = [f"s-{i}" for i in range(known)], min(known, n)
    drawn = iteration_prompts(names, n, number, seed, draw)
    assert len(drawn) == n == len(set(drawn)) and set(drawn) <= set(names)
    assert drawn == iteration_prompts(names[::-1], n, number, seed, draw)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
@settings(deadline=None)
def test_every_round_uses_every_speech_once(known, n, seed):
    "Draws behind one another, cut into rounds: each is all speeches, whether or not iterations end where rounds do."
    names, n = [f"s-{i}" for i in range(known)], min(known, n)
    drawn = list(
        itertools.chain.from_iterable(iteration_prompts(names, n, number, seed) for number in range(3 * known // n + 1))
    )
    rounds = [drawn[start : start + known] for start in range(0, len(drawn) - known + 1, known)]
    assert len(rounds) >= 3 and all(sorted(own) == sorted(names) for own in rounds)
    assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1


def test_no_iteration_of_rounds_that_end_inside_it_has_a_speech_twice():
    "All of a small grid, because few of its places can go wrong."
    for known in range(2, 9):
        for n, number, seed in itertools.product(range(1, known + 1), range(6), range(3)):
            assert len(set(iteration_prompts([f"s-{i}" for i in range(known)], n, number, seed))) == n, (
                known,
                n,
                number,
                seed,
            )


def test_rounds_have_another_order_each_and_seeds_too():
    names = [f"s-{i:02}" for i in range(24)]
    assert len({tuple(iteration_prompts(names, 24, number, seed)) for number in range(3) for seed in range(3)}) == 9
    assert iteration_prompts(names, 24, 0, 0) != sorted(names)


def test_fresh_draws_know_nothing_of_one_another():
    "Two halves of eight speeches have two in common on average; rounds have none, for they are one round."
    names = [f"s-{i}" for i in range(8)]
    common = {
        draw: [
            len(set(iteration_prompts(names, 4, 2 * k, 0, draw)) & set(iteration_prompts(names, 4, 2 * k + 1, 0, draw)))
            for k in range(100)
        ]
        for draw in ("rounds", "fresh")
    }
    assert set(common["rounds"]) == {0} and 1.7 < np.mean(common["fresh"]) < 2.3
    drawn = Counter(itertools.chain.from_iterable(iteration_prompts(names, 4, k, 0, "fresh") for k in range(200)))
    assert min(drawn.values()) > 70 and max(drawn.values()) < 130, "100 each"


# Pairs

TEXTS = st.sampled_from(
    ["", " ", "yes", "no", "I see it", "I hear you", "what would help you now", "tell me more about the stairs"]
)
REWARDS = st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-5, 5, allow_nan=False))
GROUPS = st.integers(2, 6).flatmap(
    lambda n: st.tuples(st.lists(TEXTS, min_size=n, max_size=n), st.lists(REWARDS, min_size=n, max_size=n))
)
CHOICES = st.builds(lambda choice, slack, gap: IterSettings(pair_choice=choice, length_slack=slack, min_gap=gap),
                    st.sampled_from(["best-worst", "similar-length"]), st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.4, 3.0]))  # fmt: skip


def words(text):
    return max(1, len(text.split()))


@given(GROUPS, CHOICES)
@settings(deadline=None, max_examples=300)
def test_a_pair_is_one_that_may_be_and_of_those_the_widest(group, own):
    answers, rewards = group
    allowed = [(i, j) for i, j in itertools.permutations(range(len(answers)), 2)
               if answers[i].strip() and answers[i] != answers[j] and rewards[i] - rewards[j] > own.min_gap
               and max(words(answers[i]), words(answers[j])) <= (1 + own.length_slack) * min(words(answers[i]), words(answers[j]))]  # fmt: skip
    found = choose_pair(answers, rewards, own)
    if own.pair_choice == "similar-length":
        assert (found in allowed) if allowed else found in DROP_REASONS
        assert not allowed or rewards[found[0]] - rewards[found[1]] == max(rewards[i] - rewards[j] for i, j in allowed)
        return
    if isinstance(found, tuple):
        i, j = found
        assert (
            rewards[i] == max(rewards)
            and rewards[j] == min(rewards)
            and rewards[i] - rewards[j] > own.min_gap
            and answers[i] != answers[j]
            and answers[i].strip()
        )
    else:  # refused for a reason that can be seen
        best, worst = int(np.argmax(rewards)), len(rewards) - 1 - int(np.argmin(rewards[::-1]))
        seen = {
            "no gap": max(rewards) - min(rewards) <= own.min_gap,
            "same text": answers[best] == answers[worst],
            "empty answer": not answers[best].strip(),
        }
        assert seen[found]


@given(st.lists(st.floats(-5, 5, allow_nan=False), min_size=2, max_size=8, unique=True))
@settings(deadline=None)
def test_best_and_worst_are_argmax_and_argmin(rewards):
    assert choose_pair([f"answer {i}" for i in range(len(rewards))], rewards, IterSettings()) == (
        np.argmax(rewards),
        np.argmin(rewards),
    )


@given(st.lists(GROUPS, max_size=6), CHOICES)
@settings(deadline=None)
def test_each_group_is_a_pair_or_is_counted(groups, own):
    names = [f"s-{i}" for i in range(len(groups))]
    frame, dropped = online_pairs(
        {name: name.upper() for name in names},
        dict(zip(names, (g[0] for g in groups))),
        dict(zip(names, (g[1] for g in groups))),
        own,
    )
    assert set(dropped) == set(DROP_REASONS) and sum(dropped.values()) + len(frame) == len(groups)
    assert (
        frame.prefID.tolist() == list(range(len(frame)))
        and (frame.chosen_reward > frame.rejected_reward).all()
        and (frame.chosen != frame.rejected).all()
    )
    for row in frame.itertuples():
        answers, rewards = groups[names.index(row.ID)]
        assert (
            row.question == row.ID.upper()
            and (row.chosen, row.chosen_reward) in zip(answers, rewards)
            and (row.rejected, row.rejected_reward) in zip(answers, rewards)
        )


def test_similar_length_takes_the_even_pair_where_best_worst_takes_the_long_one():
    answers, rewards = ["one two three four five six", "one", "two", "one two"], [2.0, -1.0, 0.5, 1.0]
    assert choose_pair(answers, rewards, IterSettings()) == (0, 1)
    assert choose_pair(answers, rewards, IterSettings(pair_choice="similar-length")) == (2, 1)
    assert choose_pair(answers, rewards, IterSettings(pair_choice="similar-length", length_slack=1.0)) == (3, 1)


# An iteration, with stand-ins for what is slow


@pytest.fixture
def stand_ins(monkeypatch):
    "Candidates, rewards and trainings without models; what they were asked for is kept."
    seen = SimpleNamespace(sampled=[], trained=[], gap=1.0)

    def sample(policy, speeches, folder, own, decoding, n, dtype, name):
        seen.sampled.append((policy.location, decoding))
        return {key: [Sample(f"{key} answer {i} of {decoding.seed}", "stop", 3) for i in range(n)] for key in speeches}

    def score(scorer, speeches, answers, folder, dtype, name):
        return {key: [seen.gap * i for i in range(len(group))] for key, group in answers.items()}

    def train(start, pairs, how, goal, scratch, dtype, seed, **more):
        seen.trained.append(
            SimpleNamespace(
                start=start.location,
                pairs=pairs,
                how=how,
                seed=seed,
                **more | {"reference": more["reference"].location},
            )
        )
        shutil.copytree(start.location, goal)
        (scratch / "checkpoints").mkdir(parents=True)
        if more["optimiser"] is not None:
            (scratch / "optimiser.pt").write_text(goal.parent.name)
        return {
            "pairs": len(pairs),
            "too_long": [],
            "steps": len(pairs) // how.batch_size,
            "pack_size": 2,
            "log": [],
            "seconds": {"train": 0.0},
        }

    for name, own in {"sample_candidates": sample, "score_candidates": score, "train_policy": train}.items():
        monkeypatch.setattr(iteration, name, own)
    return seen


@pytest.mark.parametrize("init", ["previous", "base"])
@pytest.mark.parametrize("reference", ["previous", "base"])
def test_an_iteration_starts_and_is_held_where_the_settings_say_and_the_newest_policy_answers(
    init, reference, stand_ins, tmp_path
):
    own = online(tmp_path, IterSettings(iterations=3, prompts=4, candidates=2, init=init, reference=reference))
    for number in (1, 2, 3):
        run_iteration(own, number)
    places = [own.base.location, *(str(tmp_path / f"iteration-{n}" / "policy") for n in (1, 2))]
    first = [own.base.location] * 3
    assert [seen.start for seen in stand_ins.trained] == (places if init == "previous" else first)
    assert [seen.reference for seen in stand_ins.trained] == (places if reference == "previous" else first)
    assert [location for location, _ in stand_ins.sampled] == places
    assert (
        len({seen.seed for seen in stand_ins.trained}) == 3
        and len({decoding.seed for _, decoding in stand_ins.sampled}) == 3
    )


def test_a_start_at_the_base_model_trains_the_base_model_s_weights(scorer, tmp_path):
    "Without stand-ins: with a step of nothing, the second policy is the base model again, or the first one."
    from safetensors.torch import load_file

    found, moved = {}, {}
    for init in ("previous", "base"):
        dpo = DpoSettings(batch_size=2, learning_rate=1e-3, warmup_ratio=0.0, max_length=300, lora=LoraSettings())
        own = online(
            tmp_path / init,
            IterSettings(iterations=2, prompts=2, candidates=2, init=init, reference="base", checkpoints=0),
            dpo,
            scorer=scorer,
        )
        run_iteration(own, 1)
        run_iteration(replace(own, settings=replace(own.settings, learning_rate=1e-30)), 2)
        found[init] = load_file(Path(own.policy(2).location) / "model.safetensors")
        moved[init] = load_file(Path(own.policy(1).location) / "model.safetensors")
    base = load_file(Path(find_weights("random-tiny").location) / "model.safetensors")
    same = lambda a, b: all(np.allclose(a[name], b[name], rtol=0, atol=1e-20) for name in b)  # noqa: E731
    assert (
        same(found["base"], base) and same(found["previous"], moved["previous"]) and not same(moved["previous"], base)
    )


def test_longest_candidates_come_from_the_settings_or_the_run(tmp_path):
    assert online(tmp_path).decoding(1).max_tokens == 7
    own = online(tmp_path, IterSettings(max_tokens=3, temperature=0.9, top_k=5, top_p=0.8)).decoding(2)
    assert (own.max_tokens, own.temperature, own.top_k, own.top_p) == (3, 0.9, 5, 0.8)


def test_training_is_told_what_the_settings_say(stand_ins, tmp_path):
    own = IterSettings(
        iterations=3,
        prompts=4,
        candidates=2,
        epochs=2.0,
        learning_rate=0.5,
        checkpoints=3,
        nll_weight=0.2,
        schedule="across",
        optimiser="keep",
    )
    done = [run_iteration(online(tmp_path, own), number) for number in (1, 2, 3)]
    told = stand_ins.trained
    assert {(seen.how.epochs, seen.how.learning_rate, seen.how.checkpoints, seen.nll_weight) for seen in told} == {
        (2.0, 0.5, 4, 0.2)
    }
    assert [seen.schedule for seen in told] == [(0, 12), (4, 12), (8, 12)] and [
        str(seen.optimiser) for seen in told
    ] == ["", *(str(tmp_path / f"iteration-{n}" / "optimiser.pt") for n in (1, 2))]
    assert [own["pairs"] for own in done] == [4, 4, 4]
    plain = IterSettings(prompts=4, candidates=2, checkpoints=0)
    run_iteration(online(tmp_path / "plain", plain, DpoSettings(batch_size=2, learning_rate=0.25)), 1)
    last = stand_ins.trained[-1]
    assert (
        last.how.epochs,
        last.how.learning_rate,
        last.how.checkpoints,
        last.nll_weight,
        last.schedule,
        last.optimiser,
    ) == (1.0, 0.25, 0, 0.0, None, None)


def test_a_receipt_names_its_files_by_their_hashes(stand_ins, tmp_path):
    own = online(tmp_path, IterSettings(prompts=4, candidates=2))
    done = run_iteration(own, 1)
    assert {"prompts.json", "pairs.parquet", "policy/model.safetensors"} <= set(done["files"]) and done["groups"] == 4
    assert all(sha256_file(own.place(1) / name) == digest for name, digest in done["files"].items())
    assert run_iteration(own, 1) == done and len(stand_ins.trained) == 1, "a finished iteration is read"


def test_too_few_pairs_are_refused_with_the_reasons(stand_ins, tmp_path):
    stand_ins.gap = 0.0
    said = one_line(lambda: run_iteration(online(tmp_path, IterSettings(prompts=4, candidates=2)), 1))
    assert (
        "DPO-Iter 1" in said
        and "0 of 4 groups" in said
        and "4 no gap" in said
        and not (tmp_path / "iteration-1" / "job").exists()
    )
    stand_ins.gap = 1.0
    said = one_line(
        lambda: run_iteration(
            online(tmp_path / "other", IterSettings(prompts=2, candidates=2), DpoSettings(batch_size=3)), 1
        )
    )
    assert "2 of 2 groups" in said and "a batch of 3" in said and "dropped: none" in said


def watching(rewards, seen=None, stop=None):
    "A look that gives rewards by iteration, the backbone's first, and is interrupted before one."

    def look(find, name, pairs, **more):
        number = 0 if name == "base" else int(name.split("-")[1])
        if number == stop:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append((name, find().location, pairs))
        return {"reward": rewards[number], "judged": 100 - rewards[number], "pairs": pairs, **more}

    return look


def standing(folder, n):
    return [k for k in range(1, n + 1) if (folder / f"iteration-{k}" / "policy").is_dir()]


@pytest.mark.parametrize("keep, rewards, kept", [(1, [0, 5, 1, 2, 3], [1, 4]), (2, [0, 5, 1, 2, 3], [1, 3, 4]), (1, [0, 1, 2, 3, 4], [4]), (None, [0, 5, 1, 2, 3], [1, 2, 3, 4]),
                                                 (9, [0, 5, 1, 2, 3], [1, 2, 3, 4])])  # fmt: skip
def test_the_best_policy_and_the_last_ones_are_kept(keep, rewards, kept, stand_ins, tmp_path):
    own = online(tmp_path, IterSettings(iterations=4, prompts=4, candidates=2, keep_last=keep))
    result = iterate(own, watching(rewards))
    assert result["kept"] == kept == standing(tmp_path, 4) and result["best"] == max(
        range(1, 5), key=rewards.__getitem__
    )
    assert [point["pairs"] for point in result["points"]] == [0, 4, 8, 12, 16] and all(
        read_json(tmp_path / f"iteration-{n}" / "done.json") for n in range(1, 5)
    )


def test_a_run_goes_on_after_weights_were_taken_away(stand_ins, tmp_path):
    "Interrupted before the third look, and prolonged by two iterations."
    four = online(tmp_path, IterSettings(iterations=4, prompts=4, candidates=2, keep_last=1))
    rewards, seen = [0, 1, 5, 2, 3, 4, 1], []
    with pytest.raises(KeyboardInterrupt):
        iterate(four, watching(rewards, stop=3))
    assert standing(tmp_path, 4) == [2, 3] and len(stand_ins.trained) == 3
    kept = lambda find, name, pairs, **more: watching(rewards, seen)(
        find if name in ("iteration-3", "iteration-4") else lambda: four.base, name, pairs, **more
    )  # noqa: E731
    assert iterate(four, kept)["kept"] == [2, 4] and len(stand_ins.trained) == 4
    more = iterate(
        replace(four, settings=replace(four.settings, iterations=6)),
        lambda find, name, pairs, **more: watching(rewards)(find, name, pairs, **more),
    )
    assert (
        more["kept"] == [2, 6]
        and more["best"] == 2
        and len(stand_ins.trained) == 6
        and stand_ins.trained[4].start.endswith("iteration-4/policy")
    )


def test_moments_are_handed_on_once_and_jobs_are_cleared(stand_ins, tmp_path):
    "They stand in the newest iteration until the next one is done; at the end nobody needs them."
    own, standing = online(tmp_path, IterSettings(iterations=3, prompts=4, candidates=2, optimiser="keep")), []

    def look(find, name, pairs, **more):
        standing.append(sorted(path.parent.name for path in tmp_path.glob("*/optimiser.pt")))
        assert not list(tmp_path.glob("*/job"))
        return {"reward": 0.0, "judged": None}

    iterate(own, look)
    assert standing == [[], ["iteration-1"], ["iteration-2"], []]
    shutil.rmtree(tmp_path / "iteration-3")
    assert one_line(lambda: learn_by_lost_moments(own)), "moments that are gone are no reason to begin anew"


def learn_by_lost_moments(own):
    from psycopref.training.dpo import build_dpo_trainer, write_dpo_job

    pairs = pd.DataFrame({"prefID": [0], "question": ["No."], "chosen": ["I see."], "rejected": ["Why?"]})
    how = DpoSettings(batch_size=1, checkpoints=0, max_length=300)
    write_dpo_job(
        own.folder / "job",
        own.base,
        pairs,
        how,
        own.folder / "model",
        "float32",
        0,
        optimiser=own.place(2) / "optimiser.pt",
    )
    build_dpo_trainer(own.folder / "job")[0].create_optimizer()


@pytest.mark.parametrize("optimiser", ["reset", "keep"])
@pytest.mark.parametrize("name", ["os.replace", "write_json", "shutil.rmtree"])
def test_interrupted_at_the_end_of_an_iteration_it_is_finished_by_the_next_start(
    name, optimiser, stand_ins, tmp_path, monkeypatch
):
    "Between moving the moments, writing the receipt and clearing the job."
    place, other = tmp_path / "own", tmp_path / "other"
    own = online(place, IterSettings(iterations=2, prompts=4, candidates=2, optimiser=optimiser))
    run_iteration(own, 1)
    shutil.copytree(place, other)
    run_iteration(replace(own, folder=other), 2)
    with monkeypatch.context() as patch:

        def pulled(path, *more, **how):
            if str(place / "iteration-2") in str(path) and Path(path).name in ("job", "done.json", "optimiser.pt"):
                raise KeyboardInterrupt
            return real(path, *more, **how)

        module, _, own_name = name.rpartition(".")
        target = {"os": os, "shutil": shutil, "": iteration}[module]
        real = getattr(target, own_name)
        patch.setattr(target, own_name, pulled)
        try:
            run_iteration(own, 2)
            assert (name, optimiser) == ("os.replace", "reset"), "no moments, nothing to move"
        except KeyboardInterrupt:
            pass
    monkeypatch.setattr(
        iteration,
        "train_policy",
        lambda start, pairs, how, goal, *more, **named: {
            "pairs": 4,
            "too_long": [],
            "steps": 2,
            "pack_size": 2,
            "log": [],
            "seconds": {"train": 0.0},
        },
    )  # its job is done
    done = run_iteration(own, 2)
    assert (
        done == read_json(place / "iteration-2" / "done.json")
        and not list(place.glob("*/job"))
        and not list(place.glob("*/optimiser.pt"))
    )
    assert {key: value for key, value in done.items() if key != "seconds"} == {
        key: value for key, value in read_json(other / "iteration-2" / "done.json").items() if key != "seconds"
    }


def test_nothing_is_pruned_twice_and_a_last_of_none_is_refused(stand_ins, tmp_path):
    own = online(tmp_path, IterSettings(iterations=3, prompts=4, candidates=2))
    iterate(own, watching([0, 1, 2, 3]))
    one = replace(own, settings=replace(own.settings, keep_last=1))
    assert (
        prune(own, 3, 3) == []
        and prune(one, 3, 2) == [1]
        and prune(one, 3, 2) == []
        and standing(tmp_path, 3) == [2, 3]
    )
    assert "keep_last" in one_line(
        lambda: iterate(replace(own, settings=replace(own.settings, keep_last=0)), watching([0]))
    )


def test_the_best_point_is_by_reward_or_by_win_rate_and_the_earlier_of_equals(stand_ins, tmp_path):
    points = [
        {"reward": 1.0, "judged": 50.0},
        {"reward": 3.0, "judged": 40.0},
        {"reward": 3.0, "judged": 60.0},
        {"reward": 2.0, "judged": 60.0},
    ]
    assert (best_point(points, "reward"), best_point(points, "win-rate")) == (1, 2)
    assert "watch.judged" in one_line(lambda: best_point([{"reward": 1.0, "judged": None}], "win-rate"))
    own = online(tmp_path, IterSettings(iterations=3, prompts=4, candidates=2, keep_last=1, select="win-rate"))
    result = iterate(own, watching([9, 2, 1, 3]))
    assert result["best"] == 2 and result["kept"] == [2, 3], "the backbone takes no part"


# Killed, and started again

MOMENTS = [f"iter/iteration-1/{place}" for place in (
    "candidates/block-0000.json", "candidates/rewards.json", "job/rows/train/cache-*.arrow", "job/checkpoints/checkpoint-1", "job/checkpoints/checkpoint-1/trainer_state.json",
    "job/checkpoints/checkpoint-2/optimizer.pt", "job/checkpoints/checkpoint-2/trainer_state.json", "policy.saving", "done.json")]  # fmt: skip
MOMENTS += [
    "points/iteration-1/block-0000.json",
    "points/iteration-1/point.json",
    "iter/iteration-2/job/checkpoints/checkpoint-2/trainer_state.json",
]


def what_was_made(folder):
    "All that a kill must not change: texts, rewards, pairs, weights, points; not seconds, and not the paths of a place."
    found = {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*.json"))
        if path.name in ("rewards.json", "point.json", "prompts.json") or path.name.startswith("block-")
    }
    found |= {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("policy/*.safetensors"))}
    found |= {
        str(path.relative_to(folder)): pd.read_parquet(path).to_json() for path in sorted(folder.rglob("pairs.parquet"))
    }
    receipts = {str(path.relative_to(folder)): read_json(path) for path in sorted(folder.glob("iter/*/done.json"))}
    result = read_json(folder / "result.json")
    for own in (*receipts.values(), *result["iterations"]):
        own.pop("seconds")
        own["log"] = [
            {key: value for key, value in entry.items() if key != "num_tokens"} for entry in own["log"]
        ]  # trl counts them anew from each start
    return found | receipts | {"result": result}


def test_killed_at_twelve_moments_it_ends_with_the_bytes_of_no_interruption(scorer, tmp_path):
    "Each start is killed at the next moment, by itself and without warning; the last one does the rest. Two orders of hashing, so that nothing hangs on one."
    find_weights("random-tiny")
    running = {}
    for seed, (name, moments) in enumerate({"whole": [], "broken": MOMENTS}.items()):
        (tmp_path / name).mkdir()
        own = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONHASHSEED": str(seed + 1),
            "MPLBACKEND": "agg",
        }
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "iterating.py"),
            scorer,
            str(tmp_path / name),
            *moments,
        ]
        running[name] = subprocess.Popen(
            command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for process in running.values():
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said[-3000:]
    assert [
        line.rpartition(": ")[2] for line in said.splitlines() if line.startswith(("iter/", "points/", "None: "))
    ] == ["-9"] * len(MOMENTS) + ["0"]
    whole, broken = (what_was_made(tmp_path / name) for name in ("whole", "broken"))
    assert (
        whole.keys() == broken.keys()
        and sum(name.endswith(".safetensors") for name in whole) == 2
        and sum(name.endswith("point.json") for name in whole) == 3
    )
    assert sum("candidates/block-" in name for name in whole) == 4
    assert {name: broken[name] for name in whole if broken[name] != whole[name]} == {}
    weights = [whole[name] for name in whole if name.endswith(".safetensors")]
    assert len(set(weights)) == 2, "the second iteration trained"
