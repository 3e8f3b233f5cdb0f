"""The README's table of versions, from tests/versions/results/: `python -m tests.versions.matrix` writes it there."""

import json
from pathlib import Path
from typing import Any

from tests.versions.results import FOLDER, OUTCOMES

README = Path(__file__).parents[2] / "README.md"
FEW = 20
"""Parts of the suite: who ran no more has not run everything."""
HEAD = "| Python | Megatron-Core | torch | passed | failed | skipped | tests of |\n|---|---|---|---|---|---|---|\n"


def table() -> str:
    rows = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    rows.sort(key=lambda row: (number(row["python"]), number(row["megatron-core"])))
    whole = max((len(row["parts"]) for row in rows), default=0)
    return HEAD + "".join(line(row, whole) for row in rows)


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split("."))


def line(row: dict[str, Any], whole: int) -> str:
    parts = row["parts"]
    named = "everything" if len(parts) == whole > FEW else ", ".join(parts)
    passed, failed, error, skipped = (sum(part[outcome] for part in parts.values()) for outcome in OUTCOMES)
    cells = (row["python"], row["megatron-core"], row["torch"], passed, failed + error, skipped, named)
    return "| " + " | ".join(map(str, cells)) + " |\n"


def replaced(text: str) -> str:
    """A README with the table as it should be."""
    start = text.index(HEAD)
    end = text.index("\n\n", start) + 1
    return text[:start] + table() + text[end:]


if __name__ == "__main__":
    README.write_text(replaced(README.read_text()))
