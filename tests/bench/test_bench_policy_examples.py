"""Examples of bench_policy, at the smallest size."""

import bench_policy

globals().update({name: value for name, value in vars(bench_policy).items() if not name.startswith("__")})


def test_examples():
    tiny = find_weights("random-tiny")
    tokenizer, model = load_tokenizer(tiny), load_causal_lm(tiny, "float32")
    small = replace(
        load_profile("demo").dpo,
        batch_size=8,
        epochs=1.0,
        max_length=1024,
        lora=LoraSettings(rank=4, alpha=8, last_layers=1),
    )
    work = Work(lambda: twin(model), tokenizer, made_pairs(tokenizer, 16, LENGTHS["demo"]), small)
    sides = {way.side: Side(work, way) for way in (our_way(work), Way("trl", 4, "group_by_length"), Way("stock"))}
    for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert all(
            list(side.trainer.train_dataset[part]) == [row[part] for row in work.rows] for side in sides.values()
        ), "the same tokens"
    assert (
        sides["stock"].trainer.args.gradient_checkpointing
        and not sides["stock"].trainer.args.precompute_ref_log_probs
        and not sides["ours"].trainer.args.gradient_checkpointing
    )
    assert {name: side() for name, side in sides.items()} == {"ours": 16, "trl": 16, "stock": 16}
    {
        name: (
            side.trainer.state.global_step,
            side.trainer.args.per_device_train_batch_size,
            side.trainer.args.gradient_accumulation_steps,
        )
        for name, side in sides.items()
    }
    try:
        replace(work, pairs=work.pairs[:12])
        raise AssertionError("accepted")
    except StudyError as error:
        print(error)
    import torch

    again = [Side(work, way) for way in (our_way(work), Way("trl", 4, "group_by_length"))]
    before = [weight.clone() for weight in again[0].trainer.model.parameters()]
    found = same_work([*again, Side(work, Way("stock"))])
    assert max(found["losses"]) - min(found["losses"]) < 1e-3 and abs(found["losses"][0] - 0.6931) > 1e-6
    assert all(map(torch.equal, before, again[0].trainer.model.parameters())), "put back"
    try:
        same_work([again[0], Side(replace(work, pairs=work.pairs[::-1]), Way("trl", 4, "group_by_length"))])
        raise AssertionError("accepted")
    except RuntimeError as error:
        print(error)
    from unittest.mock import patch

    scratch = patch.dict(os.environ, PSYCOPREF_ROOT=tempfile.mkdtemp())  # the examples write elsewhere
    scratch.start()
    trained = lora_bench("random-tiny", 1, 1, small, "float32", ["demo"], sizes=(4, 8))
    written = read_json(Path(os.environ["PSYCOPREF_ROOT"]) / "outputs" / "bench" / "policy_training.json")
    assert (
        written["rows"] == trained
        and set(trained[0]["seconds"]) == {"ours", "trl", "stock"}
        and set(trained[0]["ratio"]) == {"trl", "stock"}
    )
    assert len(trained[0]["tried"]) == 2 and trained[0]["seconds"]["ours"] > trained[0]["of it reference"]["ours"] > 0
    assert 50 < peak_mb() < 1e6
    ballast = bytearray(50_000_000)
    grown = peak_mb()
    del ballast
    assert peak_mb() >= grown, "it never falls"
    remembered = memory_bench("random-tiny", trained, small, "float32")
    assert set(remembered[0]["peak_mb"]) == {"ours", "trl", "stock"} and all(
        own["peak_mb"] >= own["loaded_mb"] > 50 and own["steps"] == 1 for own in remembered[0]["sides"].values()
    )
    try:
        child_memory({"backbone": "random-tin", "way": "none"})
        raise AssertionError("accepted")
    except RuntimeError as error:
        assert "random-tiny" in str(error), "the child's last words are told"
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    other = {"prompt_ids": [5, 6, 7], "chosen_ids": [4], "rejected_ids": [8, 9]}
    step = 4 / 3 * (model_flops(model.config, 1, 3) - model_flops(model.config, 0, 0))
    assert (
        policy_flops(model.config, [row, row]) == 2 * policy_flops(model.config, [row])
        and policy_flops(model.config, [other]) > policy_flops(model.config, [row]) + step
    )
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1024,
    )
    full = shape_bench("small", shape, 1, pairs=4, matmul=256)
    assert (
        len(full["tried"]) == 4
        and "AdamW" in full["what"]
        and full["utilisation"]["theirs"] > 0
        and full["utilisation"]["ours"] > 0
    )
    assert full["reference gap"] < 0.02 and full["losses"] == []
    sampled = candidates_bench(
        "small", random_policy(shape, tokenizer), tokenizer, 1, prompts=3, n=2, tokens=6, rows=(2, 8)
    )
    assert (
        sampled["ours"] > 0
        and set(sampled["tried"]) == {"2", "8"}
        and all(0 < count <= 3 * 2 * 6 for count in sampled["tokens"].values())
    )
    for label in ("small", "large", "small"):
        path = keep_gpu(full | {"label": label, "device": "Some GPU 80GB", "date": "2026-01-02"}, "policy")
    assert path.name == "policy_some-gpu-80gb_2026-01-02.json" and [
        own["label"] for own in read_json(path)["rows"]
    ] == ["large", "small"]
    try:
        gpu_bench(["llama-3.2-3"], 1, 8, True)
        raise AssertionError("accepted")
    except StudyError as error:
        print(error)
    assert phases_bench(None) == []
    from psycopref.core.files import StageWriter

    timed = {
        "m": {
            "iter": {
                "iterations": [{"seconds": {"train": 2.0 * i, "sample": 5.0, "save": 0.5, "rest": 0.1}} for i in (1, 2)]
            }
        }
    }
    with StageWriter(Run("mine"), "06_policy", "demo", 0, {}) as stage:
        stage.json("training", timed)
    phased = phases_bench(None)
    assert [row["total"] for row in phased] == [7.6, 9.6] and list(phased[0]["seconds"]) == [
        "sample",
        "train",
        "save",
        "rest",
    ]
    import matplotlib.pyplot as plt

    figure = cpu_figure(trained, remembered)
    assert [len(axis.patches) for axis in figure.axes] == [3, 3]
    assert len(phases_figure(phased).axes[0].patches) == 8
    plt.close("all")
    scratch.stop()
