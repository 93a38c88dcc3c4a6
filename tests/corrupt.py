"""Damage the files of a cache in every way that we could think of, and see what is read of them.

    nice python tests/corrupt.py --cases 10000 [--seed 0]

Each case takes a whole cache of a tiny run on the testbed (soft prompts, subspaces, intrinsic vectors, scores, kept samples, a
state under way, a note of pass sizes), damages one file, and does what `ipt eval` does. What comes out must be the same figures,
or some of them with the damaged file told by name, or an IptError that names it: never a traceback, never another figure.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from helpers import Listener

from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import digest, read_file, write_file
from intrinsic_prompt_tuning.passes import first_budgets
from intrinsic_prompt_tuning.report import make_report
from intrinsic_prompt_tuning.results import Result
from intrinsic_prompt_tuning.tasks import TASKS_FILE

SEEN, UNSEEN, DIM = ("day-next", "object-small"), ("not-subject-person",), 2


class Cache:
    """A small cache, whole, and a copy of it that can be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole, self.copy = folder, folder / "whole", folder / "copy"
        self.backbone = load_backbone("testbed", device="cpu")
        content = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))
        tasks = {
            name: content["tasks"][name] | {"splits": {"tiny": "seen" if name in SEEN else "unseen"}} for name in (*SEEN, *UNSEEN)
        }
        (folder / "tasks.yaml").write_text(yaml.safe_dump({"worlds": content["worlds"], "tasks": tasks}), encoding="utf-8")
        self._fill()
        self.files = sorted(path.relative_to(self.whole) for path in self.whole.rglob("*") if path.is_file())
        self.restore()
        self.figures = self.evaluate(self.experiment(self.copy))

    def experiment(self, cache: Path) -> Experiment:
        """Return what a new command would have, but for the backbone, which is loaded once."""
        given = {
            "split": "tiny", "tasks_file": self.folder / "tasks.yaml", "cache": cache, "prompt_length": 1, "shots": 2, "test_rows": 4,
            "device": "cpu", "steps": 2, "evaluations": 1, "batch_size": 1, "subspace_steps": 1, "warmup_steps": 1, "inner": 4,
            "rows_per_task": 1,
        }  # fmt: skip
        x = Experiment(given, Listener())
        backbone: Backbone = self.backbone
        backbone.budget, backbone.answer_budget = first_budgets(backbone.model, backbone.prompt_at)
        x.__dict__["backbone"] = backbone
        return x

    def _fill(self) -> None:
        x = self.experiment(self.whole)
        prompts = x.soft_prompts([*SEEN, *UNSEEN])
        spaces = [x.subspace(kind, DIM, {task: prompts[task] for task in SEEN}) for kind in ("subspace", "random")]
        vectors = [
            choice
            for space in spaces
            for tasks, seed in ((SEEN, 21), (UNSEEN, 100))
            for choice in x.intrinsic_vectors(tasks, seed, space).values()
        ]
        results = [result for choice in (*prompts.values(), *vectors) for result in choice]
        x.make([*results, *spaces, *x.scores(prompts, spaces, vectors)])
        x.backbone.budget.tokens += 1
        x.remember_budgets()
        self.under_way = Result(prompts[SEEN[0]][0].header | {"data_seed": 13})
        x.store.save_unfinished({self.under_way: {"step": torch.tensor(1.0), "theta": torch.arange(4.0)}})

    def restore(self) -> None:
        """Make the copy whole again."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.whole, self.copy)

    def evaluate(self, x: Experiment) -> dict[Any, Any]:
        """Return every score that `ipt eval` tells, by what it is of."""
        scores = x.wanted_scores()
        x.make(scores)
        report = make_report(x, scores)
        return {tuple(str(s[name]) for name in s if name not in ("value", "n")): (s["value"], s["n"]) for s in report["scores"]}

    def outcome(self, told_by: tuple[str, ...]) -> str:
        """Do what `ipt eval` does after a file was damaged; tell how that went: same, refused, or what is wrong.

        Where figures are missing, one of these words must stand in what is said.
        """
        x = self.experiment(self.copy)
        assert isinstance(x.report, Listener)
        try:
            state = x.store.unfinished(self.under_way)
            if state and not (set(state) == {"step", "theta"} and torch.equal(state["theta"], torch.arange(4.0))):
                return "WRONG: another state"
            figures = self.evaluate(x)
        except IptError as error:
            return "refused" if any(word in str(error) for word in told_by) else f"WRONG: an error about another file: {error}"
        except Exception:
            return f"WRONG: {traceback.format_exc()}"
        if any(self.figures.get(key) != value for key, value in figures.items()):
            return "WRONG: another figure"
        said = [*x.left_out.values(), *(sentence for sentence in x.report.sentences if "not used" in sentence)]
        if figures == self.figures and not x.left_out:
            return "same"
        return (
            "refused"
            if any(word in sentence for word in told_by for sentence in said)
            else f"WRONG: missing without a word: {said}"
        )


# --- Damages -------------------------------------------------------------------------------------

Damage = Callable[[random.Random, Path, list[Path]], "Path | None"]
"""Takes a file and all others; returns where the damaged file is now, if it was renamed."""


def _bytes(change: Callable[[random.Random, bytearray], bytes | bytearray]) -> Damage:
    def damage(rng: random.Random, path: Path, _: list[Path]) -> None:
        content = path.read_bytes()
        path.write_bytes(change(rng, bytearray(content)))

    return damage


def flip(rng: random.Random, content: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def flip_in_front(rng: random.Random, content: bytearray) -> bytearray:
    content[rng.randrange(min(len(content), 200))] ^= 1 << rng.randrange(8)
    return content


def replace_byte(rng: random.Random, content: bytearray) -> bytearray:
    content[rng.randrange(len(content))] = rng.choice([*b'0123456789eE+-.,:"{}[]ntf \n\r\t', 0, 255])
    return content


def stretch(fill: Callable[[random.Random, int], bytes]) -> Callable[[random.Random, bytearray], bytes]:
    def change(rng: random.Random, content: bytearray) -> bytes:
        start = rng.randrange(len(content))
        length = rng.randint(1, min(len(content) - start, 300))
        return bytes(content[:start]) + fill(rng, length) + bytes(content[start + length :])

    return change


def another(rng: random.Random, path: Path, others: list[Path]) -> None:
    path.write_bytes(rng.choice(others).read_bytes())


def alike(rng: random.Random, path: Path, others: list[Path]) -> None:
    path.write_bytes(rng.choice([other for other in others if other.parent == path.parent] or others).read_bytes())


def link(rng: random.Random, path: Path, others: list[Path]) -> None:
    path.unlink()
    path.symlink_to(rng.choice([rng.choice(others), path.with_name("nowhere"), path]))


def folder(_: random.Random, path: Path, __: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def lines(rng: random.Random, content: bytearray) -> bytes:
    rows = bytes(content).split(b"\n")
    at = rng.randrange(len(rows))
    rows[at : at + 1] = rng.choice([[], [rows[at], rows[at]], [rows[at][::-1]], [b"null"], [b'{"input": "a", "output": "b"}']])
    rng.shuffle(rows) if rng.random() < 0.3 else None
    return rng.choice([b"\n", b"\n", b"\r\n", b"\r"]).join(rows)


DAMAGES: dict[str, Damage] = {
    "bits flipped": _bytes(flip),
    "bits flipped in front": _bytes(flip_in_front),
    "a byte replaced": _bytes(replace_byte),
    "a stretch of random bytes": _bytes(stretch(lambda rng, n: rng.randbytes(n))),
    "a stretch of zeros": _bytes(stretch(lambda rng, n: bytes(n))),
    "a stretch gone": _bytes(stretch(lambda rng, n: b"")),
    "a stretch twice": _bytes(stretch(lambda rng, n: rng.randbytes(1) * 2 * n)),
    "cut": _bytes(lambda rng, content: content[: rng.randrange(len(content))]),
    "emptied": _bytes(lambda rng, content: b""),
    "lengthened": _bytes(lambda rng, content: bytes(content) + rng.choice([b"\0", b"\n", bytes(content), rng.randbytes(99)])),
    "lines": _bytes(lines),
    "another file of the cache": another,
    "another file of the folder": alike,
    "a link": link,
    "a folder": folder,
}
WRONG_VALUES = (None, [], {}, 5, "x", [[]], {"a": 5}, True, 1e300, -1, "../../x", "a" * 300)


def edit_header(rng: random.Random, path: Path, _: list[Path]) -> Path | None:
    """Write another header with a checksum that is right, under the old name or the one that it should have."""
    header, record, tensors = read_file(path)
    name = rng.choice(list(header))
    if rng.random() < 0.5:
        del header[name]
    else:
        # True is 1 to Python, and means the same here.
        wrong = [value for value in WRONG_VALUES if type(value) is not type(header[name]) and value != header[name]]
        header[name] = rng.choice(wrong + [3] * (name == "version"))
    return _rewritten(rng, path, header, record, tensors)


def edit_for_another(rng: random.Random, path: Path, _: list[Path]) -> Path | None:
    """Write a header of another backbone, subspace, dim, prompt length or version, with a checksum that is right."""
    header, record, tensors = read_file(path)
    others = {"backbone": "0" * 64, "subspace": "0" * 16, "dim": 3, "prompt_length": 2, "version": 3, "kind": "soft-prompt"}
    name = rng.choice([name for name in others if name in header])
    return _rewritten(rng, path, header | {name: others[name]}, record, tensors)


def edit_tensors(rng: random.Random, path: Path, _: list[Path]) -> None:
    """Write other tensors with a checksum that is right."""
    header, record, tensors = read_file(path)
    for name, tensor in tensors.items():
        tensors[name] = rng.choice(
            [torch.full_like(tensor, float("nan")), tensor.double(), tensor[None], tensor.flatten()[:1], tensor * float("inf")]
        )
    write_file(path, header, record, tensors if rng.random() < 0.7 else {})


def _rewritten(rng: random.Random, path: Path, header: dict[str, Any], record: Any, tensors: Any) -> Path | None:
    if rng.random() < 0.5:
        write_file(path, header, record, tensors)
        return None
    path.unlink()
    called = str(header.get("task", header.get("dim"))).replace("/", "-")[:100]
    path = path.with_name(f"{called}-{digest(header)}{path.suffix}")
    write_file(path, header, record, tensors)
    return path


def metadata(rng: random.Random, path: Path, _: list[Path]) -> None:
    """Write metadata that are no header at all."""
    tensors = safetensors.torch.load(path.read_bytes())
    texts = ["", "{", "[]", "null", "5", '{"header": {"version": 2}}', '{"header": [], "record": {}, "checksum": ""}', "[" * 9999]
    path.write_bytes(safetensors.torch.save(tensors, {"ipt": rng.choice(texts)}))


HEADER_DAMAGES: dict[str, Damage] = {
    "a field of the header missing or of the wrong type": edit_header,
    "a header of another backbone, subspace, dim, length or version": edit_for_another,
    "other metadata": metadata,
}
TENSOR_DAMAGES: dict[str, Damage] = {"tensors that do not fit": edit_tensors}


def kind_of(name: Path) -> str:
    """Return what a file of the cache is."""
    return "unfinished" if name.suffix == ".unfinished" else "samples" if name.parts[0] == "samples" else name.parent.name


def corrupt(cache: Cache, cases: int, seed: int) -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """Return how often what came of which damage of which kind of file, and what went wrong."""
    rng, counts, wrong = random.Random(seed), Counter[tuple[str, str, str]](), list[str]()
    kinds: dict[str, list[Path]] = {}
    for name in cache.files:
        kinds.setdefault(kind_of(name), []).append(name)
    for case in range(cases):
        kind = rng.choice(list(kinds))
        name = rng.choice(kinds[kind])
        described = name.suffix in (".safetensors", ".unfinished")
        damages = DAMAGES | (HEADER_DAMAGES if described else {})
        damages |= TENSOR_DAMAGES if kind in ("soft-prompts", "intrinsic-vectors") else {}
        what = rng.choice(list(damages))
        cache.restore()
        path = cache.copy / name
        others = [cache.copy / other for other in cache.files if other != name]
        renamed = damages[what](rng, path, others)
        for score in cache.files:  # what a score is of is read where it is made anew
            if kind_of(score) == "scores" and score != name and rng.random() < 0.2:
                (cache.copy / score).unlink()
        # A file that only looks like one of other settings is counted with those.
        result = cache.outcome((str(renamed), "not used") if renamed else (str(path),))
        counts[kind, what, result.partition(":")[0]] += 1
        if result.startswith("WRONG"):
            wrong.append(f"case {case}, seed {seed}: {what}, {name}: {result}")
            print(wrong[-1], flush=True)
        if case % 1000 == 999:
            print(f"{case + 1} cases, {len(wrong)} wrong", flush=True)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        print(f"{len(cache.files)} files, {len(cache.figures)} figures, {time.monotonic() - begin:.0f} s", flush=True)
        counts, wrong = corrupt(cache, arguments.cases, arguments.seed)
    for kind in sorted({kind for kind, *_ in counts}):
        told = Counter[str]()
        for (own, _, result), count in counts.items():
            told[result] += count * (own == kind)
        print(f"{kind:<20} {json.dumps(told)}")
    print(f"{arguments.cases} cases, {len(wrong)} wrong, {time.monotonic() - begin:.0f} s")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
