"""Talking to a policy: a crisis stops before the model, nothing is stored unasked, and every end is polite."""

import json
from pathlib import Path

import pytest
import yaml
from refusals import one_line

from psycopref.core.files import write_json
from psycopref.core.prompts import responding_prompt
from psycopref.models.chat import ChatReply
from psycopref.models.generation import Decoding
from psycopref.rater.heads import labelled_clients
from psycopref.rater.safety_screen import screen_cases
from psycopref.run.chat import ASKED, chat, crisis_sign, find_policy
from psycopref.run.cli import main
from psycopref.training.cards import HELP, NOTICE

WRITTEN = yaml.safe_load((Path(__file__).parents[1] / "rater/cases.yaml").read_text())
EXAM = "I have an exam on Friday and I can't get myself to learn for it."


class Model:
    "Answers with the number of messages; keeps what it was asked."

    uri = label = "fake"

    def __init__(self, name):
        self.asked = []

    async def answer(self, requests):
        self.asked += requests
        return [ChatReply(f"{len(request.messages)} messages") for request in requests]


class Silent(Model):
    async def answer(self, requests):
        raise AssertionError("the model was called")


def talk(*lines, save=None, make=Model, end=EOFError):
    "Return all that was said in a chat with base weights, and the model."
    left, said, made = list(lines), [], []

    def ask(prompt):
        said.append(prompt)
        if not left:
            raise end
        return left.pop(0)

    def model(name):
        made.append(make(name))
        return made[0]

    chat("random-tiny", save, ask, lambda *own: said.extend(own), model)
    return said, made[0]


CRISES = WRITTEN["crisis"]


@pytest.mark.parametrize("turns", [[text] for text in CRISES] + [[EXAM, text] for text in CRISES[:2]])
def test_words_of_a_crisis_never_reach_the_model(turns, tmp_path):
    said, model = talk("yes", *turns, "And now?", save=str(tmp_path / "kept.jsonl"))
    assert said[-1] == HELP and "crisis" in said[-2] and len(model.asked) == len(turns) - 1
    kept = (tmp_path / "kept.jsonl").read_text() if model.asked else ""
    assert turns[-1] not in kept


@pytest.mark.parametrize(
    "turns", [("I want", "to die."), ("My husband", "hits me."), ("I thought of", "Well.", "suicide")]
)
def test_a_crisis_told_in_two_turns_is_seen(turns):
    assert [crisis_sign(turns[: n + 1]) for n in range(len(turns))][-1] == "words"


def test_the_learned_signs_miss_little_and_let_most_pass():
    for kind in ("learn", "held"):
        rows = [row for row in labelled_clients() if row[3] == kind]
        crises, others = ([row[0] for row in rows if row[2] is there][:20] for there in (True, False))
        assert sum(bool(crisis_sign([text])) for text in crises) >= 14, kind
        assert sum(bool(crisis_sign([text])) for text in others) <= 10, kind


def test_a_crisis_deep_in_a_long_text_is_read():
    deep = "I took all of the tablets an hour ago and I feel sleepy now, nobody is at home."
    assert crisis_sign([deep]) and crisis_sign([" ".join([EXAM] * 40 + [deep])])


def test_the_screens_cases_hold_no_word_of_a_client():
    "They are answers: who adds a client's statement to them adds it to the chat's cases too."
    assert {key for case in screen_cases() for key in case} == {"flag", "crisis", "response", "flagged", "set"}


def test_a_conversation_is_kept_worded_as_in_training_and_stored_nowhere(tmp_path):
    before = {*tmp_path.rglob("*")}
    said, model = talk("yes", "", EXAM, "Tomorrow, maybe.")
    first, second = model.asked
    assert [message["content"] for message in first.messages] == [responding_prompt(EXAM)]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in second.messages][1:] == ["1 messages", "Tomorrow, maybe."]
    assert [line for line in said if line.startswith("machine>")] == ["machine> 1 messages", "machine> 3 messages"]
    assert NOTICE in said[0] and "Nothing is stored" in said[1] and said.count(ASKED) == 1 and said[-1] == HELP
    assert {*tmp_path.rglob("*")} == before


def test_a_chat_is_saved_where_a_new_file_is_named(tmp_path):
    said, _ = talk("yes", EXAM, "Tomorrow, maybe.", save=str(tmp_path / "kept.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(row["turn"], row["client"], row["answer"]) for row in rows] == [
        (1, EXAM, "1 messages"),
        (2, "Tomorrow, maybe.", "3 messages"),
    ]
    assert "is stored in" in said[1]
    for place in (tmp_path / "kept.jsonl", tmp_path / "none" / "kept.jsonl"):
        assert "name a new file" in one_line(lambda: talk("yes", save=str(place)))
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("lines", [[], ["no"], [""], ["y"], ["I want help"]])
@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_whoever_does_not_confirm_sees_where_help_is(lines, end):
    said, _ = talk(*lines, *([EXAM] if lines else []), make=Silent, end=end)
    assert said[-1] == HELP and "988" in HELP and "116 123" in HELP and "findahelpline.com" in HELP


def finished(folder, decoding):
    "A run's folder with two policies, without weights."
    for name in ("m/dpo/step-5", "m/iter/iteration-2/policy"):
        write_json(folder / "06_policy" / name / "config.json", {"architectures": ["LlamaForCausalLM"]})
    entries = [("dpo", "m/dpo/step-5"), ("dpo-iter", "m/iter/iteration-2/policy")]
    write_json(folder / "06_policy" / "policies.json", [{"kind": kind, "path": path} for kind, path in entries])
    settings = {f"evaluation.{name}": value for name, value in decoding.items()}
    write_json(folder / "06_policy" / "receipt.json", {"settings": settings | {"evaluation.old": 1, "dtype": "auto"}})


def test_a_run_gives_its_chosen_policy_and_its_decoding(tmp_path):
    finished(tmp_path / "run", {"max_tokens": 33, "temperature": 0.4, "top_k": 7, "top_p": 0.9})
    measured, own = Decoding(33, 0.4, 7, 0.9), tmp_path / "run" / "06_policy" / "m"
    assert find_policy(str(tmp_path / "run")) == (str(own / "iter/iteration-2/policy"), measured)
    assert find_policy(str(own / "dpo/step-5"))[1] == measured
    alone = tmp_path / "alone"
    write_json(alone / "config.json", {"architectures": ["LlamaForCausalLM"]})
    known = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 1.0, "max_new_tokens": 12}
    write_json(alone / "generation_config.json", known)
    assert find_policy(str(alone))[1] == Decoding(12, 0.3, 5, 1.0)


@pytest.mark.parametrize("path, said", [("outputs/none", "no such folder"), ("smolm2-135m", "Did you mean")])
def test_a_wrong_path_is_one_line(path, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/half/06_policy").mkdir(parents=True)
    assert main(["chat", path]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and said in shown.err
    assert "did not finish" in one_line(lambda: find_policy("outputs/half"))
    write_json(tmp_path / "reward" / "config.json", {"architectures": ["LlamaForSequenceClassification"]})
    assert "is no policy" in one_line(lambda: find_policy("reward"))


def test_real_weights_answer_in_the_terminal(monkeypatch, capsys):
    lines = iter(["yes", EXAM])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert main(["chat", "random-tiny"]) == 0
    assert "machine> " in capsys.readouterr().out
