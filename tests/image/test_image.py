"""The cpu-smoke image, from a Debian base that is made here, with buildah; then the smoke's training in its container.

What pip on this machine is configured with holds in the build too. Minutes long: `make test-image`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"


def missing() -> str | None:
    if os.geteuid() != 0:
        return "building an image without an engine needs root"
    absent = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def run(command: list[str], **more: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}"
    return done.stdout


def pip_mounts() -> list[str]:
    """Build arguments by which pip finds in the build what it finds here: its configuration, and folders it names."""
    listed = run([sys.executable, "-m", "pip", "config", "list"])
    debug = run([sys.executable, "-m", "pip", "config", "debug"])
    files = {line.split(",")[0].strip() for line in debug.splitlines() if line.endswith("exists: True")}
    named = {word.removeprefix("file://") for word in listed.replace("'", " ").split() if "/" in word}
    paths = {Path(name) for name in files | named if name.startswith("/") and Path(name).exists()}
    # An index on disk links to files beside itself.
    paths = {path.parent if path.name == "simple" else path for path in paths}
    certificates = {path for path in paths if path.suffix in (".pem", ".crt")}
    arguments = [f"--volume={path}:{path}:ro" for path in sorted(paths - certificates)]
    for path in certificates:  # elsewhere, so that the base's own are not hidden while they are installed
        arguments += [f"--volume={path}:/run/pip-certificates.pem:ro", "--build-arg=PIP_CERT=/run/pip-certificates.pem"]
    return arguments


@pytest.mark.image
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_smoke_runs_in_an_image_made_here(tmp_path: Path) -> None:
    store = Path(os.environ.get("BUILDAH_STORE", tmp_path))
    base, rootfs = f"localhost/debian:{SUITE}", store / "rootfs"
    buildah = ["buildah", "--storage-driver=vfs", f"--root={store}/store", f"--runroot={store}/run"]
    if not rootfs.exists():
        run(["debootstrap", "--variant=minbase", SUITE, str(rootfs)])
    container = run([*buildah, "from", "scratch"]).strip()
    run([*buildah, "add", "--quiet", container, str(rootfs), "/"])
    run([*buildah, "commit", "--quiet", "--rm", container, base])
    arguments = ["--pull-never", f"--build-arg=CPU_BASE_IMAGE={base}", *pip_mounts()]
    said = run(
        ["launch/container_smoke.sh", "python", "-m", "launch.smoke", "--quick", "--out", "/tmp/smoke"],
        ENGINE="buildah",
        BUILD_ARGS=" ".join(arguments),
        BUILDAH_STORE=str(store),
    )
    assert "exact match" in said.lower(), said[-3000:]
