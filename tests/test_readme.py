"""The README's commands: all are commands with these options, and those that need no download run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from conftest import run_ipt

import intrinsic_prompt_tuning
import ipt

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return what stands behind `ipt` in code blocks and in code between words, without what is plainly a placeholder."""
    blocks = re.findall(r"^    (.*)$", README, re.MULTILINE) + re.findall(r"`([^`\n]+)`", README)
    found = [
        match for text in blocks for match in re.findall(r"(?:^|&& |-m |\| )ipt ([a-z-]+(?: [^#&.]*(?:\.\w+[^#&.]*)*)?)", text)
    ]
    return sorted({command.strip() for command in found})


def test_the_readme_names_every_command() -> None:
    assert {command.split()[0] for command in commands()} == {command.name for command in ipt.app.registered_commands}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_has_these_options(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.txt").touch()  # what one of them reads
    name, *arguments = shlex.split(command)
    parser = typer.main.get_command(ipt.app).commands[name]  # type: ignore[attr-defined]
    parser.make_context(name, list(arguments))


def test_ipt_run_runs_on_the_testbed(tmp_path: Path) -> None:
    few = ("--steps", 4, "--evaluations", 1, "--subspace-steps", 2, "--test-rows", 5, "--processes", 1)
    done = run_ipt("run", "--quick", *few, "--cache", tmp_path)
    assert done.code == 0, done.err
    assert "T_test(IST)        subspace  250" in done.out


def test_the_readme_s_own_task_is_shown_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = re.findall(r"```yaml\n(tasks:.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(row, encoding="utf-8")
    for name, count in (("train", 70), ("test", 10)):
        lines = [f"title {n},body {n},{n % 2}" for n in range(count)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["title,body,label", *lines]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in commands() if "my-task" in command]
    done = run_ipt(*shlex.split(command), "--cache", tmp_path / "cache")
    assert done.code == 0, done.err
    assert "my-task, train: 32 rows" in done.out


def test_the_readme_s_table_is_understood_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"^    (\{ echo text,label.*?moods\.csv)$", README, re.DOTALL | re.MULTILINE)
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    listed = run_ipt("tasks", "--data", "moods.csv", "--show", "--cache", tmp_path / "cache")
    assert listed.code == 0 and "moods, train: 32 rows, 0 truncated" in listed.out, listed.err
    assert "moods: classification, ACC, text -> label of moods.csv, 84 rows" in listed.err
    assert "<unk>" not in listed.out  # the testbed's words


def test_the_readme_s_python_tunes_a_prompt_and_a_vector(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["3072 numbers", "250 numbers"]
    assert all(0 <= float(line.split()[-1]) <= 1 for line in lines)


def test_the_package_offers_what_its_docstring_says() -> None:
    for name in intrinsic_prompt_tuning.__all__:
        assert name in (intrinsic_prompt_tuning.__doc__ or ""), name
        assert getattr(intrinsic_prompt_tuning, name).__doc__, name
