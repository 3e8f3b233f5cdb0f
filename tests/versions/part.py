"""One interpreter's part in tests/versions: `python -m tests.versions.part RANKS JOB.json` trains the recipes of a job.

The caller compares what they leave.
"""

import json
import sys
from pathlib import Path

from tests.ranks import run_ranks
from tests.train.runs import train_all


def main(ranks: int, recipes: list[dict[str, object]]) -> None:
    for outcomes in run_ranks(ranks, train_all, recipes):
        assert outcomes == [(0, "")] * len(recipes), outcomes


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
