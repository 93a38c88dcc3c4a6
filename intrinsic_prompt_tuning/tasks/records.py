"""What fields of a row in tasks.yaml cannot say: named cleaners of text, and named transforms of a data set's records.

A transform takes all records of a split in order, and the arguments that the row gives. Most serve one of CrossFit's tasks.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from intrinsic_prompt_tuning.lazy import np

Record = dict[str, Any]


def look_up(value: Any, path: str) -> Any:
    """Follow a path; a name goes through lists to every record in them, and a column's own name may hold dots."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for step in path.split("."):
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() else [look_up(item, step) for item in value]
        else:
            value = value[step]
    return value


def texts(value: Any) -> tuple[str, ...]:
    """Flatten a value to strings: lists in order, a missing value as the empty string, booleans as YAML writes them."""
    if isinstance(value, list):
        return tuple(text for item in value for text in texts(item))
    return ("" if value is None else str(value).lower() if isinstance(value, bool) else str(value),)


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Change every string inside a value."""
    if isinstance(value, dict):
        return {key: map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


CLEANERS: dict[str, Callable[[str], str]] = {
    "": str,
    "strip": str.strip,
    "newlines": lambda text: text.replace("\n", " "),
    "breaks": lambda text: re.sub(r"[\n\r\t]", " ", text),
    "whitespace": lambda text: " ".join(text.replace(r"\n", " ").split()),  # also a newline that the data spells out
    "quotes": lambda text: text.strip("'"),
    "letter": lambda text: text[2:],  # A)text
    "compact": lambda text: text.replace(" ", "").lower(),
}


def _merge(records: Iterable[Record], column: str, *keys: str) -> Iterator[Record]:
    """Make one record of those equal in `keys`, its `column` the list of theirs: several references of one input."""
    merged: dict[tuple[Any, ...], Record] = {}
    for record in records:
        merged.setdefault(tuple(record[key] for key in keys), record | {column: []})[column].append(record[column])
    return iter(merged.values())


def _dialogues(records: Iterable[Record]) -> Iterator[Record]:
    """Leave out the broken utterances of empathetic_dialogues, then merge the answers to one prompt."""
    return _merge((record for record in records if "hit:" not in record["utterance"]), "utterance", "prompt", "context")


def _pair(records: Iterable[Record], right: str, wrong: str) -> Iterator[Record]:
    """Put two sentences in an order drawn row by row (seed 42); `label` is the position of the right one."""
    coin = np.random.RandomState(42)
    for record in records:
        label = int(coin.random_sample() <= 0.5)
        first, second = (wrong, right) if label else (right, wrong)
        yield {"first": record[first], "second": record[second], "label": label}


def _acronym(records: Iterable[Record]) -> Iterator[Record]:
    """Read acronym and long form off the token tags, of sentences with exactly one of each."""
    for record in records:
        tags = record["labels"]
        if tags.count(0) == tags.count(1) == 1:
            spans = {}
            for name, begin, inside in (("long", 0, 2), ("short", 1, 3)):
                start = tags.index(begin)
                length = next((n for n, tag in enumerate(tags[start + 1 :], 1) if tag != inside), len(tags) - start)
                spans[name] = record["tokens"][start : start + length]
            yield record | spans


def _majority(records: Iterable[Record], path: str) -> Iterator[Record]:
    """Take the label that most annotators gave; ties are left out."""
    for record in records:
        (label, count), *others = Counter(look_up(record, path)).most_common(2)
        if not others or count > others[0][1]:
            yield record | {"majority": label}


def _band(records: Iterable[Record], column: str, low: float, high: float) -> Iterator[Record]:
    """Make a label of a score: 0 below `low`, 1 above `high`; what lies between is left out."""
    return (row | {"label": int(row[column] > high)} for row in records if not low <= row[column] <= high)


def _math_options(records: Iterable[Record]) -> Iterator[Record]:
    """Cut math_qa's options out of their one string as CrossFit does: at every comma, even one inside a number."""
    for record in records:
        parts = enumerate(record["options"].split(",")[:5])
        options = [part[4 if index == 0 else 5 : None if index == 4 else -1] for index, part in parts]
        if options["abcde".index(record["correct"])]:
            yield record | {"options": options}


def _inline_options(records: Iterable[Record]) -> Iterator[Record]:
    """Find the two options inside quarel's question."""
    for record in records:
        _, *options = re.split(r"\([AB]\) ?", record["question"], maxsplit=2)
        yield record | {"options": [option.removesuffix("or ").strip() for option in options]}


def _multirc(records: Iterable[Record]) -> Iterator[Record]:
    """Gather multirc's options of one question; the answer is every right one."""
    records = ({**row, "question_id": row["idx"]["question"], "answer": (row["answer"], row["label"])} for row in records)
    for row in _merge(records, "answer", "question_id"):
        right = [text for text, label in row["answer"] if label == 1]
        yield row | {"options": [text for text, _ in row["answer"]], "right": right or ["NO ANSWER!"]}


def _infobox(records: Iterable[Record]) -> Iterator[Record]:
    """Write wiki_bio's table as text; tables whose headers and cells do not match are left out."""
    for record in records:
        title, table = record["input_text"]["context"], record["input_text"]["table"]
        headers, cells = table["column_header"], table["content"]
        if len(headers) == len(cells):
            lines = [f"{header}: {cell.strip()} [n] ".replace("\n", " ") for header, cell in zip(headers, cells, strict=True)]
            yield record | {"title": title.strip(), "infobox": "".join(lines)}


def _proto_qa(records: Iterable[Record]) -> Iterator[Record]:
    """Parse proto_qa line by line: its answers are the keys of a mapping, whose order a table would lose."""
    for row in (json.loads(record["text"]) for record in records):
        yield {"question": row["question"]["normalized"], "answers": list(row["answers"]["raw"])}


def _gold_paragraphs(records: Iterable[Record]) -> Iterator[Record]:
    """Keep the paragraphs of hotpot_qa that support the answer."""
    for record in records:
        paragraphs = zip(record["context"]["title"], record["context"]["sentences"], strict=True)
        gold = ["".join(sentences) for title, sentences in paragraphs if title in record["supporting_facts"]["title"]]
        yield record | {"gold": " ".join(gold).strip()}


_ALL = (_merge, _dialogues, _pair, _acronym, _majority, _band, _math_options, _inline_options, _multirc, _infobox, _proto_qa,
        _gold_paragraphs)  # fmt: skip
TRANSFORMS: dict[str, Callable[..., Iterator[Record]]] = {transform.__name__[1:]: transform for transform in _ALL}
