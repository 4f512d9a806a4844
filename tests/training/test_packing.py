"""Packs: the layout by properties, even packs in every step of a training, rows as trl tokenises them."""

import os
from dataclasses import replace
from itertools import accumulate

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import LoraSettings, RewardSettings
from psycopref.models.weights import load_tokenizer
from psycopref.models.packs import enable_packing, lay_out, packed_attention, unwrap
from psycopref.training.packing import EvenSampler, even_packs, reward_trainer
from psycopref.training.reward_model import reward_config
from psycopref.training.texts import accumulation_steps, add_lora, pack_size, pair_messages, pair_rows
from psycopref.training.texts import step_plan, train_quietly, training_precision
from refusals import one_line

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=80, deadline=None, derandomize=True, database=None)

# The layout

TEXT = st.lists(st.integers(2, 4), min_size=1, max_size=8)  # three tokens, so that texts start alike by chance too


def alike(first):
    "A text that goes on from the first, or is its beginning, or another one."
    return TEXT.flatmap(lambda own: st.sampled_from([first, first + own, own, first[: len(own)]]))


GROUPS = st.lists(TEXT.flatmap(lambda first: st.lists(alike(first), min_size=1, max_size=5)), min_size=1, max_size=4)


def segments(pack):
    "The columns of each segment's queries, and those of its keys."
    ends, key_ends = (list(accumulate(own)) for own in (pack.query_lengths, pack.key_lengths))
    assert key_ends[-1] == len(pack.keys)
    own = zip(ends, pack.query_lengths, key_ends, pack.key_lengths)
    return [([*range(end - n, end)], pack.keys[key_end - m : key_end].tolist()) for end, n, key_end, m in own]


@few
@given(GROUPS)
def test_a_text_is_spelled_by_its_prompt_s_columns_and_its_own_and_no_column_is_spare(groups):
    pack, place = lay_out(groups), 0
    ids, positions, found = pack.input_ids[0].tolist(), pack.position_ids[0].tolist(), iter(segments(pack))
    for group in groups:
        start, shared = place, min(len(os.path.commonprefix(group)), min(map(len, group)) - 1)
        for n, text in enumerate(group):
            queries, keys = next(found)
            prompt = range(start, start + shared) if n else ()
            assert keys == [*prompt, *queries] and queries == [*range(place, place + len(queries))]
            assert [ids[column] for column in keys] == text, "a token of its own, at least"
            assert [positions[column] for column in keys] == list(range(len(text)))
            place += len(queries)
    assert next(found, None) is None and pack.input_ids.shape == pack.position_ids.shape == (1, place)


@few
@given(GROUPS, st.data())
def test_states_are_kept_at_the_ends_of_the_texts(groups, data):
    each = st.tuples(*(st.tuples(*(st.integers(1, len(text)) for text in group)) for group in groups))
    kept = data.draw(st.one_of(st.integers(1, 4), each))
    pack = lay_out(groups, kept if isinstance(kept, int) else [list(own) for own in kept])
    numbers = [kept] * len(segments(pack)) if isinstance(kept, int) else [n for own in kept for n in own]
    wanted = [keys[-n:] for (_, keys), n in zip(segments(pack), numbers)]
    most = max(map(len, wanted))
    assert pack.places.tolist() == [own + [own[-1]] * (most - len(own)) for own in wanted]


def test_moving_a_pack_keeps_what_it_is():
    pack = replace(lay_out([[[5, 6], [5, 7]]]), kernel="varlen")
    moved = pack.to("meta")
    assert moved.kernel == "varlen" and moved.query_lengths == pack.query_lengths
    assert all(getattr(moved, name).device.type == "meta" for name in ("input_ids", "position_ids", "keys", "places"))


# Models


def small_model(tokenizer, **more):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    return LlamaForSequenceClassification(LlamaConfig(**shape | more))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


class Distributed(torch.nn.Module):
    "Holds the model as accelerate's and torch's wrappers do."

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("training", [True, False])
def test_packing_is_enabled_once_below_adapters_and_wrappers(training, tokenizer):
    model = small_model(tokenizer)
    adapted = add_lora(model, LoraSettings(rank=2, alpha=4), head=True).train(training)
    assert unwrap(model) is unwrap(Distributed(Distributed(adapted))) is model
    assert any("lora_A" in name for name, _ in model.base_model.named_parameters())
    assert enable_packing(adapted) == "" == enable_packing(model)
    assert model.base_model.training == training, "the probe leaves the mode as it was"


def test_a_refusal_leaves_the_model_as_it_was(tokenizer):
    model = small_model(tokenizer)
    attention = model.base_model.config._attn_implementation
    reason = enable_packing(model, tolerance=1e-30)
    assert "differ" in reason and not {"forward", "pack_kernel"} & set(vars(model.base_model))
    assert model.base_model.config._attn_implementation == attention
    assert enable_packing(model) == "", "and it may be asked again"


@pytest.mark.parametrize("unknown", [{"dropout": 0.1}, {"s_aux": torch.ones(2)}, {"position_bias": torch.ones(2)}])
def test_attention_that_a_pack_does_not_know_is_refused(unknown):
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="its attention needs"):
        packed_attention(None, states, states, states, None, pack=lay_out([[[5, 6, 7]]]), **unknown)


def test_the_masks_of_earlier_packs_are_not_kept(tokenizer):
    "In bfloat16 a text of 1,700 tokens has one of 17 MB, and hardly another has its length."
    from psycopref.models import packs

    model = small_model(tokenizer)
    enable_packing(model)
    for length in range(5, 12):
        with torch.no_grad():
            model.base_model(pack=lay_out([[[5] * length, [5, 6]]]))
    assert packs._segment_bias.cache_info().currsize == packs._seen.cache_info().currsize == 2


def test_a_window_that_only_the_mask_knows_is_refused(tokenizer):
    "A probe of a few tokens would not see it; a text that is longer than the window would be computed wrongly."
    from transformers import AutoModelForCausalLM, MistralConfig, PhimoeConfig

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=len(tokenizer))
    masked = PhimoeConfig(**shape, num_local_experts=2, sliding_window=20)
    assert "window" in enable_packing(AutoModelForCausalLM.from_config(masked))
    assert enable_packing(AutoModelForCausalLM.from_config(MistralConfig(**shape, sliding_window=20))) == ""


def test_a_backbone_with_dropout_in_its_attention_is_trained_the_plain_way(tokenizer, tmp_path):
    "A probe without dropout would not see it; the first step of a training would."
    from datasets import Dataset
    from trl import RewardConfig

    rows = Dataset.from_list([{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}] * 2)
    own = dict(bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False, disable_tqdm=True)
    args = RewardConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, **own)
    model = small_model(tokenizer, attention_dropout=0.1)
    with pytest.warns(UserWarning, match="does not take packed pairs .*dropout"):
        trainer = reward_trainer()(model=model, args=args, processing_class=tokenizer, train_dataset=rows)
    trainer.train()
    assert "dropout" in trainer.not_packed


# Even packs


@few
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_packs_hold_equal_numbers_each_pair_once_and_differ_by_the_longest_at_most(packs, size, data):
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=packs * size, max_size=packs * size))
    dealt = even_packs(lengths, packs)
    assert len(dealt) == packs and {len(pack) for pack in dealt} == {size}
    assert sorted(i for pack in dealt for i in pack) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in dealt]
    assert max(sums) - min(sums) <= max(lengths)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.data())
def test_an_epoch_is_whole_batches_without_repetition_dealt_evenly(size, packs, seed, data):
    batch_size = size * packs
    lengths = data.draw(st.lists(st.integers(1, 37), min_size=batch_size, max_size=5 * batch_size))
    sampler = EvenSampler(lengths, batch_size, size, seed)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(set(order)) == len(sampler) == len(lengths) // batch_size * batch_size
        assert set(order) <= set(range(len(lengths)))
        sums = torch.tensor([lengths[i] for i in order]).view(-1, packs, size).sum(2)
        assert (sums.amax(1) - sums.amin(1) <= max(lengths)).all()


def drawn(lengths, batch_size, size, seed, epoch):
    sampler = EvenSampler(lengths, batch_size, size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_seed_and_an_epoch_say_the_order():
    def order(seed, epoch, size=2):
        return drawn([1 + i % 5 for i in range(43)], 8, size, seed, epoch)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert {i for epoch in range(8) for i in order(0, epoch)} == set(range(43)), "others sit out each time"
    batches = [[set(order(0, 0, size)[start : start + 8]) for start in range(0, 40, 8)] for size in (1, 2, 8)]
    assert batches[0] == batches[1] == batches[2], "the batches are the same whatever the packs"


def heaviest(lengths, batch_size, size, epochs, seed):
    "Tokens of the heaviest pack of a training."
    orders = [drawn(lengths, batch_size, size, seed, epoch) for epoch in range(epochs)]
    return max(sum(lengths[i] for i in own[k : k + size]) for own in orders for k in range(0, len(own), size))


@settings(few, max_examples=40)
@given(
    st.lists(st.integers(1, 100), min_size=12, max_size=40),
    st.integers(20, 700),
    st.integers(1, 3),
    st.integers(0, 50),
    st.sampled_from([1, 2, 3]),
)
def test_the_largest_pack_that_fits_every_step_is_chosen(lengths, tokens, epochs, seed, processes):
    size = pack_size(lengths, 12, tokens, epochs, seed, processes)
    possible = [n for n in range(1, 13) if 12 % (n * processes) == 0]
    assert size in possible and (size == 1 or heaviest(lengths, 12, size, epochs, seed) <= tokens)
    larger = [n for n in possible if n > size]
    assert not larger or heaviest(lengths, 12, larger[0], epochs, seed) > tokens
    assert size <= pack_size(lengths, 12, tokens, epochs, seed, 1), "more devices never make packs larger"


def test_a_training_computes_the_packs_that_were_planned(tokenizer, tmp_path):
    "In each epoch the loader gives whole batches in packs under the budget, and the batches of the sampler."
    from datasets import Dataset

    prompts = [[5] * (3 + i % 7) for i in range(22)]
    rows = [
        {"chosen_ids": prompt + [6] * (1 + i % 5), "rejected_ids": prompt + [7] * (1 + i % 3)}
        for i, prompt in enumerate(prompts)
    ]
    lengths = [lay_out([list(row.values())]).input_ids.shape[1] for row in rows]
    data = Dataset.from_list(rows).add_column("length", lengths)
    chosen = RewardSettings(batch_size=8, epochs=2, checkpoints=1, pack_tokens=70, max_length=64, learning_rate=1e-3)
    plan = step_plan(lengths, chosen, seed=4)
    assert plan["pack_size"] == 4 and plan["left_out"] == 6
    args = reward_config(chosen, plan, tmp_path, 4, False)
    trainer = reward_trainer()(model=small_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=data)
    widths, seen, collate = [], [], trainer.data_collator

    def record(examples):
        seen.extend((example["chosen_ids"], example["rejected_ids"]) for example in examples)
        batch = collate(examples)
        widths.append(batch["pack"].input_ids.shape[1])
        return batch

    trainer.data_collator = record
    train_quietly(trainer)
    assert len(widths) == plan["steps"] * 2 == 8 and max(widths) <= chosen.pack_tokens < heaviest(lengths, 8, 8, 2, 4)
    assert seen == [tuple(rows[i].values()) for epoch in (0, 1) for i in drawn(lengths, 8, 4, 4, epoch)]


# Rows, as trl makes them

TALK = [("system", "Be brief."), ("user", "It is late."), ("assistant", "Yes."), ("user", "Why?")]
PAIRS = pd.DataFrame(
    [
        ("I count the stairs every morning.", None, "What would happen if you lost count?", "Stop."),
        (" No. ", None, " I hear a no.", "You should really talk, because that is what people do here."),
        ("", [{"role": r, "content": c} for r, c in TALK], "What keeps you awake?", "What keeps you up?"),
        ("Is it\n\nme?", None, "Who says so?\n", "Who says so, then?"),
    ],
    columns=["question", "messages", "chosen", "rejected"],
).assign(prefID=[3, 5, 8, 9])


def test_rows_are_those_that_trl_makes_of_the_same_conversations(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    said = {side: [[{"role": "assistant", "content": text}] for text in PAIRS[side]] for side in ("chosen", "rejected")}
    spoken = Dataset.from_dict({"prompt": [pair_messages(pair) for pair in PAIRS.itertuples()]} | said)
    own = dict(bf16=False, use_cpu=True, report_to="none", max_length=2000, disable_tqdm=True)
    args = RewardConfig(output_dir=str(tmp_path), **own)
    trainer = RewardTrainer(model=small_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=spoken)
    theirs = [(row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    rows, long = pair_rows(PAIRS, tokenizer, 2000)
    assert long == [] and [(row["chosen_ids"], row["rejected_ids"]) for row in rows] == theirs
    assert [row["length"] for row in rows] == [len(c) + len(r) - len(os.path.commonprefix([c, r])) for c, r in theirs]


def test_pairs_that_trl_would_drop_in_silence_are_listed(tokenizer):
    "The limit is one of tokens, and a text of just that length stays; margins stay with their pairs."
    rows, _ = pair_rows(PAIRS, tokenizer, 2000)
    sizes = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    limit = sorted(sizes)[1]
    assert len(set(sizes)) == 4 and all("margin" not in row for row in rows)
    kept, long = pair_rows(PAIRS, tokenizer, limit, margins=[0.5, 1.5, 2.5, 3.5])
    assert long == [pair for pair, size in zip(PAIRS.prefID, sizes) if size > limit] and len(long) == 2
    assert kept == [row | {"margin": n + 0.5} for n, row in enumerate(rows) if sizes[n] <= limit]
    assert "4 pairs, 4 longer than max_length" in one_line(lambda: pair_rows(PAIRS, tokenizer, min(sizes) - 1))


@few
@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 8))
def test_the_global_batch_is_kept_or_the_split_refused(batch_size, micro, processes):
    if batch_size % (micro * processes):
        said = one_line(lambda: accumulation_steps(batch_size, micro, processes))
        assert f"batch_size {batch_size}" in said and f"{processes} device" in said
    else:
        assert accumulation_steps(batch_size, micro, processes) * micro * processes == batch_size


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_weights_that_are_all_trained_on_a_gpu_are_kept_in_float32(gpu, rank, dtype, monkeypatch):
    "A step of 9e-6 is lost in bfloat16."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    autocast = gpu and not rank and dtype != "float32"
    expected = ("float32", True) if autocast else (dtype, False)
    assert training_precision(LoraSettings(rank=rank, alpha=8), dtype) == expected
