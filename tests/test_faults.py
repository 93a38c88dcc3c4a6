"""Disks that are full or cannot be written, folders that vanish, paths that are files: one sentence, and nothing is lost."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cli, Result, files_in

import ipt
from intrinsic_prompt_tuning.files import write_bytes

SHORT = ("--steps", 4, "--evaluations", 2, "--batch-size", 2)


def one_error(result: Result, *words: str) -> str:
    """Return the one sentence in which a command ended."""
    assert result.code == 1, result
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.err.splitlines()[-1] == error and "Traceback" not in result.err
    assert all(word in error for word in words), error
    return error


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process write no file beyond a size: the system itself refuses, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount a disk here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


# --- Full ----------------------------------------------------------------------------------------


def test_where_a_file_cannot_be_written_the_earlier_ones_stay_and_nothing_is_left_over(cli: Cli, tmp_path: Path) -> None:
    assert cli("collect", *SHORT, "--task", "count-next").code == 0
    before = files_in(tmp_path)
    for size in (0, 300, 1000):  # neither rows nor prompts; rows of a few words; all but prompts
        with files_of_at_most(size):
            result = cli("collect", *SHORT, "--task", "count-next", "--task", "mood-good")
        one_error(result, f"cannot write {tmp_path}", "File too large; name another folder with --cache")
        after = files_in(tmp_path)
        assert before.items() <= after.items()
        assert not [name for name in after if "/." in name or "claims" in name or "unfinished" in name]
    assert cli("collect", *SHORT, "--task", "mood-good").code == 0


def test_a_full_disk_ends_in_one_sentence_and_the_same_command_goes_on_when_there_is_room(cli: Cli, disk: Path) -> None:
    assert cli("collect", *SHORT, "--task", "count-next", "--cache", disk).code == 0
    before = files_in(disk)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    one_error(cli("collect", *SHORT, "--seen", "--cache", disk), f"cannot write {disk}", "No space left on device")
    assert {name: content for name, content in files_in(disk).items() if name != "ballast"} == before
    assert not list(disk.rglob(".claims"))
    ballast.unlink()
    assert cli("collect", *SHORT, "--task", "mood-good", "--cache", disk).code == 0


def test_an_export_that_does_not_fit_names_the_file(cli: Cli, tmp_path: Path) -> None:
    assert cli("collect", *SHORT, "--task", "count-next").code == 0
    with files_of_at_most(100):
        result = cli("export", "--task", "count-next", "--out", tmp_path / "out")
    one_error(result, f"cannot write {tmp_path / 'out'}")
    assert files_in(tmp_path / "out") == {}


def test_a_file_is_whole_or_not_there_wherever_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "one"
    for room in range(0, 9000, 1000):
        path.write_bytes(b"old")
        with contextlib.suppress(Exception), files_of_at_most(room):
            write_bytes(path, bytes(8000))
        assert path.read_bytes() == (bytes(8000) if room == 8000 else b"old")
        assert [found.name for found in tmp_path.iterdir()] == ["one"]


# --- Read-only -----------------------------------------------------------------------------------


def test_a_cache_that_can_only_be_read_gives_its_table_and_takes_nothing_new(cli: Cli, disk: Path) -> None:
    for _ in range(2):
        assert cli("collect", *SHORT, "--task", "count-next", "--cache", disk).code == 0
    table = cli("eval", "--cache", disk)
    assert table.code == 0, table.err
    before = files_in(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    again = cli("eval", "--cache", disk)
    assert (again.code, again.out) == (0, table.out), again.err
    for options in ((), ("--skip-missing",)):
        one_error(
            cli("collect", *SHORT, "--task", "mood-good", *options, "--cache", disk), "cannot write", "Read-only file system"
        )
    assert files_in(disk) == before


# --- Vanished, or something else -----------------------------------------------------------------


@pytest.fixture
def vanishing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a way to run a command whose cache is removed at the moment at which it says something."""

    def run(moment: str, command: str, *arguments: object) -> Result:
        say = ipt.Terminal.say

        def saying(self: ipt.Terminal, text: str) -> None:
            say(self, text)
            if moment in text:
                shutil.rmtree(tmp_path / "cache")

        with monkeypatch.context() as patch:
            patch.setattr(ipt.Terminal, "say", saying)
            return cli(command, *arguments)

    return run


def test_a_cache_that_vanishes_before_scoring_is_told_by_the_file_that_is_gone(cli: Cli, vanishing: Cli, tmp_path: Path) -> None:
    assert cli("collect", *SHORT, "--task", "count-next").code == 0
    gone = vanishing("scores to make", "eval")
    one_error(gone, "soft-prompts/count-next-", "No such file or directory", "remove it, and the command makes it anew")
    assert not list(tmp_path.rglob(".claims"))


def test_prompts_are_written_into_a_cache_that_vanished_meanwhile(vanishing: Cli, tmp_path: Path) -> None:
    done = vanishing("soft prompts to make", "collect", *SHORT, "--task", "count-next")
    assert done.code == 0, done.err
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(("command", "options", "words"), [
    ("collect", ("--cache", "FILE"), ("cannot write FILE/", "Not a directory; name another folder with --cache")),
    ("collect", ("--cache", "LONG"), ("File name too long",)),
    ("collect", ("--data", "FILE"), ("FILE holds no task",)),
    ("collect", ("--data", "LONG"), ("File name too long",)),
    ("collect", ("--tasks-file", "FOLDER"), ("FOLDER is not readable as YAML", "Is a directory")),
    ("collect", ("--backbone", "FILE"), ("cannot load the backbone 'FILE'",)),
    ("collect", ("--backbone", "LONG"), ("cannot load the backbone 'xxx", "Expected a Hub id")),
    ("collect", ("--backbone", "FOLDER"), ("cannot load the backbone 'FOLDER'",)),
    ("predict", ("--task", "count-next", "--input", "BYTES"), ("1 lines were not answered",)),
    ("export", ("--task", "count-next", "--out", "FILE"), ("is not empty, or no folder",)),
])  # fmt: skip
def test_a_path_that_is_something_else_is_named(
    cli: Cli, tmp_path: Path, command: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert cli("collect", *SHORT, "--task", "count-next").code == 0
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    places = {"BYTES": tmp_path / "bytes", "FILE": tmp_path / "file", "FOLDER": tmp_path / "folder", "LONG": "x" * 5000}
    result = cli(command, *(places.get(option, option) for option in options))
    expected = [word.replace("FILE", str(places["FILE"])).replace("FOLDER", str(places["FOLDER"])) for word in words]
    one_error(result, *expected)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_a_folder_in_the_place_of_a_score_is_named(cli: Cli, tmp_path: Path) -> None:
    assert cli("collect", *SHORT, "--task", "count-next").code == 0
    assert cli("eval").code == 0
    score = next(tmp_path.rglob("scores/*"))
    score.unlink()
    score.mkdir()
    one_error(cli("eval"), f"cannot write {score}", "Is a directory")
    shutil.rmtree(score)
    assert cli("eval").code == 0
