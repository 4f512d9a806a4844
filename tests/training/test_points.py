"""Points: the same speeches each time, finished ones read, interrupted ones gone on with, curves that all begin at the base model."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psycopref.training import points
from psycopref.gateway.cache import ReplyCache
from psycopref.core.settings import load_profile
from psycopref.gateway.gateway import Gateway
from psycopref.training.points import Watcher, watched_speeches
from psycopref.training.scoring import load_reward_model
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory, shared_cache):
    "The backbone, a policy beside it, and an untrained reward model."
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        tiny = find_weights("random-tiny")
        load_reward_model(tiny.location, load_tokenizer(tiny), "float32", new_head=3).save_pretrained(folder / "scorer")
        model = load_causal_lm(tiny, "float32")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        model.save_pretrained(folder / "policy")
        for name in ("scorer", "policy"):
            load_tokenizer(tiny).save_pretrained(folder / name)
        return SimpleNamespace(tiny=tiny, policy=find_weights(str(folder / "policy")), scorer=str(folder / "scorer"))


@pytest.fixture
def watcher(models, tmp_path):
    speeches = pd.DataFrame(
        [{"speech_id": f"s-{i}", "speech": f"I count the stairs for the {i}th time.", "split": "dev"} for i in range(4)]
    )
    profile = load_profile(
        "tiny", {"watch.answers": 2, "dpo_iter.block": 2, "evaluation.max_tokens": 6, "evaluation.bootstrap": 20}
    )
    return Watcher(
        tmp_path / "points",
        models.tiny,
        models.scorer,
        speeches,
        profile,
        0,
        Gateway(ReplyCache(tmp_path / "replies.sqlite")),
    )


def never(*arguments, **named):
    raise AssertionError("not needed")


@given(
    st.lists(st.sampled_from(["train", "dev", "test"]), min_size=1, max_size=12),
    st.one_of(st.none(), st.integers(1, 6)),
    st.integers(0, 3),
)
def test_watched_speeches_are_of_one_split_and_the_same_in_any_order(splits, n, seed):
    frame = pd.DataFrame({"speech_id": [f"s-{i}" for i in range(len(splits))], "speech": "…", "split": splits})
    found = watched_speeches(frame, n, seed)
    split = "dev" if "dev" in splits else "train"
    assert set(found.split) <= {split} and len(found) == min(splits.count(split), 99 if n is None else n)
    assert set(found.speech_id) == set(watched_speeches(frame[::-1], n, seed).speech_id)
    assert n is None or set(found.speech_id) <= set(watched_speeches(frame, n + 1, seed).speech_id), (
        "more speeches keep the ones before"
    )


def test_a_point_is_plain_numbers_and_a_finished_one_needs_no_weights(watcher, models, monkeypatch):
    point = watcher.look(lambda: models.policy, "step-4", 16, curve="DPO", step=4)
    assert json.loads((watcher.folder / "step-4" / "point.json").read_text()) == point
    assert (point["speeches"], point["answers"], point["pairs"], point["step"], point["curve"], point["split"]) == (
        4,
        8,
        16,
        4,
        "DPO",
        "dev",
    )
    assert point["kl"] > 0.1 and point["kl_low"] <= point["kl"] <= point["kl_high"] and 0 <= point["judged"] <= 100
    monkeypatch.setattr(points, "sample_candidates", never)
    assert watcher.look(never, "step-4", 16) == point


def test_the_base_model_is_no_way_from_itself_and_answers_otherwise_than_a_policy(watcher, models, monkeypatch):
    point = watcher.look(lambda: models.policy, "step-4", 16, curve="DPO")
    with monkeypatch.context() as patch:
        patch.setattr(points, "kl_to_base", never)
        base = watcher.look(lambda: models.tiny, "base", 0)
    assert (base["kl"], base["kl_low"], base["kl_high"]) == (0, 0, 0) and base["reward"] != point["reward"]


@pytest.mark.parametrize(
    "lost", ["step-4/point.json", "step-4/rewards.json", "step-4/block-0001.json", "reference/rewards.json"]
)
def test_an_interrupted_point_is_gone_on_with_and_ends_the_same(lost, watcher, models, monkeypatch):
    "A block that stands is read: only what was lost is sampled."
    import psycopref.training.sampling as sampling

    point = watcher.look(lambda: models.policy, "step-4", 16, curve="DPO")
    (watcher.folder / "step-4" / "point.json").unlink()
    (watcher.folder / lost).unlink(missing_ok=True)
    opened, real = [], sampling.open_sampler
    monkeypatch.setattr(sampling, "open_sampler", lambda *arguments: opened.append(arguments) or real(*arguments))
    assert watcher.look(lambda: models.policy, "step-4", 16, curve="DPO") == point
    assert len(opened) == ("block" in lost)


def test_a_point_of_another_policy_is_not_taken_from_its_blocks(watcher, models):
    "A folder of the same name, with blocks of the base model in it."
    base = watcher.look(lambda: models.tiny, "base", 0)
    shutil.copytree(watcher.folder / "base", watcher.folder / "step-4")
    (watcher.folder / "step-4" / "point.json").unlink()
    point = watcher.look(lambda: models.policy, "step-4", 16, curve="DPO")
    assert point["reward"] != base["reward"] and point == replace(watcher, folder=watcher.folder / "anew").look(
        lambda: models.policy, "step-4", 16, curve="DPO"
    )


def test_nobody_is_asked_where_points_are_not_judged(watcher, models, monkeypatch):
    monkeypatch.setattr(points, "battle", never)
    quiet = replace(watcher, profile=replace(watcher.profile, watch=replace(watcher.profile.watch, judged=False)))
    point = quiet.look(lambda: models.tiny, "base", 0)
    assert point["judged"] is None and point["judged_low"] is None and point["reward"] is not None


def test_curves_begin_at_the_base_model_and_go_along_the_pairs(watcher):
    for name, pairs, curve in (
        ("step-10", 40, "DPO"),
        ("step-2", 8, "DPO"),
        ("iteration-1", 20, "DPO-Iter"),
        ("base", 0, ""),
    ):
        (watcher.folder / name).mkdir(parents=True)
        (watcher.folder / name / "point.json").write_text(json.dumps({"name": name, "pairs": pairs, "curve": curve}))
    assert {name: [point["name"] for point in own] for name, own in watcher.curves().items()} == {
        "DPO": ["base", "step-2", "step-10"],
        "DPO-Iter": ["base", "iteration-1"],
    }


def test_a_reference_may_leave_out_what_the_settings_allow(watcher, models, monkeypatch):
    whole = watcher.reference()
    monkeypatch.setattr(points, "answer", lambda *arguments, **named: whole[1:])
    assert (
        "3 of 4" in one_line(lambda: watcher.look(lambda: models.tiny, "base", 0))
        and not (watcher.folder / "base" / "point.json").exists()
    )
    evaluation = replace(watcher.profile.evaluation, coverage=0.7)
    point = replace(watcher, profile=replace(watcher.profile, evaluation=evaluation)).look(
        lambda: models.tiny, "base", 0
    )
    assert (point["speeches"], point["answers"]) == (3, 6)
