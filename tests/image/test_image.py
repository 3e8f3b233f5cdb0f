"""The cpu-smoke image, from a Debian base that is made here; then the smoke's training in its container.

With buildah, which needs no daemon, cgroups or namespaces; `ENGINE=podman make test-image` is for where containers run.
What pip on this machine is configured with holds in the build too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
ENGINE = os.environ.get("ENGINE", "buildah")


def missing() -> str | None:
    if os.geteuid() != 0:
        return "building an image without an engine needs root"
    absent = [name for name in (ENGINE, "debootstrap") if shutil.which(name) is None]
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


def debian(folder: Path) -> None:
    """A minimal Debian in a folder."""
    if folder.exists():
        return
    done = subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"debootstrap has made no Debian here: {(done.stderr + done.stdout).strip().splitlines()[-1]}")


def base_of_buildah(rootfs: Path, store: Path, name: str) -> None:
    buildah = ["buildah", "--storage-driver=vfs", f"--root={store}/store", f"--runroot={store}/run"]
    container = run([*buildah, "from", "scratch"]).strip()
    run([*buildah, "add", "--quiet", container, str(rootfs), "/"])
    run([*buildah, "commit", "--quiet", "--rm", container, name])


def base_of_podman(rootfs: Path, store: Path, name: str) -> None:
    archive = store / "rootfs.tar"
    run(["tar", "-C", str(rootfs), "-cf", str(archive), "."])
    run(["podman", "import", "--quiet", str(archive), name])
    archive.unlink()


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: its package has no wheel for this machine")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.image
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_smoke_runs_in_an_image_made_here(tmp_path: Path) -> None:
    store = Path(os.environ.get("BUILDAH_STORE", tmp_path))
    base = f"localhost/debian:{SUITE}"
    debian(store / "rootfs")
    {"buildah": base_of_buildah, "podman": base_of_podman}[ENGINE](store / "rootfs", store, base)
    arguments = ["--pull=never", f"--build-arg=CPU_BASE_IMAGE={base}", *pip_mounts()]
    said = run(
        ["examples/smoke/container.sh", "python", "-m", "examples.smoke", "--quick", "--out", "/tmp/smoke"],
        ENGINE=ENGINE,
        BUILD_ARGS=" ".join(arguments),
        BUILDAH_STORE=str(store),
    )
    assert "exact match" in said.lower(), said[-3000:]
