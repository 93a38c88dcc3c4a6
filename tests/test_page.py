"""The page of an experiment: whole without any other file, its tables those of `eval`, and fit for a desktop and a phone."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli, commands

from intrinsic_prompt_tuning.page import PAGE

SHORT = ("--steps", 4, "--evaluations", 2)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def finished(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    """Return a page, and a way to run commands on the cache that it is of: all tasks of a split but one were done."""
    folder = tmp_path_factory.mktemp("finished")
    split = folder / "<b> & co.yaml"
    split.write_text("{seen: [mood-good, animal-class, count-next, thing-plural], unseen: [even-or-good]}", encoding="utf-8")
    cli = commands(*shared_options, "--cache", folder / "cache", "--split", split)

    assert cli("collect", *SHORT).code == 0
    assert cli("fit-subspace", "--dim", 4, "--subspace-steps", 3).code == 0
    assert cli("tune", *SHORT, "--dim", 4, "--seen", "--data-seed", 21).code == 0
    assert cli("tune", *SHORT, "--dim", 4, "--unseen").code == 0
    assert cli("tune", *SHORT, "--dim", 4, "--unseen", "--space", "random").code == 0
    split.write_text(split.read_text().replace("[even-or-good]", "[even-or-good, day-then-count]"), encoding="utf-8")
    done = cli("report", "--out", folder / "page.html")
    assert done.code == 0, done.err
    return folder / "page.html", cli


class Reader(html.parser.HTMLParser):
    """Checks that every element is closed, and collects attributes and the cells of table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_is_well_formed_and_asks_for_nothing_outside_itself(finished: tuple[Path, Cli]) -> None:
    text = finished[0].read_text(encoding="utf-8")
    read = Reader(text)
    images = [value for tag, name, value in read.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 3, "one number of seen tasks is no picture"
    assert all(image.startswith("data:image/svg+xml;base64,") for image in images)
    assert not [name for _, name, _ in read.attributes if name in ("href", "srcset", "action", "style", "onclick")]
    assert not re.search(r"https?:|url\(|@import|fetch\(", re.sub(r"base64,[^\"]*", "", text))


def test_what_people_named_is_text_and_says_nothing_of_the_machine(finished: tuple[Path, Cli]) -> None:
    text = finished[0].read_text(encoding="utf-8")
    assert "split &lt;b&gt; &amp; co.yaml" in text and "<b>" not in text
    assert str(finished[0].parent) not in text


def test_the_page_holds_the_table_of_eval_and_every_score(finished: tuple[Path, Cli]) -> None:
    page, cli = finished
    read = Reader(page.read_text(encoding="utf-8"))
    table = cli("eval").out.split("\n", 1)[1].strip()
    assert table in "".join(read.words["pre"])
    report = json.loads(cli("eval", "--json", "--per-task").out)
    heads: list[str] = []
    shown = {}
    for row in read.rows:
        heads = row if row[0] == "task" else [] if row[0] == "what" else heads
        shown |= {
            (row[0], re.sub(r".*\((...).*?\)", r"\1", head)): cell for head, cell in zip(heads, row, strict=False) if row != heads
        }
    for score in report["scores"]:
        stage, about = score["quantity"].partition("(")[2][:3] or score["quantity"], (score["space"], score["dim"])
        stage += "".join(f" {part}" for part in about if part)
        assert shown[score["task"], stage] == f"{score['value']:.3f}", score


def test_the_page_says_what_was_run_and_which_tasks_failed(finished: tuple[Path, Cli]) -> None:
    read = Reader(finished[0].read_text(encoding="utf-8"))
    told = " ".join(read.words["pre"])
    assert "collect:" in told and "steps: 4" in told and "tune:" in told
    assert "day-then-count: no soft prompt in the cache" in read.words["li"]
    assert re.search(r"ipt \d\S*, torch \d", " ".join(read.words["p"]))


def test_the_same_page_is_written_again(finished: tuple[Path, Cli], tmp_path: Path) -> None:
    page, cli = finished
    assert cli("report", "--out", tmp_path / "new" / "page.html").code == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == page.read_bytes()


def test_without_matplotlib_the_page_has_no_pictures_and_that_is_said(
    finished: tuple[Path, Cli], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = finished[1]("report", "--out", tmp_path / "page.html")
    assert done.code == 0
    assert "page.html, without pictures: pictures need the package matplotlib: pip install" in done.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text and "None could be drawn" in text


def test_a_page_tells_every_command_that_learned_and_no_damaged_file_of_options_ends_it(
    finished: tuple[Path, Cli], tmp_path: Path
) -> None:
    commands = finished[0].parent / "cache" / "commands"
    damaged = {"run-00000000.yaml": "run: [", "run-11111111.yaml": "", "tune-22222222.yaml": "5", "run-33333333.yaml": "run: 5"}
    long = {"collect-44444444.yaml": f"collect: {{backbone: {'x' * 300}}}", "collect-55555555.yaml": "collect: {}\nrun: {}"}
    for name, content in (damaged | long).items():
        (commands / name).write_text(content, encoding="utf-8")
    try:
        done = finished[1]("report", "--out", tmp_path / "page.html")
    finally:
        for name in damaged | long:
            (commands / name).unlink()
    assert done.code == 0, done.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^(?:.*<pre>)?([a-z-]+):(?: \{|$)", text, re.M)) == ["collect", "fit-subspace", *["tune"] * 3]


def test_a_page_that_cannot_be_written_is_one_sentence(finished: tuple[Path, Cli], tmp_path: Path) -> None:
    done = finished[1]("report", "--out", tmp_path)
    assert done.code == 1
    assert re.search(r"^error: cannot write .*; name another folder with --cache or --out$", done.err.splitlines()[-1])


def in_browser(page: str, width: int, script: str, folder: Path) -> object:
    """Return what a script says of a page in a frame so wide, in a real browser."""
    frame = f"""<iframe width={width} height=900 srcdoc="{page.replace("&", "&amp;").replace('"', "&quot;")}"></iframe><script>
    document.querySelector("iframe").onload = event => {{
      const d = event.target.contentDocument;
      document.title = "told:" + JSON.stringify((() => {{ {script} }})());
    }}</script>"""
    (folder / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=9000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>told:(.*?)</title>", done.stdout)
    assert found, done.stderr
    told: object = json.loads(html.unescape(found[1]))
    return told


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at the page with")
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_in_a_browser_nothing_is_wider_than_the_page_and_pictures_are_there(
    finished: tuple[Path, Cli], width: int, tmp_path: Path
) -> None:
    script = "return [d.documentElement.scrollWidth, [...d.images].map(i => i.complete && i.naturalWidth > 0 && i.width)]"
    wide, images = in_browser(finished[0].read_text(encoding="utf-8"), width, script, tmp_path)  # type: ignore[misc]
    assert wide <= width
    assert len(images) == 3 and all(0 < image <= width for image in images)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at the page with")
def test_in_a_browser_a_click_sorts_numbers_as_numbers_and_what_is_lacking_stands_last(tmp_path: Path) -> None:
    cells = "".join(
        f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in (("b", "9"), ("a", "-"), ("c", "10"), ("d", "0.5"))
    )
    table = "<table><thead><tr><th><button>task</button></th><th><button>n</button></th></tr></thead>"
    script = """const order = () => [...d.querySelectorAll("td:first-child")].map(c => c.textContent).join(""), told = [];
    for (const head of [1, 1, 0, 0]) { d.querySelectorAll("button")[head].click(); told.push(order()); }
    return [...told, d.querySelectorAll("[aria-sort]").length]"""
    page = PAGE.substitute(title="", body=f"{table}<tbody>{cells}</tbody></table>")
    assert in_browser(page, 800, script, tmp_path) == ["cbda", "dbca", "dcba", "abcd", 1]
