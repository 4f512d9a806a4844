"""DPO as a job: trl's rows, a loss that starts at ln 2, references computed once, the same weights after an interruption and on two processes."""

import copy
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psycopref.training import dpo as dpo_training
from psycopref.core.settings import DpoSettings, LoraSettings
from psycopref.training.dpo import build_dpo_trainer, dpo_rows, materialise, run_dpo_job, train_policy, write_dpo_job
from psycopref.training.jobs import launch_command, run_or_launch
from psycopref.training.texts import check_batch, last_checkpoint, numbered, pair_messages, prompt_messages
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = DpoSettings(
    epochs=2,
    batch_size=4,
    pack_tokens=300,
    learning_rate=3e-3,
    warmup_ratio=0.1,
    max_length=300,
    checkpoints=4,
    lora=LoraSettings(rank=4, alpha=8),
)
FULL = replace(LORA, lora=LoraSettings(), learning_rate=1e-3)
BOTH = pytest.mark.parametrize("own", [LORA, FULL], ids=["lora", "full"])


@pytest.fixture(scope="module")
def tiny(shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        return find_weights("random-tiny")


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    "Another model of the same shape, to be held by."
    folder = tmp_path_factory.mktemp("other")
    model = load_causal_lm(tiny, "float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return find_weights(str(folder))


def some_pairs(n, start=0):
    places = ("stairs", "doors", "windows", "cups", "letters", "coats", "trains")
    good = ("What do you feel then?", "I hear how tiring it is. What would help?", "That sounds like a lot.")
    bad = ("Stop it.", "You should pull yourself together, because everybody else does.", "Whatever.")
    return pd.DataFrame([{"ID": f"s-{i}", "prefID": i, "question": f"I count the {places[i % 7]} number {i} again and "
                                                                   "again.",
                          "chosen": good[i % 3], "rejected": bad[i % 3]} for i in range(start, start + n)])  # fmt: skip


TRAIN, DEV = some_pairs(19), some_pairs(5, 100)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train(tiny, tmp_path, name, own=FULL, seed=0, pairs=TRAIN, **more):
    return train_policy(tiny, pairs, own, tmp_path / name, tmp_path / f"{name}-job", "float32", seed, **more)


def losses(result, key="loss"):
    return [entry[key] for entry in result["log"] if key in entry]


def log_probabilities(weights, pairs, max_length=300):
    "By the plain model, each text alone: (sums of chosen answers, sums of rejected ones, tokens of chosen answers)."
    model, found = load_causal_lm(weights, "float32").eval(), {"chosen": [], "rejected": []}
    rows, _ = dpo_rows(pairs, load_tokenizer(weights), max_length)
    for row in rows:
        for side, own in found.items():
            ids, first = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            own.append(sum(logits[i - 1, ids[i]].item() for i in range(first, len(ids))))
    return *map(torch.tensor, found.values()), torch.tensor([len(row["chosen_ids"]) for row in rows])


def margins(policy, reference, pairs, beta):
    (chosen, rejected, _), (held_chosen, held_rejected, _) = (
        log_probabilities(policy, pairs),
        log_probabilities(reference, pairs),
    )
    return beta * ((chosen - held_chosen) - (rejected - held_rejected))


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


@pytest.mark.parametrize("template", TEMPLATES)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=3))
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_rows_are_those_that_trl_makes_of_conversations(template, texts, tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    pairs = pd.DataFrame(
        [{"prefID": i, "question": q, "chosen": c, "rejected": r} for i, (q, c, r) in enumerate(texts)]
    )
    rows, long = dpo_rows(pairs, tokenizer, 10**6)
    assert not long and [{name: row[name] for name in row if name != "length"} for row in rows] == by_trl(
        pairs, tokenizer
    )
    assert [row["length"] for row in rows] == [
        sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows
    ]


def test_rows_of_another_domain_are_its_own_conversation(tiny):
    tokenizer = load_tokenizer(tiny)
    talk = [
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Why?"},
    ]
    pairs = pd.DataFrame([{"prefID": 0, "question": "I count.", "chosen": "Because.", "rejected": "No.", "messages": None},
                          {"prefID": 1, "question": "not read", "chosen": "Because.", "rejected": "No.", "messages": talk}])  # fmt: skip
    rows, _ = dpo_rows(pairs, tokenizer, 10**6)
    assert [{name: row[name] for name in row if name != "length"} for row in rows] == by_trl(pairs, tokenizer)
    assert "Three." in tokenizer.decode(rows[1]["prompt_ids"]) and "not read" not in tokenizer.decode(
        rows[1]["prompt_ids"]
    )
    assert (
        rows[0]["prompt_ids"]
        == tokenizer(
            tokenizer.apply_chat_template(prompt_messages("I count."), tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).input_ids
    )


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "a prompt that merges"])
@pytest.mark.parametrize("text", ["What do you feel", "I see.", "Ünd 😀"])
def test_a_cut_answer_has_no_end_of_its_turn(template, text, tiny):
    "The same tokens, less what the template writes behind an answer; the other answer as ever."
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    pairs = pd.DataFrame([{"prefID": 0, "question": "No.", "chosen": text, "rejected": "Why?"}])
    ([ended], _), ([cut], _) = (
        dpo_rows(own, tokenizer, 10**6) for own in (pairs, pairs.assign(chosen_cut=True, rejected_cut=False))
    )
    n = len(cut["chosen_ids"])
    assert (
        cut["chosen_ids"] == ended["chosen_ids"][:n]
        and tokenizer.decode(cut["prompt_ids"] + cut["chosen_ids"]).endswith(text)
        and n < len(ended["chosen_ids"])
    )
    assert cut["rejected_ids"] == ended["rejected_ids"] and cut["prompt_ids"] == ended["prompt_ids"]
    assert cut["length"] == len(cut["prompt_ids"]) + n + len(cut["rejected_ids"])


def test_the_limit_is_of_the_prompt_with_the_longer_answer(tiny):
    tokenizer = load_tokenizer(tiny)
    [row], _ = dpo_rows(TRAIN[:1], tokenizer, 10**6)
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert dpo_rows(TRAIN[:1], tokenizer, longest)[1] == [] and dpo_rows(
        TRAIN[:1], tokenizer, longest - 1, needed=False
    ) == ([], [0])


def test_overlong_pairs_are_listed_and_left_over_pairs_counted(tiny, tmp_path):
    own, (long, dev_long) = (
        replace(FULL, epochs=1, checkpoints=1),
        (some_pairs(1, start).assign(rejected="word " * 400) for start in (50, 200)),
    )
    found = train(tiny, tmp_path, "model", own, pairs=pd.concat([TRAIN, long]), dev=pd.concat([dev_long, DEV]))
    assert found["too_long"] == [50] and found["pairs"] == 19 and found["left_out"] == 3
    assert found["dev_too_long"] == [200] and found["dev_pairs"] == 5 and found["best_step"] == found["steps"] == 4


def test_development_pairs_that_are_all_too_long_are_done_without(tiny, tmp_path):
    found = train(tiny, tmp_path, "model", LORA, dev=some_pairs(2, 200).assign(rejected="word " * 400))
    assert found["dev_too_long"] == [200, 201] and found["dev_pairs"] == 0 and found["best_step"] == found["steps"]


def test_pairs_that_are_all_too_long_or_none_are_refused(tiny, tmp_path):
    assert "dpo.max_length" in one_line(lambda: train(tiny, tmp_path, "long", replace(FULL, max_length=10)))


# The loss


@BOTH
def test_the_first_loss_is_ln_2_and_it_falls(own, tiny, tmp_path):
    found = losses(train(tiny, tmp_path, "model", replace(own, epochs=4)))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < found[0] - 0.01


@pytest.mark.parametrize("own", [replace(LORA, batch_size=4), replace(FULL, batch_size=4)], ids=["lora", "full"])
def test_held_by_another_model_the_first_loss_is_the_one_written_out(own, tiny, other, tmp_path):
    pairs = TRAIN[:4]
    found = losses(train(tiny, tmp_path, "model", own, pairs=pairs, reference=other))
    expected = torch.nn.functional.softplus(-margins(tiny, other, pairs, own.beta)).mean().item()
    assert found[0] == pytest.approx(expected, rel=1e-4) and abs(expected - math.log(2)) > 0.01


def test_the_start_as_reference_is_no_other_job(tiny, other, tmp_path):
    jobs = []
    for name, reference in (("none", None), ("start", tiny), ("other", other)):
        write_dpo_job(tmp_path / name, tiny, TRAIN, FULL, tmp_path / "model", "float32", 0, reference=reference)
        jobs.append(json.loads((tmp_path / name / "job.json").read_text()))
    assert jobs[0] == jobs[1] != jobs[2]


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_likelihood_term_is_the_mean_over_the_tokens_of_a_pack(weight, tiny, tmp_path):
    "trl's: in packs of one pair, the formula of Pang et al."
    pairs = TRAIN[:4]
    chosen, _, tokens = log_probabilities(tiny, pairs)
    found = losses(train(tiny, tmp_path, "model", replace(FULL, pack_tokens=1), pairs=pairs, nll_weight=weight))
    assert found[0] == pytest.approx(math.log(2) - weight * (chosen / tokens).mean().item(), rel=1e-5)


def test_without_a_likelihood_term_the_loss_hangs_on_no_packs(tiny, tmp_path):
    found = {
        tokens: train(tiny, tmp_path, f"model-{tokens}", replace(FULL, pack_tokens=tokens), dev=DEV)
        for tokens in (1, 4000)
    }
    assert [own["pack_size"] for own in found.values()] == [1, 4]
    assert losses(found[1]) == pytest.approx(losses(found[4000]), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_doubt_in_the_labels_reaches_the_loss(smoothing, tiny, other, tmp_path):
    "Robust DPO: a share of labels is thought to be flipped; not the plain loss."
    pairs = TRAIN[:4]
    own = margins(tiny, other, pairs, FULL.beta)
    plain, flipped = (torch.nn.functional.softplus(sign * own) for sign in (-1, 1))
    loss = losses(
        train(tiny, tmp_path, "model", replace(FULL, label_smoothing=smoothing), pairs=pairs, reference=other)
    )[0]
    robust = (((1 - smoothing) * plain - smoothing * flipped) / (1 - 2 * smoothing)).mean().item()
    # terms of size 1 cancel to 0.002, so float32 leaves some 1e-6, by processor
    assert loss == pytest.approx(robust, rel=1e-4, abs=1e-6) != pytest.approx(plain.mean().item(), rel=1e-3)


@pytest.mark.parametrize("own", [FULL, replace(FULL, label_smoothing=0.2)], ids=["plain", "in doubt"])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_first_step_s_loss_is_the_sum_of_its_terms(own, weight, tiny, other, tmp_path):
    pairs, smoothing = TRAIN[:4], own.label_smoothing
    ours, (chosen, _, tokens) = margins(tiny, other, pairs, own.beta), log_probabilities(tiny, pairs)
    plain, flipped = (torch.nn.functional.softplus(sign * ours) for sign in (-1, 1))
    expected = (
        (((1 - smoothing) * plain - smoothing * flipped) / (1 - 2 * smoothing) - weight * chosen / tokens).mean().item()
    )
    found = train(
        tiny, tmp_path, "model", replace(own, pack_tokens=1, epochs=1), pairs=pairs, reference=other, nll_weight=weight
    )
    assert losses(found)[0] == pytest.approx(expected, rel=1e-4)


# References


def test_the_reference_is_computed_once(tiny, other, tmp_path, monkeypatch):
    from trl import DPOTrainer

    calls, real = [], DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer,
        "compute_ref_log_probs",
        lambda self, model, inputs: calls.append(len(inputs["input_ids"]) // 2) or real(self, model, inputs),
    )

    def computed(**more):
        calls.clear()
        write_dpo_job(tmp_path / "job", tiny, TRAIN, FULL, tmp_path / "model", "float32", 0, dev=DEV, **more)
        trainer, _, _ = build_dpo_trainer(tmp_path / "job")
        return sum(calls), list(trainer.train_dataset["ref_chosen_logps"])

    first, values = computed()
    assert first == len(TRAIN) + len(DEV) and values == pytest.approx(
        log_probabilities(tiny, TRAIN)[0].tolist(), rel=1e-4
    )
    assert computed() == (0, values), "an interrupted job finds them"
    held, others = computed(reference=other)
    assert (
        held == len(TRAIN) + len(DEV)
        and others == pytest.approx(log_probabilities(other, TRAIN)[0].tolist(), rel=1e-4)
        and others != values
    )


# Going on


class Pulled(Exception):
    pass


def pull(job, stop):
    "Train a job up to a step and no further."
    from transformers import TrainerCallback

    trainer, _, _ = build_dpo_trainer(job)

    class Pull(TrainerCallback):
        def on_step_end(self, args, state, control, **keywords):
            if state.global_step == stop:
                raise Pulled

    trainer.add_callback(Pull())
    with pytest.raises(Pulled):
        trainer.train(
            resume_from_checkpoint=found and str(found) if (found := last_checkpoint(job / "checkpoints")) else None
        )


@BOTH
def test_resuming_from_any_checkpoint_gives_the_weights_of_no_interruption(own, tiny, other, tmp_path, monkeypatch):
    resumed_at, real = [], dpo_training.train_quietly
    monkeypatch.setattr(
        dpo_training,
        "train_quietly",
        lambda trainer, name, resume: resumed_at.append(resume and resume.name) or real(trainer, name, resume),
    )
    whole = train(tiny, tmp_path, "whole", own, dev=DEV, reference=other)
    expected = weights_of(tmp_path / "whole")
    for stop in (3, 5, 7):
        job = tmp_path / f"job-{stop}"
        write_dpo_job(job, tiny, TRAIN, own, tmp_path / f"model-{stop}", "float32", 0, dev=DEV, reference=other)
        pull(job, stop)
        assert numbered(job / "checkpoints")[-1][0] == stop - 1
        torn = job / "checkpoints" / f"checkpoint-{stop}"  # the power went while the next one was written
        torn.mkdir()
        (torn / "adapter_model.safetensors").write_bytes(b"half")
        resumed = run_dpo_job(job)
        assert same(weights_of(tmp_path / f"model-{stop}"), expected)
        assert (
            losses(resumed) == losses(whole)
            and resumed["best_step"] == whole["best_step"]
            and resumed["dev_loss"] == whole["dev_loss"]
        )
    assert resumed_at == [None, "checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("stop", [3, 7])
def test_adapters_in_bfloat16_go_on_in_bfloat16(stop, tiny, tmp_path):
    "peft loads adapters as float32, which trains on otherwise."
    for name in ("whole", "broken"):
        write_dpo_job(tmp_path / f"{name}-job", tiny, TRAIN, LORA, tmp_path / name, "bfloat16", 0, dev=DEV)
        if name == "broken":
            pull(tmp_path / "broken-job", stop)
        run_dpo_job(tmp_path / f"{name}-job")
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_a_seed_gives_the_same_weights_and_another_one_others(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny, tmp_path, name, LORA, seed)
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c) and not same(a, weights_of(tiny.location))


@pytest.mark.parametrize("epochs", [2, 1.5, 0.5])
def test_interrupted_after_the_last_step_no_step_is_added(epochs, tiny, tmp_path, monkeypatch):
    own = replace(FULL, epochs=epochs)
    whole = train(tiny, tmp_path, "whole", own)
    with monkeypatch.context() as patch, pytest.raises(Pulled):

        def pulled(*arguments):
            raise Pulled

        patch.setattr(dpo_training, "save_trained", pulled)
        train(tiny, tmp_path, "broken", own)
    assert not (tmp_path / "broken").exists()
    found = train(tiny, tmp_path, "broken", own)
    assert (
        losses(found) == losses(whole)
        and len(losses(found)) == int(4 * epochs)
        and same(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"))
    )


def test_a_finished_job_is_read_and_a_lost_model_made_again(tiny, tmp_path, monkeypatch):
    first = train(tiny, tmp_path, "model", LORA)
    expected = weights_of(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(dpo_training, "build_dpo_trainer", None)
        assert train(tiny, tmp_path, "model", LORA) == first
    shutil.rmtree(tmp_path / "model")
    train(tiny, tmp_path, "model", LORA)
    assert same(weights_of(tmp_path / "model"), expected)


# Several processes


def test_two_processes_train_as_one(tiny, other, tmp_path):
    "Same batches, same losses, the same weights to rounding; with and without development pairs, whose number two does not divide."
    jobs = {"dev": (FULL, {"dev": DEV, "reference": other}), "none": (LORA, {})}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    } | {"OMP_NUM_THREADS": "1"}
    running = {}
    for name, (own, more) in jobs.items():
        write_dpo_job(tmp_path / name, tiny, TRAIN, own, tmp_path / f"{name}-two", "float32", 0, **more)
        running[name] = subprocess.Popen(
            launch_command(tmp_path / name, 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    for name, (own, more) in jobs.items():
        one = train(tiny, tmp_path, f"{name}-one", own, **more)
        said = running[name].communicate(timeout=600)[1]
        assert running[name].returncode == 0, said[-2000:]
        two = json.loads((tmp_path / name / "result.json").read_text())
        assert (one["devices"], two["devices"], one["steps"]) == (1, 2, two["steps"]) and one["best_step"] == two[
            "best_step"
        ]
        for key in ("loss", "eval_loss", "rewards/margins"):
            assert losses(two, key) == pytest.approx(losses(one, key), abs=1e-5), (name, key)
        assert len(losses(two)) == 8 and len(losses(two, "eval_loss")) == (4 if more else 0)
        first, second = (weights_of(tmp_path / f"{name}-{n}") for n in ("one", "two"))
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_a_batch_that_the_devices_do_not_divide_is_refused(tiny, tmp_path, monkeypatch):
    write_dpo_job(tmp_path / "job", tiny, TRAIN, FULL, tmp_path / "model", "float32", 0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = one_line(lambda: build_dpo_trainer(tmp_path / "job"))
    assert "4" in said and "3 device" in said


def test_steps_of_another_size_are_refused():
    made = SimpleNamespace(
        args=SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, world_size=3)
    )
    check_batch(made, replace(FULL, batch_size=12), "dpo")
    assert "steps of 12 pairs over 3 processes, expected 4" in one_line(lambda: check_batch(made, FULL, "dpo"))


# Choosing


@BOTH
def test_the_kept_weights_are_those_of_the_least_development_loss(own, tiny, tmp_path):
    "Too large a step size and contrary pairs, so that the last checkpoint is not the best."
    contrary = DEV.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    found = train(tiny, tmp_path, "model", replace(own, learning_rate=0.01, epochs=3), dev=contrary)
    looked = {entry["step"]: entry["eval_loss"] for entry in found["log"] if "eval_loss" in entry}
    assert found["steps"] in looked and found["best_step"] == min(looked, key=looked.get) != found["steps"]
    expected = (
        torch.nn.functional.softplus(-margins(find_weights(str(tmp_path / "model")), tiny, contrary, own.beta))
        .mean()
        .item()
    )
    assert found["dev_loss"] == looked[found["best_step"]] == pytest.approx(expected, rel=1e-4)


def test_without_development_pairs_the_last_step_is_kept(tiny, tmp_path):
    found = train(tiny, tmp_path, "model", LORA)
    assert found["best_step"] == found["steps"] == 8 and found["dev_loss"] is None and found["points"] == []


# Schedule and moments over several jobs


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.75])
def test_two_jobs_of_one_schedule_have_the_steps_of_one_long_job(warmup, tiny, tmp_path):
    own = replace(FULL, warmup_ratio=warmup, epochs=1)
    whole = losses(train(tiny, tmp_path, "whole", replace(own, epochs=2)), "learning_rate")
    parts = [
        losses(train(tiny, tmp_path, f"part-{first}", own, schedule=(first, 8)), "learning_rate") for first in (0, 4)
    ]
    assert parts[0] + parts[1] == pytest.approx(whole, rel=1e-12) and len(set(whole)) > 4
    assert losses(train(tiny, tmp_path, "each", own), "learning_rate") != parts[0], "otherwise each job has its own"


def test_a_job_inside_a_schedule_goes_on_with_it(tiny, tmp_path):
    train(tiny, tmp_path, "whole", FULL, schedule=(8, 16))
    write_dpo_job(tmp_path / "job", tiny, TRAIN, FULL, tmp_path / "model", "float32", 0, schedule=(8, 16))
    pull(tmp_path / "job", 5)
    run_dpo_job(tmp_path / "job")
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))


ONE = replace(FULL, batch_size=1, checkpoints=2)


def test_two_jobs_that_hand_on_schedule_and_moments_are_one_unbroken_job(tiny, tmp_path):
    "One pair, so that batches are the same; the same weights bit by bit. Without the moments they are others."
    pairs, how = TRAIN[:1], replace(ONE, epochs=3)
    train(tiny, tmp_path, "whole", replace(ONE, epochs=6), pairs=pairs, reference=tiny)
    train(tiny, tmp_path, "first", how, pairs=pairs, schedule=(0, 6), optimiser="")
    middle, moments = find_weights(str(tmp_path / "first")), tmp_path / "first-job" / "optimiser.pt"
    for name, more in (("kept", {"optimiser": moments}), ("reset", {})):
        train_policy(
            middle,
            pairs,
            how,
            tmp_path / name,
            tmp_path / f"{name}-job",
            "float32",
            0,
            reference=tiny,
            schedule=(3, 6),
            **more,
        )
    assert same(weights_of(tmp_path / "kept"), weights_of(tmp_path / "whole")) and not same(
        weights_of(tmp_path / "reset"), weights_of(tmp_path / "whole")
    )
    states = torch.load(tmp_path / "kept-job" / "optimiser.pt", weights_only=True)
    assert {int(state["step"]) for state in states.values()} == {6} and not (
        tmp_path / "reset-job" / "optimiser.pt"
    ).exists()


def test_moments_are_kept_over_an_interruption(tiny, tmp_path):
    pairs, how = TRAIN[:1], replace(ONE, epochs=6, checkpoints=3)
    train(tiny, tmp_path, "first", how, pairs=pairs, optimiser="")
    moments = tmp_path / "first-job" / "optimiser.pt"
    train(tiny, tmp_path, "whole", how, pairs=pairs, optimiser=moments)
    write_dpo_job(tmp_path / "job", tiny, pairs, how, tmp_path / "model", "float32", 0, optimiser=moments)
    pull(tmp_path / "job", 5)
    run_dpo_job(tmp_path / "job")
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))
    first, second = (torch.load(tmp_path / name / "optimiser.pt", weights_only=True) for name in ("job", "whole-job"))
    assert first.keys() == second.keys() and all(
        torch.equal(first[i][key], second[i][key]) for i in first for key in first[i]
    )
    assert {int(state["step"]) for state in first.values()} == {12}


@pytest.fixture(scope="module")
def moments(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    train_policy(tiny, TRAIN[:1], replace(ONE, epochs=1), folder / "first", folder / "job", "float32", 0, optimiser="")
    return torch.load(folder / "job" / "optimiser.pt", weights_only=True)


def test_moments_of_another_number_of_weights_are_refused(moments, tiny, tmp_path):
    fewer = {i: state for i, state in moments.items() if i}
    torch.save(fewer, tmp_path / "fewer.pt")
    assert "another model" in one_line(
        lambda: train(tiny, tmp_path, "model", ONE, pairs=TRAIN[:1], optimiser=tmp_path / "fewer.pt")
    )
    assert not (tmp_path / "model").exists()


def test_moments_of_another_shape_are_refused(moments, tiny, tmp_path):
    odd = copy.deepcopy(moments)
    odd[0] = {key: value if key == "step" else torch.zeros(3, 2) for key, value in odd[0].items()}
    torch.save(odd, tmp_path / "odd.pt")
    write_dpo_job(
        tmp_path / "job", tiny, TRAIN[:1], ONE, tmp_path / "model", "float32", 0, optimiser=tmp_path / "odd.pt"
    )
    trainer, _, _ = build_dpo_trainer(tmp_path / "job")
    assert "another model" in one_line(trainer.create_optimizer)


def test_moments_of_adapters_are_refused(tiny, tmp_path):
    assert "dpo_iter.optimiser" in one_line(lambda: train(tiny, tmp_path, "model", LORA, optimiser=""))


# Points


def states_in(checkpoint):
    return {path.name for path in checkpoint.iterdir()} & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@BOTH
def test_points_stay_whole_while_they_are_needed_and_then_as_weights(own, tiny, tmp_path):
    write_dpo_job(tmp_path / "job", tiny, TRAIN, own, None, "float32", 0, dev=DEV, keep_points=True)
    pull(tmp_path / "job", 7)
    assert [(step, len(states_in(path))) for step, path in numbered(tmp_path / "job" / "checkpoints")] == [
        (2, 0),
        (4, 3),
        (6, 3),
    ]
    found = run_dpo_job(tmp_path / "job")
    kept = dict(numbered(tmp_path / "job" / "checkpoints"))
    assert found["points"] == list(kept) == [2, 4, 6, 8] and not any(states_in(path) for path in kept.values())
    assert run_or_launch(tmp_path / "job") == json.loads(json.dumps(found)), "without a goal its result is enough"
    every = [materialise(tiny, path, tmp_path / "points" / f"step-{step}", "float32") for step, path in kept.items()]
    assert not any(same(weights_of(a), weights_of(b)) for a, b in zip(every, every[1:]))
    best = find_weights(str(every[list(kept).index(found["best_step"])]))
    assert torch.nn.functional.softplus(-margins(best, tiny, DEV, own.beta)).mean().item() == pytest.approx(
        found["dev_loss"], rel=1e-4
    )
    stamp = (every[0] / "model.safetensors").stat().st_mtime_ns
    assert (
        every[0] == materialise(tiny, kept[2], every[0], "float32")
        and (every[0] / "model.safetensors").stat().st_mtime_ns == stamp
    ), "a model of the same checkpoint is kept"
    assert "holds no weights" in one_line(lambda: materialise(tiny, Path("gone"), every[0], "float32"))
    materialise(tiny, kept[8], every[0], "float32")
    assert same(weights_of(every[0]), weights_of(every[-1])), "one of another checkpoint is not"


def test_points_are_those_of_no_interruption(tiny, tmp_path):
    train(tiny, tmp_path, "whole", LORA, dev=DEV, keep_points=True)
    write_dpo_job(tmp_path / "job", tiny, TRAIN, LORA, tmp_path / "model", "float32", 0, dev=DEV, keep_points=True)
    pull(tmp_path / "job", 7)
    torn = tmp_path / "job" / "checkpoints" / "checkpoint-6"
    (torn / "trainer_state.json").unlink()  # so that it goes on from the one before
    found = run_dpo_job(tmp_path / "job")
    assert found["points"] == [2, 4, 6, 8]
    for step in found["points"]:
        adapters = [
            path / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors"
            for path in (tmp_path / "job", tmp_path / "whole-job")
        ]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_nobody_goes_on_from_a_point_without_its_optimiser(tiny, tmp_path):
    "Where the last two are lost, the training begins anew: a resume without moments would end with other weights, and silently."
    train(tiny, tmp_path, "whole", FULL, keep_points=True)
    write_dpo_job(tmp_path / "job", tiny, TRAIN, FULL, tmp_path / "model", "float32", 0, keep_points=True)
    pull(tmp_path / "job", 7)
    for step in (4, 6):
        (tmp_path / "job" / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert [len(states_in(path)) for _, path in numbered(tmp_path / "job" / "checkpoints")] == [0, 3, 3]
    run_dpo_job(tmp_path / "job")
    assert same(weights_of(tmp_path / "model"), weights_of(tmp_path / "whole"))
