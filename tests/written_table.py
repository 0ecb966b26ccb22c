"""What the tables in docs/ share: which rows are asked for, and the files they are written to."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from anomaly_detection.config import atomic_path


def chosen_names(
    parser: argparse.ArgumentParser, words: Iterable[str], known: Iterable[str]
) -> list[str]:
    """The names that words (`a`, `b` or `a,b`) say; all of them for none."""
    known = list(known)
    names = [name for word in words for name in word.split(",") if name] or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def write_table(
    path: Path,
    key: str,
    rows: Iterable[dict[str, Any]],
    introduction: str,
    header: Sequence[str],
    cells: Callable[[dict[str, Any]], Sequence[str]],
    by_name: bool = False,
) -> None:
    """Write rows to a JSON file and a Markdown table beside it; rows of another `key` stay.

    `by_name` sorts by the key; else a new row comes last.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    table = {row[key]: row for row in kept} | {row[key]: row for row in rows}
    if by_name:
        table = dict(sorted(table.items()))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(list(table.values()), indent=1) + "\n", encoding="utf-8")
    lines = [header, ["---"] * len(header), *map(cells, table.values())]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{introduction}\n{text}\n", encoding="utf-8")
