"""Sampling follows the model's distribution, and batching changes no greedy answer."""

import asyncio
import copy
import gc
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.models.generation import Branches, Decoding, end_sentence, generate, length_batches, next_tokens
from psycopref.models.generation import prompt_packs, row_generators, stop_tokens
from psycopref.models.chat import ChatRequest
from psycopref.models.local import LocalModel
from psycopref.models.packs import common_prefix, lay_out
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from refusals import one_line

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)

START = "<|im_start|>system\nYou are a therapist.<|im_end|>\n<|im_start|>user\n"
SPOKEN = (
    "I count the stairs.",
    "I count the stairs, and my sister moved out in March.",
    "I count",
    "Nobody calls.",
    "",
)
SPOKEN += ("I count the stairs. " * 6, "My boss shouts at me and I say nothing, every day of the week.")
PROMPTS = [*(START + text for text in SPOKEN), "a", "a b c"]


@pytest.fixture(scope="module")
def tiny(shared_cache):
    """random-tiny with larger weights: what comes next depends on all that came before, and some tokens are likelier
    than others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on many
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        found = find_weights("random-tiny")
    assert Path(found.location).is_relative_to(shared_cache)
    model, draw = load_causal_lm(found, "float32"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in "qkvo":
                getattr(layer.self_attn, f"{part}_proj").weight.mul_(8)
        model.lm_head.weight = torch.nn.Parameter(0.35 * torch.randn(model.lm_head.weight.shape, generator=draw))
    yield model, load_tokenizer(found)
    torch.set_num_threads(threads)


@pytest.fixture
def no_stops(tiny, monkeypatch):
    """Let answers run on, so that lengths are known."""
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", None)
    monkeypatch.setattr("psycopref.models.generation.stop_tokens", lambda model, tokenizer: set())


@torch.inference_mode()
def greedy_by_hand(model, ids: list[int], steps: int) -> list[int]:
    """Take the likeliest token again and again, without batch or cache."""
    ids = list(ids)
    for _ in range(steps):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-steps:]


def encode(tokenizer, prompt):
    return tokenizer(prompt, add_special_tokens=False).input_ids


def spelled(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def text_by_hand(model, tokenizer, prompt, steps):
    return spelled(tokenizer, greedy_by_hand(model, encode(tokenizer, prompt), steps))


@torch.inference_mode()
def test_this_model_looks_back(tiny):
    model, tokenizer = tiny
    last = encode(tokenizer, ".")
    found = {
        tuple(greedy_by_hand(model, encode(tokenizer, text) + last, 3))
        for text in ("I count", "My sister", "Nobody", "My boss", "Rain", "x y")
    }
    assert len(found) > 4, "or no test of caches and positions could fail"


# ---- one step ----

rows_of_logits = st.lists(st.floats(-8, 8), min_size=2, max_size=12)


@few
@given(rows_of_logits, st.integers(0, 14), st.floats(0.05, 1), st.floats(0.2, 3))
def test_only_allowed_tokens_are_sampled(row, top_k, top_p, temperature):
    logits = torch.tensor([row])
    order = sorted(range(len(row)), key=lambda i: -logits[0, i].item())[: top_k or None]
    mass = torch.softmax(logits[0, order].double() / temperature, -1)
    allowed = [i for rank, i in enumerate(order) if mass[:rank].sum() < top_p + 1e-5]
    lowest = min(logits[0, i].item() for i in allowed)
    how = Decoding(1, temperature, top_k, top_p)
    tokens = next_tokens(logits.expand(200, -1), how, row_generators(range(200)))
    assert tokens.shape == (200,) and all(logits[0, t].item() >= lowest for t in tokens.tolist())


def nucleus(row, top_p, temperature):
    """The exact distribution: the likeliest tokens, in order, until they hold top_p; tokens as likely as the last
    belong."""
    p = torch.softmax(torch.tensor(row).double() / temperature, -1)
    before = torch.stack([p[p > own].sum() for own in p])
    kept = torch.where(before < top_p, p, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("row", [[0.1 * i for i in range(40)], [3.0, 1.0, 1.0, 1.0, 0.0, -1.0], [5.0] + [0.0] * 30])
def test_the_nucleus_is_sampled_exactly(row, top_p):
    n, expected = 40000, nucleus(row, top_p, 0.8)
    rows = torch.tensor([row]).expand(n, -1)
    tokens = next_tokens(rows, Decoding(1, 0.8, 0, top_p), row_generators(range(n)))
    found = torch.bincount(tokens, minlength=len(row)) / n
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()
    whole = torch.softmax(torch.tensor(row).double() / 0.8, -1)
    assert (found - whole).abs().max() > 0.01 or top_p == 0.95, "the test tells the nucleus from the whole"


def test_tokens_of_no_probability_are_never_sampled():
    logits = torch.full((5000, 50), -math.inf)
    logits[:, [0, 7, 49]] = torch.tensor([1.0, 2.0, 1.5])
    for how in (Decoding(1, 1.0), Decoding(1, 1.0, 0, 0.9), Decoding(1, 1.0, 10)):
        assert set(next_tokens(logits, how, row_generators(range(5000))).tolist()) == {0, 7, 49}


@few
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_common_prefix_is_shared_and_the_longest(sequences):
    n = common_prefix(sequences)
    assert len({tuple(s[:n]) for s in sequences}) == 1
    assert n == min(map(len, sequences)) or len({tuple(s[: n + 1]) for s in sequences}) > 1


@few
@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 8))
def test_length_batches_hold_every_item_once_longest_first(lengths, size):
    batches = length_batches(lengths, size)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths))) and all(len(b) == size for b in batches[:-1]) and all(batches)
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


# ---- sampling ----


@torch.inference_mode()
def text_distribution(model, tokenizer, prompt, temperature, top_k=0):
    """The exact distribution of the first token, by its text."""
    logits = model(torch.tensor([encode(tokenizer, prompt)])).logits[0, -1].double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -math.inf
    found = Counter()
    for token, p in enumerate(torch.softmax(logits, -1).tolist()):
        found[spelled(tokenizer, [token])] += p
    return found


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (1.0, 5)])
def test_samples_follow_the_softmax(tiny, temperature, top_k):
    model, tokenizer = tiny
    n, how = 6000, Decoding(1, temperature, top_k, seed=3)
    [samples] = generate(model, tokenizer, [PROMPTS[0]], how, n=n, name="")
    found = Counter(sample.text for sample in samples)
    expected = text_distribution(model, tokenizer, PROMPTS[0], temperature, top_k)
    likeliest = [text for text, _ in expected.most_common(12)]
    assert expected[likeliest[0]] > 2 * expected[likeliest[-1]], "flat: the test would prove nothing"
    for text in likeliest:
        p = expected[text]
        assert abs(found[text] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-9, text
    assert all(expected[text] > 0 for text in found)
    if not top_k:
        wrong = text_distribution(model, tokenizer, PROMPTS[0], temperature * 1.5)
        off = [abs(found[t] / n - wrong[t]) / math.sqrt(wrong[t] * (1 - wrong[t]) / n) for t in likeliest]
        assert max(off) > 5, "the test tells temperatures apart"


def test_a_seed_gives_the_same_samples_and_another_seed_others(tiny):
    model, tokenizer = tiny
    first, again, other = (
        generate(model, tokenizer, PROMPTS, Decoding(6, 1.0, seed=s), n=2, name="") for s in (1, 1, 2)
    )
    assert first == again != other
    torch.manual_seed(99)  # the global state plays no part
    assert generate(model, tokenizer, PROMPTS, Decoding(6, 1.0, seed=1), n=2, name="") == first


def test_n_candidates_each(tiny, no_stops):
    model, tokenizer = tiny
    found = generate(model, tokenizer, PROMPTS, Decoding(5, 1.0), n=3, rows=4, name="")
    assert [len(samples) for samples in found] == [3] * len(PROMPTS)
    assert all(s.n_tokens == 5 and s.finish_reason == "length" for samples in found for s in samples)
    assert len({s.text for s in found[0]}) > 1
    greedy = generate(model, tokenizer, PROMPTS, Decoding(5), n=3, name="")
    assert all(len(set(samples)) == 1 for samples in greedy)


@pytest.mark.parametrize("max_tokens, n, top_p", [(0, 1, 1.0), (4, 0, 1.0), (4, 1, 0.0), (4, 1, 1.5)])
def test_what_can_t_be_meant_is_one_line(tiny, max_tokens, n, top_p):
    said = one_line(lambda: generate(*tiny, ["a"], Decoding(max_tokens, 1.0, 0, top_p), n=n, name=""))
    assert ("max_tokens" if top_p == 1 else "top_p") in said
    assert "prompt 1 has no token" in one_line(lambda: generate(*tiny, ["a", ""], Decoding(3), name=""))
    assert generate(*tiny, [], Decoding(3), name="") == []


# ---- greedy ----


@pytest.mark.parametrize("rows", [1, 2, 4, 64])
def test_greedy_equals_the_loop_by_hand_for_every_batch_size(tiny, no_stops, rows):
    model, tokenizer = tiny
    found = generate(model, tokenizer, PROMPTS, Decoding(10), rows=rows, name="")
    for prompt, [sample] in zip(PROMPTS, found):
        assert sample.text == text_by_hand(model, tokenizer, prompt, 10)
        assert (sample.finish_reason, sample.n_tokens) == ("length", 10)


def test_greedy_equals_transformers(tiny):
    model, tokenizer = tiny
    for prompt, [sample] in zip(PROMPTS, generate(model, tokenizer, PROMPTS, Decoding(12), name="")):
        ids = torch.tensor([encode(tokenizer, prompt)])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert sample.text == spelled(tokenizer, theirs[0, ids.shape[1] :])


@pytest.mark.parametrize("piece", [1, 9])
def test_room_is_taken_in_pieces(tiny, no_stops, monkeypatch, piece):
    model, tokenizer = tiny
    monkeypatch.setattr(Branches.__init__, "__defaults__", (piece,))
    found = generate(model, tokenizer, PROMPTS, Decoding(10), n=2, name="")
    for prompt, samples in zip(PROMPTS, found):
        assert [s.text for s in samples] == [text_by_hand(model, tokenizer, prompt, 10)] * 2


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (20, 1.0)])
def test_branches_and_repeated_keys_give_the_same_answers(tiny, monkeypatch, top_k, top_p):
    """Answers to one prompt end at different steps and leave; rooms fill up; both ways must sample the same."""
    model, tokenizer = tiny
    first = [greedy_by_hand(model, encode(tokenizer, prompt), 1)[0] for prompt in PROMPTS]
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted({*first, *range(40, 60)}))
    monkeypatch.setattr(Branches.__init__, "__defaults__", (4,))
    kept, keep = [], Branches.keep

    def recording(self, rows):
        keep(self, rows)
        kept.append((len(rows), self.shared[-1].n, self.shared[-1].groups))

    monkeypatch.setattr(Branches, "keep", recording)
    how = Decoding(30, 0.7, top_k, top_p, seed=5)
    ours = generate(model, tokenizer, PROMPTS, how, n=5, name="")
    assert len(kept) > 3 and any(n < 5 for _, n, _ in kept), "rows and prompts leave"
    assert any(rows < n * prompts for rows, n, prompts in kept), "and holes stay"
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    kept.clear()
    assert generate(model, tokenizer, PROMPTS, how, n=5, name="") == ours and not kept


def test_a_sliding_window_is_respected(tiny, no_stops):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    shape |= dict(vocab_size=tiny[0].config.vocab_size, sliding_window=5, initializer_range=0.5)
    model = MistralForCausalLM(MistralConfig(**shape)).eval()
    for prompt, [sample] in zip(PROMPTS, generate(model, tiny[1], PROMPTS, Decoding(8), name="")):
        assert sample.text == text_by_hand(model, tiny[1], prompt, 8)


def test_a_head_that_hands_no_packs_on_reads_padded_prompts(tiny, no_stops):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    model = OPTForCausalLM(OPTConfig(**shape, vocab_size=tiny[0].config.vocab_size, init_std=0.3)).eval()
    for prompts in (PROMPTS, PROMPTS[:1]):
        for prompt, [sample] in zip(prompts, generate(model, tiny[1], prompts, Decoding(8), name="")):
            assert sample.text == text_by_hand(model, tiny[1], prompt, 8)


@settings(few, max_examples=12)
@given(data=st.data())
def test_greedy_answers_do_not_depend_on_the_company(tiny, data):
    model, tokenizer = tiny
    shared = data.draw(st.sampled_from(["", "a", START]))
    parts = st.sampled_from(["I", " count", " the stairs", ".", "\n", " my sister", "<|im_end|>"])
    rests = st.lists(parts, max_size=8).map("".join)
    prompts = data.draw(st.lists(rests.map(lambda r: shared + r).filter(bool), min_size=1, max_size=6))
    together = generate(model, tokenizer, prompts, Decoding(6), name="")
    assert together == [generate(model, tokenizer, [prompt], Decoding(6), name="")[0] for prompt in prompts]


@pytest.mark.parametrize("how", [Decoding(8, 1.0, seed=4), Decoding(8, 0.8, 20, 0.9, seed=4)])
def test_sampled_answers_do_not_depend_on_the_company(tiny, how):
    """Random numbers belong to an answer: neither other prompts, nor rows, nor further candidates change it."""
    model, tokenizer = tiny
    together = generate(model, tokenizer, PROMPTS, how, n=3, name="")
    assert len({sample.text for samples in together for sample in samples}) > len(PROMPTS)
    for rows in (1, 4, 64):
        assert generate(model, tokenizer, PROMPTS[::-1], how, n=3, rows=rows, name="") == together[::-1]
    for prompt, samples in zip(PROMPTS, together):
        assert generate(model, tokenizer, [prompt], how, n=3, name="") == [samples]
        assert generate(model, tokenizer, [prompt], how, n=5, name="")[0][:3] == samples


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_prompts_are_read_in_packs_of_any_size(tiny, no_stops, monkeypatch, tokens):
    model, tokenizer = tiny
    prompts = [START + own for own in PROMPTS] + PROMPTS
    monkeypatch.setattr("psycopref.models.generation.pass_tokens", lambda device: tokens)
    for prompt, [sample] in zip(prompts, generate(model, tokenizer, prompts, Decoding(6), name="")):
        assert sample.text == text_by_hand(model, tokenizer, prompt, 6)


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60), st.data())
def test_packs_of_prompts_hold_each_once_within_the_budget(lengths, tokens, data):
    shared = data.draw(st.integers(0, min(lengths) - 1))
    packs, room = prompt_packs(lengths, shared, tokens), max(tokens, 2 * shared)
    assert [i for pack in packs for i in pack] == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or shared + sum(lengths[i] - shared for i in pack) <= room
    for one, two in zip(packs, packs[1:]):
        assert shared + sum(lengths[i] - shared for i in (*one, two[0])) > room, "no pack has room left for the next"
    computed = sum(lengths) - shared * (len(lengths) - len(packs))
    assert computed <= shared + 3 * sum(length - shared for length in lengths)


def test_decoding_leaves_the_model_as_it_was(tiny, monkeypatch):
    model, tokenizer = tiny
    before, ids = "sdpa", torch.tensor([encode(tokenizer, PROMPTS[0])])
    logits = model(ids).logits
    generate(model, tokenizer, PROMPTS, Decoding(3), name="")
    assert model.config._attn_implementation == before and torch.equal(model(ids).logits, logits)

    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("psycopref.models.generation.next_tokens", broken)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPTS, Decoding(3), name="")
    assert model.config._attn_implementation == before
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", broken)
        with pytest.raises(ZeroDivisionError):
            generate(model, tokenizer, PROMPTS, Decoding(3), name="")
    assert model.config._attn_implementation == before, "while the prompts were read"
    assert torch.equal(model(ids).logits, logits)


def test_a_model_that_has_just_learnt_from_packs_reads_its_prompts_as_packs(tiny, monkeypatch):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    expected = generate(model, tokenizer, PROMPTS, Decoding(6), name="")
    pack = lay_out([[[5, 6, 7], [5, 6, 8, 9]], [[3, 4]]])
    model.model(pack=pack).last_hidden_state.sum().backward()
    monkeypatch.setattr("psycopref.models.generation.Repeats", None)  # nothing is padded
    assert generate(model, tokenizer, PROMPTS, Decoding(6), name="") == expected
    assert model.config._attn_implementation == "sdpa"
    again = model.model(pack=pack).last_hidden_state  # masks that sampling has made serve a training too
    again.sum().backward()


def test_a_model_in_peft_answers_as_without_its_shell(tiny):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    expected = generate(model, tokenizer, PROMPTS, Decoding(6), name="")
    shell = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    assert generate(shell, tokenizer, PROMPTS, Decoding(6), name="") == expected


def test_no_batch_stays_in_memory(tiny):
    generate(*tiny, PROMPTS, Decoding(3), n=2, name="")
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Branches]


def test_threads_take_turns(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))

    def answers(own):
        return generate(own, tokenizer, PROMPTS, Decoding(12), n=2, name="")

    alone = [answers(own) for own in (model, other)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answers, [model, other] * 6)) == alone * 6


# ---- stopping ----


def test_stop_tokens_of_tokenizer_and_model_count(tiny, monkeypatch):
    model, tokenizer = tiny
    for ends, expected in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        assert stop_tokens(model, tokenizer) == expected | {tokenizer.eos_token_id}


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_stop_token_ends_an_answer_and_changes_no_other(tiny, monkeypatch, step):
    model, tokenizer = tiny
    full = [greedy_by_hand(model, encode(tokenizer, prompt), 12) for prompt in PROMPTS]
    chosen = {tokens[step] for tokens in full[::2]}  # ends at least every other answer at this step
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(chosen))
    stops = stop_tokens(model, tokenizer)
    lengths = [next((i for i, token in enumerate(tokens) if token in stops), None) for tokens in full]
    assert sum(n is not None for n in lengths) > len(full) / 4 and len({*lengths}) > 1, "some leave, at different times"
    found = generate(model, tokenizer, PROMPTS, Decoding(12), name="")
    for tokens, length, [sample] in zip(full, lengths, found):
        assert sample.text == spelled(tokenizer, tokens[:length])
        assert (sample.finish_reason, sample.n_tokens) == (("length", 12) if length is None else ("stop", length))


def test_a_stop_at_the_last_token_is_a_stop(tiny, monkeypatch):
    model, tokenizer = tiny
    tokens = greedy_by_hand(model, encode(tokenizer, PROMPTS[0]), 8)
    at = next(i for i in range(7, -1, -1) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[at])
    [[ended]] = generate(model, tokenizer, [PROMPTS[0]], Decoding(at + 1), name="")
    assert (ended.finish_reason, ended.n_tokens) == ("stop", at)
    if at:
        [[cut]] = generate(model, tokenizer, [PROMPTS[0]], Decoding(at), name="")
        assert (cut.finish_reason, cut.n_tokens) == ("length", at)


# ---- whole answers ----

WORDS = st.sampled_from(
    [
        "I",
        "see",
        "Dr. Bell",
        "e.g. home",
        "2. Rest",
        "it hurts",
        "really?",
        "stop!",
        "so.",
        "well …",
        '"no."',
        "a\n\n- b",
    ]
)


@few
@given(st.lists(WORDS, max_size=24).map(" ".join), st.integers(1, 12))
def test_a_text_ends_at_the_first_end_of_a_sentence_after_so_many_words_and_twice_is_once(text, words):
    cut = end_sentence(text, words)
    if cut is None:
        return
    assert text.startswith(cut) and cut.rstrip("\"'”’)]*")[-1] in ".!?…" and len(cut.split()) >= words
    assert text[len(cut) :].strip() and text[len(cut)].isspace(), "what ends by itself is not ended"
    assert end_sentence(cut, words) is None
    assert not cut.endswith(("Dr.", "e.g.", " 2."))
    shorter = end_sentence(text, words - 1) if words > 1 else cut
    assert shorter is not None and len(shorter) <= len(cut)


def test_the_loop_stops_early_and_says_what_the_whole_answer_cut_back_says(tiny, no_stops, monkeypatch):
    "Where every third token ends a sentence, an answer of 40 tokens is ended as its text says, with fewer steps."
    model, tokenizer = tiny
    steps = []

    def spoken(tokens, **how):
        words = ("word" + "." * (i % 3 == 2) for i, _ in enumerate(tokens))
        return " ".join(words)

    step = Branches.step
    monkeypatch.setattr(Branches, "step", lambda self, *given: steps.append(1) or step(self, *given))
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, tokens, **how: spoken(tokens))
    [[whole]] = generate(model, tokenizer, PROMPTS[:1], Decoding(40, 1.0, seed=4), name="")
    all_steps = len(steps)
    [[ended]] = generate(model, tokenizer, PROMPTS[:1], Decoding(40, 1.0, seed=4, sentence_after=10), name="")
    assert whole.finish_reason == "length" and ended.finish_reason == "sentence"
    assert ended.text == end_sentence(whole.text, 10) and len(ended.text.split()) == 12
    assert len(steps) - all_steps <= 16 < all_steps == 39


def test_an_answer_without_an_end_of_a_sentence_stays_cut(tiny, no_stops):
    model, tokenizer = tiny
    how = dict(max_tokens=6, sentence_after=50)
    [[sample]] = generate(model, tokenizer, PROMPTS[:1], Decoding(**how), name="")
    assert sample == generate(model, tokenizer, PROMPTS[:1], Decoding(6), name="")[0][0]


@pytest.mark.parametrize("penalty", [1.2, 3.0])
def test_a_penalty_of_repetition_equals_transformers_for_any_batch(tiny, penalty):
    model, tokenizer = tiny
    found = generate(model, tokenizer, PROMPTS, Decoding(12, repetition_penalty=penalty), n=2, rows=6, name="")
    for prompt, group in zip(PROMPTS, found):
        ids = torch.tensor([encode(tokenizer, prompt)])
        how = dict(max_new_tokens=12, do_sample=False, repetition_penalty=penalty)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
        assert {sample.text for sample in group} == {tokenizer.decode(theirs, skip_special_tokens=True).strip()}
    assert found != generate(model, tokenizer, PROMPTS, Decoding(12), n=2, name="")


@pytest.mark.parametrize("how", [dict(repetition_penalty=0.0), dict(sentence_after=-1)])
def test_endings_that_cannot_be_meant_are_refused(tiny, how):
    assert "generate: " in one_line(lambda: generate(*tiny, ["a"], Decoding(3, **how), name=""))


def test_seeds_of_their_own_give_each_answer_what_it_gets_alone(tiny):
    model, tokenizer = tiny
    how, seeds = Decoding(8, 1.0, 50), [[3, 5], [3, 7]]
    together = generate(model, tokenizer, PROMPTS[:2], how, n=2, name="", seeds=seeds)
    alone = [generate(model, tokenizer, [p], how, name="", seeds=[own[:1]])[0][0] for p, own in zip(PROMPTS, seeds)]
    assert [group[0] for group in together] == alone
    assert together[0][0].text != together[0][1].text


def test_local_requests_that_differ_in_the_seed_only_share_their_prompt_and_change_no_answer(tiny, shared_cache):
    asked = [
        ChatRequest(({"role": "user", "content": p},), Decoding(6, 1.0, 50, seed=s))
        for p in ("a", "b c")
        for s in (1, 2)
    ]
    asked.append(ChatRequest(asked[0].messages, Decoding(6, 1.0, 20, seed=1)))
    local = LocalModel("random-tiny", dtype="float32")
    groups = local.groups(asked)
    assert sorted(sum(groups, [])) == list(range(5)) and {frozenset(g) for g in groups} == {
        frozenset({0, 1, 2, 3}),
        frozenset({4}),
    }
    for group in groups:
        replies = asyncio.run(local.answer([asked[i] for i in group]))
        alone = [asyncio.run(local.answer([asked[i]]))[0] for i in group]
        assert replies == alone
