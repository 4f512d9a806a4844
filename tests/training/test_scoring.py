"""Scoring: reward models in the forms they were published in; alone, in any company, packed and padded, always the
same reward."""

import json
from itertools import pairwise

import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import one_line

from psycopref.training import scoring
from psycopref.core.settings import RewardSettings
from psycopref.models.packs import enable_packing
from psycopref.training.scoring import (
    SCORERS,
    Scorer,
    load_reward_model,
    load_scorer,
    score_groups,
    score_pairs,
    token_batches,
)
from psycopref.training.texts import pair_messages, pair_rows, render
from psycopref.models.weights import fix_date, load_tokenizer, quiet_transformers

CLOSE = 1e-5  # float32, sums in another order
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
GROUPED = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GROUPED |= dict(initializer_range=0.3)
SETTINGS = {"Llama": GROUPED, "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
            "Gemma2": GROUPED | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0)}  # fmt: skip
PAIRS = pd.DataFrame({
    "ID": ["a", "b", "c"], "prefID": [0, 1, 2], "question": ["I count the stairs every morning.", "No.", "Why?"],
    "messages": [None, None, [{"role": "user", "content": "It is late."}, {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"}]],
    "chosen": ["What would happen if you lost count?", "I hear a no.", "What keeps you awake?"],
    "rejected": ["Stop.", "You should really talk, because that is what people do here.", "What keeps you up?"],
})  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- published forms ----


@pytest.fixture
def tokenizer(tiny):
    """A tokenizer that puts a BOS before each text, with a chat template that does so too, as those of Llama 3 and
    Gemma."""
    from tokenizers.processors import TemplateProcessing

    found = load_tokenizer(tiny)
    found.add_special_tokens({"bos_token": "<|begin|>"})
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", found.bos_token_id)]
    )
    found.chat_template = "{{ bos_token }}" + found.chat_template
    return found


def save(folder, kind, tokenizer, **more):
    """Save a random model of a class of transformers beside its tokenizer."""
    import transformers

    family = kind.split("For")[0]
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(1)
        own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        own |= dict(vocab_size=len(tokenizer), num_labels=1) | SETTINGS[family] | more
        config = getattr(transformers, f"{family}Config")(**own)
        getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change(folder, file, edit):
    """Rewrite a json file or the weights of a folder."""
    from safetensors.torch import load_file, save_file

    path = folder / file
    if file.endswith(".json"):
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    else:
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    return folder


def plain(folder, kind="AutoModelForSequenceClassification"):
    """What a card says to load."""
    import transformers

    with quiet_transformers():
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


SIDES = ("chosen", "rejected")


def conversations(pairs=PAIRS):
    """The whole conversations of pairs: those with the chosen answers, then those with the rejected ones."""
    return [
        [*pair_messages(pair), {"role": "assistant", "content": text}]
        for side in SIDES
        for pair, text in zip(pairs.itertuples(), pairs[side])
    ]


def without(folder, lost):
    """Take weights out of a folder by a part of their name."""
    return change(folder, "model.safetensors", lambda own: {name: w for name, w in own.items() if lost not in name})


SPOKEN = dict(tokenize=True, return_tensors="pt", return_dict=True)  # of apply_chat_template


def alone(model, tokenizer, texts):
    """The reward of each text by the model's own forward pass, one text at a time."""
    with torch.no_grad():
        return [model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item() for text in texts]


@pytest.fixture(params=["packed", "padded"])
def way(request, monkeypatch):
    """Score as packs, or as for a model that takes none."""
    if request.param == "padded":
        monkeypatch.setattr(scoring, "enable_packing", lambda model: "not today")
    return request.param


def assert_close(scores, expected, tolerance=CLOSE):
    assert scores == pytest.approx(expected, abs=tolerance, rel=0)
    assert torch.tensor(expected).std() > 0.05, "rewards that differ"


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_folder_with_a_score_head_scores_as_its_card_says(family, way, tokenizer, tmp_path):
    """Skywork's form: template, tokens and head by plain transformers, one conversation at a time."""
    save(tmp_path / "model", f"{family}ForSequenceClassification", tokenizer)
    model, their_tokenizer = plain(tmp_path / "model")
    expected = []
    for conversation in conversations():
        with torch.no_grad():
            expected.append(model(**their_tokenizer.apply_chat_template(conversation, **SPOKEN)).logits[0][0].item())
    ours, our_tokenizer, weights = load_scorer(Scorer(str(tmp_path / "model")), "float32")
    chosen, rejected = score_pairs(ours, our_tokenizer, PAIRS, name="")
    assert_close([*chosen, *rejected], expected)
    assert weights.short == "model" and our_tokenizer.pad_token_id != our_tokenizer.eos_token_id
    assert hasattr(ours.base_model, "pack_kernel") == (way == "packed"), "the way that is meant was taken"


def test_a_rendered_text_has_one_bos(tokenizer, tmp_path, monkeypatch):
    """The template writes it, and the tokenizer would write another."""
    folder = save(tmp_path, "LlamaForSequenceClassification", tokenizer)
    model, tokenizer, _ = load_scorer(Scorer(str(folder)), "float32")
    begin, laid = tokenizer.bos_token_id, []
    text = render(tokenizer, pair_messages(next(PAIRS.itertuples())), PAIRS.chosen[0])
    assert tokenizer(text).input_ids[:2] == [begin, begin], "left to itself"
    monkeypatch.setattr(scoring, "lay_out", lambda groups, own=scoring.lay_out: laid.extend(groups) or own(groups))
    score_pairs(model, tokenizer, PAIRS, name="")
    rows, _ = pair_rows(PAIRS, tokenizer, 2000)
    texts = [text for group in laid for text in group] + [row[f"{side}_ids"] for row in rows for side in SIDES]
    assert len(texts) == 4 * len(PAIRS) and all(ids[0] == begin and ids.count(begin) == 1 for ids in texts)


@pytest.fixture
def released(tokenizer, tmp_path):
    """The form of the paper's released reward model: saved by OpenRLHF, so of a class that transformers does not
    have, with one score.weight."""
    save(tmp_path / "released", "LlamaForSequenceClassification", tokenizer)
    forget = ("id2label", "label2id", "problem_type")
    return change(
        tmp_path / "released",
        "config.json",
        lambda c: {k: v for k, v in c.items() if k not in forget} | {"architectures": ["RewardModel"]},
    )


def test_the_released_reward_model_loads_and_scores_as_openrlhf_reads_it(released, way):
    """There the reward is the head's value on the last token that is no padding."""
    from safetensors.torch import load_file
    from transformers import LlamaModel

    heads = {name: weight for name, weight in load_file(released / "model.safetensors").items() if "model." not in name}
    assert list(heads) == ["score.weight"] and heads["score.weight"].shape == (1, 32)
    model, tokenizer, _ = load_scorer(Scorer(str(released)), "float32")
    with quiet_transformers():
        backbone = LlamaModel.from_pretrained(released, dtype=torch.float32).eval()
    expected = []
    for conversation in conversations():
        ids = tokenizer.apply_chat_template(conversation, **SPOKEN)["input_ids"]
        with torch.no_grad():
            expected.append((backbone(ids).last_hidden_state[0, -1] @ heads["score.weight"][0]).item())
    chosen, rejected = score_pairs(model, tokenizer, PAIRS, name="")
    assert_close([*chosen, *rejected], expected)


@pytest.mark.parametrize("lost", ["score.weight", "layers.0.mlp.down_proj"])
def test_without_its_head_or_a_layer_the_released_form_is_refused(lost, released):
    """transformers makes a missing weight at random and says so in a notice only."""
    said = one_line(lambda: load_scorer(Scorer(str(without(released, lost))), "float32"))
    assert lost in said and "random" in said and str(released) in said


def test_a_language_model_is_no_reward_model_unless_a_new_head_is_asked_for(tiny):
    """transformers would make a random head and say so in a notice only."""
    tokenizer = load_tokenizer(tiny)
    assert "score.weight" in one_line(lambda: load_scorer(Scorer(tiny.location), "float32"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        load_reward_model(tiny.location, tokenizer, "float32", new_head=seed).score.weight for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected), "the caller's chance is left alone"


def test_the_head_is_float32_over_a_backbone_in_half_precision(released, way):
    """Two answers that tie in bfloat16 are told apart."""
    model, tokenizer, _ = load_scorer(Scorer(str(released)), "bfloat16")
    assert model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    chosen, rejected = score_pairs(model, tokenizer, PAIRS, name="")
    scores = torch.tensor([*chosen, *rejected])
    assert not torch.equal(scores, scores.bfloat16().float()), "finer than bfloat16"


def test_nemotrons_reward_is_the_first_logit_of_the_first_new_token(way, tokenizer, tmp_path):
    """As its card reads it: generate one token, take the score of token 0."""
    save(tmp_path, "LlamaForCausalLM", tokenizer, tie_word_embeddings=False)
    model, their_tokenizer = plain(tmp_path, "AutoModelForCausalLM")
    expected = []
    for conversation in conversations():
        ids = their_tokenizer.apply_chat_template(conversation, add_generation_prompt=False, **SPOKEN)
        how = dict(max_new_tokens=1, return_dict_in_generate=True, output_scores=True, do_sample=False)
        made = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], **how)
        expected.append(made["scores"][0][0][0].item())
    ours, our_tokenizer, _ = load_scorer(Scorer(str(tmp_path), "first-logit"), "float32")
    chosen, rejected = score_pairs(ours, our_tokenizer, PAIRS, name="")
    assert_close([*chosen, *rejected], expected)
    assert hasattr(ours.base_model, "pack_kernel") == (way == "packed")


def test_the_scorers_of_the_paper_are_known_by_name():
    assert set(RewardSettings().scorers) <= set(SCORERS)


def test_a_model_that_takes_no_packs_gives_the_scores_of_its_own_pass(tokenizer, tmp_path):
    """BLOOM's attention has a bias by distance, which a pack can't have."""
    folder = save(tmp_path, "BloomForSequenceClassification", tokenizer)
    model, tokenizer, _ = load_scorer(Scorer(str(folder)), "float32")
    assert enable_packing(model)
    groups = [[tokenizer.apply_chat_template(c, tokenize=False) for c in conversations()], ["Stop."], ["a"]]
    expected = alone(model, tokenizer, [text for group in groups for text in group])
    for tokens in (1, 100, 8192):
        scores = score_groups(model, tokenizer, groups, tokens, name="")
        assert [len(own) for own in scores] == [6, 1, 1]
        assert_close([score for own in scores for score in own], expected)


# ---- the end is no padding ----


def test_texts_that_hold_and_end_with_the_end_token_score_right_where_padding_was_the_end(way, tokenizer, tmp_path):
    """trl 2758, transformers 35352: a checkpoint whose padding token is its end token; a text ends with that token,
    as Llama 3's template writes it."""
    tokenizer.pad_token = tokenizer.eos_token
    for end in ("<|im_end|>\\n", "<|im_end|>\n"):
        tokenizer.chat_template = tokenizer.chat_template.replace(end, "<|im_end|>")
    save(tmp_path, "LlamaForSequenceClassification", tokenizer)
    theirs, their_tokenizer = plain(tmp_path)
    end = their_tokenizer.eos_token_id
    assert their_tokenizer.pad_token_id == theirs.config.pad_token_id == end
    texts = [their_tokenizer.apply_chat_template(c, tokenize=False) for c in conversations()]
    ids = [their_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert all(own[-1] == end and own.count(end) > 1 for own in ids)
    with torch.no_grad():
        expected = [theirs.score(theirs.model(torch.tensor([own])).last_hidden_state)[0, -1, 0].item() for own in ids]
        padded = their_tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
        mistaken = theirs(**padded).logits.flatten().tolist()
    assert min(abs(a - b) for a, b in zip(mistaken, expected)) > 1e-3, "plain transformers reads another token here"

    ours, our_tokenizer, _ = load_scorer(Scorer(str(tmp_path)), "float32")
    assert our_tokenizer.pad_token_id == ours.config.pad_token_id != end
    [scores] = score_groups(ours, our_tokenizer, [texts], name="")
    assert_close(scores, expected)
    assert_close(alone(ours, our_tokenizer, texts), expected)


# ---- any company ----


@pytest.fixture(scope="module")
def word_models(tmp_path_factory):
    """Models on a tokenizer of one token a word: one like Llama, one with a window of 4 tokens and a soft cap, and
    one that takes no packs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, 12)}
    inner = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=template
    )
    found = {}
    for family in SETTINGS:
        more = {"sliding_window": 4} if family == "Gemma2" else {}
        folder = save(tmp_path_factory.mktemp(family), f"{family}ForSequenceClassification", tokenizer, **more)
        model, own, _ = load_scorer(Scorer(str(folder)), "float32")
        assert bool(enable_packing(model)) == (family == "Bloom")
        found[family] = model, own, {}
    return found


words = st.lists(st.sampled_from([f"w{i}" for i in range(2, 6)] + ["<end>"]), min_size=1, max_size=12)


@st.composite
def ragged_groups(draw):
    """Groups of one to five texts: beginnings, copies and continuations of one text, and strangers."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        base = draw(words)
        kinds = {"same": st.just(base), "beginning": st.integers(1, len(base)).map(lambda n, base=base: base[:n]),
        "longer": words.map(lambda more, base=base: base + more),
                 "other": words, "one": words.map(lambda own: own[:1])}  # fmt: skip
        groups.append(
            [" ".join(draw(kinds[draw(st.sampled_from(sorted(kinds)))])) for _ in range(draw(st.integers(1, 5)))]
        )
    return groups


def score_alone(word_model, text):
    """The score of one text by the model's own pass; kept, as texts come again."""
    model, tokenizer, kept = word_model
    if text not in kept:
        [kept[text]] = alone(model, tokenizer, [text])
    return kept[text]


@pytest.mark.parametrize("family", SETTINGS)
@few
@given(groups=ragged_groups(), tokens=st.integers(1, 60), random=st.randoms(use_true_random=False))
@example(groups=[["w2"]], tokens=1, random=None)
@example(groups=[["w2"] * 5, ["w2 w3", "w2", "w2 w3 w4"], ["w3 w2 <end>", "w3 w2 <end>"]], tokens=3, random=None)
def test_a_score_hangs_on_the_text_alone(family, word_models, groups, tokens, random):
    """Whatever else is scored, in whatever order, under whatever budget."""
    model, tokenizer, _ = own = word_models[family]
    order = list(range(len(groups)))
    if random is not None:
        random.shuffle(order)
    scores = score_groups(model, tokenizer, [groups[i] for i in order], tokens, name="")
    assert [len(found) for found in scores] == [len(groups[i]) for i in order]
    for place, found in zip(order, scores):
        assert found == pytest.approx([score_alone(own, text) for text in groups[place]], abs=CLOSE, rel=0)


def test_prompts_are_computed_once(word_models, monkeypatch):
    model, tokenizer, _ = word_models["Llama"]
    widths, real = [], scoring.lay_out

    def recording(groups):
        pack = real(groups)
        widths.append(pack.input_ids.numel())
        return pack

    monkeypatch.setattr(scoring, "lay_out", recording)
    prompt = " ".join(["w2", "w3"] * 10)
    groups = [[f"{prompt} w4 w{i}" for i in (2, 3, 4)], [f"w5 {prompt}", f"w5 {prompt} w2"]]
    score_groups(model, tokenizer, groups, tokens=50, name="")
    assert widths == [(21 + 3) + (20 + 1 + 2)], "where a text goes on from a whole other one, a token comes again"


# ---- batches ----


@few
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_batches_hold_each_item_once_under_the_budget_longest_first(sizes, tokens):
    batches = token_batches(sizes, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or sum(sizes[i] for i in batch) <= tokens for batch in batches)
    flat = [sizes[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    for batch, after in pairwise(batches):
        assert sum(sizes[i] for i in batch) + sizes[after[0]] > tokens, "it is left when the next does not fit"


# ---- faults that users meet ----


def renamed(folder):
    return change(folder, "model.safetensors", lambda own: {k.replace("model.", "base."): w for k, w in own.items()})


def torn(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize(
    "kind, head, spoil, more, said",
    [
        ("SequenceClassification", "score", renamed, {}, "random"),
        ("SequenceClassification", "score", lambda folder: folder, {"num_labels": 2}, "score.weight"),
        ("SequenceClassification", "first-logit", lambda folder: folder, {}, "random"),
        ("CausalLM", "first-logit", torn, {}, "truncated"),
    ],
    ids=["other names", "two labels", "no language head", "torn"],
)
def test_a_checkpoint_of_another_kind_is_one_line(tokenizer, tmp_path, kind, head, spoil, more, said):
    folder = spoil(save(tmp_path, f"LlamaFor{kind}", tokenizer, **more))
    assert said in one_line(lambda: load_scorer(Scorer(str(folder), head), "float32"))


def test_padded_batches_keep_the_budget_with_their_padding(word_models, monkeypatch):
    """One long text among short ones: every row is as wide as the longest."""
    model, tokenizer, _ = word_models["Bloom"]
    shapes, plain_forward = [], model.base_model.forward

    def recording(ids, **keywords):
        shapes.append(tuple(ids.shape))
        return plain_forward(ids, **keywords)

    monkeypatch.setattr(model.base_model, "forward", recording)
    score_groups(model, tokenizer, [["w2 " * 40], *([["w3"]] * 20)], tokens=64, name="")
    assert sum(rows for rows, _ in shapes) == 21 and all(rows == 1 or rows * width <= 64 for rows, width in shapes)


def test_an_empty_text_is_one_line(word_models):
    model, tokenizer, _ = word_models["Llama"]
    one_line(lambda: score_groups(model, tokenizer, [["", "w2"]], name=""))


def test_a_text_does_not_hang_on_the_day(tokenizer, monkeypatch):
    """Llama 3.2's template writes the date of today where it is given none, so a training and its scores would change
    overnight."""
    import datetime

    from transformers.utils import chat_template_utils

    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string "
        "}}" + tokenizer.chat_template
    )
    fix_date(tokenizer)
    texts = []
    for day in (1, 2):
        frozen = type("frozen", (), {"now": staticmethod(lambda day=day: datetime.datetime(2026, 5, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", frozen)
        texts.append(render(tokenizer, [{"role": "user", "content": "No."}], "I see."))
    assert texts[0] == texts[1]
