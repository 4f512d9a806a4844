"""What was trained, scored or seen is made once: a changed setting makes again what hangs on it, and nothing else."""

import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

from psycopref.core import files
from psycopref.core.files import Kept, StageReader, StageWriter, modules_hash, read_json, sha256_file, whole_folder
from psycopref.core.files import write_json
from psycopref.core.settings import load_profile
from psycopref.core.stages import Run, grid_cells, stage_settings
from psycopref.experiments import arms
from psycopref.experiments.mixing_grid import Domains, make_cell
from psycopref.experiments.reward_table import RewardStudy, score_others, train_backbones
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training import jobs, sampling
from psycopref.training.scoring import load_reward_model
from psycopref.training.watching import Watcher, watched_speeches

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = Run("r")


def some_pairs(n, name, **more):
    rows = pd.DataFrame({"ID": [f"{name}-{i}" for i in range(n)], "prefID": range(n), "gap": 1.0})
    return rows.assign(question=rows.ID + "?", chosen="What do you feel then?", rejected="Stop it.", **more)


FIT, DEV, TEST = (some_pairs(n, name) for n, name in ((12, "fit"), (3, "dev"), (4, "test")))


def save_scorer(folder, head):
    tiny = find_weights("random-tiny")
    load_reward_model(tiny.location, load_tokenizer(tiny), "float32", new_head=head).save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)


@pytest.fixture
def trained(monkeypatch):
    "Do jobs without training; what is trained hangs on the learning rate alone. Lists the jobs that were done."
    done = []

    def do_job(folder):
        job = read_json(folder / "job.json")
        done.append(job)
        if job["goal"]:
            with whole_folder(folder.__class__(job["goal"])) as partial:
                save_scorer(partial, int(1e6 * job["settings"]["learning_rate"]))
        else:
            shutil.copytree(find_weights("random-tiny").location, folder / "checkpoints" / "checkpoint-2")
        result = {"points": [2], "pairs": len(job["pairs"]), "log": [], "seconds": {"train": 1.0}}
        write_json(folder / "result.json", result)
        return result

    monkeypatch.setattr(jobs, "do_job", do_job)
    return done


def stage_5(fit=FIT, stop=None, **overrides):
    "Do what chapter 5 does up to the tables; returns what the receipt says of each piece: what -> taken over."
    settings = load_profile("tiny", {f"reward.{name}": value for name, value in overrides.items()})
    writer = StageWriter(RUN, "05_reward", "tiny", 0, stage_settings(settings, "05_reward")).begin()
    study = RewardStudy(settings, fit, {"dev": DEV, "test": TEST}, writer.work, 0, kept=writer.kept)
    found, _ = train_backbones(study)
    score_others(study, found, False)
    if stop:
        raise stop
    writer.finish()
    return {own["what"]: own["taken_over"] for own in StageReader(RUN, "05_reward").receipt["kept"]}


MODEL, SCORES = "reward model random-tiny", "scores of Bradley-Terry on random two-layer Llama"


def test_another_scorer_ranker_or_hub_repository_trains_and_scores_nothing_again(trained, tmp_path):
    save_scorer(tmp_path / "scorer", 5)
    assert not any(stage_5().values()) and len(trained) == 1
    weights = sha256_file(RUN.stage("05_reward") / "random-tiny" / "model.safetensors")
    for more in (
        {"rankers": []},
        {"push_to_hub": "me/mine"},
        {"ece_bins": [5]},
        {"scorers": [str(tmp_path / "scorer")]},
    ):
        found = stage_5(**more)
        assert found.pop("scores of scorer", False) is False and all(found.values()), more
        assert len(found) == 3 and len(trained) == 1
        assert sha256_file(RUN.stage("05_reward") / "random-tiny" / "model.safetensors") == weights


CHANGES = {
    "learning rate": {"learning_rate": 0.5},
    "one pair": {"fit": FIT.assign(chosen=["And then?", *FIT.chosen[1:]])},
    "order of pairs": {"fit": FIT[::-1]},
}


@pytest.mark.parametrize("change", [*CHANGES, "code", "prompt"])
def test_what_a_training_hangs_on_trains_again_and_the_old_one_is_thrown_away(change, trained, monkeypatch, tmp_path):
    stage_5()
    if change == "code":
        monkeypatch.setattr(jobs, "modules_hash", lambda module, *wings: "other code")
    if change == "prompt":
        monkeypatch.setattr(jobs, "prompt_messages", lambda speech: "other words")
    found = stage_5(**CHANGES.get(change, {}))
    assert len(trained) == 2 and not found[MODEL] and found["scores of untrained head on random two-layer Llama"]
    assert found[SCORES] == (change != "learning rate"), "the same weights came out"
    assert len(list((RUN.outputs / "kept" / "05_reward").iterdir())) == 3
    assert all(stage_5(**CHANGES.get(change, {})).values()) and len(trained) == 2


def test_an_interrupted_stage_is_taken_over_by_one_of_other_settings(trained):
    with pytest.raises(KeyboardInterrupt):
        stage_5(stop=KeyboardInterrupt)
    assert all(stage_5(rankers=[]).values()) and len(trained) == 1


def test_interrupted_code_that_changed_trains_again_where_it_stopped(trained, monkeypatch):
    "The job stands in the work folder still; it was done by other code."
    with pytest.raises(KeyboardInterrupt):
        stage_5(stop=KeyboardInterrupt)
    monkeypatch.setattr(jobs, "modules_hash", lambda module, *wings: "other code")
    assert not stage_5()[MODEL] and len(trained) == 2


def test_a_receipt_says_when_and_by_what_a_training_was_made_and_its_seconds_are_counted(trained):
    stage_5()
    [entry] = (RUN.outputs / "kept" / "05_reward").glob("*/files/model.safetensors")
    record = entry.parents[1] / "kept.json"
    write_json(record, read_json(record) | {"seconds": 250.0, "finished": "long ago", "commit": "an older one"})
    stage_5(rankers=[])
    receipt = StageReader(RUN, "05_reward").receipt
    [own] = [own for own in receipt["kept"] if own["what"] == MODEL]
    assert (own["taken_over"], own["seconds"], own["finished"], own["commit"]) == (
        True,
        250,
        "long ago",
        "an older one",
    )
    assert receipt["seconds"] >= 250


def whole(folder):
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_take_over_leaves_both_folders_whole(trained, monkeypatch):
    stage_5()
    places = RUN.outputs / "kept" / "05_reward", RUN.stage("05_reward")
    before, real, seen = [whole(place) for place in places], files.link_file, []

    def pulled(source, place):
        seen.append(place)
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(source, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "link_file", pulled)
        stage_5(rankers=[])
    assert [whole(place) for place in places] == before
    assert all(stage_5(rankers=[]).values()) and len(trained) == 1


@pytest.mark.parametrize("fault", ["truncated", "gone", "record"])
def test_a_torn_training_is_made_again_and_said(fault, trained, capsys):
    stage_5()
    [path] = (RUN.outputs / "kept" / "05_reward").glob("*/files/model.safetensors")
    data = path.read_bytes()
    path.unlink()  # by another name it stands in the finished stage
    if fault == "truncated":
        path.write_bytes(data[:-40])
    if fault == "record":
        path.write_bytes(data)
        (path.parents[1] / "kept.json").write_text("{")
    found, said = stage_5(rankers=[]), capsys.readouterr().out
    assert len(trained) == 2 and found == {MODEL: False} | dict.fromkeys(set(found) - {MODEL}, True)
    lost = "kept.json" if fault == "record" else "model.safetensors"
    assert f"{lost} is not as it was kept, so this is made again: {MODEL}" in said and len(said.splitlines()) == 1


def test_nothing_that_a_stage_writes_reaches_what_is_kept(trained):
    "Only weights have two names; cards and defaults are written beside them."
    stage_5()
    before = whole(RUN.outputs / "kept")
    for path in (RUN.stage("05_reward") / "random-tiny").glob("*.json"):
        path.write_text("changed")
    assert whole(RUN.outputs / "kept") == before


# The grid


def grid(**overrides):
    "Do what chapter 9 does with its cells."
    settings = load_profile("tiny", overrides)
    psy = {"train": FIT, "dev": DEV, "test": TEST}
    talk = [{"role": "user", "content": "3?"}]
    own = {part: some_pairs(n, f"help-{part}") for part, n in (("train", 12), ("dev", 3), ("test", 5))}
    own = {part: pairs.assign(messages=[talk] * len(pairs)) for part, pairs in own.items()}
    domains = Domains(psy, own, "HelpSteer2", "PsyCoPref", {})
    for cell in grid_cells(settings):
        writer = StageWriter(RUN, "09_mixing", "tiny", 0, stage_settings(settings, "09_mixing"), part=cell)
        if not writer.is_current():
            make_cell(writer.begin(), cell, settings, domains, 0)
    return {cell.mix: StageWriter(RUN, "09_mixing", "tiny", 0, {}, part=cell).folder for cell in grid_cells(settings)}


def test_another_cell_or_scorer_trains_that_cell_alone(trained):
    small = {"mixing.budget": 8, "mixing.cells": ["psy", "half"]}
    folders = grid(**small)
    scores = {mix: whole(folder)["psy.parquet"] for mix, folder in folders.items()}
    assert len(trained) == 2
    folders = grid(**small | {"mixing.cells": ["psy", "half", "help"]})
    assert len(trained) == 3 and {mix: whole(folders[mix])["psy.parquet"] for mix in scores} == scores
    grid(**small | {"mixing.cells": ["help", "psy", "half"], "reward.scorers": ["nobody"]})
    assert len(trained) == 3
    grid(**small | {"mixing.budget": 4, "mixing.cells": ["help", "both-all"]})
    assert len(trained) == 5
    assert not list((RUN.outputs / "kept").rglob("*.safetensors")), "a cell's model is kept by nobody"


# Arms


@pytest.mark.parametrize("rank, times", [(4, 1), (0, 2)])
def test_an_arm_of_adapters_is_trained_once_and_whole_models_are_not_kept(rank, times, trained, tmp_path):
    profile = load_profile("tiny", {"dpo.lora.rank": rank})
    for start in ("first", "second"):
        kept, tiny = Kept(tmp_path / "kept"), find_weights("random-tiny")
        own = arms.Arms(tmp_path / start, tiny, "", {}, FIT, profile, 0, kept)
        [(pairs, place)] = arms.train_arm(own, "offline", FIT)
        assert pairs == 2 * profile.dpo.batch_size and (place / "model.safetensors").is_file()
    assert len(trained) == times and bool(list((tmp_path / "kept").glob("*"))) == (rank > 0)


# Watched points


def test_a_point_is_measured_once_and_judged_anew(tmp_path, monkeypatch):
    "Another judge asks no policy again; other speeches do."
    save_scorer(tmp_path / "scorer", 3)
    texts = {f"s{i}": f"I count the stairs for the {i}th time." for i in range(3)}
    speeches = pd.DataFrame({"speech_id": texts.keys(), "speech": texts.values(), "split": "dev"})
    gateway, real, opened = Gateway(ReplyCache(tmp_path / "replies.sqlite")), sampling.open_sampler, []
    monkeypatch.setattr(sampling, "open_sampler", lambda *how: opened.append(1) or real(*how))
    tiny = find_weights("random-tiny")

    def look(start, speeches=speeches, **overrides):
        own = watched_speeches(speeches, None, 0), load_profile("tiny", overrides), 0, gateway, None
        watcher = Watcher(tmp_path / start, tiny, str(tmp_path / "scorer"), *own, Kept(tmp_path / "kept"))
        return watcher.look(lambda: tiny, "base", 0)

    point = look("first")
    assert look("second") == point and len(opened) == 1
    silent = look("third", **{"watch.judged": False})
    assert silent["judged"] is None and (silent["reward"], silent["kl"]) == (point["reward"], point["kl"])
    assert len(opened) == 1 and look("fourth", speeches[:2])["speeches"] == 2 and len(opened) == 2


# Code


def test_code_counts_with_what_it_imports_from_the_named_wings_and_prose_does_not(tmp_path, monkeypatch):
    places = {"psycopref.a.first": "from .second import x\nfrom ..b.third import y\nimport json\n"}
    places |= {"psycopref.a.second": "x = 1\n", "psycopref.b.third": "y = 1\n"}

    def spec(name):
        path = tmp_path / f"{name}.py"
        path.write_text(places[name])
        return SimpleNamespace(origin=str(path))

    def hashed(**changed):
        monkeypatch.setattr(files.importlib.util, "find_spec", spec)
        before = dict(places)
        places.update({f"psycopref.a.{name}": text for name, text in changed.items()})
        modules_hash.cache_clear()
        try:
            return [modules_hash("a.first", *wings) for wings in (("a",), ("a", "b"))]
        finally:
            places.update(before)

    plain, code = hashed(), places["psycopref.a.first"]
    assert plain[0] != plain[1]
    assert hashed(first='"""Said otherwise."""\n\n# a remark\n' + code) == plain
    assert not {*hashed(second="x = 2\n")} & {*plain} and not {*hashed(first=code + "z = 1\n")} & {*plain}
    modules_hash.cache_clear()
