"""Packs: the layout by properties, even packs in every step of a training, rows as trl tokenises them."""

import os
from dataclasses import replace
from itertools import accumulate

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.core.settings import LoraSettings, RewardSettings
from psycopref.training.packing import (
    EvenSampler,
    Pack,
    enable_packing,
    even_packs,
    lay_out,
    packed_attention,
    reward_trainer,
    unwrap,
)
from psycopref.training.texts import (
    accumulation_steps,
    add_lora,
    pack_size,
    pair_messages,
    pair_rows,
    train_quietly,
    training_precision,
)
from psycopref.models.weights import load_tokenizer

few = settings(max_examples=80, deadline=None, derandomize=True, database=None)

texts = st.lists(st.integers(2, 4), min_size=1, max_size=8)  # three tokens, so that texts start alike by chance too
groups_of_texts = st.lists(
    st.tuples(texts, st.lists(texts, min_size=1, max_size=5)).flatmap(
        lambda drawn: st.tuples(*(st.sampled_from([drawn[0], drawn[0] + own, own, drawn[0][: len(own)]]) for own in drawn[1])).map(list)
    ),
    min_size=1, max_size=4,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def segments(pack):
    """The columns of each segment's queries, and those of its keys."""
    ends, key_ends = list(accumulate(pack.query_lengths)), list(accumulate(pack.key_lengths))
    keys = pack.keys.tolist()
    return [
        (list(range(end - n, end)), keys[key_end - m : key_end])
        for end, n, key_end, m in zip(ends, pack.query_lengths, key_ends, pack.key_lengths)
    ]


# ---- the layout ----


@few
@given(groups_of_texts)
def test_every_text_is_spelled_by_the_columns_it_sees(groups):
    pack = lay_out(groups)
    ids, positions, found = pack.input_ids[0].tolist(), pack.position_ids[0].tolist(), segments(pack)
    flat = [text for group in groups for text in group]
    assert len(found) == len(flat)
    for text, (queries, keys) in zip(flat, found):
        assert [ids[column] for column in keys] == text
        assert [positions[column] for column in keys] == list(range(len(text)))
        assert queries and keys[-len(queries) :] == queries, "its last keys are its own tokens"


@few
@given(groups_of_texts)
def test_segments_tile_the_width_and_a_text_sees_its_prompt_and_itself_only(groups):
    pack = lay_out(groups)
    found = segments(pack)
    width = pack.input_ids.shape[1]
    assert [column for queries, _ in found for column in queries] == list(range(width))
    given = iter(found)
    for group in groups:
        (first, keys), *others = [next(given) for _ in group]
        assert keys == first, "the first text sees itself"
        for queries, keys in others:
            assert keys == first[: shared_tokens(group)] + queries


def shared_tokens(group):
    """The common beginning, short of one token of the shortest text."""
    return min(len(os.path.commonprefix(group)), min(map(len, group)) - 1)


@few
@given(groups_of_texts)
def test_the_width_is_all_tokens_less_the_shared_ones(groups):
    pack, total = lay_out(groups), sum(len(text) for group in groups for text in group)
    width = total - sum((len(group) - 1) * shared_tokens(group) for group in groups)
    assert pack.input_ids.shape == pack.position_ids.shape == (1, width)
    assert sum(pack.key_lengths) == len(pack.keys) == total


@few
@given(groups_of_texts, st.data())
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
    assert isinstance(moved, Pack) and moved.kernel == "varlen"
    assert (moved.query_lengths, moved.key_lengths) == (pack.query_lengths, pack.key_lengths)
    assert all(getattr(moved, name).device.type == "meta" for name in ("input_ids", "position_ids", "keys", "places"))


# ---- models ----


def small_model(tokenizer, **more):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    shape |= dict(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id) | more
    return LlamaForSequenceClassification(LlamaConfig(**shape))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def test_unwrapping_finds_the_model_with_its_adapters(tokenizer):
    from torch import nn
    from transformers import LlamaForSequenceClassification

    class Distributed(nn.Module):  # holds the model as accelerate's and torch's wrappers do
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = small_model(tokenizer)
    assert unwrap(model) is unwrap(Distributed(Distributed(model))) is model
    adapted = add_lora(model, LoraSettings(rank=2, alpha=4), head=True)
    inner = unwrap(Distributed(adapted))
    assert type(inner) is LlamaForSequenceClassification and inner is unwrap(adapted)
    assert any("lora_A" in name for name, _ in inner.base_model.named_parameters()) and inner.base_model is inner.model


@pytest.mark.parametrize("training", [True, False])
def test_packing_is_enabled_once_and_a_wrapped_model_is_the_same(training, tokenizer):
    model = add_lora(small_model(tokenizer), LoraSettings(rank=2, alpha=4), head=True).train(training)
    assert enable_packing(model) == "" == enable_packing(unwrap(model))
    assert unwrap(model).base_model.training == training, "the probe leaves the mode as it was"


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


def test_a_backbone_with_dropout_in_its_attention_is_trained_the_plain_way(tokenizer, tmp_path):
    """A probe without dropout would not see it; the first step of a training would."""
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


# ---- even packs ----

batches = st.integers(1, 5).flatmap(lambda packs: st.tuples(st.just(packs), st.integers(1, 5))).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.lists(st.integers(1, 200), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))  # fmt: skip


@few
@given(batches)
def test_packs_hold_equal_numbers_each_pair_once_and_differ_by_the_longest_at_most(drawn):
    packs, lengths = drawn
    dealt = even_packs(lengths, packs)
    assert len(dealt) == packs and {len(pack) for pack in dealt} == {len(lengths) // packs}
    assert sorted(i for pack in dealt for i in pack) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in dealt]
    assert max(sums) - min(sums) <= max(lengths)


samplers = st.builds(
    lambda size, packs, whole, rest, seed, long: (size * packs, size, seed, [1 + (i * long) % 37 for i in range(size * packs * whole + rest % (size * packs))]),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 8), st.integers(0, 99), st.integers(1, 36),
)  # fmt: skip


@few
@given(samplers)
def test_an_epoch_is_whole_batches_without_repetition_dealt_evenly(drawn):
    batch_size, size, seed, lengths = drawn
    sampler = EvenSampler(lengths, batch_size, size, seed)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(set(order)) == len(sampler) == len(lengths) // batch_size * batch_size
        assert set(order) <= set(range(len(lengths)))
        sums = [sum(lengths[i] for i in order[place : place + size]) for place in range(0, len(order), size)]
        for start in range(0, len(sums), batch_size // size):
            batch = sums[start : start + batch_size // size]
            assert max(batch) - min(batch) <= max(lengths)


def test_a_seed_and_an_epoch_say_the_order():
    def order(seed, epoch, size=2):
        sampler = EvenSampler([1 + i % 5 for i in range(43)], 8, size, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert {i for epoch in range(8) for i in order(0, epoch)} == set(range(43)), (
        "the pairs that sit out are others each time"
    )
    batches = [[set(order(0, 0, size)[start : start + 8]) for start in range(0, 40, 8)] for size in (1, 2, 8)]
    assert batches[0] == batches[1] == batches[2], "the batches are the same whatever the packs"


def heaviest(lengths, batch_size, size, epochs, seed):
    """Tokens of the heaviest pack of a training."""
    found = 0
    for epoch in range(epochs):
        sampler = EvenSampler(lengths, batch_size, size, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        found = max([found, *(sum(lengths[i] for i in order[k : k + size]) for k in range(0, len(order), size))])
    return found


@settings(few, max_examples=40)
@given(
    st.lists(st.integers(1, 100), min_size=12, max_size=40),
    st.integers(20, 700),
    st.integers(1, 3),
    st.integers(0, 50),
    st.sampled_from([1, 2, 3]),
)
def test_the_largest_pack_that_fits_every_step_is_chosen(lengths, tokens, epochs, seed, processes):
    batch_size = 12
    size = pack_size(lengths, batch_size, tokens, epochs, seed, processes)
    possible = [n for n in range(1, batch_size + 1) if batch_size % (n * processes) == 0]
    assert size in possible and (size == 1 or heaviest(lengths, batch_size, size, epochs, seed) <= tokens)
    larger = [n for n in possible if n > size]
    assert not larger or heaviest(lengths, batch_size, larger[0], epochs, seed) > tokens
    assert size <= pack_size(lengths, batch_size, tokens, epochs, seed, 1), "more devices never make packs larger"


def test_a_training_computes_the_packs_that_were_planned(tokenizer, tmp_path):
    """In each epoch the loader gives whole batches in packs under the budget, and the batches of the sampler."""
    from datasets import Dataset

    from psycopref.training.reward_model import reward_config
    from psycopref.training.texts import step_plan

    rows = [
        {"chosen_ids": [5] * (3 + i % 7) + [6] * (1 + i % 5), "rejected_ids": [5] * (3 + i % 7) + [7] * (1 + i % 3)}
        for i in range(22)
    ]
    rows = [row | {"length": lay_out([list(row.values())]).input_ids.shape[1]} for row in rows]
    chosen = RewardSettings(batch_size=8, epochs=2, checkpoints=1, pack_tokens=70, max_length=64, learning_rate=1e-3)
    plan = step_plan([row["length"] for row in rows], chosen, seed=4)
    assert plan["pack_size"] == 4 and plan["left_out"] == 6
    args, data = reward_config(chosen, plan, tmp_path, 4, False), Dataset.from_list(rows)
    trainer = reward_trainer()(model=small_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=data)
    widths, seen, collate = [], [], trainer.data_collator

    def record(examples):
        seen.extend((example["chosen_ids"], example["rejected_ids"]) for example in examples)
        batch = collate(examples)
        widths.append(batch["pack"].input_ids.shape[1])
        return batch

    trainer.data_collator = record
    train_quietly(trainer, "packs")
    lengths, expected = [row["length"] for row in rows], []
    assert len(widths) == plan["steps"] * 2 == 8 and max(widths) <= chosen.pack_tokens < heaviest(lengths, 8, 8, 2, 4)
    for epoch in (0, 1):
        sampler = EvenSampler(lengths, 8, 4, 4)
        sampler.set_epoch(epoch)
        expected += [(rows[i]["chosen_ids"], rows[i]["rejected_ids"]) for i in sampler]
    assert seen == expected


# ---- rows, as trl makes them ----

PAIRS = pd.DataFrame({
    "ID": ["a", "b", "c", "d"], "prefID": [3, 5, 8, 9], "question": ["I count the stairs every morning.", " No. ", "Why?", "Is it\n\nme?"],
    "messages": [None, None, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It is late."}, {"role": "assistant", "content": "Yes."},
                              {"role": "user", "content": "Why?"}], None],
    "chosen": ["What would happen if you lost count?", " I hear a no.", "What keeps you awake?", "Who says so?\n"],
    "rejected": ["Stop.", "You should really talk, because that is what people do here.", "What keeps you up?", "Who says so, then?"],
})  # fmt: skip


def test_rows_are_those_that_trl_makes_of_the_same_conversations(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    spoken = [{"prompt": pair_messages(pair), "chosen": [{"role": "assistant", "content": pair.chosen}], "rejected": [{"role": "assistant", "content": pair.rejected}]}
              for pair in PAIRS.itertuples()]  # fmt: skip
    own = dict(bf16=False, use_cpu=True, report_to="none", max_length=2000, disable_tqdm=True)
    args, data = RewardConfig(output_dir=str(tmp_path), **own), Dataset.from_list(spoken)
    trainer = RewardTrainer(model=small_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=data)
    theirs = trainer.train_dataset
    rows, long = pair_rows(PAIRS, tokenizer, 2000)
    assert long == [] and len(rows) == len(theirs) == 4
    for side in ("chosen_ids", "rejected_ids"):
        assert [row[side] for row in rows] == list(theirs[side])
    assert [row["length"] for row in rows] == [
        len(c) + len(r) - len(os.path.commonprefix([c, r]))
        for c, r in zip(theirs["chosen_ids"], theirs["rejected_ids"])
    ]


def test_pairs_that_trl_would_drop_in_silence_are_listed(tokenizer):
    """The limit is one of tokens, and a text of just that length stays; margins stay with their pairs."""
    rows, _ = pair_rows(PAIRS, tokenizer, 2000)
    sizes = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    assert len(set(sizes)) == 4
    limit = sorted(sizes)[1]
    kept, long = pair_rows(PAIRS, tokenizer, limit, margins=[0.5, 1.5, 2.5, 3.5])
    assert long == [int(pair) for pair, size in zip(PAIRS.prefID, sizes) if size > limit] and len(long) == 2
    assert [(row["chosen_ids"], row["margin"]) for row in kept] == [
        (row["chosen_ids"], n + 0.5) for n, (row, size) in enumerate(zip(rows, sizes)) if size <= limit
    ]
    assert all("margin" not in row for row in rows)
    assert "all 4 pairs" in one_line(lambda: pair_rows(PAIRS, tokenizer, min(sizes) - 1))


@few
@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 8))
def test_the_global_batch_is_kept_or_the_split_refused(batch_size, micro, processes):
    if batch_size % (micro * processes):
        said = one_line(lambda: accumulation_steps(batch_size, micro, processes))
        assert f"batch_size {batch_size}" in said and f"{processes} device" in said
    else:
        assert accumulation_steps(batch_size, micro, processes) * micro * processes == batch_size


@pytest.mark.parametrize("gpu, rank, dtype, expected", [
    (True, 0, "auto", ("float32", True)), (True, 0, "bfloat16", ("float32", True)), (True, 0, "float32", ("float32", False)), (True, 4, "auto", ("auto", False)),
    (True, 4, "bfloat16", ("bfloat16", False)), (False, 0, "auto", ("auto", False)), (False, 0, "float32", ("float32", False)), (False, 4, "auto", ("auto", False)),
])  # fmt: skip
def test_weights_that_are_all_trained_on_a_gpu_are_kept_in_float32(gpu, rank, dtype, expected, monkeypatch):
    """A step of 9e-6 is lost in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert training_precision(LoraSettings(rank=rank, alpha=8), dtype) == expected
