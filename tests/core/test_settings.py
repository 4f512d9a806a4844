"""Profiles: every setting can be set, nothing else can, and the paper's numbers are the paper's."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
import yaml

from refusals import one_line
from psycopref.core.paper import coarse_of, coarse_topics, paper_values, resource_path
from psycopref.core.settings import PROFILES, StudyError, load_profile
from psycopref.core.stages import BEHAVIOUR, SENT, STAGES, Run, derived_seed, project_root, stage_settings, user_path


def leaves(node, path=()):
    """Yield (dotted name, value, annotation) of every setting of a profile."""
    hints = typing.get_type_hints(type(node))
    for entry in dataclasses.fields(node):
        value = getattr(node, entry.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, entry.name))
        else:
            yield ".".join((*path, entry.name)), value, hints[entry.name]


def value_at(profile, dotted):
    for part in dotted.split("."):
        profile = getattr(profile, part)
    return profile


def wrong_values(kind):
    """Values of any type but the annotated one."""
    inside = typing.get_args(kind)
    if type(None) in inside:
        return [wrong for wrong in wrong_values(inside[0]) if wrong is not None]
    if typing.get_origin(kind) is typing.Literal:
        return [None, 3, True, "other", inside[0] + " ", [inside[0]], (), {}]
    if typing.get_origin(kind) is tuple:
        return [None, 3, "text", {}, (None,), [[]], *[[w] for w in wrong_values(inside[0])]]
    return {
        int: [None, "3", 3.0, True, [3], (), {}],
        float: [None, "3", True, [3.0], (), {}],
        str: [None, 3, 3.5, True, ["x"], (), b"x"],
        bool: [None, 0, 1, "true", 1.0, [True], {}],
    }[kind]


EVERY = [(name, *leaf) for name, profile in PROFILES.items() for leaf in leaves(profile)]


def test_every_leaf_takes_its_own_value_and_changes_nothing():
    assert len(EVERY) == len(PROFILES) * len(list(leaves(PROFILES["demo"]))) and len(EVERY) > 300
    for profile, dotted, value, _ in EVERY:
        assert load_profile(profile, {dotted: value}) == PROFILES[profile], dotted
        as_json = list(value) if isinstance(value, tuple) else value  # a tuple is a list after JSON
        assert value_at(load_profile(profile, {dotted: as_json}), dotted) == value, dotted


def test_every_leaf_takes_another_value_of_its_type_and_only_that_leaf_changes():
    for profile, dotted, old_value, annotation in EVERY:
        other = {int: 7919, float: 0.7919, str: "other", bool: old_value is not True}
        inside = typing.get_args(annotation)
        kind = inside[0] if type(None) in typing.get_args(annotation) else annotation
        if typing.get_origin(kind) is typing.Literal:
            new = next(choice for choice in inside if choice != old_value)
        else:
            new = (other[inside[0]],) if typing.get_origin(kind) is tuple else other[kind]
        if profile == "paper" and dotted in ("dpo_iter.select", "watch.judged"):  # its reward model must not select
            continue
        if profile != "paper" and new in ("keep", "train+dev"):  # adapters keep no moments; a reward model selects
            continue
        if dotted in ("responses.each_speech", "responses.samples", "ratings.shown"):  # calls divide the responses
            continue
        if profile == "laptop" and dotted == "dpo.label_smoothing":  # its arm with log-ratios for each token has none
            continue
        if type(None) in typing.get_args(annotation):
            assert value_at(load_profile(profile, {dotted: None}), dotted) is None
        changed = load_profile(profile, {dotted: new})
        pairs = zip(leaves(changed), leaves(PROFILES[profile]))
        assert {d for (d, now, _), (_, old, _) in pairs if now != old} == {dotted}
        assert value_at(changed, dotted) == new and type(value_at(changed, dotted)) is type(new)


def test_every_leaf_refuses_every_wrong_type_in_one_line_that_names_it():
    for profile, dotted, _, kind in EVERY:
        for wrong in wrong_values(kind):
            with pytest.raises(StudyError) as error:
                load_profile(profile, {dotted: wrong})
            assert dotted in str(error.value) and "\n" not in str(error.value)


def test_every_number_has_a_range():
    for profile, dotted, value, kind in EVERY:
        own = next(iter(typing.get_args(kind)), kind)
        wrong = {int: [-1, -(10**9)], float: [-0.1, -1e9]}.get(own, [])
        if dotted.rpartition(".")[2] in ("coverage", "top_p", "warmup_ratio", "test_fraction", "topic_confidence"):
            wrong.append(1.01)
        for number in wrong:
            with pytest.raises(StudyError) as error:
                load_profile(profile, {dotted: number})
            assert dotted in str(error.value) and str(number) in str(error.value)
    for dotted in (
        "dpo.batch_size",
        "reward.batch_size",
        "dpo.learning_rate",
        "evaluation.max_tokens",
        "ablation.pairs",
    ):
        assert "greater than 0" in one_line(lambda dotted=dotted: load_profile("demo", {dotted: 0}))
    assert "backbones" in one_line(lambda: load_profile("demo", {"backbones": []}))


def test_whole_numbers_become_fractions_and_nothing_else_is_converted():
    assert type(load_profile("demo", {"dpo.beta": 1}).dpo.beta) is float
    for name, value, said in [
        ("dpo.beta", "1", "override 'dpo.beta': found '1' (str), expected a valid number"),
        ("reward.epochs", 1.0, "override 'reward.epochs': found 1.0 (float), expected a valid integer"),
        ("dpo.select", "test", "override 'dpo.select': found 'test' (str), expected 'loss', 'reward' or 'win-rate'"),
        ("speeches.sources", [3], "override 'speeches.sources': found 3 (int), expected a valid string"),
    ]:
        assert one_line(lambda name=name, value=value: load_profile("demo", {name: value})) == f"{said}; set it so"


def test_calls_divide_the_responses_to_a_speech():
    changed = {"responses.each_speech": 2, "responses.samples": 3}
    said = one_line(lambda: load_profile("paper", changed))
    assert "ratings.shown: found 4 with 6 responses" in said
    assert load_profile("paper", changed | {"ratings.shown": 3}).ratings.shown == 3


def test_a_misspelt_name_is_refused_and_the_right_one_named():
    for profile, dotted, value, _ in EVERY:
        parts = dotted.split(".")
        for place, part in enumerate(parts):
            for typo in (part + "x", part[:-1]):
                wrong = ".".join([*parts[:place], typo, *parts[place + 1 :]])
                with pytest.raises(StudyError) as error:
                    load_profile(profile, {wrong: value})
                assert wrong in str(error.value), wrong
                hint = str(error.value).rpartition("Did you mean ")[2].rstrip("?").split(", ")
                assert part in hint, (wrong, str(error.value))


@pytest.mark.parametrize("name, meant", [("dmeo", "demo"), ("papers", "paper"), ("Tiny", "tiny")])
def test_a_misspelt_profile_is_refused_and_the_right_one_named(name, meant):
    with pytest.raises(StudyError, match=f"{name}.*Did you mean {meant}"):
        load_profile(name)


@pytest.mark.parametrize("dotted", ["reward", "reward.lora", "reward.epochs.x", "reward.", ".reward", ""])
def test_a_section_or_a_broken_name_can_not_be_set(dotted):
    for value in (3, {"epochs": 3}):
        assert repr(dotted) in one_line(lambda value=value: load_profile("demo", {dotted: value}))


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"dpo.select": "win-rate", "watch.judged": False}, "dpo.select"),
        ({"dpo.select": "loss", "dpo_iter.select": "win-rate", "watch.judged": False}, "dpo_iter.select"),
        ({"dpo.length_normalised": True, "dpo.label_smoothing": 0.1}, "dpo.length_normalised"),
        ({"dpo_iter.optimiser": "keep", "dpo.lora.rank": 8}, "dpo_iter.optimiser"),
        *(({name: 0}, name) for name in ("watch.answers", "watch.speeches", "dpo.checkpoints", "dpo_iter.keep_last")),
        *(({name: 0}, name) for name in ("dpo_iter.iterations", "dpo_iter.keep_last")),
    ],
)
def test_settings_of_policies_that_contradict_one_another_are_refused(overrides, named):
    assert re.match(rf"(override ')?{named}'?: found ", one_line(lambda: load_profile("paper", overrides)))
    for given in ({"dpo.select": "win-rate", "dpo_iter.select": "win-rate"}, {"dpo_iter.optimiser": "keep"}):
        assert load_profile("paper", given).watch.judged


def test_overrides_meet_in_any_order_and_profiles_are_frozen_to_the_last_leaf():
    overrides = {"reward.lora.last_layers": None, "reward.lora.rank": 3, "speeches.limit": 9, "dpo.beta": 1}
    one, other = load_profile("paper", overrides), load_profile("paper", dict([*overrides.items()][::-1]))
    assert one == other and one.dpo.beta == 1.0 and one.reward.lora.last_layers is None
    assert len({*PROFILES.values(), one}) == 1 + len(PROFILES), "only what is frozen has a hash"


def test_a_profile_file_names_each_setting_once_and_only_what_differs():
    for name in PROFILES:
        text = resource_path(f"profiles/{name}.yaml").read_text(encoding="utf-8")
        names = re.findall(r"^(\w+):", text, re.M)
        assert len(names) == len(set(names)) and yaml.safe_load(text)["name"] == name


def test_the_paper_profile_has_the_papers_numbers():
    paper = PROFILES["paper"]
    assert paper.dpo.beta == 0.1 and paper.dpo.learning_rate == 5e-7 and paper.dpo.batch_size == 64
    assert paper.reward.batch_size == 128 and paper.reward.learning_rate == 9e-6 and paper.reward.epochs == 2
    assert (paper.dpo_iter.prompts, paper.dpo_iter.candidates, paper.dpo_iter.iterations) == (6400, 8, 16)
    assert paper.dpo_iter.prompts % paper.dpo.batch_size == 0
    assert paper.dpo_iter.iterations * paper.dpo_iter.prompts // paper.dpo.batch_size == 1600
    pairs = paper_values()["dataset"]["train_pairs"]
    assert paper.ablation.pairs == pairs == 34329
    assert paper.dpo.steps == paper.dpo_iter.iterations * paper.dpo_iter.steps == 1600 and paper.dpo_iter.steps == 100
    assert paper.reward.train_on == "train+dev" and "reward" not in (paper.dpo.select, paper.dpo_iter.select)
    assert paper.pairs.min_gap == 1 and paper.responses.each_speech == 4 and paper.responses.samples == 1
    rankers = [row["model"] for row in paper_values()["table_1"] if row["kind"] == "generative LLM"]
    asked = [uri.partition("@")[0].rpartition("/")[2] for uri in paper.reward.rankers if "@http" in uri]
    assert asked == rankers and len(asked) == 3, "Table 1's rankers, each on a server of its own"
    assert len({uri.partition("@")[2] for uri in paper.reward.rankers}) == len(paper.reward.rankers)
    assert (paper.speeches.min_characters, paper.speeches.max_characters) == (100, 1000)
    assert paper.reward.lora.rank == paper.dpo.lora.rank == 0, "the paper trains every weight"
    assert paper.backbones == ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
    dataset = paper_values()["dataset"]
    assert round(paper.speeches.test_fraction * dataset["speeches"]) == dataset["test_speeches"] == 3291
    assert all("gpt-4o" in uri for uri in (paper.ratings.rater, paper.evaluation.judge, paper.evaluation.reference))


def test_a_reward_model_selects_nothing_on_pairs_that_it_was_trained_on():
    free = {"dpo.select": "loss", "dpo_iter.select": "win-rate"}
    load_profile("demo", free | {"reward.train_on": "train+dev"})
    for name in free:
        said = one_line(lambda: load_profile("demo", free | {"reward.train_on": "train+dev", name: "reward"}))
        assert said.startswith(f"{name}: found 'reward' with reward.train_on 'train+dev'")
        assert "no checkpoint is selected on pairs that it or its reward model was trained on" in said


def test_small_profiles_never_ask_a_paid_model():
    for name in ("tiny", "demo", "laptop"):
        uris = [v for _, value, _ in leaves(PROFILES[name]) for v in (value if isinstance(value, tuple) else [value])]
        assert not any(str(v).startswith("openai:") for v in uris) and PROFILES[name].budget_usd == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_reads_parts_of_the_profile_as_plain_data(profile):
    for name, stage in STAGES.items():
        found = stage_settings(PROFILES[profile], name)
        assert tuple(found) == stage.reads and json.loads(json.dumps(found)) is not None
        for dotted, value in found.items():
            node = value_at(PROFILES[profile], dotted)
            whole = dataclasses.asdict(node) if dataclasses.is_dataclass(node) else node
            if isinstance(whole, dict):
                gone = {*BEHAVIOUR, *(key for key, sender in SENT.items() if sender != name)}
                whole = {key: own for key, own in whole.items() if f"{dotted}.{key}" not in gone}
            assert value == whole
        as_overrides = {name: 2 if name.endswith("keep_last") else "other" for name in BEHAVIOUR}
        assert stage_settings(load_profile(profile, as_overrides), name) == found, "how a run behaves redoes nothing"
        sent = stage_settings(load_profile(profile, dict.fromkeys(SENT, "me/mine")), name)
        assert (sent != found) == (name in SENT.values()), "a hub repository runs the stage that sends"


def test_every_setting_is_read_by_some_stage():
    reads = {section for stage in STAGES.values() for section in stage.reads}
    dotted = {d for _, d, _, _ in EVERY}
    unread = {d for d in dotted if not any(d == r or d.startswith(r + ".") for r in reads)}
    assert unread == {"name", "budget_usd"}, "a setting that no stage reads changes no receipt and no result"


def test_seeds_differ_where_names_differ_and_parts_never_run_together():
    parts = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("b", "a"), ("1",), (1,), ("",), ("a", ""), ("", "a")]
    parts += [('a", "b',)]  # looks like two
    assert derived_seed(7, "members", "psycho8k-1", 3) == 3053057125, "the same in every process, on every machine"
    found = [derived_seed(seed, *p) for seed in range(20) for p in parts]
    assert len({*found}) == 20 * len(parts) and all(0 <= seed < 2**32 for seed in found)
    assert [derived_seed(seed, *p) for seed in range(19, -1, -1) for p in parts[::-1]] == found[::-1], "in any order"


def test_a_run_name_can_not_leave_its_folder():
    for name in ("", "../x", "a/b", ".hidden", "a b", "a\n", "-x", "é"):
        one_line(lambda name=name: Run(name))


def test_the_project_is_found_from_a_folder_below(tmp_path, monkeypatch):
    monkeypatch.delenv("PSYCOPREF_ROOT")
    inner = tmp_path / "ours" / "nbs" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path / "ours" / "settings.ini").write_text("[DEFAULT]\nlib_name = psycopref\n")
    monkeypatch.chdir(inner)
    assert project_root() == (tmp_path / "ours").resolve()
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path.resolve(), "another project's settings.ini is none of ours"


def test_the_taxonomy_of_table_4_is_whole():
    fine = [topic for node in coarse_topics().values() for topic in node["topics"]]
    assert len(fine) == len(set(fine)) == len(coarse_of()) == 42
    counted = sum(count for node in coarse_topics().values() for count in node["topics"].values())
    assert counted == paper_values()["dataset"]["speeches"] == 26483


@pytest.mark.parametrize("here", ["", "nbs", "elsewhere"])
def test_a_path_means_the_same_from_every_folder(tmp_path, monkeypatch, here):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "own.csv").write_text("a")
    monkeypatch.setenv("PSYCOPREF_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path / here)
    assert user_path("own.csv") == tmp_path / "own.csv" and user_path(tmp_path / "own.csv") == tmp_path / "own.csv"
    assert user_path("~/x") == Path.home() / "x" and user_path("none.csv") == tmp_path / "none.csv"
    (tmp_path / "elsewhere" / "only.csv").write_text("b")
    assert (user_path("only.csv") == tmp_path / "elsewhere" / "only.csv") == (here == "elsewhere")
