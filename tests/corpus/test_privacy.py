"""Masking: nothing but hits changes, twice is once, every kind is found, words that look like names stay, no
network."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.core.settings import StudyError
from psycopref.core.paper import resource_path
from psycopref.corpus.privacy import (
    PERSONAL_KINDS,
    PLACEHOLDER,
    PLACEHOLDERS,
    NAME_WORDS,
    _resolve,
    find_addresses,
    find_names,
    load_pipeline,
    mask_found,
    mask_text,
    mask_texts,
    masking_quality,
    name_key,
    privacy_cases,
    split_words,
)

PIECES = [
    *"Anna|Mark|my husband Mark|my name is |Will|Hope's|Dr. |Qrxil|O'Brien|van Dijk|K.|ANNA".split("|"),
    *"anna@mail.example.org|@anna_k|u/quiet_owl|https://a.example/|www.x.example|bit.ly/x".split("|"),
    *"212-555-0187|call 555-0142|+44 7700 900123|42 Elm Street|12 Mark Street, Springfield, IL 62704".split("|"),
    *"PO Box 12|[name]|[email]|[phone|name]|[|]| | | |. |.|, ".split("|"),
    "\n",
    *"-|'s".split("|"),
    "’s",
    *" and | said |(|)|@|/|24/7|1-10|worst.The|my sister priya".split("|"),
    "é",
    "\U0001d4d0",
    "\u0301",
    "ß",
    "İ",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join)


def words(text):
    return [text[start:end] for start, end in find_names(text)]


@settings(deadline=None, max_examples=100)
@given(texts)
def test_masking_twice_is_masking_once(text):
    masked, _ = mask_text(text)
    assert mask_text(masked) == (masked, dict.fromkeys(PERSONAL_KINDS, 0))


@settings(deadline=None, max_examples=100)
@given(texts)
def test_only_hits_change_and_counts_are_placeholders(text):
    masked, found = mask_found(text)
    kept = PLACEHOLDER.split(masked)
    assert re.fullmatch("(.*)".join(map(re.escape, kept)), text, re.DOTALL), (
        "text outside the hits stands unchanged and in order"
    )
    assert len(text) - sum(len(hit) for hit, _ in found) == len(masked) - sum(
        len(PLACEHOLDERS[kind]) for _, kind in found
    )
    added = Counter(PLACEHOLDER.findall(masked)) - Counter(PLACEHOLDER.findall(text))
    assert added == Counter(PLACEHOLDERS[kind] for _, kind in found)
    assert mask_text(text) == (masked, {kind: sum(k == kind for _, k in found) for kind in PERSONAL_KINDS})


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_words_lie_in_the_text(text):
    for word in split_words(text):
        assert 0 <= word.start < word.end <= len(text) and word.key == name_key(text[word.start : word.end])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.sampled_from(PERSONAL_KINDS)), max_size=8))
def test_resolved_spans_do_not_touch(hits):
    spans = _resolve([(start, start + size, kind) for start, size, kind in hits], "x" * 50)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])) and bool(spans) == bool(hits)
    assert {kind for *_, kind in spans} <= {kind for *_, kind in hits}


def test_an_email_beats_a_handle_and_an_address_a_phone_number():
    assert _resolve([(5, 12, "handle"), (0, 20, "email"), (9, 20, "url")], "x" * 30) == [(0, 20, "email")]
    assert _resolve([(0, 12, "phone"), (0, 30, "address")], "x" * 30) == [(0, 30, "address")]
    assert _resolve([(0, 6, "person")], "[name] ") == []


def test_many_texts_keep_their_order_and_number(capsys):
    many = ["Call Priya.", "", "Will I sleep?", "Priya and Anna", "a@b.example.com"] * 3
    masked, counts = mask_texts(many, name="test")
    assert masked == [mask_text(text)[0] for text in many] and masked[1] == ""
    assert counts == {**dict.fromkeys(PERSONAL_KINDS, 0), "person": 9, "email": 3}
    assert mask_texts([]) == ([], dict.fromkeys(PERSONAL_KINDS, 0))


@pytest.mark.parametrize(
    "text, masked",
    [
        ("My husband Mark left.", "My husband [name] left."),
        ("I miss Anna's laugh; Anna was 9.", "I miss [name]'s laugh; [name] was 9."),
        ("Siobhan O’Rourke-Lee and J. were there", "[name] and J. were there"),
        ("I'm Zoë.", "I'm [name]."),
        ("My name is Qrxil and Qrxil is odd", "My name is [name] and [name] is odd"),
        ("Mr. Zzyzx and Mrs. Young came", "Mr. [name] and Mrs. [name] came"),
        ("her name is Paris", "her name is [name]"),
        ("My wife told Abcdef everything", "My wife told [name] everything"),
        ("my brother josh hit me", "my brother [name] hit me"),
        ("I wrote to j.d+x@mail.example.co.uk.", "I wrote to [email]."),
        ("write anna@mail.example.com.She reads it", "write [email].She reads it"),
        ("write jane.doe at mail.example.com now", "write [email] now"),
        ("or jane_doe-at-example.com, jane.doe (a) example.com", "or [email], [email]"),
        ("jane.doe＠example.com and jane%40example.com", "[email] and [email]"),
        ("jane.doe[ at ]example [ . ] com", "[email]"),
        ("anna@example dot com", "[email]"),
        ("(212) 555‑0187 or 212·555·0187", "[phone] or [phone]"),
        ("(212) 555-0187 or +44 7700 900123 or 0412 345 678", "[phone] or [phone] or [phone]"),
        ("the line (800-555-0199) is busy", "the line ([phone]) is busy"),
        ("text me at 555-0142", "text me at [phone]"),
        ("see https://a.example/b?c=1#d, or www.x.example.", "see [url], or [url]."),
        ("see example.com/me and t.me/anna", "see [url] and [url]"),
        ("it is on @mina_92 and u/quiet_owl_7", "it is on [handle] and [handle]"),
        ("at 42 Elm Street, Apt 3B since May", "at [address] since May"),
        ("to 225 King Street West, Toronto, ON M5V 1J2 today", "to [address] today"),
        ("to 14 Banksia Street, Fitzroy VIC 3065 today", "to [address] today"),
        ("he is at 12 High Street,\n Leeds, LS1 4AB", "he is at [address]"),
        ("12 Martin Luther King Drive is home", "[address] is home"),
        ("https://x.example/@anna", "[url]"),
    ],
)
def test_planted(text, masked):
    assert mask_text(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "Will I ever be well? May I ask? Mark my words, Hope dies last. Grace is rare. Rose petals. Bill after bill.",
        "We moved from Jordan to Austin in April. Christian values, Angel numbers, Summer rain.",
        "Zoloft, Prozac, Xanax and Lexapro; CBT for ADHD; Google and Facebook; Monday to Sunday; Christmas in France.",
        "I asked God, Mom and Dad. Catholic, English and German. The doctor said no, my Dad said yes.",
        "24/7, 2 years ago, 911, I weigh 130, at 10:30 a.m., 1-10, e.g. 5'4, 1,250,000, 2010-2012, 1 2 3 4 5 6 7 8 9 "
        "10.",
        "It was the worst.The end.everything hurts, like.it or not.my life. So.I left. home.my/his",
        "I looked at example words. Anyone at home at 9 dot. Section 2.1 at most. Look at me at 5 at the cafe.",
        "I was @ work, @home and @ 5pm. He/she and and/or. r/Anxiety helps.",
        "I was 5 when I drove 300 miles on my way, 2 doctors at the Dr. office. The Baker Act.",
        "I hope mark and will grow; my husband will stay; my friend may come; my dad said so.",
        "San Diego, St. Louis, New Jersey, Saint Paul Street, Trinity College",
        "",
        " ",
        "[name] and [email] and [phone]",
    ],
)
def test_traps_stay(text):
    assert mask_text(text) == (text, dict.fromkeys(PERSONAL_KINDS, 0))


def test_a_modal_stays_though_its_name_was_found():
    assert mask_text("My son Will left. Will I see Will again?")[0] == "My son [name] left. Will I see [name] again?"


def test_an_address_is_found_where_it_stands():
    text = "On 3 May.\n\n12 High Street ,\tLeeds,  LS1 4AB"
    assert {text[start:end] for start, end in find_addresses(text)} >= {"12 High Street ,\tLeeds,  LS1 4AB"}
    assert find_addresses("height: 1.5; and on a way, Texas. OOOPQ8Y6Zr Dr8 pl2 AbC") == []


def test_groups_of_words_do_not_overlap():
    groups = [NAME_WORDS[name] for name in ("mostly_names", "mostly_words", "places", "kept")]
    assert [(a & b) for i, a in enumerate(groups) for b in groups[i + 1 :] if a & b] == []
    assert all(word == name_key(word) for group in groups for word in group)


def test_a_pipeline_that_is_not_installed_is_one_line():
    for name in ("en_core_web_nope", "numpy", "/nowhere/at/all", ""):
        with pytest.raises(StudyError, match="spacy download|lexicon") as caught:
            mask_texts(["Anna"], names=name)
        assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def test_a_pipeline_works_beside_the_lexicon(tmp_path):
    import spacy

    pipeline = spacy.blank("en")
    pipeline.to_disk(tmp_path / "plain")
    with pytest.raises(StudyError, match="no label PERSON"):
        load_pipeline(str(tmp_path / "plain"))
    pipeline.add_pipe("entity_ruler").add_patterns(
        [{"label": "PERSON", "pattern": "Vrul"}, {"label": "GPE", "pattern": "Anatolia"}]
    )
    pipeline.to_disk(tmp_path / "people")
    text = "Vrul met Anna in Anatolia"
    assert mask_text(text)[0] == "Vrul met [name] in Anatolia"
    assert mask_text(text, names=str(tmp_path / "people")) == (
        "[name] met [name] in Anatolia",
        {**dict.fromkeys(PERSONAL_KINDS, 0), "person": 2},
    )
    assert mask_text("[name] met [name]", names=str(tmp_path / "people"))[1]["person"] == 0


def test_no_socket_is_opened_and_the_import_is_light(tmp_path):
    code = """
import socket, sys
def refuse(*arguments, **keywords): raise SystemExit("a socket was asked for")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import psycopref.corpus.privacy as privacy
print([m for m in ("presidio_analyzer", "spacy", "faker", "pandas", "torch", "pyap", "tldextract") if m in sys.modules])
print(privacy.mask_text("Anna: a@b.example.com, clinic.co.uk/x, 212-555-0187")[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines() == ["[]", "[name]: [email], [url], [phone]"], done.stdout + done.stderr


def test_cases_are_sound():
    cases = privacy_cases()
    assert len(cases) >= 120 and len({case["text"] for case in cases}) == len(cases)
    for case in cases:
        assert case.keys() == {"text", "spans", "held_out"}
        for words_, kind in case["spans"]:
            assert kind in PERSONAL_KINDS and words_ in case["text"]
    assert {kind for case in cases for _, kind in case["spans"]} == set(PERSONAL_KINDS)
    assert sum(case["held_out"] for case in cases) == len(cases) // 4
    assert 0.4 < sum(not case["spans"] for case in cases) / len(cases) < 0.6
    assert json.loads(resource_path("privacy_cases.jsonl").read_text(encoding="utf-8").splitlines()[0]) == cases[0]


def test_quality_on_the_cases_we_tuned_on():
    table = masking_quality([case for case in privacy_cases() if not case["held_out"]]).set_index("kind")
    assert table.loc["all", "precision"] >= 0.95 and table.loc["all", "recall"] >= 0.9
