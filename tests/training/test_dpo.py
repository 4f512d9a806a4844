"""DPO as a job: trl's rows, a loss that starts at ln 2, references computed once, schedules, moments and points."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.training.dpo import build_dpo_trainer, dpo_rows, materialise
from psycopref.training.texts import check_batch, numbered, pair_messages, prompt_messages
from refusals import one_line
from trainings import (
    DEV,
    SETTINGS,
    TRAIN,
    log_probabilities,
    losses,
    margins,
    pull,
    run,
    same,
    train,
    weights_of,
    write,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LORA, FULL = SETTINGS["dpo lora"], SETTINGS["dpo full"]
BOTH = pytest.mark.parametrize("own", [LORA, FULL], ids=["lora", "full"])

# Rows

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "its own": None,
    "ChatML": CHATML,
    "trimmed": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if m.role == 'assistant' %}{{ "
               "eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "a prompt that merges": "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}{% if "
                            "add_generation_prompt %}assistant:I{% endif %}",
    "a turn that thinks": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last "
                          "%}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if "
                          "add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a prompt that thinks": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"),
}  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["I hear you.", " What then?", "No.\n\n", "Ünd 😀 ?", "I", "<think>", "a  b"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12),
)


def by_trl(pairs, tokenizer):
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    conversations = [
        {
            "prompt": pair_messages(pair),
            **{side: [{"role": "assistant", "content": getattr(pair, side)}] for side in ("chosen", "rejected")},
        }
        for pair in pairs.itertuples()
    ]
    args = DPOConfig(output_dir="none", max_length=None, use_cpu=True, bf16=False)
    found = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(conversations), tokenizer, args, "train"
    )
    return [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in found]


def by_trl(pairs, tokenizer):
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    said = [{side: [{"role": "assistant", "content": getattr(pair, side)}] for side in ("chosen", "rejected")}
            for pair in pairs.itertuples()]  # fmt: skip
    conversations = [{"prompt": pair_messages(pair), **own} for pair, own in zip(pairs.itertuples(), said)]
    args = DPOConfig(output_dir="none", max_length=None, use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    found = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(conversations), tokenizer, args, "train")
    return [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in found]


def templated(tiny, template):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    return tokenizer


def without_length(rows):
    return [{name: row[name] for name in row if name != "length"} for row in rows]


@pytest.mark.parametrize("template", TEMPLATES)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=3))
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_rows_are_those_that_trl_makes_of_conversations(template, texts, tiny):
    tokenizer = templated(tiny, template)
    pairs = pd.DataFrame(
        [(i, *own) for i, own in enumerate(texts)], columns=["prefID", "question", "chosen", "rejected"]
    )
    rows, long = dpo_rows(pairs, tokenizer, 10**6)
    assert not long and without_length(rows) == by_trl(pairs, tokenizer)
    assert all(
        row["length"] == sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows
    )


def test_rows_of_another_domain_are_its_own_conversation(tiny):
    tokenizer = load_tokenizer(tiny)
    talk = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "Three."}]
    talk += [{"role": "user", "content": "Why?"}]
    pairs = pd.DataFrame({"prefID": [0, 1], "question": ["I count.", "not read"], "messages": [None, talk]})
    pairs = pairs.assign(chosen="Because.", rejected="No.")
    rows, _ = dpo_rows(pairs, tokenizer, 10**6)
    assert without_length(rows) == by_trl(pairs, tokenizer)
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
    [cut], _ = dpo_rows(pairs.assign(chosen_cut=True, rejected_cut=False), tokenizer, 10**6)
    n = len(cut["chosen_ids"])
    assert cut["chosen_ids"] == ended["chosen_ids"][:n] and n < len(ended["chosen_ids"])
    assert tokenizer.decode(cut["prompt_ids"] + cut["chosen_ids"]).endswith(text)
    assert cut["rejected_ids"] == ended["rejected_ids"] and cut["prompt_ids"] == ended["prompt_ids"]
    assert cut["length"] == len(cut["prompt_ids"]) + n + len(cut["rejected_ids"])


def test_the_limit_is_of_the_prompt_with_the_longer_answer(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    [row], _ = dpo_rows(TRAIN[:1], tokenizer, 10**6)
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert dpo_rows(TRAIN[:1], tokenizer, longest)[1] == []
    assert dpo_rows(TRAIN[:1], tokenizer, longest - 1, needed=False) == ([], [0])
    assert "dpo.max_length" in one_line(lambda: train(tiny, tmp_path, "long", replace(FULL, max_length=10)))
    assert "no pair" in one_line(lambda: dpo_rows(TRAIN[:0], tokenizer, 10**6))


# The loss


@BOTH
def test_the_first_loss_is_ln_2_and_it_falls(own, tiny, tmp_path):
    found = losses(train(tiny, tmp_path, "model", replace(own, epochs=4)))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < found[0] - 0.01


def test_the_start_as_reference_is_no_other_job(tiny, other, tmp_path):
    written = [
        write(tiny, tmp_path / name, FULL, tmp_path / "model", reference=reference)
        for name, reference in (("none", None), ("start", tiny), ("other", other))
    ]
    jobs = [json.loads((job / "job.json").read_text()) for job in written]
    assert jobs[0] == jobs[1] != jobs[2]


@pytest.mark.parametrize("own", [LORA, FULL, replace(FULL, label_smoothing=0.2)], ids=["lora", "full", "in doubt"])
@pytest.mark.parametrize("weight", [0.0, 0.4])
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
    assert abs(found - math.log(2)) > 0.01 and (not smoothing or abs((robust - plain).mean()) > 1e-3)


def test_without_a_likelihood_term_the_loss_hangs_on_no_packs(tiny, tmp_path):
    one, many = (
        train(tiny, tmp_path, f"model-{tokens}", replace(FULL, pack_tokens=tokens), dev=DEV) for tokens in (1, 4000)
    )
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

    first, values = computed()
    everything = len(TRAIN) + len(DEV)
    assert first == everything and values == pytest.approx(log_probabilities(tiny, TRAIN)[0].tolist(), rel=1e-4)
    assert computed() == (0, values), "an interrupted job finds them"
    held, others = computed(reference=other)
    assert (
        held == everything and others == pytest.approx(log_probabilities(other, TRAIN)[0].tolist(), rel=1e-4) != values
    )


def test_steps_of_another_size_are_refused():
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, world_size=3)
    check_batch(SimpleNamespace(args=args), replace(FULL, batch_size=12), "dpo")
    said = one_line(lambda: check_batch(SimpleNamespace(args=args), FULL, "dpo"))
    assert "steps of 12 pairs over 3 processes, expected 4" in said


# Schedule and moments over several jobs


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.75])
def test_two_jobs_of_one_schedule_have_the_steps_of_one_long_job(warmup, tiny, tmp_path):
    own = replace(FULL, warmup_ratio=warmup, epochs=1)

    def rates(name, settings, **more):
        return losses(train(tiny, tmp_path, name, settings, **more), "learning_rate")

    whole, first, second = (
        rates("whole", replace(own, epochs=2)),
        rates("first", own, schedule=(0, 8)),
        rates("second", own, schedule=(4, 8)),
    )
    assert first + second == pytest.approx(whole, rel=1e-12) and len(set(whole)) > 4
    assert rates("each", own) != first, "otherwise each job has its own"


def test_a_job_inside_a_schedule_goes_on_with_it(tiny, tmp_path):
    train(tiny, tmp_path, "whole", FULL, schedule=(8, 16))
    job = write(tiny, tmp_path / "job", FULL, tmp_path / "model", schedule=(8, 16))
    pull(job, 5, FULL)
    run(job)
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))


ONE = replace(FULL, batch_size=1, checkpoints=2)
PAIR = {"pairs": TRAIN[:1]}  # so that batches are the same


def moments_of(job):
    return torch.load(job / "optimiser.pt", weights_only=True)


def test_two_jobs_that_hand_on_schedule_and_moments_are_one_unbroken_job(tiny, tmp_path):
    "The same weights bit by bit. Without the moments they are others."
    how = replace(ONE, epochs=3)
    train(tiny, tmp_path, "whole", replace(ONE, epochs=6), reference=tiny, **PAIR)
    train(tiny, tmp_path, "first", how, schedule=(0, 6), optimiser="", **PAIR)
    middle, moments = find_weights(str(tmp_path / "first")), tmp_path / "first-job" / "optimiser.pt"
    for name, more in (("kept", {"optimiser": moments}), ("reset", {})):
        train(middle, tmp_path, name, how, reference=tiny, schedule=(3, 6), **more, **PAIR)
    whole, kept, reset = (weights_of(tmp_path / name) for name in ("whole", "kept", "reset"))
    assert same(kept, whole) and not same(reset, whole)
    assert {int(state["step"]) for state in moments_of(tmp_path / "kept-job").values()} == {6}
    assert not (tmp_path / "reset-job" / "optimiser.pt").exists()


def test_moments_are_kept_over_an_interruption(tiny, tmp_path):
    how = replace(ONE, epochs=6, checkpoints=3)
    train(tiny, tmp_path, "first", how, optimiser="", **PAIR)
    more = {"optimiser": tmp_path / "first-job" / "optimiser.pt"} | PAIR
    train(tiny, tmp_path, "whole", how, **more)
    job = write(tiny, tmp_path / "job", how, tmp_path / "model", **more)
    pull(job, 5, how)
    run(job)
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))
    first, second = moments_of(job), moments_of(tmp_path / "whole-job")
    assert first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)
    assert {int(state["step"]) for state in first.values()} == {12}


@pytest.mark.parametrize("fault", ["number", "shape", "gone"])
def test_moments_of_another_model_are_refused(fault, tiny, tmp_path):
    train(tiny, tmp_path, "first", replace(ONE, epochs=1), optimiser="", **PAIR)
    odd = copy.deepcopy(moments_of(tmp_path / "first-job"))
    if fault == "number":
        odd.pop(0)
    else:
        odd[0] = {key: value if key == "step" else torch.zeros(3, 2) for key, value in odd[0].items()}
    if fault != "gone":
        torch.save(odd, tmp_path / "odd.pt")
    said = one_line(lambda: train(tiny, tmp_path, "model", ONE, optimiser=tmp_path / "odd.pt", **PAIR))
    assert ("is gone" if fault == "gone" else "another model") in said and not (tmp_path / "model").exists()


def test_moments_of_adapters_are_refused(tiny, tmp_path):
    assert "dpo_iter.optimiser" in one_line(lambda: train(tiny, tmp_path, "model", LORA, optimiser=""))


# Points


def states_in(job):
    "Number of files, beside weights, by which each checkpoint can be gone on from."
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    return {n: len({own.name for own in path.iterdir()} & states) for n, path in numbered(job / "checkpoints")}


@BOTH
def test_points_stay_whole_while_they_are_needed_and_then_as_weights(own, tiny, tmp_path):
    job = write(tiny, tmp_path / "job", own, None, dev=DEV, keep_points=True)
    pull(job, 7, own)
    assert states_in(job) == {2: 0, 4: 3, 6: 3}
    found = run(job)
    kept = dict(numbered(job / "checkpoints"))
    assert found["points"] == list(kept) == [2, 4, 6, 8] and not any(states_in(job).values())
    assert run(job) == json.loads(json.dumps(found)), "without a goal its result is enough"
    every = [materialise(tiny, path, tmp_path / "points" / f"step-{step}", "float32") for step, path in kept.items()]
    assert not any(same(weights_of(a), weights_of(b)) for a, b in zip(every, every[1:]))
    best = find_weights(str(every[list(kept).index(found["best_step"])]))
    loss = torch.nn.functional.softplus(-margins(best, tiny, DEV, own.beta)).mean().item()
    assert loss == pytest.approx(found["dev_loss"], rel=1e-4)

    def stamp():
        return (every[0] / "model.safetensors").stat().st_mtime_ns

    before = stamp()
    assert every[0] == materialise(tiny, kept[2], every[0], "float32") and stamp() == before, "the same one is kept"
    assert "holds no weights" in one_line(lambda: materialise(tiny, Path("gone"), every[0], "float32"))
    materialise(tiny, kept[8], every[0], "float32")
    assert same(weights_of(every[0]), weights_of(every[-1])), "one of another checkpoint is not"


def test_points_are_those_of_no_interruption(tiny, tmp_path):
    train(tiny, tmp_path, "whole", LORA, dev=DEV, keep_points=True)
    job = write(tiny, tmp_path / "job", LORA, tmp_path / "model", dev=DEV, keep_points=True)
    pull(job, 7, LORA)
    (job / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()  # so that it goes on from the one before
    assert run(job)["points"] == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        names = [own / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors"
                 for own in (job, tmp_path / "whole-job")]  # fmt: skip
        assert names[0].read_bytes() == names[1].read_bytes()


def test_nobody_goes_on_from_a_point_without_its_optimiser(tiny, tmp_path):
    "Where the last two are lost, the training begins anew: a resume without moments would end with other weights."
    train(tiny, tmp_path, "whole", FULL, keep_points=True)
    job = write(tiny, tmp_path / "job", FULL, tmp_path / "model", keep_points=True)
    pull(job, 7, FULL)
    for step in (4, 6):
        (job / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert states_in(job) == {2: 0, 4: 3, 6: 3}
    run(job)
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))
