"""The ending of a run: three numbers, the time, and two answers to a speech that a rule chose."""

import pandas as pd
import pytest
from refusals import one_line

from psycopref.core.files import SCHEMAS, StageWriter
from psycopref.core.principles import principle_keys
from psycopref.core.stages import Run
from psycopref.run.results import median_speech, side_columns, summary

PRINCIPLE_KEYS = principle_keys()

POLICIES = {"M": "base", "M + DPO": "dpo", "M + DPO-Iter": "dpo-iter"}
WON = {"b": 0, "c": 1, "d": 7, "e": 3, "f": 2}  # principles that DPO-Iter wins; the base loses them all
SPEECHES = pd.DataFrame({"speech_id": [*"abcdef"]}).assign(
    source="s", speech="The rent is due.", topic="t", coarse_topic="work", topic_by="gold", split="test"
)
SPEECHES.loc[0, ["coarse_topic", "speech"]] = "crisis-and-safety", "A crisis by topic."
SPEECHES.loc[5, "speech"] = "I want to die."


def battle(speech, policy):
    won = WON.get(speech, 7) if policy.endswith("Iter") else 0
    told = {f"{key}_verdict": "win" if i < won else "loss" for i, key in enumerate(PRINCIPLE_KEYS)}
    row = {"speech_id": speech, "setting": "free", "policy": policy, "reference": "R", "order": "policy first"}
    return row | told | {"verdict": "loss", "judge": "rules:rubric"}


BATTLES = pd.DataFrame([battle(speech, policy) for speech in "abcdef" for policy in POLICIES])[[*SCHEMAS["battles"]]]


def finish(sources=("demo",), label="offline rubric (stand-in)", battles=BATTLES):
    "A run of which the stages that the ending reads are finished."
    run = Run("r")
    answers = [
        (speech, policy, "free", f"Answer of {kind} to {speech}. " * 30, "stop", 9, 0)
        for speech in "abcdef"
        for policy, kind in POLICIES.items()
    ]
    rates = [
        {
            "setting": f"{word} length constraint",
            "model": policy,
            "Overall": 40.0,
            "95% interval": "30.0 to 50.0",
            "n": 6,
        }
        for word in ("w/o", "w/")
        for policy in POLICIES
    ]
    reward = {"kind": "reward model", "model": "BT", "accuracy %": 63.6, "95% interval": "34.8 to 86.3", "pairs": 11}
    entries = [{"policy": policy, "kind": kind, "backbone": "m"} for policy, kind in POLICIES.items()]
    kept = {
        "01_speeches": {"speeches": SPEECHES},
        "04_pairs": {},
        "05_reward": {"summary": {"rows": [reward | {"kind": "baseline", "accuracy %": 99.0}, reward]}},
        "06_policy": {"policies": entries},
        "07_win_rates": {"summary": {"rows": rates}, "battles": battles},
    }
    kept["07_win_rates"]["answers"] = pd.DataFrame(answers, columns=[*SCHEMAS["answers"]])
    for stage, results in kept.items():
        with StageWriter(run, stage, "tiny", 0, {"speeches": {"sources": [*sources]}}) as writer:
            writer.facts |= {"rater": "offline rubric (stand-in)", "models": {"rules:rubric": {"label": label}}}
            for name, value in results.items():
                writer.rows(name, value, name) if hasattr(value, "columns") else writer.json(name, value)
    return run


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_run_ends_in_nine_lines_with_its_numbers_and_two_answers(width):
    lines = summary(finish(), width)
    assert len(lines) <= 9 and max(map(len, lines)) <= width
    told = " ".join(lines)
    for part in ("63.6% (34.8–86.3) on 11 test pairs", "6 speeches", "offline rubric (stand-in)", "against R"):
        assert part in told, part
    assert all(f"{kind} 40.0% (30.0–50.0)" in told for kind in ("base", "DPO", "DPO-Iter"))
    assert "99.0" not in told and "minutes of work (9 chapters not finished)" in told
    assert "c, the speech of median gain (no crisis): The rent is due." in told
    before, _, after = next(line for line in lines if line.startswith("BEFORE")).partition(" | ")
    assert before.startswith("BEFORE (base): Answer of") and after.startswith("AFTER (DPO-Iter): Answer of")
    assert "to c" in told and not any(f"to {other}." in told for other in "abdef") and " …" in lines[-1]


def test_the_speech_is_the_lower_median_and_never_about_a_crisis():
    assert median_speech(BATTLES, SPEECHES, "M", "M + DPO-Iter") == "c", "of b 0, c 1, e 3, d 7; a and f are crises"
    assert median_speech(BATTLES[BATTLES.speech_id != "c"], SPEECHES, "M", "M + DPO-Iter") == "e"
    shuffled = BATTLES.sample(frac=1, random_state=0)
    assert median_speech(shuffled, SPEECHES, "M", "M + DPO") == "b", "all are equal: the first by name"
    crises = SPEECHES.assign(coarse_topic="crisis-and-safety")
    assert median_speech(BATTLES, crises, "M", "M + DPO-Iter") is None
    assert median_speech(BATTLES.assign(setting="length"), SPEECHES, "M", "M + DPO-Iter") is None


def test_what_is_missing_and_what_means_nothing_is_said():
    assert "r/05_reward: has no receipt.json" in one_line(lambda: summary(Run("r")))
    told = " ".join(summary(finish(("released",), "random two-layer Llama (wiring only)"), 100))
    assert told.startswith("WIRING ONLY") and "mean nothing" in told and "released pairs: no 02, 03" in told
    assert "No answers are shown" in summary(finish(battles=BATTLES[BATTLES.speech_id == "a"]), 100)[-1]


def test_two_texts_stand_side_by_side():
    rows = side_columns("one two three four", "five\n\nsix", 21, 2)
    assert rows == ["one two   | five six", "three …   |"]
