"""Our packed trainers against trl's own: same loss, same gradients, in float32, for eight architectures."""

import copy
import warnings

import pytest
import torch

from psycopref.core.settings import LoraSettings
from psycopref.models.weights import load_tokenizer
from psycopref.models.packs import enable_packing, lay_out
from psycopref.training.packing import dpo_trainer, reward_trainer
from psycopref.training.texts import add_lora, dialogue, prompt_messages

QUESTIONS = ["I count the stairs every morning before work.", "No.", "My sister moved out in March."]
CHOSEN = ["It sounds tiring. What would happen if you lost count?", "I hear a no. What now?", "You miss her."]
REJECTED = ["Stop.", "You should really talk about feelings, because that is what people do here.", CHOSEN[2] + " And?"]
PAIRS = list(zip(QUESTIONS, CHOSEN, REJECTED))
SMALL = dict(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(initializer_range=0.2)
GROUPED = SMALL | dict(num_key_value_heads=2)
ARCHITECTURES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=8),
    "gemma": GROUPED | dict(head_dim=8),
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    "gemma3_text": GROUPED | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "mistral": GROUPED | dict(sliding_window=16),
    "gpt_neox": SMALL,
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def tokens(tokenizer, question, answer):
    return tokenizer(dialogue(tokenizer, question, answer)).input_ids


def make(architecture, kind, tokenizer):
    "A random tiny model of an architecture; a sliding window of 16 is shorter than the texts."
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    assert len(tokenizer) <= 1024
    ends = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **ends, num_labels=1)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    if architecture == "gemma2":  # SDPA knows no soft cap, so its plain pass is eager, as transformers advises
        model.set_attn_implementation("eager")
    return model


def dataset(kind, tokenizer):
    from datasets import Dataset

    if kind == "reward":
        ids = [{"chosen_ids": tokens(tokenizer, q, c), "rejected_ids": tokens(tokenizer, q, r)} for q, c, r in PAIRS]
        return Dataset.from_list(ids)
    said = {"chosen": CHOSEN, "rejected": REJECTED}
    talk = {side: [[{"role": "assistant", "content": text}] for text in own] for side, own in said.items()}
    return Dataset.from_dict({"prompt": list(map(prompt_messages, QUESTIONS))} | talk)


def move(model, lora):
    "Take the policy away from its reference, so that a comparison sees more than ln 2."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (not lora and "layers.1.mlp" in name):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05


PLAIN = dict(bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False, disable_tqdm=True)
PLAIN |= dict(per_device_train_batch_size=len(PAIRS), seed=3, data_seed=3, max_length=None)


def build(kind, ours, architecture, tokenizer, tmp_path, lora, moved=True, rows=None, **more):
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    own = dict(output_dir=str(tmp_path / f"{kind}-{ours}")) | PLAIN | more
    torch.manual_seed(0)
    model = add_lora(make(architecture, kind, tokenizer), LoraSettings(rank=lora, alpha=8), head=kind == "reward")
    if moved:
        move(model, lora)
    data = dict(train_dataset=rows or dataset(kind, tokenizer), processing_class=tokenizer)
    if kind == "reward":
        return (reward_trainer() if ours else RewardTrainer)(model=model, args=RewardConfig(**own), **data)
    args = DPOConfig(**{"precompute_ref_log_probs": True, "beta": 0.1} | own)
    reference = make(architecture, kind, tokenizer)
    return (dpo_trainer() if ours else DPOTrainer)(model=model, ref_model=reference, args=args, **data)


def gradients(trainer):
    "Loss and gradients of one full batch."
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():  # a bias that cancels in a pair has rounding for a gradient
        assert (ours[1][name] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-7, name


def both(kind, architecture, tokenizer, tmp_path, lora, **more):
    found = []
    for ours in (False, True):
        trainer = build(kind, ours, architecture, tokenizer, tmp_path, lora, **more)
        assert not ours or trainer.not_packed == "", "the packed way was taken"
        found.append(gradients(trainer))
    return found


SMOOTH, LIKELY = {"label_smoothing": 0.1, "loss_type": ["robust"]}, {"loss_weights": [1.0, 0.3]}
CASES = [
    *(("reward", name, {}) for name in ARCHITECTURES),
    ("reward", "llama", {"center_rewards_coefficient": 0.1}),
    ("reward", "llama", {"gradient_checkpointing": True}),
    *(("dpo", name, {}) for name in ARCHITECTURES),
    ("dpo", "llama", SMOOTH),
    ("dpo", "llama", SMOOTH | LIKELY | {"loss_type": ["robust", "sft"]}),
    ("dpo", "llama", LIKELY | {"loss_type": ["sigmoid", "sft"]}),
    ("dpo", "llama", {"ld_alpha": 0.5}),
    ("dpo", "llama", {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    ("dpo", "llama", {"precompute_ref_log_probs": False}),
    ("dpo", "llama", {"gradient_checkpointing": True}),
]
WITH_ADAPTERS = [own for own in CASES if own[2].get("gradient_checkpointing") or own[1] == "gpt_neox"] + [CASES[0]]


@pytest.mark.parametrize(
    "kind, architecture, more, lora", [(*own, 0) for own in CASES] + [(*own, 4) for own in WITH_ADAPTERS]
)
def test_loss_and_gradients_equal_trl(kind, architecture, more, lora, tokenizer, tmp_path):
    theirs, ours = both(kind, architecture, tokenizer, tmp_path, lora, **more)
    assert_equal(ours, theirs)


def test_margins_equal_trl(tokenizer, tmp_path):
    rows = dataset("reward", tokenizer).add_column("margin", [1.0, 0.0, 2.5])
    theirs, ours = both("reward", "llama", tokenizer, tmp_path, 0, rows=rows)
    without = gradients(build("reward", True, "llama", tokenizer, tmp_path, 0))
    assert_equal(ours, theirs)
    assert ours[0] > without[0] + 0.1, "a margin asks for more"


def test_first_dpo_loss_is_ln_2_and_a_moved_adapter_changes_it(tokenizer, tmp_path):
    "trl 2423, 1962: a wrong precomputed reference shows here. Without an effect of adapters equality would be empty."
    loss, _ = gradients(build("dpo", True, "llama", tokenizer, tmp_path / "plain", 0, moved=False))
    assert loss == pytest.approx(0.6931472, abs=1e-5)
    assert abs(gradients(build("dpo", True, "llama", tokenizer, tmp_path / "moved", 4))[0] - 0.6931472) > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_is_the_same_alone_in_a_pack_and_padded(architecture, tokenizer):
    model, padded = make(architecture, "reward", tokenizer), make(architecture, "reward", tokenizer)
    assert enable_packing(model) == ""
    groups = [[tokens(tokenizer, q, a) for a in (c, r, c + " " + r)] for q, c, r in PAIRS]
    flat = [text for group in groups for text in group]
    padding = tokenizer.pad({"input_ids": flat}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        packed = model(input_ids=torch.tensor([text[-1:] for text in flat]), pack=lay_out(groups)).logits.squeeze(-1)
        rows = padded(**padding).logits.squeeze(-1)
        alone, still = (
            torch.cat([own(input_ids=torch.tensor([text])).logits for text in flat]).squeeze(-1)
            for own in (padded, model)
        )
    assert rows.std() > 1e-3, "rewards that differ"
    assert torch.allclose(packed, alone, atol=2e-5) and torch.allclose(rows, alone, atol=2e-5)
    assert torch.equal(still, alone), "a plain call is untouched by packing"


def test_answers_and_pairs_do_not_see_each_other(tokenizer):
    model = make("llama", "reward", tokenizer)
    enable_packing(model)

    def rewards(*groups):
        groups = [[tokens(tokenizer, q, a) for a in answers] for q, *answers in groups]
        ids = torch.tensor([[5]] * sum(map(len, groups)))
        with torch.no_grad():
            return model(input_ids=ids, pack=lay_out(groups)).logits.squeeze(-1).tolist()

    first = rewards(("No.", "I see.", "What then?"), ("Yes.", "Good."))
    second = rewards(("No.", "I see.", "Entirely different words here!"), ("Perhaps.", "Good."))
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    assert first[1] != pytest.approx(second[1], abs=1e-3) and first[2] != pytest.approx(second[2], abs=1e-3)


def test_a_copied_model_runs_its_own_weights(tokenizer):
    model = make("llama", "reward", tokenizer)
    enable_packing(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 1
        pack = lay_out([[[5, 6, 7], [5, 6, 8]]])
        ids = torch.tensor([[7], [8]])
        assert not torch.allclose(model(input_ids=ids, pack=pack).logits, other(input_ids=ids, pack=pack).logits)


def test_a_model_that_cannot_is_trained_the_plain_way_and_says_so(tokenizer, tmp_path):
    "BLOOM's attention has a bias by distance: its loss still equals trl's, by trl's own way."
    from transformers import BloomConfig, BloomForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    found, shape = [], dict(hidden_size=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    for trainer in (RewardTrainer, reward_trainer()):
        torch.manual_seed(0)
        model = BloomForSequenceClassification(BloomConfig(vocab_size=len(tokenizer), **shape))
        args, rows = RewardConfig(output_dir=str(tmp_path), **PLAIN), dataset("reward", tokenizer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            built = trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        found.append(gradients(built)[0])
    assert found[0] == found[1] and built.not_packed
    assert any("does not take packed pairs" in str(warning.message) for warning in said)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_bfloat16_on_a_cpu_is_as_near_to_float32_as_eager_attention(architecture, tokenizer, tmp_path):
    "Packs attend by matrix products there, with scores rounded as in transformers' eager attention: no further off."
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for ours in (False, True):
            trainer = build("reward", ours, architecture, tokenizer, tmp_path, 0)
            trainer.model.to(dtype)
            if not ours:
                trainer.model.set_attn_implementation("eager")
            loss, own = gradients(trainer)
            found[dtype, ours] = loss, torch.cat([gradient.float().flatten() for _, gradient in sorted(own.items())])
    exact = found[torch.float32, False]
    off = {ours: (found[torch.bfloat16, ours][1] - exact[1]).norm() / exact[1].norm() for ours in (False, True)}
    assert off[True] < max(1.5 * off[False], 0.02) and abs(found[torch.bfloat16, True][0] - exact[0]) < 0.05
