"""Cases to read: chosen by a rule that takes no side, shown as HTML, Markdown and LaTeX whatever the texts hold, scored only where the rater could."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycopref.evaluation import cases as room
from psycopref.core.files import PRINCIPLE_KEYS
from psycopref.core.tables import Label
from psycopref.feedback.battles import ORDERS
from psycopref.evaluation.cases import (
    Case,
    battle_margins,
    case_frame,
    case_latex,
    case_markdown,
    case_note,
    case_rows,
    cases_page,
    choose_cases,
    four_answers,
    make_case,
    score_case,
)
from psycopref.core.settings import StudyError

CHECK = settings(deadline=None, derandomize=True, database=None, max_examples=40)
NAMES = ["verdict", *(f"{key}_verdict" for key in PRINCIPLE_KEYS)]
OTHER = {"win": "loss", "loss": "win", "tie": "tie"}
LABEL = Label("tiny", ("warm & co",), "offline rubric (stand-in)", "1 battle")
HOSTILE = [
    "a | b \\| c \\\\| d",
    "\\end{tabular} \\input{x} {{}} $x_1^2$ #1 % gone",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "one\n\n\ntwo\r\nthree\u2028four",
    "\n\n  \n",
    "",
    "🙂👩‍👩‍👧 ☎️ → ✓",
    "שלום \u202eevil\u202c مرحبا",
    "*bold* _it_ `code` [l](javascript:alert(1)) ![i](x) # h",
    "1. one\n- two\n> three\n+ four",
    "</td></table></section>",
    "&lt;b&gt; &amp;",
    "tab\there \x00\x07 nul",
]
text = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60))
verdict = st.sampled_from(["win", "loss", "tie"])


def fought(speech_id, first, second):
    "Both orders of a battle; each a list of the overall verdict and seven more."
    return [
        {"speech_id": speech_id, "policy": "warm", "setting": "free", "order": order, **dict(zip(NAMES, verdicts))}
        for order, verdicts in zip(ORDERS, (first, second))
    ]


@st.composite
def fights(draw, least=1):
    one = st.lists(verdict, min_size=8, max_size=8)
    return pd.DataFrame(
        [row for place in range(draw(st.integers(least, 9))) for row in fought(f"s{place}", draw(one), draw(one))]
    )


def even(*verdicts):
    "Battles decided alike in both orders and on all principles."
    return pd.DataFrame(
        [row for place, word in enumerate(verdicts) for row in fought(f"s{place}", [word] * 8, [word] * 8)]
    )


def hostile_case(said, mine, theirs, names=("warm", "stone"), scores=None):
    return Case(
        "loss",
        "free",
        names,
        said,
        (mine, theirs),
        {"overall": "loss", **dict.fromkeys(PRINCIPLE_KEYS, "tie")},
        scores or {},
        "rater <b>&|",
    )


# the rule


@CHECK
@given(fights(), st.integers(0, 5))
def test_swapping_the_sides_turns_the_largest_win_into_the_loss(battles, seed):
    chosen, swapped = (
        choose_cases(battles, seed),
        choose_cases(battles.assign(**{name: battles[name].map(OTHER) for name in NAMES}), seed),
    )
    assert (
        chosen.get("largest") == swapped.get("loss")
        and chosen.get("loss") == swapped.get("largest")
        and chosen.get("median") == swapped.get("median")
    )


@CHECK
@given(fights(), st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(battles, random):
    places = list(range(len(battles)))
    random.shuffle(places)
    assert choose_cases(battles.iloc[places], 3) == choose_cases(battles, 3)
    pd.testing.assert_frame_equal(battle_margins(battles.iloc[places]), battle_margins(battles))


@CHECK
@given(fights())
def test_the_rule_does_what_it_says(battles):
    chosen, margins = choose_cases(battles, 0), battle_margins(battles).set_index("speech_id")
    wins, losses = (margins[margins.verdict == word].margin for word in ("win", "loss"))
    assert (
        ("largest" in chosen) == bool(len(wins))
        and ("loss" in chosen) == bool(len(losses))
        and len(set(chosen.values())) == len(chosen)
    )
    assert "largest" not in chosen or (
        margins.verdict[chosen["largest"]] == "win" and margins.margin[chosen["largest"]] == wins.max()
    )
    assert "loss" not in chosen or (
        margins.verdict[chosen["loss"]] == "loss" and margins.margin[chosen["loss"]] == losses.min()
    )
    left = margins.drop([name for rule, name in chosen.items() if rule != "median"])
    assert ("median" in chosen) == bool(len(left))
    assert (
        left.empty
        or abs(left.margin[chosen["median"]] - margins.margin.median())
        == (left.margin - margins.margin.median()).abs().min()
    )


@CHECK
@given(fights())
def test_margins_are_principles_won_less_lost_in_both_orders(battles):
    by_hand = {}
    for name, own in battles.groupby("speech_id"):
        first, second = own.iloc[0], own.iloc[1]
        by_hand[name] = sum({"win": 1, "loss": -1, "tie": 0}[first[n]] for n in NAMES[1:] if first[n] == second[n])
    assert battle_margins(battles).set_index("speech_id").margin.to_dict() == by_hand


def test_equal_battles_are_drawn_by_the_seed():
    drawn = {choose_cases(even(*["win"] * 12), seed)["largest"] for seed in range(20)}
    assert len(drawn) > 3


def test_no_loss_no_win_nothing():
    assert set(choose_cases(even("win", "win", "tie"), 0)) == {"largest", "median"}
    assert set(choose_cases(even("loss"), 0)) == {"loss"} and set(choose_cases(even("tie", "tie"), 0)) == {"median"}
    assert choose_cases(even("win").iloc[:0], 0) == {}


def test_a_battle_of_one_order_is_no_case():
    battles = even("win", "win", "loss")
    assert choose_cases(battles[battles.order == ORDERS[1]], 0) == {}
    alone = battles[~((battles.speech_id == "s2") & (battles.order == ORDERS[0]))]
    assert "loss" not in choose_cases(alone, 0) and set(battle_margins(alone).speech_id) == {"s0", "s1"}


def test_mixed_battles_are_refused():
    with pytest.raises(ValueError, match="one policy, setting and judge"):
        choose_cases(pd.concat([even("win"), even("loss")]), 0)


# a case

ANSWERS = pd.DataFrame(
    [
        ("s0", "warm", "free", "Mine."),
        ("s0", "warm", "length", "Longer."),
        ("s0", "reference", "free", "Theirs."),
        ("s0", "cool", "free", "Cool."),
        ("s1", "warm", "free", "Other."),
    ],
    columns=["speech_id", "policy", "setting", "response"],
)
SPEECHES = pd.DataFrame({"speech_id": ["s0", "s1"], "speech": ["I am tired.", "He left."]})


def test_a_case_has_the_right_answers_and_verdicts():
    case = make_case("loss", "s0", even("loss", "win"), ANSWERS, SPEECHES, ("a", "b"))
    assert (
        case.texts == ("Mine.", "Theirs.")
        and case.speech == "I am tired."
        and set(case.verdicts.values()) == {"loss"}
        and list(case.verdicts) == ["overall", *PRINCIPLE_KEYS]
    )
    assert make_case("loss", "s0", even("loss").assign(setting="length"), ANSWERS, SPEECHES, ("a", "b")).texts == (
        "Longer.",
        "Theirs.",
    )


def test_the_reference_is_its_free_answer():
    more = pd.concat(
        [ANSWERS, pd.DataFrame([("s0", "reference", "length", "Theirs, longer.")], columns=ANSWERS.columns)]
    )
    assert make_case("loss", "s0", even("loss"), more, SPEECHES, ("a", "b")).texts == ("Mine.", "Theirs.")


@pytest.mark.parametrize(("place", "whose"), [(0, "warm, free"), (2, "the reference, free")])
def test_a_missing_or_doubled_answer_is_said(place, whose):
    for answers in (ANSWERS.drop(place), pd.concat([ANSWERS, ANSWERS.iloc[[place]]])):
        with pytest.raises(StudyError, match=f"found [02] answers of {whose}"):
            make_case("loss", "s0", even("loss"), answers, SPEECHES, ("a", "b"))


# scores


def test_four_answers_hold_both_sides_first_whatever_the_order():
    more = pd.concat(
        [
            ANSWERS,
            pd.DataFrame([("s0", "dry", "free", "Dry."), ("s0", "dry", "length", "Drier.")], columns=ANSWERS.columns),
        ]
    )
    own = more[more.speech_id == "s0"]
    for seed in range(5):
        shown = four_answers(own.sample(frac=1, random_state=seed), "warm", "free")
        assert shown.model.tolist() == ["warm, free", "reference", "cool, free", "dry, free"]


def test_fewer_than_four_answers_or_equal_ones_have_no_scores():
    case = make_case("loss", "s0", even("loss"), ANSWERS, SPEECHES, ("a", "b"))
    assert four_answers(ANSWERS.iloc[:3], "warm", "free").empty
    assert four_answers(ANSWERS.iloc[:4].assign(response="The same."), "warm", "free").empty
    assert score_case(None, "unasked", "s0", ANSWERS.iloc[:3], SPEECHES, case, "warm", 0) == {}


def rated(keys, models):
    return pd.DataFrame(
        [{"speech_id": "s0", "principle": key, "model": model, "rating": 4} for key, model in product(keys, models)],
        columns=["speech_id", "principle", "model", "rating"],
    )


@pytest.mark.parametrize(
    ("keys", "models", "kept"),
    [
        ([], [], []),
        (["empathy", "safety"], ["warm, free", "reference"], ["empathy", "safety"]),
        (["empathy"], ["warm, free", "cool, free"], []),
    ],
)
def test_a_rater_that_fails_leaves_out_what_it_did_not_rate(monkeypatch, keys, models, kept):
    case = make_case("loss", "s0", even("loss"), ANSWERS, SPEECHES, ("a", "b"))
    monkeypatch.setattr(room, "rate", lambda *arguments, **keywords: (rated(keys, models), ["put aside"]))
    scores = score_case(None, "broken", "s0", ANSWERS, SPEECHES, case, "warm", 0)
    assert list(scores) == kept and all(pair == (4, 4) for pair in scores.values())
    shown = replace(case, scores=scores)
    assert len(case_rows(shown)) == 10 and ("Numbers" in case_note(shown)) == bool(kept)


def test_marks_of_the_two_sides_mirror():
    case = hostile_case("s", "a b", "c", scores={"empathy": (4, 2)})
    rows = {what: (mine, theirs) for what, mine, theirs in case_rows(case)}
    assert (
        rows["words"] == ("2", "1")
        and rows["overall"] == ("worse", "better")
        and rows["empathy"] == ("4 (undecided)", "2 (undecided)")
        and rows["safety"] == ("undecided", "undecided")
    )
    assert case_frame(case).shape == (11, 3)


# what is shown


class Reader(HTMLParser):
    "Gathers the tags and the text of a page, and whether every tag is closed."

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.open += [tag] * (tag not in ("meta", "col", "br"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


ALLOWED = set("html head meta title style body h1 h3 p div section table colgroup col thead tbody tr th td".split())


@CHECK
@given(text, text, text, text)
def test_html_shows_any_text_as_text(said, mine, theirs, name):
    reader = Reader()
    reader.feed(cases_page([(name, hostile_case(said, mine, theirs, (name, "stone")))], LABEL))
    assert (
        not reader.open
        and {tag for tag, _ in reader.tags} <= ALLOWED
        and {name for _, names in reader.tags for name in names}
        <= {"class", "dir", "lang", "charset", "name", "content"}
    )
    for value in (said, mine, theirs):
        assert "\n".join(value.splitlines()).replace("\x00", "") in "".join(reader.words).replace("\x00", "")


def test_the_page_says_what_it_is_and_reaches_for_nothing():
    page = cases_page([("T", hostile_case("s", "a", "b"))], LABEL)
    assert "never advice to a client" in page and "stand-in" in page and "Machine-written" in page
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "No battle was decided" in cases_page([], LABEL)


def cells(line):
    "Split a row of a Markdown table as GFM does: an escaped character never parts cells."
    return re.sub(r"\\.", "xx", line)[1:-1].split("|")


@CHECK
@given(text, text, text, text)
def test_markdown_keeps_its_table_whatever_the_text(said, mine, theirs, name):
    lines = case_markdown(name, hostile_case(said, mine, theirs, (name, "stone")), LABEL).split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 12 and all(line.endswith("|") and len(cells(line)) == 3 for line in table)
    whole = "\n".join(lines).replace("<br>", "")
    assert (
        "<" not in whole
        and sum(line.startswith(">") for line in lines) == 1
        and len(lines) == 21
        and "stand-in" in whole
    )
    assert not re.search(r"(?<!\\)(?:\\\\)*[`_\[\]]", whole)


def balanced(source):
    "Check braces, environments and the number of cells of each row."
    bare = re.sub(r"\\textbackslash\{\}|\\text[a-z]+\{\}|\\dots\{\}|\\[&%$#_{}]", "", source)
    depth = 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    assert re.findall(r"\\(begin|end)\{([a-z*]+)\}", bare) == [
        ("begin", "table*"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("end", "table*"),
    ]
    commands = set(re.findall(r"\\([a-zA-Z]+)", bare))
    assert commands <= {
        "begin",
        "end",
        "centering",
        "small",
        "textwidth",
        "toprule",
        "midrule",
        "bottomrule",
        "multicolumn",
        "textbf",
        "newline",
        "caption",
        "pm",
        "geq",
        "kappa",
        "alpha",
        "rho",
        "cdot",
        "times",
    }
    rows = [line for line in bare.split("\n") if line.endswith(r"\\")]
    assert len(rows) == 12 and [line.count("&") for line in rows] == [0, *[2] * 11]


@CHECK
@given(text, text, text, text)
def test_latex_is_balanced_whatever_the_text(said, mine, theirs, name):
    source = case_latex(name, hostile_case(said, mine, theirs, (name, "stone")), LABEL)
    balanced(source)
    assert not re.search(r"&\s*\\newline|^\s*\\newline", source, re.M), "no line to end at the head of a cell"
    assert not re.search("[\U0001f000-\U0001ffff\u200b-\u200f\u202a-\u202e\ufe0f\x00-\x08]", source)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_latex_compiles(tmp_path):
    latin = [value for value in HOSTILE if "ש" not in value]
    body = "\n".join(
        case_latex("T", hostile_case(value, value, value, (value or "-", "stone")), LABEL) for value in latin
    )
    (tmp_path / "a.tex").write_text(
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
        + body
        + r"\end{document}",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
