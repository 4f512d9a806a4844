"""Small trainings of reward models and by DPO, for tests of both."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from psycopref.core.settings import DpoSettings, LoraSettings, RewardSettings
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from psycopref.training.dpo import DpoJob, build_dpo_trainer, dpo_rows, train_policy, write_dpo_job
from psycopref.training.jobs import store_job
from psycopref.training.reward_model import RewardJob, build_reward_trainer, train_reward_model
from psycopref.training.scoring import load_reward_model, score_pairs
from psycopref.training.texts import last_checkpoint

SMALL = dict(epochs=2, batch_size=4, pack_tokens=300, warmup_ratio=0.1, max_length=300, checkpoints=4)
ADAPTERS = dict(learning_rate=3e-3, lora=LoraSettings(rank=4, alpha=8))
SETTINGS = {
    "reward lora": RewardSettings(**SMALL, **ADAPTERS),
    "reward full": RewardSettings(**SMALL, learning_rate=1e-3),
    "dpo lora": DpoSettings(**SMALL, **ADAPTERS),
    "dpo full": DpoSettings(**SMALL, learning_rate=1e-3),
}
PLACES = ("stairs", "doors", "windows", "cups", "letters", "coats", "trains")
GOOD = ("What do you feel then?", "I hear how tiring it is. What would help?", "That sounds like a lot.")
BAD = ("Stop it.", "You should pull yourself together, because everybody else does.", "Whatever.")


def some_pairs(n, start=0):
    pairs = pd.DataFrame({"prefID": range(start, start + n)})
    pairs["question"] = [f"I count the {PLACES[i % 7]} number {i} again and again." for i in pairs.prefID]
    return pairs.assign(chosen=[GOOD[i % 3] for i in pairs.prefID], rejected=[BAD[i % 3] for i in pairs.prefID])


TRAIN, DEV = some_pairs(19), some_pairs(5, 100)
CONTRARY = DEV.rename(columns={"chosen": "rejected", "rejected": "chosen"})


def is_reward(settings) -> bool:
    return isinstance(settings, RewardSettings)


def write(start, folder, settings, goal, dtype="float32", seed=0, pairs=TRAIN, dev=None, **more):
    "Write a job of the kind of its settings."
    if is_reward(settings):
        store_job(folder, RewardJob(start, settings, goal, dtype, seed), {"train": pairs, "dev": dev})
    else:
        write_dpo_job(folder, DpoJob(start, settings, goal, dtype, seed, **more), pairs, dev)
    return folder


def train(start, folder, name, settings, dtype="float32", seed=0, pairs=TRAIN, **more):
    "Train to folder/name, by the job folder/name-job."
    kind = train_reward_model if is_reward(settings) else train_policy
    return kind(start, pairs, settings, folder / name, folder / f"{name}-job", dtype, seed, **more)


def build(settings, job):
    return (build_reward_trainer if is_reward(settings) else build_dpo_trainer)(job)


class Pulled(Exception):
    pass


def pull(job, stop, settings):
    "Do a job up to a step and no further."
    from transformers import TrainerCallback

    trainer, _, _ = build(settings, job)

    class Pull(TrainerCallback):
        def on_step_end(self, args, state, control, **keywords):
            if state.global_step == stop:
                raise Pulled

    trainer.add_callback(Pull())
    found = last_checkpoint(job / "checkpoints")
    with pytest.raises(Pulled):
        trainer.train(resume_from_checkpoint=found and str(found))


def weights_of(folder, name="model.safetensors"):
    "Read a file of weights; of a policy with an adapter that of the adapter."
    from safetensors.torch import load_file

    found = Path(folder) / name
    return load_file(found if found.is_file() else Path(folder) / "adapter" / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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
    "Return DPO's margins of pairs, by plain models."
    (chosen, rejected, _), (held, held_rejected, _) = (log_probabilities(own, pairs) for own in (policy, reference))
    return beta * ((chosen - held) - (rejected - held_rejected))


def dev_loss(settings, folder, start, pairs):
    "Compute the loss of a saved model on pairs, in the plain way."
    weights = find_weights(str(folder))
    if is_reward(settings):
        tokenizer = load_tokenizer(weights)
        model = load_reward_model(weights.location, tokenizer, "float32")
        chosen, rejected = map(torch.tensor, score_pairs(model, tokenizer, pairs, name=""))
        own = chosen - rejected
    else:
        own = margins(weights, start, pairs, settings.beta)
    return torch.nn.functional.softplus(-own).mean().item()
