"""MS MARCO text from wherever it can be had, and the order in which it is sent."""

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_inference_server.benchmark.load.hub import HUB_CONFIGS, HubUnreachable, fetch_ms_marco
from ml_inference_server.utils import sample
from ml_inference_server.utils.errors import ConfigError

# Twice what the largest shipped suite sends; the official files are much longer than anybody replays.
MAX_ROWS = 100_000
LAYOUTS = "qid<TAB>pid<TAB>query<TAB>passage or qid<TAB>query"

Kind = Literal["queries", "passages", "pairs"]


class PairRow(NamedTuple):
    """One labelled line; `pid` and `passage` are empty in a file of queries."""

    qid: str
    pid: str
    query: str
    passage: str


@dataclass(frozen=True)
class Dataset:
    """`sha256` is that of the rows as tab-separated lines: what sha256sum says of a TSV file that was read whole."""

    name: str
    rows: tuple[PairRow, ...]
    sha256: str
    note: str = ""

    def workload(self, kind: Kind, seed: int) -> "Workload":
        """The distinct texts (or pairs) in the order that `seed` gives. ConfigError if there are none."""
        items: dict[Any, None]
        if kind == "queries":
            items = dict.fromkeys(row.query for row in self.rows)
        elif kind == "passages":
            items = dict.fromkeys(row.passage for row in self.rows if row.passage)
        else:
            items = dict.fromkeys((row.query, row.passage) for row in self.rows if row.passage)
        if not items:
            raise ConfigError(
                f"dataset {self.name} holds queries only: use the workload queries, or a file in the layout"
                " qid<TAB>pid<TAB>query<TAB>passage"
            )
        ordered = list(items)
        random.Random(seed).shuffle(ordered)  # noqa: S311 - an order, not a secret
        return Workload(kind, tuple(ordered))

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "rows": len(self.rows),
            "queries": len({row.query for row in self.rows}),
            "passages": len({row.passage for row in self.rows if row.passage}),
            "note": self.note,
        }


@dataclass(frozen=True)
class Workload:
    """Distinct items in sending order; requests take them in turn and start over at the end."""

    kind: Kind
    items: tuple[Any, ...]

    def batch(self, index: int, size: int, *, from_end: bool = False) -> list[Any]:
        """The items of request `index`; `from_end` counts from the far end, so that a warm-up sends other ones."""
        first = -(index + 1) * size if from_end else index * size
        return [self.items[(first + i) % len(self.items)] for i in range(size)]

    def distinct_texts(self, sent_items: int) -> int:
        """How many different texts the first `sent_items` items hold."""
        sent = self.items[:sent_items]
        return len(set(itertools.chain.from_iterable(sent)) if self.kind == "pairs" else set(sent))


def is_local(source: str) -> bool:
    """Whether `source` needs no network, so that it can be read (and refused) at once."""
    return source not in ("auto", "ms_marco") and not source.startswith("ms_marco:")


async def load_dataset(source: str) -> Dataset:
    """The rows of `source`: auto, ms_marco[:v1.1|:v2.1], sample, or a file. ConfigError says what is wrong where."""
    if source == "sample":
        return read_file(sample.PAIRS, name="sample (bundled)")
    if is_local(source):
        return read_file(Path(source), name=Path(source).name)
    _, _, config = source.partition(":")
    config = config or "v1.1"
    if config not in HUB_CONFIGS:
        raise ConfigError(f"dataset {source}: ms_marco has no version {config!r}; it has: {', '.join(HUB_CONFIGS)}")
    try:
        records = await fetch_ms_marco(config)
    except HubUnreachable as error:
        if source != "auto":
            raise ConfigError(
                f"dataset {source}: MS MARCO cannot be fetched: {error}; use --dataset sample, or a file"
            ) from None
        note = f"MS MARCO cannot be fetched ({error}), so the bundled sample is used instead"
        print(f"Note: {note}.", file=sys.stderr)
        return read_file(sample.PAIRS, name="sample (bundled), in place of MS MARCO", note=note)
    return _dataset(f"MS MARCO {config}", _record_rows(enumerate(records, 1), f"ms_marco:{config}, record"))


def read_file(path: Path, *, name: str, note: str = "") -> Dataset:
    """A TSV, JSON or JSONL file, at most MAX_ROWS rows. ConfigError names file, line and what was expected."""
    try:
        with path.open("rb") as file:
            lines = _decoded(path, file)
            head = next(lines, "")
            everything = itertools.chain([head], lines)
            if head.lstrip().startswith(("{", "[")):
                rows = _record_rows(_json_records(path, head, everything), f"{path}:")
            else:
                rows = _tsv_rows(path, everything)
            return _dataset(name, rows, note)
    except FileNotFoundError:
        raise ConfigError(
            f"dataset {path}: no such file; give a file of MS MARCO text, or one of auto, ms_marco, sample"
        ) from None
    except OSError as error:
        raise ConfigError(f"dataset {path}: cannot be read: {error.strerror}") from None


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}:{number}: not UTF-8 text ({error.reason}); expected {LAYOUTS}, or JSON"
            ) from None


def _dataset(name: str, rows: Iterator[PairRow], note: str = "") -> Dataset:
    kept = tuple(itertools.islice(rows, MAX_ROWS))
    if not kept:
        raise ConfigError(f"dataset {name}: no text in it; expected {LAYOUTS}, or MS MARCO JSON")
    if next(rows, None) is not None:
        note = "; ".join(filter(None, (note, f"only the first {MAX_ROWS} rows of {name} were used")))
    digest = hashlib.sha256()
    for row in kept:
        digest.update(("\t".join(row if row.passage else (row.qid, row.query)) + "\n").encode())
    return Dataset(name, kept, digest.hexdigest(), note)


def _tsv_rows(path: Path, lines: Iterable[str]) -> Iterator[PairRow]:
    columns = 0
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line:
            continue
        cells = line.split("\t")
        columns = columns or len(cells)
        if len(cells) != columns or columns not in (2, 4):
            wanted = f"{columns} as in the first line" if columns in (2, 4) else LAYOUTS
            raise ConfigError(f"{path}:{number}: {len(cells)} tab-separated column(s), expected {wanted}")
        if not all(cell.strip() for cell in cells):
            empty = next(i for i, cell in enumerate(cells, 1) if not cell.strip())
            raise ConfigError(f"{path}:{number}: column {empty} is empty, expected {LAYOUTS}")
        yield PairRow(*cells) if columns == 4 else PairRow(cells[0], "", cells[1], "")


def _json_records(path: Path, head: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """(line or record number, record) of JSONL, a JSON list, or the column-oriented official download."""
    try:
        first = json.loads(head)
    except json.JSONDecodeError:
        first = None
    if isinstance(first, dict) and isinstance(first.get("query"), str):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse(path, line, number)
        return
    whole = _parse(path, "".join(lines), 1)
    if isinstance(whole, dict) and isinstance(whole.get("query"), Mapping):
        for number, (key, query) in enumerate(whole["query"].items(), 1):
            columns = {name: values.get(key) for name, values in whole.items() if isinstance(values, Mapping)}
            yield number, {**columns, "query": query}
    else:
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{line + error.lineno - 1}: not valid JSON: {error.msg}") from None


def _record_rows(records: Iterable[tuple[int, Any]], where: str) -> Iterator[PairRow]:
    """MS MARCO records; passages as a list of {passage_text: ...} or as {passage_text: [...]}."""
    for number, record in records:
        place = f"{where}{number}"
        query = record.get("query") if isinstance(record, Mapping) else None
        if not isinstance(query, str):
            raise ConfigError(f"{place}: no query; expected an MS MARCO record with query and passages")
        passages = record.get("passages")
        texts: Sequence[Any] | None = None
        if isinstance(passages, Mapping):
            texts = passages.get("passage_text")
        elif isinstance(passages, list):
            texts = [passage.get("passage_text") if isinstance(passage, Mapping) else None for passage in passages]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{place}: no passages.passage_text; expected a list of texts there")
        qid = str(record.get("query_id", number))
        for position, text in enumerate(texts):
            # The official files hold a few blank texts; the server would rightly refuse them.
            if query.strip() and text.strip():
                yield PairRow(qid, f"{qid}-{position}", _valid(query, place), _valid(text, place))


def _valid(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no message can carry
        raise ConfigError(f"{place}: a text is not valid Unicode: it holds half of a surrogate pair") from None
    return text.strip()
