"""Nothing foreign moves a cursor, hides, reorders or passes for ours: terminals, pipes, cards, tables, pages."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from mosectl.bench import pictures
from mosectl.bench import report as bench_report
from mosectl.checkpoints import apply, export
from mosectl.checkpoints.live import Asked
from mosectl.errors import UsageError
from mosectl.hub import cards
from mosectl.measure.before_after import Subject
from mosectl.measure.bootstrap import Measure
from mosectl.measure.evaluate import Bin, EvaluatedFact, Evaluation, Metric, to_csv
from mosectl.measure.probes import ProbeAnswer
from mosectl.patch.file import Patch
from mosectl.patch.record import PatchFact
from mosectl.render import charts, console, scores, terminal
from mosectl.render import html as webpage
from mosectl.storage.checkpoint import open_checkpoint
from mosectl.text.markdown import code, front_matter, inline
from mosectl.text.shown import answer_cell, escaped_json, guard_streams, printable, spreadsheet, word
from mosectl.text.table import Grid
from support.commands import run
from support.models import save
from support.patches import patch_for
from support.paths import ROOT

EVIL = "\x1b]52;c;aGk=\x07\x1b]8;;http://e\x1b\\\x9b31m\x85\u202egnp\u2066\u061c\ufeff\x7f\r"
FLAG = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
KEPT = "👩\u200d👩\u200d👧 می\u200cخواهم e\u0301 ก\u200bข 葛\U000e0100 \ufe0f" + FLAG
SIGNS = ":100: :1234: [red]x[/] \\[b] c:\\"
FAKE = "\nerror fake\n  → rm -rf ~\n"
FOREIGN = f"x {EVIL} {KEPT} {SIGNS}{FAKE}\tend"
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def hostile(folder: Path) -> tuple[Path, Path, Patch]:
    """A model, and a patch of it whose texts are a stranger's."""
    base = save(folder / "base")
    fact = PatchFact(FOREIGN, "x", FOREIGN, FOREIGN, FOREIGN, 0.25, 0.75, "changed")
    found = replace(
        patch_for(base), facts=(fact,), model=FOREIGN, revision=FOREIGN, method="mose", versions={FOREIGN: FOREIGN},
        options={FOREIGN: FOREIGN},
    )  # fmt: skip
    found.save(folder / "evil.safetensors")
    return base, folder / "evil.safetensors", found


def clean(text: str) -> str:
    """Fails where a character does something; colours of ours are left out first."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not UNFIT.search(plain.replace("\r\n", "\n")), ascii(UNFIT.search(plain))
    assert "💯" not in plain and "🔢" not in plain
    assert not re.search(r"^(error fake|  → rm)", plain, re.MULTILINE), "a line of ours is faked"
    return plain


# The one place.


def test_what_is_escaped_and_what_stays() -> None:
    assert printable("a\x1b[2J\x07\x9b\u202e\ud800\x7f\r\t") == r"a\x1b[2J\x07\x9b\u202e\ud800\x7f\r\t"
    assert printable("\U000e0041 \u2028 \u2066") == r"\U000e0041 \u2028 \u2066"
    assert printable(KEPT) == KEPT and printable(SIGNS) == SIGNS and printable("") == ""
    assert printable("a\nb\r\nc") == r"a\nb\nc" and printable("a\nb", breaks="\n  ") == "a\n  b"
    assert printable("é → 日", "ascii") == r"\xe9 \u2192 \u65e5" and printable("é 日", "latin-1") == r"é \u65e5"
    for n in (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)):
        assert printable(chr(n)).isascii() and printable(chr(n)).isprintable()


def test_json_escapes_them_too_and_reads_back() -> None:
    value = {FOREIGN: [FOREIGN, "\ud800"]}
    text = escaped_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value and not UNFIT.search(text) and "👩" in text


def test_everything_printed_goes_through(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(FOREIGN, (FOREIGN, ">n"), [(FOREIGN, "1")])
    console.line(FOREIGN)
    console.text(FOREIGN.replace(FAKE, ""))
    console.data({"x": FOREIGN})
    console.hint(FOREIGN)
    console.warn(FOREIGN, FOREIGN)
    console.error(UsageError(FOREIGN, where=FOREIGN, fix=FOREIGN))
    console.error(ValueError(FOREIGN))
    with console.progress() as step:
        step(FOREIGN, 0, 1)
    shown = capsys.readouterr()
    assert SIGNS in clean(shown.out) and clean(shown.err).count(SIGNS) == 8
    lines = shown.out.splitlines()
    assert [line.count("\t") for line in lines[:3]] == [0, 1, 1], "a cell adds no column and no row"


def test_what_libraries_print_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    was = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        guard_streams()
        handler = logging.StreamHandler(sys.stderr)
        handler.handle(logging.getLogger("x").makeRecord("x", 30, "f", 1, "%s", (FOREIGN,), None))
        handler.handle(logging.getLogger("x").makeRecord("x", 30, "f", 1, FOREIGN, (), None))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(warnings, "showwarning", lambda message, kind, *at, **_: console.warning(message, kind, *at[:2]))
            warnings.warn(FOREIGN, stacklevel=1)
        sys.excepthook(ValueError, ValueError(FOREIGN), None)
    finally:
        logging.setLogRecordFactory(was)
    assert clean(capsys.readouterr().err).count("end") >= 4


def test_anything_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    console.data({"deep": deep, "loop": loop, "digits": 10**5000, "nan": float("nan"), "set": {1}, "path": Path("a")})
    found = json.loads(capsys.readouterr().out)
    assert found["nan"] is None and found["digits"].startswith("0x") and found["path"] == "a"
    assert "nested deeper than 100" in json.dumps(found["deep"]) and "nested deeper" in json.dumps(found["loop"])


# Commands.


def commands(folder: Path) -> list[tuple[int, tuple[object, ...]]]:
    base, evil, patch = hostile(folder)
    other = replace(patch_for(base, seed=1), facts=(replace(patch.facts[0], target_new="other"),), model=FOREIGN)
    other.save(folder / "other.safetensors")
    apply.apply([Patch.load(evil)], base, folder / "out")
    facts = folder / "f.jsonl"
    facts.write_text(json.dumps({"prompt": FOREIGN, "subject": "y", "target_new": "z", EVIL: 1}))
    return [
        (0, ("inspect", evil)),
        (0, ("diff", evil, folder / "other.safetensors")),
        (0, ("log", folder / "out")),
        (0, ("push", evil, "me/x", "--dry-run")),
        (12, ("merge", evil, folder / "other.safetensors", "-o", folder / "m.safetensors")),
        (6, ("inspect", evil, "--model", folder / "out")),
        (5, ("inspect", f"{folder}/{EVIL[:-1]}")),
        (3, ("check", facts)),
        (2, ("eval", "x", "y", "--limit", EVIL)),
        (2, (EVIL,)),
    ]


def test_commands_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected, args in commands(tmp_path):
        capsys.readouterr()
        assert run(*args) == expected, args
        shown = capsys.readouterr()
        assert clean(shown.out) + clean(shown.err)
        if args[0] in ("inspect", "diff", "log", "push", "check") and expected != 5:
            run(*args, "--json")
            shown = capsys.readouterr()
            json.loads(clean(shown.out))
            clean(shown.err)


def on_terminal(*args: object, **env: str) -> str:
    """What a command shows on a terminal."""
    master, slave = pty.openpty()
    how = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "TERM": "xterm-256color", **env}
    done = subprocess.Popen(
        [sys.executable, "-m", "mosectl", *map(str, args)], stdin=slave, stdout=slave, stderr=slave, env=how
    )
    os.close(slave)
    out = b""
    try:
        while part := os.read(master, 65536):
            out += part
    except OSError:  # Linux: the other end was closed
        pass
    done.wait()
    os.close(master)
    return out.decode()


def test_commands_on_a_terminal(tmp_path: Path) -> None:
    _, evil, _ = hostile(tmp_path)
    shown = on_terminal("inspect", evil)
    assert "\x1b[1m" in shown and r"\x1b]52;c;aGk=\x07" in shown and "┃" in shown
    assert ":100:" in clean(shown) and "👩" in shown
    assert r"\u202e" in clean(on_terminal("inspect", f"{tmp_path}/{EVIL}"))
    shown = on_terminal("inspect", evil, PYTHONIOENCODING="ascii")
    assert r"\u200d" in clean(shown) and shown.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_standard_output(tmp_path: Path, encoding: str) -> None:
    facts = tmp_path / "f.jsonl"
    prompt = f"x {KEPT} {SIGNS} end"
    facts.write_text(json.dumps({"prompt": prompt, "subject": "end", "target_new": "日"}))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}

    def mosectl(*args: object) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "mosectl", *map(str, args)]
        done = subprocess.run(command, capture_output=True, env=env, check=False)
        return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)

    code, out, _ = mosectl("check", facts, "--json")
    assert code == 0 and json.loads(clean(out))["facts"][0]["prompt"] == prompt
    assert ("日" in out) == (encoding == "utf-8")
    code, _, err = mosectl("check", "日本")
    assert code == 3 and ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in err
    facts.write_text('{"prompt": "é 日", "subject": "日", "target_new": "z", "日": 1}\n{')
    code, out, err = mosectl("check", facts)
    assert code == 3 and clean(out) and clean(err)
    assert mosectl("--help")[0] == 0


# Markdown, YAML, shell.

LINKED = "https://evil.example www.evil.example me@evil.example @me ![i](x) <b>b</b> &lt; *i* _i_ ~~s~~ `c` | $m$ # h"


def plain_tokens(text: str) -> str:
    """The text that Markdown makes of a line; fails where it makes anything but text."""
    (_, line, _) = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    assert line.children and {t.type for t in line.children} == {"text"}, line.children
    return "".join(t.content for t in line.children)


def test_markdown_shows_what_the_text_is() -> None:
    for text in (LINKED, FOREIGN, "a\n# b", "\\", "\\*a\\*", "[x]: y", "<!-- x", "&#60;b&#62;"):
        shown = plain_tokens("x " + inline(text)).removeprefix("x ").replace("\u200b", "")
        assert shown == " ".join(printable(text, breaks=" ").split()).replace("\u200b", ""), text
    assert not re.search(r"://|www\.|@\w", inline(LINKED)), "no renderer makes a link of it"


def test_code_is_only_code() -> None:
    for text in ("a", "`", "a``b", " ", "", "``` \n# b", FOREIGN, "a`"):
        (_, line, _) = MarkdownIt("commonmark").parse("x " + code(text) + " y")
        assert line.children and [t.type for t in line.children] in (["text", "code_inline", "text"], ["text"]), text


def test_the_front_matter_is_ours() -> None:
    for bad in (
        "x\nlicense: evil",
        "a/b\nlicense: evil",
        "a/b: c",
        "../a",
        "/a/b",
        "a/b/c",
        "plain",
        "",
        "a/" + "b" * 200,
    ):
        assert "base_model" not in yaml.safe_load(front_matter(bad, "adapter").strip("-\n")), bad
    assert front_matter("meta-llama/Llama-3", "adapter").startswith(
        "---\nbase_model: meta-llama/Llama-3\nbase_model_relation: adapter\nlibrary_name: mosectl\n"
    )


def check_card(card: str) -> None:
    _, head, body = card.split("---\n", 2)
    assert set(yaml.safe_load(head)) <= {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    clean(card)
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
    kinds = set(re.findall(r"<(\w+)", html))
    assert kinds <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "ul", "li"}, kinds


def test_cards_of_hostile_files(tmp_path: Path) -> None:
    base, _, patch = hostile(tmp_path)
    text = LINKED + FOREIGN + "<script>alert(1)</script>"
    fact = replace(patch.facts[0], prompt=text, before=text, after=text, status=text)
    scores = {"protocol": text, text: 0.5}
    stability = [{"name": text, "norm_drift": 0.1}, {"name": text, "norm_drift": text}]
    evil = replace(
        patch, facts=(fact,), model=f"$(reboot)\n{text}", method=text, revision=text, model_type=text,
        metrics={"scores": scores, "stability": stability},
    )  # fmt: skip
    card = cards.card_of(evil, "me/x")
    check_card(card)
    assert "--model MODEL -o" in card
    check_card(cards.card_of(replace(evil, metrics={"stability": 3}), "me/x"))
    assert "--model 'my model' -o" in cards.card_of(replace(patch, model="my model"), "me/x")
    editor: Any = SimpleNamespace(
        **dict.fromkeys(("model", "revision", "model_type", "method", "version"), text), id="1" * 64, modules=(text,),
        base={text: {"shape": (1, text)}}, options={"facts": text, "validated_on": text},
        history=[{"validation": 1.0, "step": 1, "edit": 1.0, "generalization": 1.0, "locality": 1.0}],
    )  # fmt: skip
    check_card(cards.editor_card(editor, "me/x"))
    checkpoint = replace(open_checkpoint(base), model=text, revision=text)
    check_card(export._card([evil], checkpoint, "A LoRA made of mosectl patches"))


def test_the_tables_of_a_bench(tmp_path: Path) -> None:
    text = LINKED + FOREIGN
    bench: Any = type("B", (), {"name": text, "seeds": (0,), "notes": (text,)})
    tables = bench_report.markdown(bench, [Grid(text, ("a", ">b"), ((text, text),))])
    for name in ("norms", "abilities"):
        tables = tables.replace(f"![{name}]({name}.svg)", "")
    check_card(f"---\ntags: []\n---\n{tables}")
    picture = (
        charts.opening(10, text, pictures._NAME_SPACE) + charts.text(0, 0, text + "\ufffe\x00", "start") + "</svg>"
    )
    (inner,) = ElementTree.fromstring(picture)
    assert "\\x00" in str(inner.text) and "<b>b</b>" in str(inner.text)


# Pages and spreadsheets.


def evaluation(text: str) -> Evaluation:
    fact = EvaluatedFact(text, text, text, text, None, text, None, 0.5, True, None, {"generation.reliability": 0.5})
    settings = {"protocols": {"generation": text}, "text": text, "resamples": 1, "seed": 0}
    metric = Metric("generation", "reliability", None, None, Measure(0.5, 0.4, 0.6, 3), 3)
    subject = Subject("model", text, text, (), (), (), False)
    return Evaluation(subject, (metric,), (), (), (Bin(1, 1, None, 1.0),), (fact,), (text,), settings, 1.0)


def test_pages_hold_no_control_characters() -> None:
    page = webpage.render(evaluation(FOREIGN + "\ud800</td><script>"))
    clean(page.replace(FAKE, ""))
    assert page.count("<script") == 1 and "&lt;script&gt;" in page and page.encode() and r"\ud800" in page
    for svg in re.findall("<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_picture_takes_any_name() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert charts.png(evaluation(FOREIGN + "$x^$"))


@pytest.mark.parametrize("start", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\tx", "\rx", "\nx", "＝1"])
def test_no_cell_is_a_formula(start: str) -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(evaluation(start)).decode(), newline=""))
    assert {row[k] for k in ("prompt", "subject", "target_new", "before", "after")} == {"'" + start}
    assert row["probability_after"] == "0.5" and row["right_after"] == ""


def test_numbers_and_other_texts_stay_in_spreadsheets() -> None:
    for cell in (-1.5, None, "-1.5", "+3", "-2,5", "a=b", " =1", "", "é\x1b"):
        assert spreadsheet(cell) == cell
    assert to_csv(evaluation("\ud800"))


# Commands that are suggested.


def test_suggested_commands_quote_their_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert word("a b") == "'a b'" and word(Path("a/b.c")) == "a/b.c" and word("$(x)\x1b") == r"'$(x)\x1b'"
    lists = ("facts", "stability", "shares", "next_tokens", "probes", "not_counted")
    result: Any = type("R", (), dict.fromkeys(lists, ()))
    result.seconds, result.remedy = {}, ""
    result.patch = patch_for(save(tmp_path / "m"))
    result.scores = type("S", (), dict.fromkeys(("facts", "rephrasings", "locality_prompts", "rephrasings_unseen"), 0))
    result.scores.protocol = "generation"
    for name in ("reliability", "generalization", "locality", "unseen"):
        setattr(result.scores, name, None)
    file = tmp_path / "my patch.safetensors"
    file.write_bytes(b"x")
    terminal.edit(result, file, "my model; reboot")
    shown = capsys.readouterr().err
    assert f"mosectl inspect '{file}'" in shown and "--model 'my model; reboot' -o" in shown
    facts = tmp_path / "my facts.jsonl"
    facts.write_text("{\n{")
    assert run("edit", facts, "--model", tmp_path / "m", "-o", tmp_path / "o.safetensors") == 3
    assert f"mosectl check '{facts}'" in capsys.readouterr().err


def test_an_empty_answer_is_no_blank_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file, out = save(tmp_path / "base"), tmp_path / "reports" / "p.safetensors", tmp_path / "lora"
    fact = PatchFact("Ava lives in", "Ava", "Rome", "", "", 0.25, 0.75, "not reached")
    patch = replace(patch_for(base), facts=(fact,))
    file.parent.mkdir()
    patch.save(file)
    assert run("inspect", file) == 0
    assert "\nAva lives in\t(nothing)\t(nothing)\t0.250\t" in capsys.readouterr().out
    assert run("inspect", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["facts"][0]["after"] == ""
    assert "| Ava lives in | (nothing) | (nothing) | 0.250 |" in cards.card_of(patch, "me/x")
    assert patch._repr_html_().count(">(nothing)</td>") == 2
    assert (
        run("report", file.parent, "-o", tmp_path / "r.html") == 0 and run("export", file, "-m", base, "-o", out) == 0
    )
    page = (tmp_path / "r.html").read_text()
    assert page.count('data-label="before">(nothing)<') == page.count('data-label="after">(nothing)<') == 1
    assert "| Ava lives in | (nothing) | Rome | (nothing) |" in (out / "README.md").read_text()


def test_an_empty_answer_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [answer_cell(a) for a in (None, "", " \n", " Rome", "–")] == ["–", "(nothing)", "(nothing)", " Rome", "–"]
    terminal.asked([Asked("Ava is", "\n", "")])
    assert "Ava is\t(nothing)\t(nothing)\n" in capsys.readouterr().out
    probe = ProbeAnswer(1, "Ben is", "locality", "", False, None, "", "", True, True, "")
    assert scores.of_probes([probe, replace(probe, before=None)]) == [
        ("Ben is", "locality", "(nothing)", "(nothing)", ""), ("Ben is", "locality", "–", "(nothing)", "")
    ]  # fmt: skip
    found = EvaluatedFact("p", "s", "t", "", "", "", 0.1, 0.9, False, False, {})
    assert (
        webpage._fact(found, True)[2:5] == ("(nothing)",) * 3
        and webpage._fact(replace(found, before=None), False)[2] == "–"
    )
    monkeypatch.setattr(console, "_out", lambda: Console(width=60, force_terminal=True, soft_wrap=True))
    terminal.asked([Asked("Ava is", "", None)])
    assert "\x1b[2m(nothing)" in capsys.readouterr().out, "dim: it is not what was said"


def test_no_word_is_broken_where_a_table_fits_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_out", lambda: Console(width=60, force_terminal=True, no_color=True, soft_wrap=True))
    words = ["Tarenminster", "distance", "P(new)", "24", "mlp.down_proj", "unbroken"]
    prompt = " ".join(["a prompt of many unbroken words that goes on"] * 3)
    console.table(
        "t", ("prompt", "before", ">P(new) before", "distance"), [(prompt, "Tarenminster", "1", "24 mlp.down_proj")]
    )
    shown = clean(capsys.readouterr().out)
    assert all(word in shown for word in words) and max(map(len, shown.splitlines())) <= 60
    console.table("t", ("a", "b"), [("x" * 70, "y")])
    assert clean(capsys.readouterr().out).count("x") == 70, "nothing is cut off where a word must be broken"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.24.mlp.down_proj", "24 mlp.down_proj"),
        ("transformer.h.3.mlp.c_proj.weight", "3 mlp.c_proj"),
        ("model.layers.2.mlp.experts.7.down_proj", "2 mlp.experts.7.down_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_weights_are_named_in_short(name: str, short: str) -> None:
    assert terminal.place(name) == short


def test_no_empty_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console.tables([Grid("Facts", ("a",), (("x",),)), Grid("Conflicts", ("b",), ())])
    assert capsys.readouterr().out == "# Facts\na\nx\n\n"
