"""The process of the engine `trl`: `python -m remit_megatron.posttrain.worker [FOLDER]`.

With a folder it runs that stage and ends with its exit code; ranks of a launcher are started so. Without one it reads
folders from stdin, a line each, and answers each with a line of JSON, {"code", "message"}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import RemitError, RunError
from remit_megatron.posttrain.contract import WORK
from remit_megatron.posttrain.engines import LOG, OUTCOME
from remit_megatron.posttrain.host import PACKAGES, Stop


def run(folder: Path, stop: Stop) -> tuple[int, str | None]:
    """(exit code, message for the user; None: the log says it)."""
    try:
        missing = [name for name in PACKAGES if not _has(name)]
        if missing:
            return 2, f"{sys.executable} lacks {', '.join(missing)}: pip install 'remit-megatron[post]', or name an " \
                      "interpreter that has them as engine.python"  # fmt: skip
        from remit_megatron.posttrain.trl_engine import run_trl

        run_trl(folder, stop)
    except RemitError as error:
        print(f"remit: {error}", file=sys.stderr, flush=True)
        return error.exit_code, str(error)
    except OSError as error:
        traceback.print_exc()
        return RunError.exit_code, f"{error.filename or folder}: {error.strerror or error}"
    except Exception as error:  # noqa: BLE001 - the engine's own, whatever they are; the log has the stack
        traceback.print_exc()
        return RunError.exit_code, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return 0, None


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def run_once(folder: Path) -> int:
    """The exit code of a stage; what went wrong on any rank is left for whoever started the launcher."""
    code, message = run(folder, Stop())
    if code:
        write_atomically(folder / WORK / OUTCOME, json.dumps({"code": code, "message": message}).encode())
    return code


def serve(stop: Stop) -> None:
    """Answer requests until stdin ends. What stages print goes to their own logs."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        stop.requested = False
        with (folder / WORK / LOG).open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code, message = run(folder, stop)
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps({"code": code, "message": message}), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(run_once(Path(sys.argv[1])))
    serve(Stop())
