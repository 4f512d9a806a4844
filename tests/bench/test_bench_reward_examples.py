"""Examples of bench_reward, at the smallest size."""

import bench_reward

globals().update({name: value for name, value in vars(bench_reward).items() if not name.startswith("__")})


def test_examples():
    tiny = find_weights("random-tiny")
    tokenizer = load_tokenizer(tiny)
    rows = made_rows(tokenizer, 16, LENGTHS["demo"])
    assert rows == made_rows(tokenizer, 16, LENGTHS["demo"]) and rows[0]["length"] < len(rows[0]["chosen_ids"]) + len(
        rows[0]["rejected_ids"]
    )
    for name, spans in LENGTHS.items():
        found = [len(tokenizer(answer).input_ids) for _, own in made_groups(tokenizer, 8, 2, spans) for answer in own]
        assert all(abs(n - min(max(n, spans.answer[0]), spans.answer[1])) <= 3 for n in found), (
            "the seam of a cut may cost a token"
        )
    prompts = [common_prefix([row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    f"prompts of {min(prompts)} to {max(prompts)} tokens, {sum(prompts) / len(prompts):.0f} on average"
    model = add_lora(
        load_reward_model(tiny.location, tokenizer, "float32", new_head=0),
        LoraSettings(rank=4, alpha=8, last_layers=1),
        head=True,
    )
    other = twin(model)
    assert (
        all(a is b for a, b in zip(model.parameters(), other.parameters()))
        and unwrap(model).config is not unwrap(other).config
    )
    ours, theirs = (
        make_trainer(model, tokenizer, rows, Way(True, "batch_rebalance")),
        make_trainer(other, tokenizer, rows, Way()),
    )
    assert "forward" in vars(unwrap(model).base_model) and "forward" not in vars(unwrap(other).base_model), (
        "trl's side is not touched"
    )
    tokens = sum(row["length"] for row in rows)
    walks = [Epoch(trainer, way, tokens) for trainer, way in ((ours, Way(True, "batch_rebalance")), (theirs, Way()))]
    assert [walk() for walk in walks] == [tokens, tokens]
    assert walks[0].positions == tokens < walks[1].positions
    f"{tokens} tokens of useful text: ours computes {walks[0].positions} positions, trl {walks[1].positions}"
    from unittest.mock import patch

    scratch = patch.dict(os.environ, PSYCOPREF_ROOT=tempfile.mkdtemp())  # the examples write elsewhere
    scratch.start()
    found, mine, rival = training_bench(
        "tiny", "reward_training", "tokens/s", model, tokenizer, rows, Way(True, "batch_rebalance"), [Way()], rounds=1
    )
    assert len(found["tried"]) == 3 and found["theirs"] == max(found["theirs"], 1) and found["loss difference"] < 1e-4
    assert found["positions"]["ours"] == found["positions"]["useful"] < found["positions"]["theirs"]
    try:
        loss_gap(
            mine.trainer,
            make_trainer(load_reward_model(tiny.location, tokenizer, "float32", new_head=9), tokenizer, rows, Way()),
            rows[:8],
        )
        raise AssertionError("accepted")
    except RuntimeError as error:
        print(error)
    trained = lora_bench("random-tiny", 1, 1, LoraSettings(rank=4, last_layers=1), "float32", ["demo"])
    written = read_json(Path(os.environ["PSYCOPREF_ROOT"]) / "outputs" / "bench" / "reward_training.json")
    assert [row["label"] for row in written["rows"]] == ["demo's lengths"] and {
        "ours",
        "theirs",
        "ratio",
        "ratios",
        "unit",
        "device",
        "what",
        "date",
    } <= written.keys()
    groups = made_texts(tokenizer, 3, 8, LENGTHS["demo"])
    reward = load_reward_model(tiny.location, tokenizer, "float32", new_head=0)
    flat = [text for group in groups for text in group]
    scores = [plain_scores(twin(reward), tokenizer, flat, by_length) for by_length in (False, True)]
    own = [score for group in score_groups(reward, tokenizer, groups, name="") for score in group]
    assert max(reward_gap(own, other, exact=True) for other in scores) < 1e-4
    try:
        reward_gap(own, own[1:] + own[:1], exact=False)
        raise AssertionError("accepted")
    except RuntimeError as error:
        print(error)
    scored = scoring_bench("random-tiny", 1, 16, "float32", ["demo"])
    assert len(scored) == 4 and all(row["ours"] > 0 and row["largest difference"] <= 1e-4 for row in scored)
    log = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "eval_loss": 0.65}]
    assert (
        curve_gap(log, log) == 0
        and round(curve_gap(log, [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]), 9) == 0.1
    )
    try:
        curve_gap(log, log[:1])
        raise AssertionError("accepted")
    except RuntimeError as error:
        print(error)
    assert useful_work([{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}]) == (5, 1 + 2 + 3 + 3 + 4)
    assert useful_work(rows)[0] == sum(row["length"] for row in rows)
    import torch

    assert 1e8 < matmul_rate(torch.float32, 128) < 1e16
    small = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1024,
    )
    found = shape_bench("small", small, 1, pairs=4, matmul=256)
    assert (
        found["positions"]["ours"] == found["positions"]["useful"]
        and len(found["tried"]) >= 3
        and "AdamW" in found["what"]
    )
    assert found["utilisation"]["theirs"] > 0 and found["utilisation"]["ours"] > 0
    weights = found["parameters"] - 64 * (1024 + 1 + 2 * 2 + 1)  # without embeddings, head and norms
    assert found["FLOP a pair"] > 6 * weights * found["positions"]["useful"] / 4 > found["FLOP a pair"] / 4
    row = {"label": "small", "device": "Some GPU 80GB", "date": "2026-01-02", "ratio": 1.0}
    for ratio, label in ((1.0, "small"), (2.0, "small"), (3.0, "large")):
        path = keep_gpu(row | {"ratio": ratio, "label": label})
    assert path.name == "reward_some-gpu-80gb_2026-01-02.json" and [
        own["ratio"] for own in read_json(path)["rows"]
    ] == [2.0, 3.0]
    try:
        gpu_bench(["llama-3.2-3"], 1, 8, True)
        raise AssertionError("accepted")
    except StudyError as error:
        print(error)
    import matplotlib.pyplot as plt

    figure = bench_figure({"training": trained, "scoring": [row for row in scored if row["sorted"]], "GPU": []})
    assert len(figure.axes) == 2 and [len(axis.patches) for axis in figure.axes] == [2, 4]
    plt.close(figure)
    scratch.stop()
