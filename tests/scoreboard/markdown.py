"""The table as Markdown."""

from collections.abc import Iterable, Sequence

from tests.scoreboard.registry import GROUPS, Line
from tests.scoreboard.results import Recorded, Results

_HEAD = """# Scoreboard: load held, faults survived, bad inputs tried, nothing lost

What the server promises, tried against real servers and written by this command; run it again to see it for yourself:

```bash
python -m tests.scoreboard            # full: as much of everything as the pass lines ask for; takes hours
python -m tests.scoreboard --quick    # a slice of each row, half a minute at most, into the folder scoreboard
python -m tests.scoreboard --rows G1,F --seed 7   # some rows, or groups, anew; the others stay as they are
```

Each row has its own date, commit and seed. *not run* and *cannot tell* are no passes; the sentence beside says why.
What a row measured besides, and the command that repeats it: [scoreboard.json](scoreboard.json).

K3 needs another server, which calls the model `fake` and answers at `/v1/embeddings`. `{port}` and `{model}` are
filled in:

```bash
pip install 'infinity-emb[server,torch,optimum]==0.0.78'   # in an environment of its own
export SCOREBOARD_PEER_NAME='Infinity 0.0.78'
export SCOREBOARD_PEER='infinity_emb v2 --model-id {model} --served-model-name fake --engine torch
  --device cpu --port {port} --url-prefix /v1 --no-bettertransformer'
python -m tests.scoreboard --rows K3
```
"""
_VERDICTS = {True: "pass", False: "**fail**", None: "cannot tell"}


def markdown(lines: Sequence[Line], results: Results) -> str:
    """The whole document."""
    shown = {line.key: results.rows[line.key] for line in lines if line.key in results.rows}
    parts = [_HEAD, _machines(shown), _summary(lines, shown)]
    for letter, title in GROUPS.items():
        group = [line for line in lines if line.key.startswith(letter)]
        if group:
            parts.append(f"## {title}\n\n{_group(group, shown)}")
    return "\n".join(parts)


def _machines(shown: dict[str, Recorded]) -> str:
    keys: dict[str, list[str]] = {}
    for key, recorded in shown.items():
        if recorded.was_run:
            keys.setdefault(recorded.origin.machine, []).append(key)
    if not keys:
        return "No row was run yet.\n"
    if len(keys) == 1:
        return f"The machine: {next(iter(keys))}\n"
    return "The machines:\n\n" + "".join(f"- {', '.join(its)}: {machine}\n" for machine, its in keys.items())


def _summary(lines: Sequence[Line], shown: dict[str, Recorded]) -> str:
    verdicts = [verdict(shown.get(line.key)) for line in lines]
    names = {"pass": "passed", "**fail**": "failed", "cannot tell": "cannot tell", "not run": "not run"}
    counts = [f"{verdicts.count(each)} {name}" for each, name in names.items() if each in verdicts]
    return f"Of {len(lines)} rows: {', '.join(counts)}.\n"


def verdict(recorded: Recorded | None) -> str:
    """As the table shows it."""
    return "not run" if recorded is None or not recorded.was_run else _VERDICTS[recorded.passed]


def _group(group: Iterable[Line], shown: dict[str, Recorded]) -> str:
    rows = ["| # | what is tried | figure | pass line | | when, commit |", "| --- | --- | --- | --- | --- | --- |"]
    for line in group:
        recorded = shown.get(line.key)
        cells = [line.key, line.title, _figure(recorded), line.pass_line, verdict(recorded), _origin(recorded)]
        rows.append("| " + " | ".join(_cell(each) for each in cells) + " |")
    return "\n".join(rows) + "\n"


def _figure(recorded: Recorded | None) -> str:
    if recorded is None:
        return ""
    return ". ".join(part.rstrip(".") for part in (recorded.text, recorded.note) if part)


def _origin(recorded: Recorded | None) -> str:
    if recorded is None or not recorded.was_run:
        return ""
    origin = recorded.origin
    extent = "quick" if origin.is_quick else "full"
    return f"{origin.ended_at[:10]}, {_short(origin.commit)}, {extent}, {_duration(origin.took_s)}"


def _short(commit: str) -> str:
    """A commit's first characters; what is no commit as it is."""
    bare = commit.removesuffix("+")
    return bare[:9] + commit[len(bare) :] if len(bare) == 40 else commit


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
