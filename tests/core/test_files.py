"""Files are whole or absent, say who made them, and come out the same twice."""

import csv
import errno
import html
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusals import one_line

from psycopref.core import files as artifacts
from psycopref.core.files import SCHEMAS, StageReader, StageWriter, atomic_path, read_json, read_rows, sha256_file
from psycopref.core.files import write_json, write_rows
from psycopref.core.stages import Run
from psycopref.core.tables import Label, format_cell, html_table, latex_table, markdown_table, new_figure

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LABEL = Label("tiny", ("a model",), "a rater", "3 rows")
RUN = Run("example")


def score(**changed):
    """One row of the kind `scores`."""
    return {"ID": "a", "prefID": 0, "model": "m", "chosen_score": 1.5, "rejected_score": -0.25} | changed


def write_stage(value=1, name="01_speeches", run=RUN):
    with StageWriter(run, name, "tiny", 0, {}) as stage:
        stage.json("value", {"n": value})
        stage.rows("scores", pd.DataFrame([score(prefID=value)]))


def signed(name="05_reward", run=RUN):
    """What the receipt of a stage names."""
    return set(StageReader(run, name).receipt["outputs"])


# ---- interruptions ----


def test_halves_of_a_killed_stage_are_not_signed_and_the_signed_stage_stays_readable():
    write_stage(1)
    writer = StageWriter(RUN, "01_speeches", "tiny", 0, {}).begin()
    (writer.work / ".scores.parquet.7.partial").write_bytes(b"half of it")  # what a kill inside atomic_path leaves
    reader = StageReader(RUN, "01_speeches")
    assert reader.json("value") == {"n": 1} and reader.rows("scores").prefID.tolist() == [1]
    with StageWriter(RUN, "01_speeches", "tiny", 0, {}) as stage:
        stage.json("other", {"n": 2})
    assert signed("01_speeches") == {"other.json"}


def test_kill_at_any_step_leaves_one_whole_stage_readable(tmp_path):
    code = """
        import json, os, shutil, signal
        from pathlib import Path
        import pandas as pd
        from psycopref.core import files as artifacts
        from psycopref.core.tables import Label
        from psycopref.core.files import StageReader, StageWriter
        from psycopref.core.stages import Run

        artifacts.code_version()  # asks git once, before anything is counted

        def stage(run, n):
            with StageWriter(run, "01_speeches", "tiny", 0, {}) as writer:
                writer.json("value", {"n": n})
                writer.text("value.txt", str(n))
                writer.table("4", "topics", pd.DataFrame({"n": [n]}), "Topics", Label("tiny"))

        def die_before(step):
            left = [step]
            def counted(inner):
                def call(*arguments, **keywords):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return inner(*arguments, **keywords)
                return call
            os.replace, shutil.rmtree, shutil.copy2 = map(counted, (os.replace, shutil.rmtree, shutil.copy2))
            Path.write_text, Path.mkdir, Path.unlink = map(counted, (Path.write_text, Path.mkdir, Path.unlink))

        found = []
        for step in range(200):
            run = Run(f"run-{step}")
            stage(run, 1)
            child = os.fork()
            if child == 0:
                die_before(step)
                stage(run, 2)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            reader = StageReader(run, "01_speeches")
            try:
                found.append([reader.json("value")["n"], int(reader.path("value.txt").read_text())])
            except Exception as error:
                found.append(f"step {step}: {error}")
            if ended == 0:
                break
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, check=True, timeout=300
    )
    out = json.loads(done.stdout)
    assert len(out) > 15, "the steps of a stage were counted"
    assert out[0] == [1, 1] and out[-1] == [2, 2]
    assert [entry for entry in out if entry not in ([1, 1], [2, 2])] == []


def test_an_exception_leaves_no_stage_and_no_tables(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with StageWriter(RUN, "01_speeches", "tiny", 0, {}) as stage:
            stage.rows("scores", pd.DataFrame([score()]))
            stage.table("4", "topics", pd.DataFrame({"n": [1]}), "Topics", LABEL)
            1 / 0
    assert not RUN.stage("01_speeches").exists() and not RUN.tables.exists() and not RUN.figures.exists()
    assert not list(tmp_path.rglob("receipt.json"))
    assert "01_speeches" in one_line(lambda: StageReader(RUN, "01_speeches").rows("scores"))


def interrupted(seed, settings, inputs):
    with pytest.raises(KeyboardInterrupt):
        with StageWriter(RUN, "05_reward", "tiny", seed, settings, inputs) as stage:
            stage.json("abandoned", {"n": 1})
            (stage.work / "scratch").mkdir(exist_ok=True)
            (stage.work / "scratch" / "step-7").write_text("half way")
            raise KeyboardInterrupt


@pytest.mark.parametrize("changed", ["settings", "seed", "input", None])
def test_scratch_is_continued_by_the_same_run_alone_and_never_signed(tmp_path, changed):
    source = write_json(tmp_path / "source.json", 1)
    interrupted(0, {"epochs": 1}, [source])
    write_json(source, 2 if changed == "input" else 1)
    with StageWriter(
        RUN, "05_reward", "tiny", changed == "seed", {"epochs": 1 + (changed == "settings")}, [source]
    ) as stage:
        assert (stage.work / "scratch" / "step-7").exists() == (changed is None)
        stage.json("value", {"n": 2})
    assert signed() == {"value.json"} | ({"abandoned.json"} if changed is None else set())
    assert not (RUN.stage("05_reward") / "scratch").exists()


def test_a_project_below_a_folder_named_scratch_can_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCOPREF_ROOT", str(tmp_path / "scratch" / "somebody"))
    write_stage(3)
    assert StageReader(RUN, "01_speeches").json("value") == {"n": 3}


def test_a_second_run_replaces_the_first_whole():
    with StageWriter(RUN, "01_speeches", "tiny", 0, {}) as stage:
        stage.json("first", 1)
    with StageWriter(RUN, "01_speeches", "tiny", 1, {}) as stage:
        stage.json("second", 2)
    reader = StageReader(RUN, "01_speeches")
    assert reader.json("second") == 2 and reader.receipt["seed"] == 1 and signed("01_speeches") == {"second.json"}
    assert not (reader.folder / "first.json").exists() and "first.json" in one_line(lambda: reader.json("first"))
    assert [p.name for p in RUN.outputs.iterdir() if p.name.startswith("01")] == ["01_speeches"]


# ---- a full disk ----


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    old_json = write_json(tmp_path / "a.json", {"n": 1})
    old_rows = write_rows(tmp_path / "a.parquet", "scores", pd.DataFrame([score()]))
    before = sha256_file(old_json), sha256_file(old_rows)
    real = Path.write_text

    def half(self, text, **keywords):
        real(self, text[: len(text) // 2], **keywords)
        full()

    for target, name, fake in ((Path, "write_text", half), (artifacts.os, "replace", full)):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, fake)
            patched.setattr(pq.ParquetWriter, "write_table", full)
            assert "disk is full" in one_line(lambda: write_json(old_json, {"n": 2}))
            new = pd.DataFrame([score(ID="b")])
            assert "disk is full" in one_line(lambda: write_rows(old_rows, "scores", new))
        assert (sha256_file(old_json), sha256_file(old_rows)) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.parquet"]


def test_another_system_error_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError):
        with atomic_path(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "denied")


def test_a_disk_that_fills_in_a_table_or_a_figure_is_one_line(monkeypatch):
    write_stage(1)
    frame, (figure, _) = pd.DataFrame({"n": [1]}), new_figure()
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    monkeypatch.setattr(type(figure), "savefig", full)
    for act in (lambda s: s.table("4", "t", frame, "T", LABEL), lambda s: s.figure("4", "f", figure, "F", LABEL)):

        def stage(act=act):
            with StageWriter(RUN, "01_speeches", "tiny", 0, {}) as writer:
                act(writer)

        one_line(stage)
        assert StageReader(RUN, "01_speeches").json("value") == {"n": 1}


# ---- bad files ----


def test_every_kind_of_bad_file_is_one_line(tmp_path):
    write_stage()
    folder = RUN.stage("01_speeches")
    good = (folder / "scores.parquet").read_bytes()
    bad_rows = [b"", b"PAR1", good[:-1], good[: len(good) // 2], good[:100] + b"\0" * (len(good) - 100)]
    bad_rows += [b"PAR1" + b"x" * 64 + b"PAR1", b"a,b\n1,2\n"]
    for i, content in enumerate(bad_rows):
        (path := tmp_path / f"{i}.parquet").write_bytes(content)
        assert path.name in one_line(lambda: read_rows(path, "scores"))
    whole = (folder / "receipt.json").read_text()
    for i, text in enumerate(["", whole[: len(whole) // 2], "{", whole.replace("{", "", 1), "\x00"]):
        (path := tmp_path / f"{i}.json").write_text(text)
        assert path.name in one_line(lambda: read_json(path))
    (tmp_path / "latin.json").write_bytes(b'"caf\xe9"')
    for name in ("latin.json", "absent.json"):
        assert name in one_line(lambda: read_json(tmp_path / name))
    assert "absent.parquet" in one_line(lambda: read_rows(tmp_path / "absent.parquet", "scores"))
    assert "speeches" in one_line(lambda: read_rows(folder / "scores.parquet", "speeches")), "rows of another kind"


def test_what_is_not_as_it_was_signed_is_refused():
    write_stage()
    folder = RUN.stage("01_speeches")
    content = bytearray((folder / "scores.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "scores.parquet").write_bytes(content)
    assert "changed" in one_line(lambda: StageReader(RUN, "01_speeches").rows("scores")), "a flipped byte"

    def said(name, stage="01_speeches"):
        return one_line(lambda: StageReader(RUN, stage).json(name))

    (folder / "extra.json").write_text("{}")
    assert "extra.json" in said("extra"), "a file that nobody signed"
    (folder / "value.json").unlink()
    assert "value.json" in said("value"), "a signed file that is gone"
    receipt = folder / "receipt.json"
    receipt.write_text(receipt.read_text()[:-20])
    assert "receipt.json" in said("value"), "a truncated receipt"
    receipt.unlink()
    assert "receipt.json" in said("value") and "02_responses" in said("value", "02_responses")


WRONG = [{"prefID": value} for value in (None, "3", 1.5, 2**70)] + [{"ID": value} for value in (3, None, b"\xff")]
WRONG += [{"chosen_score": float("nan")}, {"chosen_score": "high"}, {"chosen_score": True}, {"extra": 1}]


@pytest.mark.parametrize("changed", WRONG)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, changed):
    path, frame = tmp_path / "a.parquet", pd.DataFrame([score(**changed)])
    assert "a.parquet" in one_line(lambda: write_rows(path, "scores", frame))
    less = pd.DataFrame([score()]).drop(columns="rejected_score")
    assert "rejected_score" in one_line(lambda: write_rows(path, "scores", less))
    assert list(tmp_path.iterdir()) == []


# ---- receipts ----


def test_a_receipt_tells_inputs_outputs_and_settings(tmp_path):
    source = write_json(tmp_path / "source.json", [1])
    with StageWriter(RUN, "02_responses", "demo", 5, {"responses": {"pool": "demo"}}, [source], {"calls": 3}) as stage:
        path = stage.json("value", [2])
        outputs = {"value.json": sha256_file(path)}
    receipt = StageReader(RUN, "02_responses").receipt
    expected = dict(stage="02_responses", run="example", profile="demo", seed=5, calls=3, outputs=outputs)
    expected |= dict(settings={"responses": {"pool": "demo"}}, inputs={"source.json": sha256_file(source)})
    assert {key: receipt[key] for key in expected} == expected and receipt["versions"]["pandas"] == pd.__version__


# ---- rows ----

VALUES = {"str": st.text(max_size=30), "int": st.integers(-(2**63), 2**63 - 1), "float": st.floats(allow_nan=False)}
VALUES["bool"] = st.booleans()


def rows_of(kind):
    return st.lists(st.fixed_dictionaries({name: VALUES[type_] for name, type_ in SCHEMAS[kind].items()}), max_size=6)


@few
@given(st.sampled_from(sorted(SCHEMAS)).flatmap(lambda kind: st.tuples(st.just(kind), rows_of(kind))), st.randoms())
def test_rows_come_back_as_they_were_and_the_bytes_are_the_same(tmp_path_factory, drawn, shuffler):
    (kind, rows), folder = drawn, tmp_path_factory.mktemp("rows")
    frame = pd.DataFrame(rows, columns=list(SCHEMAS[kind]))
    columns = list(frame.columns)
    shuffler.shuffle(columns)
    first = write_rows(folder / "a.parquet", kind, frame)
    again = write_rows(folder / "b.parquet", kind, frame[columns].set_index(pd.Index(range(5, 5 + len(frame)))))
    assert first.read_bytes() == again.read_bytes(), "neither the order of columns nor the index counts"
    found = read_rows(first, kind)
    assert list(found.columns) == list(SCHEMAS[kind]) and found.to_dict("records") == rows
    assert write_rows(folder / "c.parquet", kind, found).read_bytes() == first.read_bytes()


def test_a_frame_that_does_not_fit_leaves_the_rows_as_they_were(tmp_path):
    good = pd.DataFrame([score()])
    path = write_rows(tmp_path / "a.parquet", "scores", (good.assign(prefID=n) for n in range(3)))
    before = path.read_bytes()
    assert read_rows(path, "scores").prefID.tolist() == [0, 1, 2], "frame by frame"
    for bad in (good.assign(ID=None), good.assign(age=3)):
        assert "a.parquet" in one_line(lambda: write_rows(path, "scores", iter([good, good, bad])))
    with pytest.raises(ZeroDivisionError):
        write_rows(path, "scores", (good.assign(ID=str(1 // n)) for n in (1, 0)))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


# ---- tables ----

NASTY = 'a&b %$#_{}~^\\ "x" <i>&amp; | 5 ± 2 ≥ 1 · —'
SPECIAL_TEX = {"\\" + sign: sign for sign in "&%$#_{}"} | {"---": "—", r"$\pm$": "±", r"$\geq$": "≥", r"$\cdot$": "·"}
SPECIAL_TEX |= {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^"}
SPECIAL_TEX |= {r"\textless{}": "<", r"\textgreater{}": ">"}


def read_tex(text: str) -> str:
    """Undo the escapes of a LaTeX cell; a raw special character is an error."""
    found, i = [], 0
    while i < len(text):
        token = next((t for t in SPECIAL_TEX if text.startswith(t, i)), text[i])
        assert token in SPECIAL_TEX or token not in "&%$#_{}~^\\", f"raw {token!r} in {text!r}"
        found.append(SPECIAL_TEX.get(token, token))
        i += len(token)
    return "".join(found)


def read_html(page: str) -> tuple[list[str], set[str]]:
    """Return the texts of all cells and the tags of a page, which must be well-formed."""
    tree = ElementTree.fromstring(f"<page>{page.replace('<br>', '<br/>')}</page>")
    for line_break in tree.iter("br"):
        line_break.text = "\n"
    cells = ["".join(cell.itertext()) for cell in tree.iter() if cell.tag in ("td", "th")]
    return cells, {node.tag for node in tree.iter()} - {"page"}


cell_text = st.text(st.sampled_from(list("&%$#_{}~^\\—±≥·<>\"'|a1 ;é")), min_size=1, max_size=20)


@few
@given(cell_text, cell_text)
def test_latex_cells_read_back(first, second):
    body = latex_table(pd.DataFrame({"x": [first], "y": [second]}), "C", LABEL).splitlines()[6]
    assert body.endswith(r" \\")
    cells = re.split(r"(?<!\\) & ", body[:-3])
    if first.strip() == first and second.strip() == second and "& " not in first + second:
        assert [read_tex(c) for c in cells] == [first, second]


@few
@given(cell_text, cell_text)
def test_html_cells_read_back_and_bring_no_tags(first, second):
    cells, tags = read_html(html_table(pd.DataFrame({first: [second], "n": ["x\ny"]}), first, Label(second)))
    assert cells == [first, "n", second, "x\ny"]
    assert tags == {"h3", "div", "table", "thead", "tbody", "tr", "th", "td", "br", "p"}


@few
@given(cell_text.filter(lambda t: "\\" not in t and t.strip() == t), st.integers(1, 4))
def test_markdown_rows_keep_their_columns(text, rows):
    lines = markdown_table(pd.DataFrame({"a|b": [text] * rows, "c": ["line\nline"] * rows})).splitlines()
    assert len(lines) == rows + 2
    for line in lines[2:]:
        cells = re.split(r"(?<!\\)\|", line.strip("\n"))
        plain = [re.sub(r"\\([|*])", r"\1", c.strip()).replace("&lt;", "<") for c in cells]
        assert plain == ["", text, "line<br>line", ""]


def test_a_table_stands_in_five_forms_and_every_form_names_its_makers():
    frame = pd.DataFrame({NASTY: [NASTY, None], "accuracy": [0.8125, None], "n": [3, 4]})
    with StageWriter(RUN, "05_reward", "tiny", 0, {}) as stage:
        stage.table("1", "reward", frame, NASTY, LABEL)
    files = {p.suffix: p for p in RUN.tables.iterdir()}
    assert {p.name for p in files.values()} == {f"table_1_reward.{form}" for form in "csv md tex html json".split()}
    kept = {p.name: sha256_file(p) for p in (RUN.stage("05_reward") / "tables").iterdir()}
    assert kept == {p.name: sha256_file(p) for p in files.values()}, "the copy for the reader is the signed one"
    with open(files[".csv"], newline="", encoding="utf-8") as handle:
        assert list(csv.reader(handle)) == [[NASTY, "accuracy", "n"], [NASTY, "0.8125", "3"], ["", "", "4"]]
    described = {"number": "1", "slug": "reward", "caption": NASTY, "label": str(LABEL)}
    assert json.loads(files[".json"].read_text()) == described
    tex, page, md = (files[s].read_text(encoding="utf-8") for s in (".tex", ".html", ".md"))
    assert tex.splitlines()[6].split(" & ")[-2:] == ["0.812", r"3 \\"]
    assert r"a\&b \%\$\#\_\{\}\textasciitilde{}\textasciicircum{}" in tex
    assert read_tex(tex.split(r"\caption{")[1].split("}\n\\end{table")[0]) == f"{NASTY}. {LABEL}"
    assert html.escape(NASTY) in page and "<i>" not in page and "&amp;amp;" in page
    assert str(LABEL) in page and str(LABEL) in md and NASTY in md


SHOWN = [(None, "—"), (0.0, "0.0"), (9.2, "9.2"), (0.0312, "0.031"), (9.9994, "9.999"), (-12.34, "-12.3"), (0, "0")]
SHOWN += [(1234, "1234"), ("0.5", "0.5"), (True, "True"), (float("inf"), "inf"), (float("nan"), "—")]


@pytest.mark.parametrize("value, shown", SHOWN)
def test_cells(value, shown):
    assert format_cell(value) == shown


def test_an_empty_table_has_a_head():
    frame = pd.DataFrame({"a": [], "b": []})
    assert markdown_table(frame) == "| a | b |\n| --- | --- |"
    assert read_html(html_table(frame, "C", LABEL))[0] == ["a", "b"] and "a & b" in latex_table(frame, "C", LABEL)


# ---- figures ----


def test_two_equal_figures_have_equal_bytes_and_carry_their_label(monkeypatch):
    for name, clock in (("first", "1000000000"), ("second", "1700000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", clock)  # what a renderer takes for now
        figure, axes = new_figure()
        axes.plot([0, 1, 2], [1.0, 0.5, 0.75], label="win rate")
        axes.set(xlabel="step", ylabel="win rate (%)")
        axes.legend()
        with StageWriter(Run(name), "08_ablations", "tiny", 0, {}) as stage:
            stage.figure("4", "curve", figure, "Fig. 4", LABEL)
        assert " ".join(text.get_text() for text in figure.texts).replace("\n", " ") == str(LABEL)
        assert read_json(Run(name).figures / "fig_4_curve.json")["label"] == str(LABEL)
    for suffix in ("png", "pdf", "json"):
        first, second = ((Run(n).figures / f"fig_4_curve.{suffix}").read_bytes() for n in ("first", "second"))
        assert first == second and len(first) > 50
    first, second = (signed("08_ablations", Run(name)) for name in ("first", "second"))
    assert first == second == {f"figures/fig_4_curve.{suffix}" for suffix in ("json", "pdf", "png")}
