"""RewardBench is read as published and scored as its leaderboard scores it; a model handed to its program keeps its
scores.

REWARDBENCH_PYTHON, the interpreter of an environment in which the authors' command (rewardbench 0.1.4) runs, opens
the comparison with it; REWARDBENCH_SOURCE may name a folder with the unpacked package.
"""

import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import COMMIT, Hub, in_child, one_line, serve

from psycopref.evaluation.reward_bench import PRIOR, PRIOR_PAIRS, PUBLISHED, SECTION_WEIGHT, SECTIONS, overall_shares
from psycopref.evaluation.reward_bench import read_reward_bench, score_reward_bench
from psycopref.training.texts import name_for_older

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
CORE = [subset for weights in SECTIONS.values() for subset in weights]
HEAD = ["prompt", "chosen", "chosen_model", "rejected", "rejected_model", "subset", "id"]


def row(subset="hep-go", id=0, **other):
    said = {"prompt": f"Question {id} of {subset}, with a comma?", "chosen": "Yes,\nof course.", "chosen_model": "a"}
    return said | {"rejected": 'He said "no".', "rejected_model": "b", "subset": subset, "id": id} | other


def rows(subsets=CORE, each=2, **other):
    return [row(subset, id, **other) for subset in subsets for id in range(each)]


def turns(*texts):
    return [{"content": text, "role": "any"} for text in texts]


def put(path, found, columns=None):
    """Write a table in the form that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(found, columns=columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


def scored(pairs, right, samples=20):
    """Score pairs of which `right` says whether they are won; the losses are ties."""
    return score_reward_bench(pairs, np.asarray(right, float), np.zeros(len(pairs)), samples).set_index("name")


@pytest.fixture
def pairs(tmp_path):
    return read_reward_bench(put(tmp_path / "bench.parquet", rows()))


# ---- reading ----


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_published_table_is_read_in_every_form(tmp_path, ending):
    found = read_reward_bench(put(tmp_path / f"bench.{ending}", rows(), HEAD))
    assert list(found) == ["ID", "prefID", "question", "messages", "chosen", "rejected", "subset"] and len(found) == 46
    assert found.prefID.tolist() == list(range(46)) and found.ID.is_unique and found.ID[3] == "alpacaeval-length-1"
    assert found[["question", "chosen", "rejected", "subset"]].values.tolist() == [
        [raw[name] for name in ("prompt", "chosen", "rejected", "subset")] for raw in rows()
    ]
    assert found.messages.tolist() == [[{"role": "user", "content": text}] for text in found.question]


def test_the_older_sets_take_their_subset_from_the_name_of_the_file(tmp_path):
    said = [row("reddit", 7, prompt=turns("Hi", "Hello!", "Why?"))]
    for name in [*PRIOR_PAIRS, "pku_safer"]:
        put(tmp_path / "older" / "data" / f"{name}-00000-of-00001.parquet", said)
    found = read_reward_bench(put(tmp_path / "bench.csv", rows(each=1)), tmp_path / "older")
    assert found.subset.tolist() == [*CORE, *PRIOR_PAIRS] and found.prefID.tolist() == list(range(27))
    last = found.iloc[-1]
    assert last.ID == "summarize-7" and last.question == "Why?"
    assert [turn["role"] for turn in last.messages] == ["user", "assistant", "user"]


HUB_CODE = """
import json, sys
from psycopref.core.settings import StudyError
from psycopref.evaluation.reward_bench import read_reward_bench
try:
    print(json.dumps(read_reward_bench(*sys.argv[1:]).ID.tolist()))
except StudyError as error:
    print(json.dumps(str(error)))
"""


def test_the_hub_is_asked_for_the_filtered_part(tmp_path):
    hub = Hub()
    files = {name: put(tmp_path / f"{name}.parquet", [row(id=id)]) for id, name in enumerate(("raw", "filtered"))}
    hub.files = {f"data/{name}-00000-of-00001.parquet": path.read_bytes() for name, path in files.items()}
    with serve(hub) as (address, seen):
        [found] = in_child(HUB_CODE, tmp_path, address, "hf://datasets/any/set")
    paths = [request["path"] for request in seen]
    assert found == ["hep-go-1"] and any(COMMIT in path for path in paths) and not any("raw" in path for path in paths)
    for names in ([], ["reward-bench"]):
        [offline] = in_child(HUB_CODE, tmp_path, "http://127.0.0.1:9", *names, offline="1")
        assert "allenai/reward-bench" in offline and "HF_HUB_OFFLINE" in offline and offline.endswith("/path/to/it")


FAULTS = {
    "prompt is None": {"prompt": None},
    "prompt is []": {"prompt": []},
    "begin and end with the user's": {"prompt": turns("Hi", "Hello!")},
    "rejected is 3,": {"rejected": 3},
    "chosen is None": {"chosen": None},
    "subset 'hep-goo' is not known. Did you mean hep-go": {"subset": "hep-goo"},
    "subset None is not known. Known: alpacaeval-easy": {"subset": None},
    "id is None": {"id": None},
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_wrong_cell_is_one_line_with_its_row(tmp_path, part):
    table = tmp_path / "bench.jsonl"
    table.write_text("".join(json.dumps(one) + "\n" for one in [row(), row(id=1), {**row(id=2), **FAULTS[part]}]))
    message = one_line(lambda: read_reward_bench(table))
    assert part in message and f"{table}, row 2" in message


def test_missing_columns_and_wrong_places_are_one_line(tmp_path):
    def read(columns):
        return read_reward_bench(put(tmp_path / "a.csv", rows(), columns))

    for name in ("prompt", "chosen", "rejected", "subset", "id"):
        assert f"['{name}'] are missing" in one_line(lambda: read([n for n in HEAD if n != name]))
    assert len(read([n for n in HEAD if not n.endswith("_model")])) == 46, "the models' names are not needed"
    assert "no such file" in one_line(lambda: read_reward_bench(tmp_path / "nowhere"))
    put(tmp_path / "part" / "shp-00000-of-00001.parquet", [row()])
    assert "anthropic_hhh" in one_line(lambda: read_reward_bench(tmp_path / "part")), "of the older sets all or none"


# ---- scoring ----


def test_the_constants_are_those_of_the_card():
    sizes = [sum(PUBLISHED[subset] for subset in weights) for weights in SECTIONS.values()]
    assert len(set(CORE)) == 23 and sizes == [358, 456, 740, 1431] and PUBLISHED["math-prm"] == 447
    assert SECTIONS["Reasoning"]["math-prm"] == 984 and sum(SECTIONS["Reasoning"].values()) == 2 * 984
    assert SECTION_WEIGHT == {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 1, PRIOR: 0.5}


def test_every_level_is_there_with_its_number(pairs):
    table = score_reward_bench(pairs, pairs.prefID % 2, np.zeros(46), samples=50)
    assert table.level.tolist() == ["overall", "micro", *["section"] * 4, *["subset"] * 23]
    assert table.name[6:].tolist() == CORE and table.n.tolist() == [46, 46, 10, 12, 10, 14, *[2] * 23]
    assert np.allclose(table.accuracy, 0.5) and table.note[1] == "46 pairs, 2985 are published"
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


@pytest.mark.parametrize("gone", [["hep-rust"], ["donotanswer"], [s for s in CORE if s not in SECTIONS["Safety"]]])
def test_an_incomplete_section_is_empty_with_a_reason(pairs, gone):
    part = pairs[~pairs.subset.isin(gone)]
    table, empty = scored(part, np.ones(len(part))), ["overall"]
    for section, weights in SECTIONS.items():
        lacking = [subset for subset in weights if subset in gone]
        said = f"lacks {len(lacking)} of {len(weights)} subsets: {', '.join(lacking)}"
        if lacking:
            assert table.note[section] == (said if len(lacking) < len(weights) else "no pair in the file")
            empty.append(section)
    assert table.accuracy[empty].isna().all() and table.low[empty].isna().all()
    assert table.note["overall"] == f"lacks {len(gone)} of 23 subsets: {', '.join(gone)}"
    assert (table.accuracy.drop(empty) == 1).all() and not set(gone) & set(table.index)
    assert table.n["micro accuracy"] == len(part) == 46 - 2 * len(gone)


def test_the_older_sets_count_half_and_only_together(tmp_path):
    everything = read_reward_bench(put(tmp_path / "all.jsonl", rows([*CORE, *PRIOR_PAIRS])))
    old = everything.subset.isin(list(PRIOR_PAIRS))
    table = scored(everything, ~old)
    assert table.accuracy["overall"] == pytest.approx(4 / 4.5)
    assert table.accuracy[["Prior Sets", "micro accuracy"]].tolist() == [0, 1]
    assert table.n[["overall", "micro accuracy"]].tolist() == [54, 46]
    assert table.note["overall"].endswith("with Prior Sets at half weight")
    most = everything[everything.subset != "shp"]
    table = scored(most, ~old[most.index])
    assert table.accuracy["overall"] == 1 and np.isnan(table.accuracy["Prior Sets"])
    assert table.note["Prior Sets"] == "lacks 1 of 4 subsets: shp"
    alone = scored(everything[old], np.ones(8)).accuracy["overall"]
    assert np.isnan(alone), "the older sets alone give no overall score"


def test_wrong_scores_are_refused(pairs):
    assert "1 scores for 46 pairs" in one_line(lambda: score_reward_bench(pairs, [1.0], [0.0]))
    assert "'hep-x'" in one_line(lambda: score_reward_bench(pairs.assign(subset="hep-x"), np.ones(46), np.ones(46)))
    with pytest.raises(ValueError, match="chosen_scores"):
        score_reward_bench(pairs, [np.nan] * 46, np.zeros(46))


@few
@given(st.data())
def test_the_table_is_the_plain_sum(data):
    sizes = {subset: data.draw(st.integers(1, 4)) for subset in [*CORE, *PRIOR_PAIRS]}
    found = pd.DataFrame([{"subset": s, "messages": turns(f"{s} {i}")} for s, n in sizes.items() for i in range(n)])
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found))))
    table = scored(found, right, samples=2).accuracy
    mean = {s: right[(found.subset == s).to_numpy()].mean() for s in sizes}
    section = {name: np.average([mean[s] for s in own], weights=list(own.values())) for name, own in SECTIONS.items()}
    section[PRIOR] = np.mean([mean[s] for s in PRIOR_PAIRS])
    overall = (sum(section[name] for name in SECTIONS) + 0.5 * section[PRIOR]) / 4.5
    micro = right[found.subset.isin(CORE).to_numpy()].mean()
    expected = {**mean, **section, "overall": overall, "micro accuracy": micro}
    assert table.to_dict() == pytest.approx(expected, abs=1e-12)
    assert sum(overall_shares(True).values()) == pytest.approx(1)


# ---- intervals ----


def invented(sizes, prompt="{} {}"):
    """Pairs of so many prompts in each subset."""
    found = [{"subset": s, "messages": turns(prompt.format(s, i))} for s, n in sizes.items() for i in range(n)]
    return pd.DataFrame(found)


def test_the_interval_of_a_section_has_the_width_of_the_benchmark_s_design():
    """Sizes of subsets are fixed, so the variance is Σ w² a (1 − a) / n; subsets of unequal difficulty must not widen
    it."""
    sizes = {subset: PUBLISHED[subset] for subset in SECTIONS["Reasoning"]}
    pairs = invented(sizes)
    rate = {subset: 0.2 if subset == "math-prm" else 0.9 for subset in sizes}
    place = pairs.groupby("subset").cumcount()
    right = place < pairs.subset.map(lambda s: round(rate[s] * sizes[s]))
    found = scored(pairs, right, samples=2000).loc["Reasoning"]
    mean = right.groupby(pairs.subset).mean()
    spread = np.sqrt(sum(overall_shares()[s] ** 2 * 16 * mean[s] * (1 - mean[s]) / n for s, n in sizes.items()))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.06)


def test_pairs_of_one_prompt_are_drawn_together():
    sizes = {subset: 40 for subset in SECTIONS["Chat"]}
    right = np.tile(np.arange(40) % 2, 5)
    apart, together = (scored(invented(sizes, prompt), right, samples=500).loc["Chat"] for prompt in ("{} {}", "{1}"))
    assert together.accuracy == apart.accuracy == 0.5 and together.high - together.low > 1.5 * (apart.high - apart.low)


# ---- handing a model over ----


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory, shared_cache):
    """A random reward model with the rotary settings of Llama 3, saved as our training saves one, and named for older
    programs."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from psycopref.training.texts import save_merged
    from psycopref.models.weights import find_weights, load_tokenizer

    folder = tmp_path_factory.mktemp("handover") / "model"
    os.environ.setdefault("PSYCOPREF_CACHE", str(shared_cache))
    tokenizer = load_tokenizer(find_weights("random-tiny"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0}
    rope |= {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 131072, "num_labels": 1, "initializer_range": 0.3}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(vocab_size=len(tokenizer), rope_parameters=rope, **shape, **ids)
        save_merged(LlamaForSequenceClassification(config), tokenizer, folder)
    name_for_older(folder)
    return folder


def our_scores(folder, pairs):
    from psycopref.training.scoring import Scorer, load_scorer, score_pairs

    model, tokenizer, _ = load_scorer(Scorer(str(folder)), "float32")
    return np.array(score_pairs(model.cpu(), tokenizer, pairs, name="")).T


def spoken(each=2):
    """Pairs of unequal lengths, with words that the tokenizer knows."""
    rng = np.random.default_rng(0)
    words = "I feel tired and lost since my work changed tell me more about what happened then".split()

    def say():
        return " ".join(rng.choice(words, rng.integers(3, 40)))

    return [row(subset, id, prompt=say(), chosen=say(), rejected=say()) for subset in CORE for id in range(each)]


def test_older_names_change_nothing_here(reward_model, tmp_path):
    """What is written for an older transformers is understood by this one, and once is enough."""
    from transformers import AutoConfig, AutoTokenizer

    names = ("config.json", "tokenizer_config.json")
    config, tokenizer = (json.loads((reward_model / name).read_text()) for name in names)
    scaling, inputs = config["rope_scaling"], ["input_ids", "attention_mask"]
    assert config["rope_theta"] == 500000 and scaling["factor"] == 32 and "rope_theta" not in scaling
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and tokenizer["model_input_names"] == inputs
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    assert name_for_older(reward_model) == []
    assert AutoConfig.from_pretrained(reward_model).rope_parameters == config["rope_parameters"]
    loaded = AutoTokenizer.from_pretrained(reward_model)
    assert loaded.model_input_names == inputs and "<|im_start|>" in loaded.all_special_tokens
    assert "no such file" in one_line(lambda: name_for_older(tmp_path))


COMMAND = """
import torch
from transformers import BatchEncoding
if not torch.cuda.is_available():  # its pipeline names cuda
    to = BatchEncoding.to
    BatchEncoding.to = lambda self, device: to(self, "cpu" if device == "cuda" else device)
from rewardbench.rewardbench import main
main()
"""


def test_their_command_gives_our_table(reward_model, tmp_path):
    """Their whole command, with the older transformers it needs, on a local copy of the dataset's layout."""
    if not (python := os.environ.get("REWARDBENCH_PYTHON")):
        pytest.skip("set REWARDBENCH_PYTHON to the interpreter of an environment with rewardbench")
    table = put(tmp_path / "allenai" / "reward-bench" / "data" / "filtered-00000-of-00001.parquet", spoken())
    (tmp_path / "model").symlink_to(reward_model)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_HOME": str(tmp_path / "hf")}
    environment["PYTHONPATH"] = os.environ.get("REWARDBENCH_SOURCE", "")
    traits = "--model model --not_quantized --torch_dtype float32 --output_dir out/ --save_all".split()
    command, how = [python, "-c", COMMAND, *traits], {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    pairs, out = read_reward_bench(table), tmp_path / "out"
    ours, lines = our_scores(reward_model, pairs), (out / "model_all.jsonl").read_text().splitlines()
    theirs = [[np.ravel(one[side])[0] for side in ("chosen", "rejected")] for one in map(json.loads, lines)]
    assert np.allclose(ours, theirs, atol=2e-4, rtol=0)
    result = json.loads((out / "model.json").read_text())
    accuracy = score_reward_bench(pairs, *ours.T, samples=2).set_index("name").accuracy
    assert result["accuracy"] == pytest.approx(accuracy["micro accuracy"])
    assert result["extra_results"] == pytest.approx(accuracy[CORE].to_dict())


@pytest.mark.parametrize("again", ["copy", "place"])
def test_a_file_given_twice_counts_no_pair_twice(tmp_path, again):
    path = put(tmp_path / "filtered.csv", rows())
    other = put(tmp_path / "filtered (1).csv", rows()) if again == "copy" else path
    assert "stand twice" in one_line(lambda: read_reward_bench(path, other))
    assert len(read_reward_bench(path)) == len(rows())
