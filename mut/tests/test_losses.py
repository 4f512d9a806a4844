"""Our shared-prefix trainers against trl's own: same loss, same gradients, in float32."""

import pytest
import torch

from psycopref.config import LoraSettings
from psycopref.pairwise import add_lora, dialogue, dpo_trainer, prompt_messages, reward_trainer, score_groups, share_prefix
from psycopref.reward import load_reward_model, train_reward_model
from psycopref.weights import find_weights, load_causal_lm, load_tokenizer

PAIRS = [
    ("I count the stairs every morning before work.", "It sounds tiring. What would happen if you lost count?", "Stop."),
    ("No.", "I hear a clear no. What stands behind it?", "You should really talk about your feelings, because that is what people do here."),
    ("My sister moved out in March and the house is loud with it.", "You miss her.", "You miss her. How do the evenings feel?"),
]


@pytest.fixture(scope="module")
def tiny():
    weights = find_weights("random-tiny")
    return weights, load_tokenizer(weights)


def dataset(kind, tokenizer):
    from datasets import Dataset

    if kind == "reward":
        return Dataset.from_list([{f"{side}_ids": tokenizer(dialogue(tokenizer, q, text)).input_ids for side, text in (("chosen", c), ("rejected", r))} for q, c, r in PAIRS])
    return Dataset.from_list([{"prompt": prompt_messages(q), "chosen": [{"role": "assistant", "content": c}], "rejected": [{"role": "assistant", "content": r}]} for q, c, r in PAIRS])


def gradients(trainer):
    "Loss and gradients of one full batch."
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def move(model, lora):
    "Take the policy away from its reference, so that a comparison sees more than ln 2."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (not lora and "layers.1.mlp" in name):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05


def build(kind, ours, tiny, tmp_path, lora, moved=True, **more):
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    weights, tokenizer = tiny
    common = dict(output_dir=str(tmp_path / f"{kind}-{ours}"), per_device_train_batch_size=len(PAIRS), bf16=False, use_cpu=True, report_to="none",
                  gradient_checkpointing=False, seed=3, data_seed=3, disable_tqdm=True, max_length=None)
    torch.manual_seed(0)
    if kind == "reward":
        model = add_lora(load_reward_model(weights.location, tokenizer, "float32"), LoraSettings(rank=lora, alpha=8), head=True)
        args, stock, mine = RewardConfig(**common, **more), RewardTrainer, reward_trainer()
    else:
        model = add_lora(load_causal_lm(weights, "float32"), LoraSettings(rank=lora, alpha=8))
        args, stock, mine = DPOConfig(**common, precompute_ref_log_probs=True, beta=0.5, **more), DPOTrainer, dpo_trainer()
    if moved:
        move(model, lora)
    reference = {"ref_model": load_causal_lm(weights, "float32")} if kind == "dpo" else {}
    return (mine if ours else stock)(model=model, args=args, train_dataset=dataset(kind, tokenizer), processing_class=tokenizer, **reference)


VARIANTS = [("reward", {}), ("reward", {"center_rewards_coefficient": 0.1}), ("dpo", {}), ("dpo", {"label_smoothing": 0.1, "loss_type": ["robust"]}),
            ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]})]


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("kind, more", VARIANTS)
def test_loss_and_gradients_equal_trl(kind, more, lora, tiny, tmp_path):
    theirs, ours = (gradients(build(kind, own, tiny, tmp_path, lora, **more)) for own in (False, True))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        scale = gradient.abs().max().clamp(min=1e-8)
        assert ((ours[1][name] - gradient).abs().max() / scale) < 1e-4, name


def test_first_dpo_loss_is_ln_2(tiny, tmp_path):
    "trl issues 2423 and 1962: a wrong precomputed reference shows here."
    loss, _ = gradients(build("dpo", True, tiny, tmp_path / "plain", 0, moved=False))
    assert loss == pytest.approx(0.6931472, abs=1e-5)


def test_a_moved_adapter_changes_the_loss(tiny, tmp_path):
    "The equality above would be empty if adapters had no effect."
    loss, _ = gradients(build("dpo", True, tiny, tmp_path / "moved", 4))
    assert abs(loss - 0.6931472) > 1e-3


@pytest.mark.parametrize("branches", [2, 3, 8])
def test_a_text_gets_the_same_reward_alone_in_a_group_and_padded(branches, tiny):
    weights, tokenizer = tiny
    model = load_reward_model(weights.location, tokenizer, "float32")
    answers = [" ".join(["I hear you."] * (i + 1)) for i in range(branches)]
    groups = [[dialogue(tokenizer, q, a) for a in answers] for q, _, _ in PAIRS]
    for group, scores in zip(groups, score_groups(model, tokenizer, groups, name="")):
        for text, score in zip(group, scores):
            with torch.no_grad():
                alone = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
            assert score == pytest.approx(alone, abs=2e-5)


def test_answers_do_not_see_each_other(tiny):
    "Changing one answer leaves the other's reward as it was."
    weights, tokenizer = tiny
    model = load_reward_model(weights.location, tokenizer, "float32")
    first = score_groups(model, tokenizer, [[dialogue(tokenizer, "No.", a) for a in ("I see.", "What then?")]], name="")[0]
    other = score_groups(model, tokenizer, [[dialogue(tokenizer, "No.", a) for a in ("I see.", "Entirely different words here!")]], name="")[0]
    assert first[0] == pytest.approx(other[0], abs=1e-5) and first[1] != pytest.approx(other[1], abs=1e-3)


def test_no_branch_is_lost_when_one_answer_starts_the_other():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    batch = share_prefix(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert batch.input_ids[0][batch.index[1, :3]].tolist() == [5, 6, 7]


def test_a_saved_reward_model_scores_as_before(tiny, tmp_path):
    "trl 1379: a score head lost on save would give new, random scores."
    import pandas as pd

    from psycopref.config import RewardSettings

    weights, tokenizer = tiny
    pairs = pd.DataFrame([{"ID": f"s-{i}", "prefID": i, "question": q, "chosen": c, "rejected": r} for i, (q, c, r) in enumerate(PAIRS * 4)])
    settings = RewardSettings(epochs=6, batch_size=4, micro_batch_size=2, learning_rate=3e-3, max_length=300, lora=LoraSettings(rank=4, alpha=8))
    log = train_reward_model(weights, pairs, settings, tmp_path / "model", "float32")
    assert log["pairs"] == 12 and log["log"][-1]["loss"] < log["log"][0]["loss"]
    model = load_reward_model(str(tmp_path / "model"), tokenizer, "float32", seed=123)
    groups = [[dialogue(tokenizer, q, c), dialogue(tokenizer, q, r)] for q, c, r in PAIRS]
    assert all(chosen > rejected for chosen, rejected in score_groups(model, tokenizer, groups, name="")), "learned, and still there after loading"
    again = load_reward_model(str(tmp_path / "model"), tokenizer, "float32", seed=456)
    assert (model.score.weight == again.score.weight).all()
