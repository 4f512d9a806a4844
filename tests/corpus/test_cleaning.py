"""Cleaning settles, loses no word that a client wrote, ends on any input, and judging gives one reason."""

import functools
import re
import signal
import unicodedata

import pytest
from bs4 import BeautifulSoup
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psycopref.corpus import cleaning
from psycopref.corpus.cleaning import REASONS, clean, judge

few = settings(max_examples=150, deadline=None, derandomize=True, database=None)
ENGLISH = (
    "Since my brother moved out I lie awake and listen to the house. "
    "I do not know whom I could tell about it without shame. "
)
GERMAN = (
    "Seit mein Bruder ausgezogen ist, liege ich wach und horche. "
    "Ich weiss nicht, wem ich davon erzählen soll, ohne mich zu schämen."
)


@pytest.fixture
def alarm():
    """End a test that would never end."""

    def ring(*_):
        raise AssertionError("still cleaning after 20 s")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)  # of this process: other work on the machine does not count
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def exactly(length: int) -> str:
    """English of that many characters."""
    return (ENGLISH * (length // len(ENGLISH) + 1))[: length - 1].strip().ljust(length, ".")


# ---- any text ----


def garbled(layers) -> str:
    """Read UTF-8 as another encoding, again and again."""
    text, codecs = layers
    return functools.reduce(lambda t, codec: t.encode("utf-8").decode(codec, "replace"), codecs, text)


no_surrogates = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
codecs = st.lists(st.sampled_from(["cp1252", "latin-1", "cp1251", "mac_roman"]), max_size=3)
mojibake = st.tuples(no_surrogates, codecs).map(garbled)
pieces = st.lists(st.sampled_from(
    ["<p>", "</p", "</p>", "<br/>", "<!--", "-->", "<", ">", "<b ", "<script>", "</script>", "style>", "&", "&amp;",
    "&amp", "amp;", "&lt;", "&lt", "gt;", "&#39;", "&#38;",
     "&#x26;", "#39;", ";", "&nbsp;", "&shy;", "&#55357;", "&#128;", "&#0;", "&NotEqualTilde;",
     "&acirc;&euro;&trade;", "â€™", "Ã©", "Ã", "Â", "\x92", "\ufffd", "＜", "b＞",
     "＆", "ﬁ", "\u0301", "\ud83d", "\ude00", "😀", "\u200d", "\u200e", "\u202e", "\u2066", "\u200b", "\ufeff", "\x00",
     "\x1b[", "31m", "\x7f", "\x85", "\u2028", "\u00a0",
     "\t", "\r\n", " ", "a", "b", "é", "2 < 3 > 1", "I <3 you", "\U000e0061", "İ", "ß"]),
     max_size=16).map("".join)  # fmt: skip
strange = st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs", "Sm", "Po", "Ll"]), max_size=40)
anything = st.one_of(st.text(max_size=60), strange, mojibake, pieces)


@few
@given(anything)
@example("<" * 400 + "b>" * 400)
@example("&" + "amp;" * 60 + "lt;p&" + "amp;" * 60 + "gt;")
def test_cleaning_settles_on_one_line_of_plain_text(text):
    once = clean(text)
    assert clean(once) == once
    assert once == once.strip() and "  " not in once
    assert {unicodedata.category(c) for c in once}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert all(c == " " for c in once if unicodedata.category(c) == "Zs"), "one kind of blank"
    once.encode("utf-8")
    marks = re.search("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]", once)
    assert not marks, "no invisible or bidirectional mark"


@pytest.mark.parametrize(
    "mark", "\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c", ids=ascii
)
def test_every_invisible_mark_goes(mark):
    assert clean(f"{mark}I said {mark} so{mark}") == "I said so"
    assert mark not in "\u200d\u200e\u200f" or clean(f"I was aw{mark}ake") == "I was awake", "no word is split"


@pytest.mark.parametrize("blank", [c for c in map(chr, range(0x10000)) if c.isspace() and c != "\x85"], ids=ascii)
def test_every_blank_parts_words(blank):
    assert clean(f"I was sad.{blank}I left{blank}{blank}him") == "I was sad. I left him"


sober = st.lists(
    st.sampled_from(
        "I can't sleep, since March. Why? 2 <3 (maybe) é naïve 😀 R&B ... — $20 a@b.de 50%".split()
        + ["< 3", "> 1", "5 & 6"]
    ),
    min_size=1,
).map(" ".join)


@few
@given(sober)
def test_sober_text_is_left_alone(text):
    assert clean(text) == text


@few
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="&<>"), min_size=1))
def test_ascii_without_markup_is_left_alone(text):
    assert clean(text) == text


def test_our_own_speeches_are_clean_and_usable(shipped):
    for row in shipped:
        assert judge(row["speech"]) == (row["speech"], None)


@few
@given(st.text(st.sampled_from("’“”—…é漢аяü😀 abc"), min_size=1, max_size=12))
def test_text_read_in_a_wrong_encoding_comes_back(text):
    known = "It’s “fine”, I don’t know – naïve café … "
    assert clean((known + text).encode("utf-8").decode("latin-1")) == clean(known + text)


# ---- markup ----

words = st.lists(
    st.sampled_from(["I", "am", "tired,", "why?", "2 + 2", "don't", "März", "R&amp;B", "&lt; 3"]),
    min_size=1,
    max_size=4,
).map(" ".join)
EMPTY = "br hr img input link meta html head body template".split()
tags = st.sampled_from([tag for tag in cleaning._TAGS.split() if tag not in EMPTY])
attributes = st.sampled_from(
    ["", " class='x y'", ' title="a b"', " href=http://x.de/a?b=1&c=2", " disabled", '\ndata-x="1"\n']
)


def wrapped(inner):
    kids = st.lists(inner, min_size=1, max_size=3).map(" ".join)
    return st.builds(lambda tag, how, kids: f"<{tag}{how}>{kids}</{tag}>", tags, attributes, kids)


markup = st.recursive(words, wrapped, max_leaves=8)
void = st.sampled_from(["<br>", "<br/>", "<HR />", "<img src='a.png' alt='b'>", "<!-- a <b> c -->", "<!DOCTYPE html>",
"<script>if (a < b) { alert('<p>') }</script>",
                        "<STYLE type='text/css'>\np > b { color: red }\n</STYLE >"])  # fmt: skip


def test_words_between_two_scripts_stay():
    page = "a <script>x</script> b <style>y</style> c <!-- d --> e <!-- f --> g <script>z</script> h"
    assert clean(page) == "a b c e g h"


@few
@given(st.lists(markup | void, min_size=1, max_size=6).map(" ".join))
def test_markup_is_stripped_as_a_parser_strips_it(page):
    soup = BeautifulSoup(page, "html.parser")
    assert clean(page) == clean(soup.get_text(" ").replace("<", "&lt;"))


NO_TAGS = """a <b and c|I <3 you|x < y > z|<my wife> said|I feel </3|a < b and c > d|<-- look|<<< really >>>|<|x<y
<thing>|1<2>0|he said <<no>>|</p|<p|<a.b>|<i-think>|<br-ing>|<!-- open|<!ok>|I told <a friend> about it|<i am tired>
a <b and c> d|my <main problem> is sleep|outgoing &shy people|work &times I forget|fear &notable grief
the car &pounds of debt|see x.org/?a=1&copy=2"""


@pytest.mark.parametrize("text", re.split(r"[|\n]", NO_TAGS))
def test_what_is_no_tag_and_no_entity_of_html_stays(text):
    assert clean(text) == text


def test_an_angle_inside_an_attribute_ends_no_tag():
    page = '<p>I <span title="x > y" class="a">am</span> tired.</p>'
    assert clean(page) == BeautifulSoup(page, "html.parser").get_text() == "I am tired."


@pytest.mark.parametrize(
    "tag", "big button noscript kbd time textarea caption details summary picture object acronym dfn samp var".split()
)
def test_every_tag_of_html_is_stripped(tag):
    assert clean(f"I <{tag}>am</{tag}> tired.") == "I am tired."


@pytest.mark.parametrize("depth", [1, 2, 5, 40])
def test_markup_goes_however_often_it_was_escaped(depth):
    escaped = "I said <b>no</b>."
    for _ in range(depth + 1):
        escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert clean(escaped) == "I said no ."


ENTITIES = {"&amp;": "&", "&#38;": "&", "&#x27;": "'", "&quot;": '"', "&eacute;": "é", "&hellip;": "…"}
ENTITIES |= {"&nbsp;": " ", "&#8217;": "'", "&#55357;": "\ufffd"}


@pytest.mark.parametrize("entity, shown", ENTITIES.items())
def test_entities_are_read(entity, shown):
    assert clean(f"so {entity} so") == " ".join(f"so {shown} so".split())


# ---- pathological input of the longest length that is looked at ----

LONGEST = 50_000


def filled(piece: str, tail: str = "") -> str:
    return (piece * (LONGEST // len(piece)))[: LONGEST - len(tail)] + tail


@pytest.mark.parametrize("text", [filled("<"), filled("<b "), filled("<b" + " " * 1000), filled("<<b>"),
filled("<!--"), filled("<script>"), filled("<script></script "), filled("<!doctype "),
                                  filled("&"), filled("&lt;"), filled("&#"), "&" + filled("amp;")[:-1],
                                  "&" + filled("#38;")[:-1], filled("a\u200b"), "a" + "\u200b" * (LONGEST - 1),
                                  filled(" \x00"), filled("\ud800"), filled("Ã"), filled("â€™"),
                                  filled("ÃƒÂ"), "a" + "\u0301" * (LONGEST - 1), filled("\x1b[1;"), filled("ﷺ"),
                                  filled("\u1100\u1161"), filled("😀")],
                         ids=lambda text: ascii(text[:12]))  # fmt: skip
def test_hostile_text_comes_to_an_end(alarm, text):
    assert len(text) <= LONGEST
    assert judge(text)[1] in REASONS


def test_an_entity_with_thousands_of_digits_is_only_text():
    assert judge(ENGLISH + "&#" + "9" * 5000 + ";")[1] in (None, *REASONS)


# ---- judging ----


@few
@given(st.one_of(anything, st.tuples(st.sampled_from([ENGLISH, GERMAN, ENGLISH * 9]), anything).map("".join)))
def test_a_text_is_used_or_has_one_reason(text):
    cleaned, reason = judge(text)
    assert reason is None or reason in REASONS
    assert cleaned == clean(text)
    letters = re.search(r"[^\W\d_]{2}", cleaned)
    holds = (not cleaned, not letters, len(cleaned) < 100, len(cleaned) > 1000)
    first = [name for name, hit in zip(REASONS, holds) if hit]
    assert (reason == first[0]) if first else reason in (None, "not English")


@pytest.mark.parametrize("length, reason", [(99, "too short"), (100, None), (1000, None), (1001, "too long")])
def test_both_limits_are_in_the_range(length, reason):
    text = exactly(length)
    assert len(clean(text)) == length and judge(text) == (text, reason)


@pytest.mark.parametrize("low, high", [(10, 20), (1, 1), (30, 30)])
def test_the_limits_are_the_given_ones(low, high):
    for length in range(3, 40):
        _, reason = judge(exactly(length), low, high)
        assert (reason == "too short") == (length < low) and (reason == "too long") == (length > high)


def test_lengths_are_counted_after_cleaning():
    padded = "<p class='wide'>" + exactly(99) + "</p>" + "&nbsp;" * 50
    assert judge(padded) == (exactly(99), "too short")
    assert judge("<b>" * 500 + exactly(1000) + "\x00\u200b \n" * 900) == (exactly(1000), None)
    assert judge("&amp;" * 60 + exactly(930))[1] is None, "an entity counts as what it stands for"


@pytest.mark.parametrize("text, reason", [
    ("", "empty"), (" \n\t", "empty"), ("\x00" * 300, "empty"), ("\ufeff", "empty"), ("&nbsp;" * 200, "empty"),
    ("<p><br/></p>", "empty"), ("<!-- " + ENGLISH + "-->", "empty"),
    ("\ud800\udfff", "empty"), ("😀" * 200, "no words"), ("4 / 7 = ?", "no words"), ("12345 " * 40, "no words"),
    ("a b c " * 40, "no words"), ("__ " * 50, "no words"),
    ("!" * 2000, "no words"), ("I am sad.", "too short"), ("Ich bin traurig.", "too short"), (GERMAN, "not English"),
    (GERMAN * 9, "too long"), ("لا أنام جيدا " * 12, "not English"),
    ("אני לא ישן טוב " * 12, "not English"), ("我晚上睡不着，一直在想我哥哥的事情。" * 7, "not English"), 
    (ENGLISH + "😀" * 20, None),
    (ENGLISH + "\x00", None), ("\x00".join(ENGLISH), None),
    ("\u202e" + ENGLISH + "\u202c", None)], ids=lambda value: ascii(value)[:24])  # fmt: skip
def test_the_first_reason_that_holds_is_given(text, reason):
    assert judge(text)[1] == reason


def test_a_cell_of_megabytes_is_not_even_cleaned(monkeypatch):
    monkeypatch.setattr(cleaning, "clean", lambda text: pytest.fail("cleaned"))
    for size in (LONGEST + 1, 50_000_000):
        assert judge("x" * size) == ("", "too long") and judge(" " * size) == ("", "too long")


def test_the_longest_cell_that_is_looked_at_is_judged_as_any():
    assert judge("\n".join([ENGLISH.strip()] + [" " * 100] * 480)) == (ENGLISH.strip(), None)
    assert judge(" " * LONGEST) == ("", "empty")
    assert judge(ENGLISH + " " * 400, max_characters=200) == (ENGLISH.strip(), None)
