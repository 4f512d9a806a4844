"""Cases are chosen by a rule that takes no side, and shown as HTML, Markdown and LaTeX whatever the texts hold."""

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

from psycopref.core.principles import principle_keys
from psycopref.core.tables import Label
from psycopref.evaluation import cases
from psycopref.evaluation.cases import OTHER, Case, battle_margins, case_rows, cases_text, choose_cases, four_answers
from psycopref.evaluation.cases import make_case, score_case
from psycopref.feedback.battles import ORDERS

PRINCIPLE_KEYS = principle_keys()

CHECK = settings(deadline=None, derandomize=True, database=None, max_examples=40)
NAMES = ["verdict", *(f"{key}_verdict" for key in PRINCIPLE_KEYS)]
LABEL = Label("tiny", ("warm & co",), "offline rubric (stand-in)", "1 battle")
HOSTILE = [
    "a | b \\| c \\\\| d",
    "\\end{tabular} \\input{x} {{}} {{ 1 + 1 }} {% if %} {# c #} $x_1^2$ #1 % gone",
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
verdicts = st.lists(st.sampled_from(["win", "loss", "tie"]), min_size=8, max_size=8)


def fought(*battles):
    "Both orders of battles; each order a list of the overall verdict and seven more."
    rows = [(f"s{n}", order, *own) for n, battle in enumerate(battles) for order, own in zip(ORDERS, battle)]
    return pd.DataFrame(rows, columns=["speech_id", "order", *NAMES]).assign(policy="warm", setting="free")


def even(*words):
    "Battles decided alike in both orders and on all principles."
    return fought(*([[word] * 8] * 2 for word in words))


fights = st.lists(st.tuples(verdicts, verdicts), min_size=1, max_size=9).map(lambda battles: fought(*battles))


def hostile_case(said, mine, theirs, name="warm", **scores):
    told = {"overall": "loss", **dict.fromkeys(PRINCIPLE_KEYS, "tie")}
    return Case("loss", "free", (name, "stone"), said, (mine, theirs), told, scores, "rater <b>&|")


def written(form, said, mine, theirs, name="warm"):
    return cases_text(form, [(name, hostile_case(said, mine, theirs, name))], LABEL)


# the rule


@CHECK
@given(fights, st.integers(0, 5), st.integers(0, 99))
def test_the_rule_takes_no_side_and_no_order_of_rows(battles, seed, state):
    chosen = choose_cases(battles, seed)
    swapped = choose_cases(battles.assign(**{name: battles[name].map(OTHER) for name in NAMES}), seed)
    turned = {"largest": "loss", "loss": "largest", "median": "median"}
    assert {turned[rule]: name for rule, name in swapped.items()} == chosen
    mixed = battles.sample(frac=1, random_state=state)
    assert choose_cases(mixed, seed) == chosen
    pd.testing.assert_frame_equal(battle_margins(mixed), battle_margins(battles))


@CHECK
@given(fights)
def test_the_rule_does_what_it_says(battles):
    chosen, margins = choose_cases(battles, 0), battle_margins(battles)
    for name, own in battles.groupby("speech_id"):
        first, second = own.iloc[0], own.iloc[1]
        by_hand = [{"win": 1, "loss": -1, "tie": 0}[first[n]] for n in NAMES[1:] if first[n] == second[n]]
        assert margins.margin[name] == sum(by_hand), "principles won less lost in both orders"
    assert len(set(chosen.values())) == len(chosen)
    for rule, word, best in (("largest", "win", max), ("loss", "loss", min)):
        own = margins[margins.verdict == word].margin
        assert (rule in chosen) == bool(len(own))
        if rule in chosen:
            assert own[chosen[rule]] == best(own)
    left = margins.margin.drop([name for rule, name in chosen.items() if rule != "median"])
    assert ("median" in chosen) == bool(len(left))
    if "median" in chosen:
        far = (left - margins.margin.median()).abs()
        assert far[chosen["median"]] == far.min()


@pytest.mark.parametrize(
    "words, rules",
    [(["win", "win", "tie"], {"largest", "median"}), (["loss"], {"loss"}), (["tie", "tie"], {"median"}), ([], set())],
)
def test_a_rule_that_finds_nothing_is_left_out(words, rules):
    assert set(choose_cases(even(*words), 0)) == rules


def test_equal_battles_are_drawn_by_the_seed():
    assert len({choose_cases(even(*["win"] * 12), seed)["largest"] for seed in range(20)}) > 3


def test_a_battle_of_one_order_is_no_case():
    battles = even("win", "win", "loss")
    assert choose_cases(battles[battles.order == ORDERS[1]], 0) == {}
    alone = battles[~((battles.speech_id == "s2") & (battles.order == ORDERS[0]))]
    assert "loss" not in choose_cases(alone, 0) and set(battle_margins(alone).index) == {"s0", "s1"}


# a case

COLUMNS = ["speech_id", "policy", "setting", "response"]
SAID = [("s0", "warm", "free", "Mine."), ("s0", "warm", "length", "Longer."), ("s0", "reference", "free", "Theirs.")]
ANSWERS = pd.DataFrame([*SAID, ("s0", "cool", "free", "Cool."), ("s1", "warm", "free", "Other.")], columns=COLUMNS)
SPEECHES = pd.DataFrame({"speech_id": ["s0", "s1"], "speech": ["I am tired.", "He left."]})


def made(answers=ANSWERS, setting="free"):
    return make_case("loss", "s0", even("loss", "win").assign(setting=setting), answers, SPEECHES, ("a", "b"))


def test_a_case_has_the_right_answers_and_verdicts():
    case = made()
    assert case.texts == ("Mine.", "Theirs.") and case.speech == "I am tired."
    assert case.verdicts == dict.fromkeys(["overall", *PRINCIPLE_KEYS], "loss")
    longer = pd.DataFrame([("s0", "reference", "length", "Theirs, longer.")], columns=COLUMNS)
    assert made(pd.concat([ANSWERS, longer]), "length").texts == ("Longer.", "Theirs."), "the reference's free answer"


# scores


def test_four_answers_hold_both_sides_first_whatever_the_order():
    dry = pd.DataFrame([("s0", "dry", "free", "Dry."), ("s0", "dry", "length", "Drier.")], columns=COLUMNS)
    own = pd.concat([ANSWERS[ANSWERS.speech_id == "s0"], dry], ignore_index=True)
    for seed in range(5):
        shown = four_answers(own.sample(frac=1, random_state=seed), "warm", "free")
        assert shown.model.tolist() == ["warm, free", "reference", "cool, free", "dry, free"]


def test_fewer_than_four_answers_or_equal_ones_have_no_scores():
    assert four_answers(ANSWERS.iloc[:3], "warm", "free").empty
    assert four_answers(ANSWERS.iloc[:4].assign(response="The same."), "warm", "free").empty
    assert score_case(None, "unasked", "s0", ANSWERS.iloc[:3], SPEECHES, made(), "warm", 0) == {}


BOTH = ["warm, free", "reference"]


@pytest.mark.parametrize(
    "keys, models, kept",
    [([], [], 0), (["empathy", "safety"], BOTH, 2), (["empathy"], ["warm, free", "cool, free"], 0)],
)
def test_a_rater_that_fails_leaves_out_what_it_did_not_rate(monkeypatch, keys, models, kept):
    rated = pd.DataFrame(product(["s0"], keys, models, [4]), columns=["speech_id", "principle", "model", "rating"])
    monkeypatch.setattr(cases, "collect_ratings", lambda *arguments, **keywords: (rated, ["put aside"]))
    scores = score_case(None, "broken", "s0", ANSWERS, SPEECHES, made(), "warm", 0)
    assert scores == dict.fromkeys(keys[:kept], (4, 4))
    shown = replace(made(), scores=scores)
    assert len(case_rows(shown)) == 10 and ("Numbers" in cases.case_note(shown)) == bool(kept)


def test_marks_of_the_two_sides_mirror():
    case = hostile_case("s", "a b", "c", empathy=(4, 2))
    rows = {what: sides for what, *sides in case_rows(case)}
    assert rows["words"] == ["2", "1"] and rows["overall"] == ["worse", "better"]
    assert rows["empathy"] == ["4 (undecided)", "2 (undecided)"] and rows["safety"] == ["undecided", "undecided"]
    assert cases.case_frame(case).shape == (11, 3)


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
ATTRIBUTES = set("class dir lang charset name content".split())


@CHECK
@given(text, text, text, text)
def test_html_shows_any_text_as_text(said, mine, theirs, name):
    reader = Reader()
    reader.feed(written("html", said, mine, theirs, name))
    assert not reader.open and {tag for tag, _ in reader.tags} <= ALLOWED
    assert {name for _, names in reader.tags for name in names} <= ATTRIBUTES
    for value in (said, mine, theirs):
        assert "\n".join(value.splitlines()).replace("\x00", "") in "".join(reader.words).replace("\x00", "")


def test_the_page_says_what_it_is_and_reaches_for_nothing():
    page = written("html", "s", "a", "b")
    assert all(word in page for word in ("never advice to a client", "stand-in", "Machine-written"))
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "No battle was decided" in cases_text("html", [], LABEL)


@CHECK
@given(text, text, text, text)
def test_markdown_keeps_its_table_whatever_the_text(said, mine, theirs, name):
    lines = written("md", said, mine, theirs, name).split("\n")
    table = [line for line in lines if line.startswith("|")]
    cells = [re.sub(r"\\.", "xx", line)[1:-1].split("|") for line in table]  # as GFM: an escape never parts cells
    assert len(table) == 12 and all(line.endswith("|") for line in table) and {len(own) for own in cells} == {3}
    whole = "\n".join(lines).replace("<br>", "")
    assert "<" not in whole and sum(line.startswith(">") for line in lines) == 1
    assert len(lines) == 21 and "stand-in" in whole
    assert not re.search(r"(?<!\\)(?:\\\\)*[`_\[\]]", whole)


COMMANDS = set("begin end centering small textwidth toprule midrule bottomrule multicolumn textbf newline".split())
COMMANDS |= set("caption pm geq kappa alpha rho cdot times to leq S tau varphi".split())


@CHECK
@given(text, text, text, text)
def test_latex_is_balanced_whatever_the_text(said, mine, theirs, name):
    source = written("tex", said, mine, theirs, name)
    bare, depth = re.sub(r"\\textbackslash\{\}|\\text[a-z]+\{\}|\\dots\{\}|\\[&%$#_{}]", "", source), 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    environments = re.findall(r"\\(begin|end)\{([a-z*]+)\}", bare)
    assert environments == list(zip(["begin"] * 2 + ["end"] * 2, ["table*", "tabular", "tabular", "table*"]))
    assert set(re.findall(r"\\([a-zA-Z]+)", bare)) <= COMMANDS
    rows = [line for line in bare.split("\n") if line.endswith(r"\\")]
    assert [line.count("&") for line in rows] == [0, *[2] * 11]
    assert not re.search(r"&\s*\\newline|^\s*\\newline", source, re.M), "no line to end at the head of a cell"
    assert not re.search("[\U0001f000-\U0001ffff\u200b-\u200f\u202a-\u202e\ufe0f\x00-\x08]", source)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_latex_compiles(tmp_path):
    latin = [value for value in HOSTILE if "ש" not in value]
    body = [written("tex", own, own, own, own or "-") for own in latin]
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
    (tmp_path / "a.tex").write_text("\n".join([head, *body, r"\end{document}"]), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
