"""Watching a policy: the divergence against the sum written out, points as plain JSON, finished ones read and
interrupted
ones gone on with, figures without overlaps."""

import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.settings import LoraSettings, load_profile
from psycopref.gateway.cache import ReplyCache
from psycopref.gateway.gateway import Gateway
from psycopref.models.generation import Sample
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from psycopref.training import watching
from psycopref.training.scoring import load_reward_model
from psycopref.training.texts import add_lora, prompt_messages, render
from psycopref.training.watching import (
    Watcher,
    answer_statistics,
    answer_tokens,
    distinct_n,
    draw_curve,
    global_steps,
    head_only,
    kl_along,
    kl_to_base,
    overoptimisation_figure,
    summarise,
    training_curves_figure,
    watch_figure,
    watched_speeches,
)  # fmt: skip

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
)
GROUPED = SMALL | dict(num_key_value_heads=2)
ARCHITECTURES = {
    "llama": GROUPED, "gpt_neox": SMALL, "granite": GROUPED | dict(logits_scaling=3.0),
    "cohere": GROUPED | dict(logit_scale=0.4),
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
    final_logit_softcapping=2.0),
    "bloom": dict(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.3),  # takes no packs
}  # fmt: skip
GROUPS = [
    [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 4], [5, 6, 7, 30, 31, 32, 33, 34, 35, 36]],
    [[40, 41, 42]],
    [[50, 51, 52, 53], [50, 51, 2]],
]
OWN = [[5, 1, 7], [1], [2, 1]]

pytestmark = pytest.mark.usefixtures("one_thread")


def make(architecture, seed=0, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | more))
        .float()
        .eval()
    )
    if architecture == "gemma2":  # SDPA knows no soft cap
        model.set_attn_implementation("eager")
    return model


def moved(model, by=0.05, seed=1):
    "A copy with noise in all its weights."
    policy, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return policy


def written_out(policy, base, groups, own):
    "The definition: whole logits of each text alone, in float64 behind the models."
    found = []
    for texts, counts in zip(groups, own):
        found.append([])
        for text, n in zip(texts, counts):
            with torch.no_grad():
                p, q = (m(input_ids=torch.tensor([text])).logits[0].double().log_softmax(-1) for m in (policy, base))
            first = len(text) - n
            found[-1].append(
                sum((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item() for t in range(first, len(text)))
            )
    return found


def assert_close(found, expected):
    assert [len(own) for own in found] == [len(own) for own in expected]
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected)):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_equals_the_sum_written_out(architecture):
    base = make(architecture)
    policy = moved(base)
    expected = written_out(policy, base, GROUPS, OWN)
    assert min(itertools.chain(*expected)) > 1e-3, "a distance worth measuring"
    for tokens in (8192, 14, 1):
        assert_close(kl_along(policy, base, GROUPS, OWN, tokens), expected)
    assert hasattr(policy.base_model, "pack_kernel") == (architecture != "bloom"), "the way that was meant was taken"


@pytest.fixture(scope="module")
def pair():
    base = make("llama")
    return base, {by: moved(base, by) for by in (1e-6, 0.01, 0.3)}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1e-6, 0.01, 0.3]), st.integers(1, 60), st.data())
def test_never_negative_and_the_same_one_by_one(pair, by, budget, data):
    base, policies = pair
    token = st.integers(0, 63)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3))
    answers = [data.draw(st.lists(st.lists(token, max_size=8), min_size=1, max_size=3)) for _ in prompts]
    groups, own = (
        [[prompt + answer for answer in texts] for prompt, texts in zip(prompts, answers)],
        [[len(a) for a in texts] for texts in answers],
    )
    together = kl_along(policies[by], base, groups, own, budget)
    assert all(nats >= 0 for nats in itertools.chain(*together))
    assert all(nats == 0 for nats, n in zip(itertools.chain(*together), itertools.chain(*own)) if not n)
    alone = [
        [kl_along(policies[by], base, [[text]], [[n]])[0][0] for text, n in zip(texts, counts)]
        for texts, counts in zip(groups, own)
    ]
    assert_close(together, alone)


def test_logits_never_exist_whole(monkeypatch):
    base = make("llama")
    policy, seen = moved(base), []
    whole = kl_along(policy, base, GROUPS, OWN)
    monkeypatch.setattr(watching, "_SCORES", 3 * 64)
    policy.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape[-2]))
    assert_close(kl_along(policy, base, GROUPS, OWN), whole)
    assert max(seen) == 3 and sum(seen) == sum(map(sum, OWN)), "three positions at a time, and only the answers'"


def test_models_are_left_whole():
    base = make("llama")
    before = base(input_ids=torch.tensor([[5, 6]])).logits
    with pytest.raises(ZeroDivisionError), head_only(base):
        raise ZeroDivisionError
    assert "forward" not in vars(base.base_model)
    kl_along(moved(base), base, GROUPS, OWN)
    assert torch.equal(base(input_ids=torch.tensor([[5, 6]])).logits, before)


def test_a_model_is_no_way_from_itself_whatever_its_dropout():
    base = make("gpt_neox", hidden_dropout=0.5)
    assert set(itertools.chain(*kl_along(copy.deepcopy(base).train(), base.train(), GROUPS, OWN))) == {0.0}


def test_adapters_count():
    base = make("llama")
    policy = add_lora(copy.deepcopy(base), LoraSettings(rank=2, alpha=8))
    assert set(itertools.chain(*kl_along(policy, base, GROUPS, OWN))) == {0.0}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    found = kl_along(policy, base, GROUPS, OWN)
    assert_close(found, written_out(policy.merge_and_unload(), base, GROUPS, OWN))


# from texts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_weights("random-tiny"))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>TAIL{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tail", ["", "\n", "\n\n"])
@pytest.mark.parametrize("answer", ["Tell me more.", "", "\nWell"])
def test_an_answer_ends_with_its_end_token(tokenizer, answer, tail):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML.replace("TAIL", tail)
    end = own.convert_tokens_to_ids("<|im_end|>")
    ids, n = answer_tokens(own, prompt_messages("I count."), answer, {end})
    assert ids[-1] == end and ids[-n:].count(end) == 1, (
        "the template's tail does not count, nor the ends of earlier turns"
    )
    assert own.decode(ids) == render(own, prompt_messages("I count."), answer).removesuffix(tail)
    assert own.decode(ids[-n:]).strip("\n") == answer.strip("\n") + "<|im_end|>"


def test_a_template_without_an_end_counts_all(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}{% endif %}"
    ids, n = answer_tokens(own, [{"role": "user", "content": "Hm."}], "Tell me more.", {own.eos_token_id})
    assert own.decode(ids[-n:]).strip() == "Tell me more."
    own.chat_template = (
        "{% if add_generation_prompt %}<|im_start|>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert "common start" in one_line(
        lambda: answer_tokens(own, [{"role": "user", "content": "Hm."}], "Tell me.", set())
    )


def test_texts_are_measured_to_the_end_of_the_turn(tokenizer):
    base = make("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    policy, talks = moved(base), [prompt_messages("I count the stairs."), prompt_messages("No.")]
    answers = [["Tell me more.", "", "What happens then?"], ["I see."]]
    found = kl_to_base(policy, base, tokenizer, talks, answers, name="")
    for messages, texts, nats in zip(talks, answers, found):
        before = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).input_ids
        for text, own in zip(texts, nats):
            after = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
            assert own == pytest.approx(written_out(policy, base, [[before + after]], [[len(after)]])[0][0], rel=1e-5)
    assert kl_to_base(policy, base, tokenizer, [], [], name="") == [] and kl_to_base(
        policy, base, tokenizer, talks[:1], [[]], name=""
    ) == [[]]


def test_what_cant_be_compared_is_refused():
    base = make("llama")
    assert "one vocabulary" in one_line(lambda: kl_along(make("llama", vocab_size=50), base, GROUPS, OWN))
    broken = moved(base, float("inf"))
    assert "no finite number" in one_line(lambda: kl_along(broken, base, GROUPS, OWN))


# words and points


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="aAb ,.", max_size=20), max_size=6), st.integers(1, 3))
def test_distinct_n_is_a_share_that_repetition_lowers(texts, n):
    share = distinct_n(texts, n)
    assert 0 <= share <= 1
    assert (
        distinct_n(texts * 2, n) == pytest.approx(share / 2)
        and distinct_n([text.upper() for text in texts], n) == share
    )


def said(*texts, reason="stop"):
    return [Sample(text, reason, len(text.split()) + 1) for text in texts]


def test_statistics():
    found = answer_statistics([*said("It is hard.", ""), *said("It is", reason="length")])
    assert found == {"tokens": 8 / 3, "cut_share": 1 / 3, "distinct_1": 3 / 5, "distinct_2": 2 / 3}


NUMBER = st.floats(-5, 5, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.text(alphabet="ab .", max_size=12), NUMBER, st.floats(0, 40), st.booleans()),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
    NUMBER,
    st.booleans(),
)
def test_points_are_plain_json(drawn, reference, judged):
    def inputs(order):
        own = {f"s{i}": drawn[i] for i in order}
        column = [{name: [row[k] for row in rows] for name, rows in own.items()} for k in range(4)]
        return (
            {name: said(*texts) for name, texts in column[0].items()},
            column[1],
            {name: [reference] for name in own},
            column[2],
            column[3] if judged else None,
        )

    point = summarise(8, *inputs(range(len(drawn))), samples=20, step=2, dropped_share=0.5)
    assert json.loads(json.dumps(point, allow_nan=False)) == point
    flat = list(itertools.chain(*drawn))
    assert (
        point["answers"] == len(flat)
        and point["speeches"] == len(drawn)
        and (point["pairs"], point["step"], point["dropped_share"]) == (8, 2, 0.5)
    )
    assert point["proxy"] == pytest.approx(100 * sum(row[1] > reference for row in flat) / len(flat))
    for name in ("reward", "proxy", "judged", "kl", "words"):
        low, high = point[f"{name}_low"], point[f"{name}_high"]
        few = name not in ("proxy", "judged")  # without bounds there is none below eight speeches
        assert (low is None) == (high is None) == (few or point[name] is None)
        assert low is None or low <= high
    assert (point["judged"] is None) == (not judged)
    turned = summarise(8, *inputs(reversed(range(len(drawn)))), samples=20, step=2, dropped_share=0.5)
    assert all(
        turned[name] == pytest.approx(value) for name, value in point.items() if name[-4:] not in ("_low", "high")
    ), "the order of speeches says nothing"


def test_intervals_count_speeches_not_answers():
    names = [f"s{i}" for i in range(30)]
    once, four = (
        summarise(
            0,
            {name: said(*"a" * n) for name in names},
            {name: [float(i)] * n for i, name in enumerate(names)},
            {name: [10.0] for name in names},
        )
        for n in (1, 4)
    )
    assert once["reward"] == four["reward"] and once["proxy"] == pytest.approx(100 * 19 / 30)
    assert four["reward_high"] - four["reward_low"] > 0.9 * (once["reward_high"] - once["reward_low"])
    assert once["reward_low"] < once["reward"] < once["reward_high"]


def test_some_speeches_may_be_unjudged():
    answers, ones = {"a": said("x"), "b": said("y"), "c": said("z")}, {name: [1.0] for name in "abc"}
    point = summarise(0, answers, ones, ones, judged={"a": [1], "c": [0]})
    assert point["judged"] == 50 and point["proxy"] == 0 and point["speeches"] == 3
    assert summarise(0, answers, ones, ones, judged={})["judged"] is None


# figures


def invented(n, top=8000, judged=True, intervals=True, **more):
    points = []
    for f in (i / max(1, n - 1) for i in range(n)):
        values = {"reward": 3 * f, "proxy": 30 + 50 * f, "judged": 30 + 80 * f * (1 - f) if judged else None}
        values |= {"kl": 60 * f, "words": 100 + 80 * f}
        bands = {
            f"{key}_{side}": value + by if intervals and value is not None else None
            for key, value in values.items()
            for side, by in (("low", -4), ("high", 4))
        }
        shares = {"cut_share": 0.1 * f, "distinct_1": 0.2, "distinct_2": 0.6 - 0.2 * f}
        points.append({"pairs": int(top * f), "step": None, "tokens": 130.0, **values, **bands, **shares, **more})
    return points


def boxes(figure):
    "Where the axes with their labels, the legend and the figure's own labels stand."
    figure.canvas.draw()
    shown = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible() and axes.axison]
    around = [legend.get_window_extent() for legend in figure.legends] + [
        text.get_window_extent() for text in figure.texts
    ]
    around += [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    return shown + around


def assert_tidy(figure):
    import matplotlib.pyplot as plt

    for one, other in itertools.combinations(boxes(figure), 2):
        over = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(over) < 3, f"{one} and {other} overlap"
    plt.close(figure)


CURVES = {
    "offline: the dataset's pairs": invented(6, 26000),
    "DPO-Iter: the newest policy's own pairs": invented(17, dropped_share=0.1),
    "online: one round": invented(1),
}
LOGGED = "loss rewards/margins rewards/accuracies rewards/chosen rewards/rejected logps/chosen logps/rejected".split()
LOG = [
    {"step": i, **{f"{at}{key}": float(i) for at in ("", *(["eval_"] if i == 3 else [])) for key in LOGGED}}
    for i in range(1, 4)
]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_nothing_overlaps(count):
    curves = dict(list(CURVES.items())[:count]) | {
        f"Llama 3.1 8B Instruct, policy {i}": invented(3) for i in range(count - 3)
    }
    assert_tidy(watch_figure(curves))
    assert_tidy(overoptimisation_figure(curves))
    assert_tidy(training_curves_figure({name: [LOG] * min(count, 3) for name in curves}))


def test_what_is_none_is_not_drawn():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    points = invented(3, judged=False) + invented(1, intervals=False)
    x = [point["pairs"] for point in points]
    draw_curve(axes, x, points, "judged", 0)
    assert len(axes.lines[0].get_xdata()) == 1 and not axes.collections
    draw_curve(axes, x, points, "reward", 1)
    assert len(axes.lines[1].get_xdata()) == 4 and len(axes.collections) == 1
    plt.close(figure)
    figure = overoptimisation_figure({"not judged": invented(4, judged=False)})
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "reward model" in said and "reward model above judge" not in said
    plt.close(figure)


def test_the_gap_is_shaded_where_the_reward_model_is_above():
    import matplotlib.pyplot as plt

    rows = ((0, 0.0, 30, 50), (8, 4.0, 60, 60), (16, 16.0, 90, 40))
    points = [dict(zip(("pairs", "kl", "proxy", "judged"), row)) for row in rows]
    figure = overoptimisation_figure({"gamed": points})
    axes = figure.axes[0]
    [gap] = [c for c in axes.collections if c.get_label() == "reward model above judge"]
    corners = gap.get_paths()[0].vertices
    assert (
        corners[:, 0].min() == pytest.approx(2, abs=0.1)
        and corners[:, 0].max() == pytest.approx(4)
        and corners[:, 1].max() == pytest.approx(90)
    )
    best = [line for line in axes.lines if line.get_label() == "judged best"]
    assert [line.get_xydata().tolist() for line in best] == [[[2.0, 60.0]]]
    plt.close(figure)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True), min_size=1, max_size=5))
def test_iterations_lie_behind_one_another(steps):
    entries, borders = global_steps([[{"step": s} for s in sorted(own)] for own in steps])
    assert [e["step"] for e in entries] == sorted(e["step"] for e in entries) and len(entries) == sum(map(len, steps))
    assert len(borders) == len(steps) - 1 and entries[-1]["step"] == sum(map(max, steps))


def test_an_iteration_shows_where_it_begins():
    import matplotlib.pyplot as plt

    figure = training_curves_figure({"DPO": LOG, "DPO-Iter": [LOG, LOG]})
    margins = [line for line in figure.axes[2].lines if line.get_linewidth() < 1]
    assert [line.get_xdata()[0] for line in margins] == [3]
    losses = [[*line.get_ydata()] for line in figure.axes[0].lines]
    assert [1.0, 2.0, 3.0, 1.0, 2.0, 3.0] in losses and [3.0, 3.0] in losses, "training and development pairs"
    plt.close(figure)


# one point after another


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
    said = {"speeches": 4, "answers": 8, "pairs": 16, "step": 4, "curve": "DPO", "split": "dev"}
    assert point | said == point
    assert point["kl"] > 0.1 and 0 <= point["judged_low"] <= point["judged"] <= point["judged_high"] <= 100
    assert point["kl_low"] is None, "too few speeches for the interval of a mean without bounds"
    monkeypatch.setattr(watching, "kl_to_base", never)  # the base model is no way from itself
    base = watcher.look(lambda: models.tiny, "base", 0)
    assert base["kl"] == 0 and base["reward"] != point["reward"]
    monkeypatch.setattr(watching, "sample_candidates", never)
    assert watcher.look(never, "step-4", 16) == point


@pytest.mark.parametrize("lost", ["step-4/block-0001.json", "reference/rewards.json"])
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


def test_nobody_is_asked_where_points_are_not_judged(watcher, models, monkeypatch):
    monkeypatch.setattr(watching, "battle", never)
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
    monkeypatch.setattr(watching, "answer", lambda *arguments, **named: whole[1:])
    assert (
        "3 of 4" in one_line(lambda: watcher.look(lambda: models.tiny, "base", 0))
        and not (watcher.folder / "base" / "point.json").exists()
    )
    evaluation = replace(watcher.profile.evaluation, coverage=0.7)
    point = replace(watcher, profile=replace(watcher.profile, evaluation=evaluation)).look(
        lambda: models.tiny, "base", 0
    )
    assert (point["speeches"], point["answers"]) == (3, 6)
