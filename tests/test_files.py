"""Files that describe themselves: bytes, checksums, versions, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from intrinsic_prompt_tuning import files
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import Example, rows_digest

HEADER = {"version": files.FILE_VERSION, "kind": "soft-prompt", "task": "mood-good", "data_seed": 100}
RECORD = {"validation": 0.5, "validation_loss": 1.0}
PROMPT = torch.arange(15.0).reshape(3, 5)


def write_one(path: Path, **changes: Any) -> Path:
    files.write_file(path, HEADER | changes, RECORD, {"soft_prompt": PROMPT})
    return path


def version_1(path: Path) -> Path:
    """Write a file as the last program of version 1 did: without a checksum."""
    content = {"header": HEADER | {"version": 1}, "record": RECORD}
    path.write_bytes(safetensors.torch.save({"soft_prompt": PROMPT}, {"ipt": json.dumps(content, sort_keys=True)}))
    return path


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_one(tmp_path / "new" / "folder" / "one.safetensors")
    header, record, tensors = files.read_file(path)
    assert (header, record, list(tensors)) == (HEADER, RECORD, ["soft_prompt"])
    assert torch.equal(tensors["soft_prompt"], PROMPT)
    assert [found.name for found in path.parent.iterdir()] == ["one.safetensors"]


def test_a_file_without_tensors_comes_back_too(tmp_path: Path) -> None:
    path = tmp_path / "score.safetensors"
    files.write_file(path, HEADER, {"score": 0.25, "n": 4}, {})
    assert files.read_file(path) == (HEADER, {"score": 0.25, "n": 4}, {})


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_one(tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    strided = PROMPT.T.contiguous().T
    assert not strided.is_contiguous()
    files.write_file(tmp_path / "three", dict(reversed(HEADER.items())), dict(reversed(RECORD.items())), {"soft_prompt": strided})
    assert (tmp_path / "three").read_bytes() == first.read_bytes()


def test_a_file_s_tensors_can_be_read_without_ipt(tmp_path: Path) -> None:
    path = write_one(tmp_path / "one")
    assert torch.equal(safetensors.torch.load_file(path)["soft_prompt"], PROMPT)
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["ipt"])["header"] == HEADER


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense that is no safetensors file",
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": "{"}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": "[]"}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": "[" * 100_000}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": '{"header": [], "record": {}}'}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": '{"header": {"version": 2}, "record": {}}'}),
        safetensors.torch.save(
            {"soft_prompt": torch.zeros(3, 5)}, {"ipt": '{"header": {"version": 2}, "record": 1, "checksum": ""}'}
        ),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        IptError, match=r"is not a file of ipt, or is damaged .*: remove it, and the command makes it anew"
    ) as caught:
        files.read_file(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 400


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_one(tmp_path / "one")
    whole = path.read_bytes()
    for size in (4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(IptError, match="damaged"):
            files.read_file(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(IptError, match=r"nothing\.safetensors"):
        files.read_file(tmp_path / "nothing.safetensors")


def test_not_a_bit_of_a_file_may_be_another(tmp_path: Path) -> None:
    path = write_one(tmp_path / "one")
    whole = path.read_bytes()
    for at in range(8, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(IptError, match=re.escape(str(path))):
            files.read_file(path)


@pytest.mark.parametrize("part", ["header", "record", "tensors"])
def test_a_checksum_covers_header_record_and_tensors(tmp_path: Path, part: str) -> None:
    path = write_one(tmp_path / "one")
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["ipt"])
    tensors = {"soft_prompt": PROMPT + (part == "tensors")}
    if part != "tensors":
        content[part]["task" if part == "header" else "validation"] = "another"
    path.write_bytes(safetensors.torch.save(tensors, {"ipt": json.dumps(content)}))
    with pytest.raises(IptError, match="its checksum is another"):
        files.read_file(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = write_one(tmp_path / "one", version=files.FILE_VERSION + 1)
    with pytest.raises(IptError, match="one has file version 3, expected 2: remove it, .* or use the ipt that made it"):
        files.read_file(path)


def test_a_file_of_version_1_is_refused_by_name(tmp_path: Path) -> None:
    path = version_1(tmp_path / "old.safetensors")
    with pytest.raises(IptError, match=r"old\.safetensors has file version 1, expected 2"):
        files.read_file(path)


def test_a_write_that_fails_leaves_nothing_behind_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(IptError, match=r"cannot write .*taken: .*; name another folder with --cache"):
        files.write_bytes(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(IptError, match="cannot write"):
        files.write_bytes(tmp_path / "file" / "below", b"content")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_folder_s_own_name_cannot_be_written(name: str) -> None:
    with pytest.raises(IptError, match=r"cannot write \S+: .*; name another folder with --cache or --out"):
        files.write_bytes(Path(name), b"content")


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_one(tmp_path / "one")
    before = path.read_bytes()

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_one(path, task="another")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("one", before)]


def test_a_digest_changes_with_every_value_and_not_with_their_order() -> None:
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1}) != files.digest({"a": 1, "b": 3})
    one = Example("in", ("a", "b"), ("c",))
    others = [
        Example("IN", ("a", "b"), ("c",)),
        Example("in", ("a",), ("c",)),
        Example("in", ("a", "b"), ()),
        Example("in", ("a", "b"), ("c",), tail=1),
    ]
    assert len({rows_digest([example]) for example in [one, *others]}) == 5


def test_a_file_s_name_holds_no_separators() -> None:
    assert files.file_name("google/t5-base lm:1") == "google-t5-base-lm-1"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "own"))
    assert files.user_cache() == tmp_path / "own"
    monkeypatch.delenv("IPT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.user_cache() == tmp_path / "xdg" / "ipt"


def test_an_empty_variable_names_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPT_CACHE", "")
    assert files.user_cache().name == "ipt" and files.user_cache().is_absolute()


def test_without_a_home_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a container's user that the system does not know
    for system in ("linux", "darwin"):
        monkeypatch.setattr("sys.platform", system)
        with pytest.raises(IptError, match=r"there is no home folder .* --cache or \$IPT_CACHE"):
            files.user_cache()
