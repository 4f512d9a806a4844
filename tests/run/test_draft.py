"""A drafting aid: the screen comes first, all is labelled, a named person decides, and nothing else lets a text out."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from refusals import one_line

from psycopref.core.files import write_json
from psycopref.core.principles import principle_keys
from psycopref.core.trail import Entry, Seal, canonical_json, seal_path, text_hash, verified
from psycopref.gateway.gateway import chat_model
from psycopref.models.chat import ChatReply, Failure
from psycopref.models.generation import Decoding
from psycopref.models.weights import find_weights, load_tokenizer
from psycopref.rater.rules import RATER
from psycopref.run import draft as room
from psycopref.run.cli import main
from psycopref.run.draft import (
    COMMANDS,
    LABEL,
    PROFESSIONAL,
    DraftingAid,
    audit_trail,
    draft_session,
    find_reward,
    open_aid,
    open_reward,
    open_trail,
    rate_drafts,
    release_text,
    review_draft,
    sampled_decoding,
    suggest_drafts,
)
from psycopref.training.cards import HELP, NOTICE
from psycopref.training.scoring import load_reward_model
from psycopref.training.texts import save_merged

CRISES = yaml.safe_load((Path(__file__).parents[1] / "rater/cases.yaml").read_text())["crisis"]
EXAM = "I have an exam on Friday and I can't get myself to learn for it. Anna says I should."
ANSWERS = ["Just learn.", "What gets in the way, Anna?", "You seem worried about Friday. What would help you?", "Hm."]
ADA = "Dr Ada Example"


class Writer:
    "Answers with the next of some texts; keeps what it was asked."

    uri = label = "fake policy"

    def __init__(self, texts=ANSWERS):
        self.texts, self.asked = texts, []

    async def answer(self, requests):
        self.asked += requests
        return [own if isinstance(own, Failure) else ChatReply(own) for own in self.texts[: len(requests)]]


class Silent(Writer):
    async def answer(self, requests):
        raise AssertionError("a model was called")


def by_words(speech, texts):
    return [float(len(text.split())) for text in texts]


def an_aid(writer=None, score=by_words, rater=None) -> DraftingAid:
    rater = rater or chat_model(RATER)
    return DraftingAid(writer or Writer(), Decoding(temperature=0.5), score, "words (a fake)", rater)


@pytest.fixture
def trail(tmp_path):
    return open_trail(tmp_path / "drafts.jsonl")


@pytest.fixture
def drafts(trail):
    return suggest_drafts(an_aid(), trail, [EXAM]).drafts


def kinds(trail) -> list[str]:
    return [entry.kind for entry in verified(trail.path)][1:]


# The screen


@pytest.mark.parametrize("said", [[text] for text in CRISES] + [[EXAM, CRISES[0]], ["I want", "to die."]])
def test_a_message_of_a_crisis_reaches_no_model_and_gets_no_draft(said, trail):
    never = an_aid(Silent(), lambda *_: pytest.fail("scored"), Silent())
    found = suggest_drafts(never, trail, said)
    assert found.sign and found.drafts == () and kinds(trail) == ["screened"]
    assert said[-1] not in trail.path.read_text()


def test_a_message_that_passes_is_noted_before_the_model_answers(trail):
    with pytest.raises(AssertionError, match="a model was called"):
        suggest_drafts(an_aid(Silent()), trail, [EXAM])
    assert kinds(trail) == ["screened"]
    assert "empty" in one_line(lambda: suggest_drafts(an_aid(Silent()), trail, [EXAM, " …"]))


# Drafts


def test_drafts_are_ranked_by_reward_with_ratings_reasons_and_a_label(drafts):
    assert [draft.text for draft in drafts] == [ANSWERS[2], ANSWERS[1], ANSWERS[0], ANSWERS[3]]
    assert [draft.rank for draft in drafts] == [1, 2, 3, 4] and {draft.of for draft in drafts} == {4}
    best, last = drafts[0], drafts[-1]
    assert tuple(best.ratings) == principle_keys() and all(1 <= own <= 5 for own in best.ratings.values())
    assert best.ratings["empathy"] > last.ratings["empathy"] and "Rubric" in best.reasons["empathy"]
    for shown in (str(best), repr(best), f"{best}", repr([best])):
        assert LABEL in shown and "stand-in" in shown and "reward +" in shown
    for line in str(best).splitlines():
        if best.text in line:
            assert line.startswith("  draft 1 | ")


def test_what_a_model_writes_can_t_pass_for_the_program(trail):
    sly = "\x1b[2J\x1b[HApproved by Dr A.\r\n[head of the trail]\u202e evil\x07"
    [draft] = suggest_drafts(an_aid(Writer([sly, sly])), trail, [EXAM]).drafts
    assert draft.text == "[2J[HApproved by Dr A.\n[head of the trail] evil"
    assert [line for line in str(draft).splitlines() if "of the trail" in line] == [
        "  draft 1 | [head of the trail] evil"
    ]


def test_flags_of_the_screen_and_cuts_are_shown(trail):
    class Cut(Writer):
        async def answer(self, requests):
            return [ChatReply("Stop your medication today.", "length")]

    [draft] = suggest_drafts(an_aid(Cut()), trail, [EXAM]).drafts
    assert "medical" in draft.flags and draft.cut
    assert "flagged: orders about medicine" in str(draft) and "cut: longest answer" in str(draft)


def test_answers_that_fail_or_say_nothing_or_the_same_are_no_drafts(trail):
    writer = Writer([Failure("broken"), "…", "What would help?", "What would help?"])
    assert [own.text for own in suggest_drafts(an_aid(writer), trail, [EXAM]).drafts] == ["What would help?"]
    assert "broken" in one_line(lambda: suggest_drafts(an_aid(Writer([Failure("broken")])), trail, [EXAM]))
    seeds = [request.decoding.seed for request in writer.asked]
    assert len(set(seeds)) == 4
    suggest_drafts(an_aid(writer), trail, [EXAM, EXAM])
    assert not set(seeds) & {request.decoding.seed for request in writer.asked[4:]}, "asking again draws anew"


def test_a_rater_that_fails_leaves_its_ratings_empty_with_the_reason(trail):
    rater = Writer([Failure("out of order")] * 4)
    [first, *_] = suggest_drafts(an_aid(rater=rater), trail, [EXAM]).drafts
    assert (
        set(first.ratings.values()) == {None}
        and "out of order" in first.reasons["empathy"]
        and "empathy –" in str(first)
    )


def test_a_rater_elsewhere_is_refused_unless_allowed_and_reads_masked_texts(tmp_path):
    assert "--send-to-rater" in one_line(lambda: open_aid("random-tiny", "r", "openai:gpt-4o"))
    rater = Writer(["{}"])
    rate_drafts(rater, EXAM, [ANSWERS[1]], mask=True)
    asked = json.dumps([rater.asked[0].messages, rater.asked[0].fields])
    assert "Anna" not in asked and asked.count("[name]") >= 2
    rate_drafts(rater, EXAM, [ANSWERS[1]])
    assert "Anna" in json.dumps(rater.asked[1].messages)


# Review and release


@pytest.mark.parametrize("name", ["", "   ", "\t\n", "…", "12", "\u200b", "\x00", None, "x" * 201])
def test_a_review_needs_a_name(name, trail, drafts):
    assert "reviewer" in one_line(lambda: review_draft(trail, drafts[0], "approved", name))
    assert kinds(trail) == ["screened", "drafted"]


def test_approved_edited_and_rejected_are_noted_with_hashes(trail, drafts):
    review = review_draft(trail, drafts[0], "approved", f" {ADA} ")
    assert (review.reviewer, review.text_sha256) == (ADA, text_hash(drafts[0].text)) and len(review.head) == 64
    edited = "What would help you to begin, Anna?"
    review_draft(trail, drafts[1], "edited", ADA, edited)
    review_draft(trail, drafts[2], "rejected", ADA)
    approved, changed, rejected = (entry.data for entry in verified(trail.path)[-3:])
    assert verified(trail.path)[-3].sha256 == review.head
    assert changed["draft_sha256"] == text_hash(drafts[1].text) and changed["text_sha256"] == text_hash(edited)
    assert changed["masked_text"] == "What would help you to begin, [name]?"
    assert rejected["text_sha256"] == "" and "masked_text" not in approved | rejected


@pytest.mark.parametrize("decision", ["", "yes", "approve", "approved all", "released", None])
def test_only_three_words_are_decisions(decision, trail, drafts):
    assert "expected approved" in one_line(lambda: review_draft(trail, drafts[0], decision, ADA))


def test_a_review_is_of_one_draft_of_this_trail_once(trail, drafts, tmp_path):
    with pytest.raises(AttributeError):
        review_draft(trail, drafts, "approved", ADA)
    review_draft(trail, drafts[0], "rejected", ADA)
    assert "was rejected by" in one_line(lambda: review_draft(trail, drafts[0], "approved", "B. B."))
    other = open_trail(tmp_path / "other.jsonl")
    assert "no line of the trail" in one_line(lambda: review_draft(other, drafts[1], "approved", ADA))
    sly = replace(drafts[1], text="Something else.")
    assert "not the text that was drafted" in one_line(lambda: review_draft(trail, sly, "approved", ADA))
    for text in ("", " \n", drafts[1].text):
        assert "edited text" in one_line(lambda text=text: review_draft(trail, drafts[1], "edited", ADA, text))
    assert "expected approved" in one_line(lambda: review_draft(trail, drafts[1], "edited", ADA))
    assert "expected approved" in one_line(lambda: review_draft(trail, drafts[1], "approved", ADA, "Other."))


def test_an_approved_text_leaves_to_the_letter_and_no_other(trail, drafts):
    one, two, three, four = drafts
    review_draft(trail, one, "approved", ADA)
    review_draft(trail, two, "edited", ADA, "What would help you to begin?")
    review_draft(trail, three, "rejected", ADA)
    assert release_text(trail, one.draft_id, one.text) == one.text
    assert release_text(trail, two.draft_id, "What would help you to begin?") == "What would help you to begin?"
    before = trail.path.read_bytes()
    for draft_id, text, said in (
        (one.draft_id, one.text + " ", "to the letter"),
        (one.draft_id, two.text, "to the letter"),
        (two.draft_id, two.text, "to the letter"),
        (three.draft_id, three.text, "was rejected"),
        (four.draft_id, four.text, "was not reviewed"),
        ("0" * 12 + "-1", one.text, "no line of the trail"),
        (None, one.text, "no line of the trail"),
    ):
        assert said in one_line(lambda: release_text(trail, draft_id, text))
    assert trail.path.read_bytes() == before
    assert audit_trail(trail.path)[0].endswith("1 approved, 1 edited, 1 rejected, 2 released")


def test_a_name_in_the_trail_that_is_no_trail_lets_nothing_out(trail, drafts, tmp_path):
    review_draft(trail, drafts[0], "approved", ADA)
    gone = replace(trail, path=tmp_path / "gone.jsonl")
    assert "not found" in one_line(lambda: release_text(gone, drafts[0].draft_id, drafts[0].text))


TAMPERED = {
    "a name is put in": lambda raw: raw.replace(b"Dr Ada Example", b"Dr Eve Example"),
    "a rejection becomes an approval": lambda raw: raw.replace(b'"rejected"', b'"approved"'),
    "the rejection is cut off": lambda raw: raw[: raw[:-1].rfind(b"\n") + 1],
    "the screen's sign is taken out": lambda raw: raw.replace(b'"sign":""', b'"sign":"-"', 1),
    "a blank": lambda raw: raw.replace(b",", b", ", 1),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_nothing_leaves_a_trail_that_was_tampered_with(how, trail, drafts):
    review_draft(trail, drafts[0], "approved", ADA)
    review_draft(trail, drafts[1], "rejected", ADA)
    raw = trail.path.read_bytes()
    assert TAMPERED[how](raw) != raw
    trail.path.write_bytes(TAMPERED[how](raw))
    for draft in drafts[:2]:
        assert ", line " in one_line(lambda draft=draft: release_text(trail, draft.draft_id, draft.text))
    assert ", line " in one_line(lambda: audit_trail(trail.path))


def forge(trail, *rows) -> None:
    "Append entries past every check, as somebody would who knows the code: the chain is whole."
    entries = verified(trail.path)
    for kind, data in rows:
        entries.append(Entry(len(entries), "now", kind, data, entries[-1].sha256).hashed())
    trail.path.write_bytes(b"".join(entry.line for entry in entries))
    seal = canonical_json(vars(Seal(len(entries), entries[-1].sha256)))
    seal_path(trail.path).write_text(seal + "\n")


def approval(draft, **changes) -> dict:
    own = text_hash(draft.text)
    return {"draft_id": draft.draft_id, "reviewer": ADA, "draft_sha256": own, "text_sha256": own} | changes


def test_an_entry_put_in_by_hand_lets_nothing_out_that_was_not_screened_drafted_and_named(trail, drafts):
    one, two, three, four = drafts
    stopped = suggest_drafts(an_aid(), trail, ["I want to die."])
    row = {"draft": "mine-1", "text_sha256": text_hash("Mine."), "reward": 1.0}
    forge(
        trail,
        ("approved", approval(one, reviewer="  ")),
        ("approved", approval(two, text_sha256=text_hash("Mine."))),
        ("edited", approval(three)),
        ("approved", approval(four, draft_sha256=text_hash("Mine."))),
        ("drafted", {"message": stopped.message_id, "drafts": [row]}),
        ("approved", {**approval(replace(one, text="Mine.")), "draft_id": "mine-1"}),
        ("drafted", {"message": "0" * 12, "drafts": [row | {"draft": "mine-2"}]}),
        ("approved", {**approval(replace(one, text="Mine.")), "draft_id": "mine-2"}),
        ("approved", {"draft_id": "mine-3"}),
    )
    for draft_id, text, said in (
        (one.draft_id, one.text, "reviewer"),
        (two.draft_id, "Mine.", "another text"),
        (three.draft_id, three.text, "another text"),
        (four.draft_id, four.text, "another text"),
        ("mine-1", "Mine.", "stopped by the crisis screen"),
        ("mine-2", "Mine.", "no line of the trail"),
        ("mine-3", "Mine.", "no line of the trail"),
    ):
        assert said in one_line(lambda: release_text(trail, draft_id, text)), draft_id


def test_a_release_put_in_by_hand_is_found_by_the_audit(trail, drafts):
    own = {"draft_id": drafts[0].draft_id, "text_sha256": text_hash(drafts[0].text)}
    forge(trail, ("released", own), ("approved", approval(drafts[0])))
    assert "line 4: a text was released that nobody approved" in one_line(lambda: audit_trail(trail.path))


def test_a_head_that_was_noted_shows_a_trail_made_anew(trail, drafts):
    head = review_draft(trail, drafts[0], "rejected", ADA).head
    assert "line 4" in audit_trail(trail.path, head.upper())[-1]
    for path in (trail.path, seal_path(trail.path)):
        path.unlink()
    again = suggest_drafts(an_aid(), trail, [EXAM + " Hm."]).drafts
    review_draft(trail, again[0], "approved", ADA)
    assert "can't tell" in audit_trail(trail.path)[-1], "the chain alone shows nothing, and says so"
    assert "no line has the noted hash" in one_line(lambda: audit_trail(trail.path, head))


def test_reviewers_at_the_same_time_decide_once(trail, drafts, tmp_path):
    code = "import sys; from pathlib import Path; from psycopref.run.draft import *\n"
    code += "from psycopref.core.settings import StudyError\ntrail = open_trail(sys.argv[1])\n"
    code += "draft = Draft(sys.argv[2], 1, 4, sys.argv[3], 0.0, {}, {}, {}, False, '', '')\n"
    code += "try:\n    review_draft(trail, draft, 'approved', sys.argv[4])\nexcept StudyError:\n    sys.exit(3)"
    given = [sys.executable, "-c", code, str(trail.path), drafts[0].draft_id, drafts[0].text]
    running = [subprocess.Popen([*given, f"Reviewer {name}"]) for name in "ABC"]
    assert sorted(process.wait() for process in running) == [0, 3, 3]
    assert kinds(trail).count("approved") == 1


def test_the_one_function_that_hands_a_text_out_is_the_gate():
    "Whoever adds another way out has to come past this test."
    told = re.findall(r"tell\(.*(?:\.text|text\b).*\)", Path(room.__file__).read_text())
    assert told == [], "the terminal is shown labelled drafts and what `release_text` returned, no text of a draft"


# Privacy


def test_texts_stand_in_the_trail_as_hashes_unless_they_are_asked_for_and_then_masked(tmp_path, trail, drafts):
    raw = trail.path.read_text()
    assert "exam" not in raw and "Anna" not in raw and not any(text in raw for text in ANSWERS)
    assert text_hash(EXAM) in raw and text_hash(ANSWERS[1]) in raw
    keeping = open_trail(tmp_path / "kept.jsonl", keep_texts=True)
    suggest_drafts(an_aid(), keeping, [EXAM])
    kept = keeping.path.read_text()
    assert "[name] says I should." in kept and "What gets in the way, [name]?" in kept and "Anna" not in kept


# The terminal


def session(*lines, path="random-tiny", file="drafts.jsonl", end=EOFError, writer=None, **how):
    "Return all that was told, and the writer."
    left, told, writer = list(lines), [], writer or Writer()

    def ask(prompt):
        told.append(prompt)
        if not left:
            raise end
        return left.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "open_reward", lambda name: by_words)
        how = {"reward": "words", "make": lambda name: writer} | how
        draft_session(path, str(file), ask, lambda *own: told.extend(own), **how)
    return told, writer


OPEN = ("yes", ADA, EXAM, ".")


def test_a_session_shows_labelled_drafts_and_prints_approved_text_alone(tmp_path):
    file = tmp_path / "drafts.jsonl"
    told, writer = session(*OPEN, "approve 2", file=file)
    assert NOTICE in told[0] and str(file) in told[1] and told.count(PROFESSIONAL) == 1
    drafts = [line for line in told if line.startswith(f"[{LABEL}]")]
    assert len(drafts) == 4 and ANSWERS[2] in drafts[-1], "the best is the last"
    assert [line for line in told if line in ANSWERS] == [ANSWERS[1]]
    assert told.index(ANSWERS[1]) > told.index(drafts[-1]) and f"Approved by {ADA}:" in told
    head = next(line for line in told if line.startswith("Head of the trail at this approval")).split()[7]
    assert any(entry.sha256 == head and entry.kind == "approved" for entry in verified(file))
    assert "ends" in told[-1] and audit_trail(file)[0].endswith("1 approved, 1 released")
    assert len(writer.asked) == 4 and EXAM in writer.asked[0].messages[0]["content"]


def test_an_edited_text_of_two_lines_leaves_as_it_was_typed(tmp_path):
    file = tmp_path / "drafts.jsonl"
    told, _ = session(*OPEN, "edit 1", "You seem worried.", "What would help?", ".", file=file)
    assert "You seem worried.\nWhat would help?" in told and not any(line in ANSWERS for line in told)
    assert verified(file)[-1].kind == "released"


def test_a_rejection_lets_nothing_out(tmp_path):
    told, _ = session(*OPEN, "reject", file=tmp_path / "drafts.jsonl")
    assert not any(line in ANSWERS for line in told) and any("All 4 drafts were rejected" in line for line in told)
    assert audit_trail(tmp_path / "drafts.jsonl")[0].endswith("4 rejected")


NO_DECISION = (
    "|yes|y|ok|1|approve|approve all|approve 0|approve 5|approve 1 2|approve 1,2|approve *|approve 1-4|edit".split("|")
)


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_nothing_but_a_whole_command_is_a_decision(tmp_path, end):
    told, _ = session(*OPEN, *NO_DECISION, "Reject", "approve -1", end=end, file=tmp_path / "drafts.jsonl")
    assert sum("No decision" in line and COMMANDS in line for line in told) == len(NO_DECISION) + 2
    assert not any(line in ANSWERS for line in told)
    assert audit_trail(tmp_path / "drafts.jsonl")[0].endswith("1 opened, 1 screened, 1 drafted")


def test_an_edit_that_is_broken_off_or_empty_is_no_approval(tmp_path):
    told, _ = session(*OPEN, "edit 1", "What", file=tmp_path / "a.jsonl")
    assert "What" not in told and audit_trail(tmp_path / "a.jsonl")[0].endswith("1 drafted")
    told, _ = session(*OPEN, "edit 1", ".", "edit 1", ANSWERS[2], ".", file=tmp_path / "b.jsonl")
    assert sum("edited text is empty, or the draft" in line for line in told) == 2
    assert audit_trail(tmp_path / "b.jsonl")[0].endswith("1 drafted")


def test_names_are_asked_for_until_there_is_one(tmp_path):
    told, _ = session("yes", "", "  ", "7", ADA, file=tmp_path / "drafts.jsonl")
    assert sum("expected the reviewer's name" in line for line in told) == 3
    assert verified(tmp_path / "drafts.jsonl")[1].data["reviewer"] == ADA


@pytest.mark.parametrize("lines", [["no"], [""], ["y"], ["I am a client"]])
def test_whoever_is_no_professional_sees_where_help_is(lines, tmp_path):
    told, _ = session(*lines, ADA, EXAM, ".", file=tmp_path / "drafts.jsonl", writer=Silent())
    assert told[-1] == HELP and not (tmp_path / "drafts.jsonl").exists()


@pytest.mark.parametrize("said", [[CRISES[0]], [EXAM, CRISES[0]]])
def test_a_crisis_shows_where_help_is_and_ends_the_session(said, tmp_path):
    *calm, last = said
    lines = ["yes", ADA, *(part for text in calm for part in (text, ".", "reject")), last, ".", EXAM, "."]
    told, writer = session(*lines, file=tmp_path / "drafts.jsonl")
    assert told[-1] == HELP and "crisis" in told[-3] and len(writer.asked) == 4 * len(calm)
    assert kinds(open_trail(tmp_path / "drafts.jsonl"))[-1] == "screened"


# Runs and the command line


def finished(run, *stages):
    "A run's folder with a policy and a reward model, without weights."
    write_json(run / "06_policy/m/iter/policy/config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(run / "06_policy/policies.json", [{"kind": "dpo-iter", "path": "m/iter/policy"}])
    (run / "05_reward/m").mkdir(parents=True)
    for stage in ("05_reward", "06_policy", *stages):
        write_json(run / stage / "receipt.json", {"settings": {}})


def test_a_run_gives_its_policy_and_the_reward_model_of_its_backbone(tmp_path):
    finished(tmp_path / "run")
    made = []
    aid = open_aid(str(tmp_path / "run"), make=lambda name: made.append(name) or Writer())
    assert made == [str(tmp_path / "run/06_policy/m/iter/policy")]
    assert aid.scorer == str(tmp_path / "run/05_reward/m") and "stand-in" in aid.labels["rater"]
    (tmp_path / "run/05_reward/receipt.json").unlink()
    assert "no finished reward model" in one_line(lambda: find_reward(made[0]))
    assert "--reward" in one_line(lambda: open_aid("random-tiny"))
    assert "2 or more" in one_line(lambda: open_aid("random-tiny", "r", candidates=1))
    assert sampled_decoding(Decoding(9)).temperature > 0 and sampled_decoding(Decoding(9)).max_tokens == 9


@pytest.fixture(scope="module")
def reward(tmp_path_factory, shared_cache):
    "A tiny reward model with a random head."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        weights = find_weights("random-tiny")
        tokenizer, folder = load_tokenizer(weights), tmp_path_factory.mktemp("reward")
        save_merged(load_reward_model(weights.location, tokenizer, "float32", new_head=0), tokenizer, folder)
    return str(folder)


def test_rewards_are_the_model_s_own(reward):
    score = open_reward(reward)
    assert score(EXAM, ANSWERS) == pytest.approx([score(EXAM, [text])[0] for text in ANSWERS], abs=1e-5)
    assert len(set(score(EXAM, ANSWERS))) == 4


def test_real_weights_draft_in_the_terminal_and_the_audit_agrees(reward, tmp_path, monkeypatch, capsys):
    lines = iter([*OPEN, "approve 1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    file = str(tmp_path / "drafts.jsonl")
    assert main(["draft", "random-tiny", "--reward", reward, "--trail", file, "--candidates", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count(LABEL) == 2 and f"Approved by {ADA}:" in shown.out and not shown.err
    head = re.search("at this approval: ([0-9a-f]{64})", shown.out)[1]
    assert main(["audit", file, "--noted", head]) == 0
    assert "whole and in order" in capsys.readouterr().out
    Path(file).write_bytes(Path(file).read_bytes().replace(b"Ada", b"Eve"))
    assert main(["audit", file]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "line 2: was changed" in shown.err


@pytest.mark.parametrize(
    "words, said", [(["audit", "none.jsonl"], "not found"), (["draft", "outputs/none"], "no such folder")]
)
def test_a_wrong_path_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and said in shown.err
