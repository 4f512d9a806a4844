"""Layouts change no number; 8 bits change them a little, row by row; what was measured is kept by machine."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from psycopref.models import linear
from psycopref.models.generation import Decoding, generate
from psycopref.models.linear import OUTLIER_CHANNELS, fastest_layout, lay_out_weights, load_for_sampling, to_int8
from psycopref.models.local import Int8Model, LocalModel
from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer
from refusals import one_line

PROMPTS = ["I count the stairs.", "I count on my sister, who moved out in March.", "Rain"]


def tiny(dtype="float32"):
    weights = find_weights("random-tiny")
    return load_for_sampling(weights, dtype), load_tokenizer(weights)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_layout_changes_no_answer_and_no_saved_weight(layout, tmp_path):
    weights = find_weights("random-tiny")
    plain, tokenizer = load_causal_lm(weights, "float32"), load_tokenizer(weights)
    laid = lay_out_weights(load_causal_lm(weights, "float32"), layout)
    found = [generate(model, tokenizer, PROMPTS, Decoding(12), name="") for model in (plain, laid)]
    assert found[0] == found[1]
    assert laid.lm_head.weight is laid.model.embed_tokens.weight and laid.lm_head.weight.is_contiguous()
    assert laid.model.layers[0].mlp.up_proj.weight.is_contiguous() == (layout == "rows")
    for name, model in (("plain", plain), ("laid", laid)):
        model.save_pretrained(tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "laid")}) == 1


def test_the_faster_layout_is_chosen_once_and_kept_by_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path))
    times = {"rows": [2.0, 2.0, 1.0, 1.0], "columns": [1.0, 1.0, 1.0, 1.0]}
    calls = []
    monkeypatch.setattr(linear, "measure_layouts", lambda dtype: calls.append(dtype) or times)
    fastest_layout.cache_clear()
    assert fastest_layout(torch.float32) == "columns"
    times["columns"][3] = 1.2  # slower for packs by more than a tenth
    [kept] = (tmp_path / "machines").iterdir()
    assert json.loads(kept.read_text())["machine"][3] == "torch.float32"
    fastest_layout.cache_clear()
    assert fastest_layout(torch.float32) == "columns" and len(calls) == 1, "read, not measured again"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # as a processor with fewer instructions
    fastest_layout.cache_clear()
    assert fastest_layout(torch.float32) == "rows" and len(calls) == 2
    fastest_layout.cache_clear()


@pytest.mark.parametrize("content", ["", '{"layout": "rows"', "[]", "{}", '{"layout": "diagonal"}', None])
def test_what_was_kept_wrongly_or_can_t_be_kept_stops_nobody(tmp_path, monkeypatch, content):
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(linear, "measure_layouts", lambda dtype: {"rows": [2.0] * 4, "columns": [1.0] * 4})
    fastest_layout.cache_clear()
    if content is None:
        (tmp_path / "machines").write_text("a file where a folder should be")
    else:
        fastest_layout(torch.float32)
        [kept] = (tmp_path / "machines").iterdir()
        kept.write_text(content)
        fastest_layout.cache_clear()
    assert fastest_layout(torch.float32) == "columns"
    assert content is None or json.loads(kept.read_text())["layout"] == "columns", "mended"
    fastest_layout.cache_clear()


def test_measuring_takes_nobody_s_random_numbers(monkeypatch):
    monkeypatch.setattr(linear, "_seconds", lambda product: float(product().shape[0]))
    before = torch.get_rng_state()
    assert linear.measure_layouts(torch.float32, 8, 16)["rows"] == [8.0, 32.0, 128.0, 1024.0]
    assert torch.equal(torch.get_rng_state(), before)


class OneLayer(torch.nn.Sequential):
    device = torch.device("cpu")

    def forward(self, rows):
        return super().forward(rows)


@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_of_a_layer_are_near_and_a_row_does_not_depend_on_the_others(bias):
    torch.manual_seed(0)
    layer, given, errors = torch.nn.Linear(64, 48, bias=bias), torch.randn(5, 64), {}
    given[:, 7] *= 200  # a channel that would take all the room
    with torch.inference_mode():
        exact = layer(given)
        for channels in (0, 1):
            model = to_int8(OneLayer(copy.deepcopy(layer)).eval(), [{"rows": given}], channels)
            found = model(given)
            alone = torch.cat([model(row[None]) for row in given])
            assert torch.allclose(found, alone, rtol=1e-5, atol=1e-5), (
                "the part in floating point is summed in another order"
            )
            errors[channels] = float((found - exact).norm() / exact.norm())
        without = given.clone()
        without[:, 7] = 0
        small = float(layer(without).norm() / exact.norm())
    assert errors[1] < 0.02 * small and errors[1] < errors[0] / 10, "the channel apart costs the others nothing"
    assert isinstance(to_int8(OneLayer(layer), [])[0], torch.nn.Linear), "a layer that no text went through stays"


OF_ONE_SIGN = """
import copy, torch
from test_linear import OneLayer, to_int8
torch.manual_seed(0)
layer, given = torch.nn.Linear(64, 48, bias=False), torch.rand(5, 64)
layer.weight.data.abs_()
with torch.inference_mode():
    exact, found = layer(given), to_int8(OneLayer(copy.deepcopy(layer)).eval(), [{"rows": given}], 0)(given)
print(float((found - exact).norm() / exact.norm()))
"""


def test_eight_bits_are_as_near_on_processors_whose_sums_of_two_products_have_sixteen():
    "Numbers of one sign make the largest sums: without VNNI they were cut, by a fifth of what they are."
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OF_ONE_SIGN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 0.01, done.stderr


def test_threads_that_share_a_model_in_8_bits_get_their_own_numbers():
    model = to_int8(OneLayer(torch.nn.Linear(64, 48)).eval(), [{"rows": torch.randn(5, 64)}])
    given = [torch.randn(size, 64) for size in (40, 90, 150, 300)]

    def many(rows):
        with torch.inference_mode():
            return [model(rows.clone()) for _ in range(50)]

    alone = [many(rows)[0] for rows in given]
    with ThreadPoolExecutor(4) as pool:
        for one, found in zip(alone, pool.map(many, given)):
            assert all(torch.equal(one, own) for own in found)


def test_a_model_in_8_bits_answers_alone_as_in_company():
    model, tokenizer = tiny("int8")
    how = Decoding(10, 0.9, seed=2)
    together = generate(model, tokenizer, PROMPTS, how, n=2, name="")
    assert [generate(model, tokenizer, [prompt], how, n=2, name="")[0] for prompt in PROMPTS] == together
    rounded = model.base_model.layers[0].mlp.up_proj
    assert not hasattr(rounded, "weight") and hasattr(model.base_model, "pack_kernel"), "its prompts are packs"


def test_eight_bits_stand_in_uri_label_and_cache_key():
    exact, rounded = LocalModel("random-tiny", dtype="float32"), Int8Model("random-tiny")
    assert exact.uri == "local:random-tiny" and rounded.uri == "int8:random-tiny"
    assert "int8" in rounded.label and "int8" not in exact.label and f"{OUTLIER_CHANNELS} channels" in rounded.identity
    assert exact.identity != rounded.identity != LocalModel("random-tiny", dtype="bfloat16").identity


def test_eight_bits_are_refused_off_the_cpu():
    model = load_causal_lm(find_weights("random-tiny"), "float32").to("meta")
    assert "local: in place of int8:" in one_line(lambda: to_int8(model, []))
    assert "int4" in one_line(lambda: tiny("int4"))


SPEECHES = (  # none of them is read to choose the channels
    "Since the move I eat alone, and I pretend that it's a choice.",
    "My son stopped speaking to me after the divorce. I write him letters that I never send. What else can I do?",
    "I get panic attacks in the supermarket, so my neighbour does the shopping, and I am ashamed of it.",
    "Work is fine. Everything is fine. I just can't remember when I last looked forward to anything.",
)


@pytest.mark.chain
def test_real_weights_in_8_bits_foretell_the_same_tokens():
    """The bound of what may run in 8 bits: in 95% of positions the same likeliest token after a float32 answer."""
    weights = find_weights("smollm2-135m")
    exact, rounded = load_for_sampling(weights, "float32"), load_for_sampling(weights, "int8")
    tokenizer, same, near = load_tokenizer(weights), [], []
    how = dict(tokenize=False, add_generation_prompt=True)
    for seed, speech in enumerate(SPEECHES):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": speech}], **how)
        [[sample]] = generate(exact, tokenizer, [prompt], Decoding(90, 0.7, 50, seed=seed), name="")
        ids, start = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt + sample.text, prompt))
        with torch.inference_mode():
            one, two = (
                model(input_ids=torch.tensor([ids])).logits[0, len(start) - 1 : -1].float()
                for model in (exact, rounded)
            )
        same += (one.argmax(-1) == two.argmax(-1)).tolist()
        near.append(float((two - one).norm() / one.norm()))
    assert len(same) > 150 and sum(same) / len(same) >= 0.95 and 0 < max(near) < 0.1
