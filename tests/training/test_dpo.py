"""DPO as a job: trl's rows, the loss written out, references computed once, schedules, moments and points."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psycopref.core.files import SCHEMAS, read_rows, write_rows
from psycopref.core.principles import principle_keys
from psycopref.core.prompts import responding_prompt
from psycopref.feedback.pairing import answer_columns, make_pairs, scored_responses, with_answers
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from psycopref.training.dpo import build_dpo_trainer, dpo_rows, materialise, train_policy
from psycopref.training.jobs import run_or_launch
from psycopref.training.packing import EvenSampler
from psycopref.training.texts import merge_policy, numbered, pair_messages, prompt_messages
from refusals import one_line
from trainings import DEV, SETTINGS, TRAIN, log_probabilities, losses, margins, pull, same, train, weights_of, write

PRINCIPLE_KEYS = principle_keys()

pytestmark = pytest.mark.usefixtures("one_thread")

LORA, FULL = SETTINGS["dpo lora"], SETTINGS["dpo full"]

# Rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "its own": None,
    "ChatML": CHATML,
    "trimmed": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "a prompt that merges": "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:I{% endif %}",
    "a turn that thinks": CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    ),
    "a prompt that thinks": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"),
}
TEXTS = st.one_of(
    st.sampled_from(["I hear you.", " What then?", "No.\n\n", "Ünd 😀 ?", "I", "<think>", "a  b"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12),
)


def by_trl(pairs, tokenizer):
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    said = {side: [[{"role": "assistant", "content": text}] for text in pairs[side]] for side in ("chosen", "rejected")}
    rows = Dataset.from_dict({"prompt": [pair_messages(pair) for pair in pairs.itertuples()]} | said)
    args = DPOConfig(output_dir="none", max_length=None, use_cpu=True, bf16=False)
    found = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    return [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in found]


def templated(tiny, template):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    return tokenizer


def assert_as_trl(rows, pairs, tokenizer):
    "As trl's, less those whose answers are the same tokens, of which nothing can be learnt."
    found = [{name: own for name, own in row.items() if name != "length"} for row in rows]
    assert found == [row for row in by_trl(pairs, tokenizer) if row["chosen_ids"] != row["rejected_ids"]]
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert all(row["length"] == sum(len(row[part]) for part in parts) for row in rows)


@pytest.mark.parametrize("template", TEMPLATES)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=8, max_size=16))
@settings(
    deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_rows_are_those_that_trl_makes_of_conversations(template, texts, tiny):
    tokenizer = templated(tiny, template)
    pairs = pd.DataFrame(texts, columns=["question", "chosen", "rejected"]).assign(prefID=range(len(texts)))
    rows, long = dpo_rows(pairs, tokenizer, 10**6, needed=False)
    assert not long
    assert_as_trl(rows, pairs, tokenizer)


def test_rows_of_another_domain_are_its_own_conversation(tiny):
    tokenizer = load_tokenizer(tiny)
    talk = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "Three."}]
    talk += [{"role": "user", "content": "Why?"}]
    pairs = pd.DataFrame({"prefID": [0, 1], "question": ["I count.", "not read"], "messages": [None, talk]})
    pairs = pairs.assign(chosen="Because.", rejected="No.")
    rows, _ = dpo_rows(pairs, tokenizer, 10**6)
    assert_as_trl(rows, pairs, tokenizer)
    first, second = (tokenizer.decode(row["prompt_ids"]) for row in rows)
    assert "Three." in second and "not read" not in second
    how = dict(tokenize=False, add_generation_prompt=True)
    assert first == tokenizer.apply_chat_template(prompt_messages("I count."), **how)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "a prompt that merges"])
@pytest.mark.parametrize("text", ["What do you feel", "I see.", "Ünd 😀"])
def test_a_cut_answer_has_no_end_of_its_turn(template, text, tiny):
    "The same tokens, less what the template writes behind an answer; the other answer as ever."
    tokenizer = templated(tiny, template)
    pairs = pd.DataFrame([{"prefID": 0, "question": "No.", "chosen": text, "rejected": "Why?"}])
    [ended], _ = dpo_rows(pairs, tokenizer, 10**6)
    [cut], _ = dpo_rows(pairs.assign(chosen_end="length", rejected_end="stop"), tokenizer, 10**6)
    n = len(cut["chosen_ids"])
    assert cut["chosen_ids"] == ended["chosen_ids"][:n] and n < len(ended["chosen_ids"])
    assert tokenizer.decode(cut["prompt_ids"] + cut["chosen_ids"]).endswith(text)
    assert cut["rejected_ids"] == ended["rejected_ids"] and cut["prompt_ids"] == ended["prompt_ids"]
    assert cut["length"] == len(cut["prompt_ids"]) + n + len(cut["rejected_ids"])


def test_an_answer_of_the_pool_that_the_limit_cut_is_trained_on_without_an_end_of_its_turn(tiny, tmp_path):
    "From what a model replied to the tokens of the job, through the files in which a stage leaves its rows."
    names = [("a", "length"), ("b", "stop"), ("c", "length")]
    rows = [("s-0", name, f"I hear you {name}", how, 4, name) for name, how in names]
    responses = pd.DataFrame(rows, columns=list(SCHEMAS["responses"]))
    rated = [("s-0", name, key, 5 - 2 * i, "", "r", 0) for i, (name, _) in enumerate(names) for key in PRINCIPLE_KEYS]
    ratings = pd.DataFrame(rated, columns=list(SCHEMAS["ratings"]))
    speeches = pd.DataFrame({"speech_id": ["s-0"], "speech": ["I count the stairs."], "split": ["train"]})
    pairs = make_pairs(speeches, scored_responses(responses, ratings), ("train",), 1.0, best_worst=False)
    write_rows(tmp_path / "pairs.parquet", "pairs", pairs[list(SCHEMAS["pairs"])])
    write_rows(tmp_path / "answers.parquet", "pair_answers", answer_columns(pairs))
    answers = read_rows(tmp_path / "answers.parquet", "pair_answers")
    pairs = with_answers(read_rows(tmp_path / "pairs.parquet", "pairs"), answers)
    job = write(tiny, tmp_path / "job", replace(FULL, batch_size=3, epochs=1), None, pairs=pairs)
    trainer, tokenizer, facts = build_dpo_trainer(job)
    end, ended = tokenizer.eos_token_id, {f"I hear you {name}": how == "stop" for name, how in names}
    for row in trainer.train_dataset:
        for side in ("chosen_ids", "rejected_ids"):
            text = tokenizer.decode(row[side], skip_special_tokens=True).strip()
            assert (end in row[side]) == ended[text], text
    assert facts["cut_share"] == pytest.approx(4 / 6)


def test_the_limit_is_of_the_prompt_with_the_longer_answer(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    [row], _ = dpo_rows(TRAIN[:1], tokenizer, 10**6)
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert dpo_rows(TRAIN[:1], tokenizer, longest)[1] == []
    assert dpo_rows(TRAIN[:1], tokenizer, longest - 1, needed=False) == ([], [0])
    assert "dpo.max_length" in one_line(lambda: train(tiny, tmp_path, "long", replace(FULL, max_length=10)))
    assert "no pair" in one_line(lambda: dpo_rows(TRAIN[:0], tokenizer, 10**6))


# The loss


def test_the_start_as_reference_is_no_other_job(tiny, other, tmp_path):
    references = {"none": None, "start": tiny, "other": other}
    for name, own in references.items():
        write(tiny, tmp_path / name, FULL, tmp_path / "model", reference=own)
    jobs = [json.loads((tmp_path / name / "job.json").read_text()) for name in references]
    assert jobs[0] == jobs[1] != jobs[2]


@pytest.mark.parametrize(
    "own, weight",
    [(LORA, 0.4), (FULL, 0.0), (replace(FULL, label_smoothing=0.2), 0.4)],
    ids=["lora", "full", "in doubt"],
)
def test_the_first_loss_is_the_one_written_out(own, weight, tiny, other, tmp_path):
    """Held by another model; in doubt, a share of labels is thought to be flipped (robust DPO); the likelihood term is
    that of Pang et al. in packs of one pair."""
    pairs, smoothing = TRAIN[:4], own.label_smoothing
    ours, (chosen, _, tokens) = margins(tiny, other, pairs, own.beta), log_probabilities(tiny, pairs)
    plain, flipped = (torch.nn.functional.softplus(sign * ours) for sign in (-1, 1))
    robust = ((1 - smoothing) * plain - smoothing * flipped) / (1 - 2 * smoothing)
    how = replace(own, pack_tokens=1, epochs=1)
    found = losses(train(tiny, tmp_path, "model", how, pairs=pairs, reference=other, nll_weight=weight))[0]
    # terms of size 1 may cancel, so float32 leaves some 1e-6, by processor
    assert found == pytest.approx((robust - weight * chosen / tokens).mean().item(), rel=1e-4, abs=1e-6)
    assert abs(found - 0.693147) > 0.01 and (not smoothing or abs((robust - plain).mean()) > 1e-3)


def test_length_normalised_the_first_loss_is_that_of_log_ratios_for_each_token(tiny, other, tmp_path):
    pairs, own = TRAIN[:4], replace(FULL, length_normalised=True, beta=5.0, epochs=1)
    (chosen, rejected, n), (held, held_rejected, _) = (log_probabilities(who, pairs) for who in (tiny, other))
    swapped = pairs.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    mean = (chosen - held) / n - (rejected - held_rejected) / log_probabilities(tiny, swapped)[2]
    found = losses(train(tiny, tmp_path, "model", own, pairs=pairs, reference=other))[0]
    assert found == pytest.approx(torch.nn.functional.softplus(-own.beta * mean).mean().item(), rel=1e-4)
    plain = losses(train(tiny, tmp_path, "plain", replace(own, length_normalised=False), pairs=pairs, reference=other))
    assert abs(found - plain[0]) > 0.01


@pytest.mark.parametrize("normalised", [False, True])
def test_without_a_likelihood_term_the_loss_hangs_on_no_packs(normalised, tiny, tmp_path):
    how = replace(FULL, epochs=1, learning_rate=3e-3, length_normalised=normalised)
    one, many = (train(tiny, tmp_path, f"model-{n}", replace(how, pack_tokens=n)) for n in (1, 4000))
    assert (one["pack_size"], many["pack_size"]) == (1, 4) and losses(one) == pytest.approx(losses(many), abs=1e-5)


# References


def test_the_reference_is_computed_once(tiny, other, tmp_path, monkeypatch):
    from trl import DPOTrainer

    calls, real = [], DPOTrainer.compute_ref_log_probs

    def counting(self, model, inputs):
        calls.append(len(inputs["input_ids"]) // 2)
        return real(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counting)

    def computed(**more):
        calls.clear()
        trainer, _, _ = build_dpo_trainer(write(tiny, tmp_path / "job", FULL, tmp_path / "model", dev=DEV, **more))
        return sum(calls), list(trainer.train_dataset["ref_chosen_logps"])

    everything, expected = len(TRAIN) + len(DEV), [log_probabilities(own, TRAIN)[0].tolist() for own in (tiny, other)]
    first, values = computed()
    assert first == everything and values == pytest.approx(expected[0], rel=1e-4)
    assert computed() == (0, values), "an interrupted job finds them"
    held, others = computed(reference=other)
    assert held == everything and others == pytest.approx(expected[1], rel=1e-4) != values


# Steps


def test_steps_by_count_go_into_as_many_passes_as_they_need_and_stop_there(tiny, tmp_path):
    "Nine pairs in batches of four: two steps in a pass, one pair sits out; epochs say nothing."
    found = train(tiny, tmp_path, "model", replace(FULL, epochs=1, steps=5, checkpoints=1), pairs=TRAIN[:9])
    assert (found["steps"], found["taken"], len(losses(found))) == (5, 5, 5)
    sampler, taken = EvenSampler([9] * 9, 4, 4, 0), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        taken += list(sampler)
    assert (found["passes"], found["left_out"], found["warmup_steps"]) == (2.222, 1, 1)
    assert found["unseen"] == 9 - len({*taken[:20]}) > 9 - len({*taken}), "the third pass ends in its middle"
    one = train(tiny, tmp_path, "one", replace(FULL, epochs=9, steps=1, checkpoints=1), pairs=TRAIN[:9])
    assert (one["taken"], one["unseen"]) == (1, 5) and losses(one) == losses(found)[:1]


# Schedule and moments over several jobs

ONE = replace(FULL, batch_size=1, checkpoints=3, epochs=6, warmup_ratio=0.6)
PAIR = {"pairs": TRAIN[:1]}  # so that batches are the same


def moments_of(job):
    return torch.load(job / "optimiser.pt", weights_only=True)


def test_two_jobs_that_hand_on_schedule_and_moments_are_one_unbroken_job(tiny, tmp_path):
    "The same weights bit by bit, with a warm-up that ends in the second. Without moments or schedule they are others."
    how = replace(ONE, epochs=3)
    train(tiny, tmp_path, "whole", ONE, reference=tiny, **PAIR)
    train(tiny, tmp_path, "first", how, schedule=(0, 6), optimiser="", **PAIR)
    middle, moments = find_weights(str(tmp_path / "first")), tmp_path / "first-job" / "optimiser.pt"
    kept = {"schedule": (3, 6), "optimiser": moments}
    for name, more in (("kept", kept), ("reset", kept | {"optimiser": None}), ("each", kept | {"schedule": None})):
        train(middle, tmp_path, name, how, reference=tiny, **more, **PAIR)
    whole, kept, reset, each = (weights_of(tmp_path / name) for name in ("whole", "kept", "reset", "each"))
    assert same(kept, whole) and not same(reset, whole) and not same(each, whole)
    assert {int(state["step"]) for state in moments_of(tmp_path / "kept-job").values()} == {6}
    facts = [json.loads((tmp_path / f"{name}-job" / "result.json").read_text()) for name in ("whole", "first", "kept")]
    assert [own["warmup_steps"] for own in facts] == [4, 3, 1]
    assert not (tmp_path / "reset-job" / "optimiser.pt").exists()


def test_schedule_and_moments_are_kept_over_an_interruption_and_those_of_another_model_refused(tiny, tmp_path):
    train(tiny, tmp_path, "first", replace(ONE, epochs=1), optimiser="", **PAIR)
    kept = tmp_path / "first-job" / "optimiser.pt"
    more = {"optimiser": kept, "schedule": (1, 7)} | PAIR
    train(tiny, tmp_path, "whole", ONE, **more)
    job = write(tiny, tmp_path / "job", ONE, tmp_path / "model", **more)
    pull(job, 5, ONE)
    run_or_launch(job)
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))
    first, second = moments_of(job), moments_of(tmp_path / "whole-job")
    assert first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)
    assert {int(state["step"]) for state in first.values()} == {7}
    short, odd = copy.deepcopy(first), copy.deepcopy(first)
    short.pop(0)
    odd[0] = {key: value if key == "step" else torch.zeros(3, 2) for key, value in odd[0].items()}
    for states, expected in ((short, "another model"), (odd, "another model"), (None, "is gone")):
        torch.save(states, kept) if states else kept.unlink()
        assert expected in one_line(lambda: train(tiny, tmp_path, "odd", ONE, **more))
    assert not (tmp_path / "odd").exists()
    assert "dpo_iter.optimiser" in one_line(lambda: train(tiny, tmp_path, "adapters", LORA, optimiser=""))


# Points


def states_in(job):
    "Number of files, beside weights, by which each checkpoint can be gone on from."
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    return {n: len({own.name for own in path.iterdir()} & states) for n, path in numbered(job / "checkpoints")}


def test_points_are_those_of_no_interruption_and_lose_their_states_in_the_end(tiny, tmp_path):
    train(tiny, tmp_path, "whole", LORA, dev=DEV, keep_points=True)
    job = write(tiny, tmp_path / "job", LORA, None, dev=DEV, keep_points=True)
    pull(job, 7, LORA)
    (job / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()  # so that it goes on from the one before
    found = run_or_launch(job)
    kept = dict(numbered(job / "checkpoints"))
    assert found["points"] == list(kept) == [2, 4, 6, 8] and not any(states_in(job).values())
    assert run_or_launch(job) == json.loads(json.dumps(found)), "without a goal its result is enough"
    for (_, whole), path in zip(numbered(tmp_path / "whole-job" / "checkpoints"), kept.values(), strict=True):
        assert same(*(weights_of(own, "adapter_model.safetensors") for own in (whole, path)))
    every = [materialise(tiny, path, tmp_path / f"step-{step}") for step, path in kept.items()]
    best = find_weights(str(every[list(kept).index(found["best_step"])]))
    loss = torch.nn.functional.softplus(-margins(best, tiny, DEV, LORA.beta)).mean().item()
    assert loss == pytest.approx(found["dev_loss"], rel=1e-4)
    before = every[0].stat().st_ino
    materialise(tiny, kept[2], every[0])
    assert every[0].stat().st_ino == before, "the same one is kept"
    assert "holds no weights" in one_line(lambda: materialise(tiny, Path("gone"), every[0]))
    first, last = weights_of(every[0]), weights_of(every[-1])
    materialise(tiny, kept[8], every[0])
    assert same(weights_of(every[0]), last) and not same(first, last), "one of another checkpoint is not"


def test_a_point_of_a_policy_that_went_on_has_its_adapters_once(tiny, tmp_path):
    "Its merged weights lie beside the adapters; adapters on top of those would count what it knew before twice."
    train(tiny, tmp_path, "first", LORA)
    merge_policy(tmp_path / "first")
    start = find_weights(str(tmp_path / "first"))
    train(start, tmp_path, "second", LORA)
    points = train_policy(start, TRAIN, LORA, None, tmp_path / "job", "float32", keep_points=True)["points"]
    place = materialise(start, tmp_path / f"job/checkpoints/checkpoint-{points[-1]}", tmp_path / "point")
    own, goal = (load_causal_lm(find_weights(str(at)), "float32").state_dict() for at in (place, tmp_path / "second"))
    assert same(own, goal)


def test_nobody_goes_on_from_a_point_without_its_optimiser(tiny, tmp_path):
    "Where the last two are lost, the training begins anew: a resume without moments would end with other weights."
    train(tiny, tmp_path, "whole", FULL, keep_points=True)
    job = write(tiny, tmp_path / "job", FULL, tmp_path / "model", keep_points=True)
    pull(job, 7, FULL)
    assert states_in(job) == {2: 0, 4: 3, 6: 3}
    for step in (4, 6):
        (job / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    run_or_launch(job)
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_pairs_asks_for_the_length_of_its_chosen_answer(tiny, tmp_path, share):
    more = [TRAIN.assign(prefID=TRAIN.prefID + 100 * i, chosen=TRAIN.chosen + f" {i}.") for i in range(20)]
    pairs = pd.concat(more, ignore_index=True)
    job = write(tiny, tmp_path / "job", replace(FULL, length_share=share), None, pairs=pairs)
    trainer, tokenizer, _ = build_dpo_trainer(job)
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in trainer.train_dataset]
    words = pairs.chosen.str.split().str.len().clip(lower=5)
    asked = [responding_prompt(q, n)[-60:] in text for q, n, text in zip(pairs.question, words, prompts)]
    plain = [responding_prompt(q)[-60:] in text for q, text in zip(pairs.question, prompts)]
    assert [not own for own in asked] == plain and abs(np.mean(asked) - share) < 0.15
    assert share == 0.5 or np.mean(asked) == share
