#!/bin/bash
# The suite under another Python, with Megatron-Core 0.19.2 and PyPI's own torch.
#
#   tests/versions/python.sh FOLDER [PYTHON] [TESTS ...]    # default: the newest Python here, and the whole suite
#
# Without a newer Python here and as root on Debian, one is unpacked from a newer release by debootstrap.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1 python=${2:-}
shift 2 || shift $#

newest() {
    local version path
    for version in 3.14 3.13 3.12; do
        for path in "$(command -v "python$version" || true)" "$HOME/.pyenv/versions/$version".*/bin/python; do
            if [[ -x $path ]] && "$path" -c "import ensurepip" 2> /dev/null; then
                echo "$path"
                return
            fi
        done
    done
}

debian() {  # its own root: what runs there sees this folder only
    local root=$folder/debian
    mkdir -p "$folder"
    bash tests/packages.sh debootstrap debootstrap
    [[ -e $root/.made ]] || debootstrap --variant=minbase \
        --include=python3,python3-venv,python3-dev,build-essential,git,make,ca-certificates trixie "$root" > "$root.log"
    touch "$root/.made"
    mkdir -p "$root/src" "$root/proc" "$root/dev/shm"
    cp /etc/resolv.conf "$root/etc/"
    git archive HEAD | tar -x -C "$root/src"
    local of_pip=()
    mapfile -t of_pip < <(compgen -e | grep -E '^(PIP_|SSL_CERT|REQUESTS_CA|https?_proxy$|HTTPS?_PROXY$)' || true)
    local pass=() name
    for name in "${of_pip[@]}"; do pass+=("$name=${!name}"); done
    mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
    mountpoint -q "$root/dev/shm" || mount -t tmpfs tmpfs "$root/dev/shm"
    trap 'umount "$folder/debian/proc" "$folder/debian/dev/shm"' EXIT
    chroot "$root" /usr/bin/env -i "${pass[@]}" HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        bash -c 'cd /src && exec bash tests/versions/python.sh build/python /usr/bin/python3 "$@"' python.sh "$@"
}

python=${python:-$(newest)}
if [[ -z $python ]]; then
    debian "$@"
    exit
fi
venv=$folder/venv
if [[ ! -e $venv/.installed || pyproject.toml -nt $venv/.installed ]]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=24"
    "$venv/bin/python" -m pip install --quiet "torch==2.13.0" "megatron-core==0.19.2" -e ".[dev]"
    touch "$venv/.installed"
fi
(($#)) || set -- tests
OMP_NUM_THREADS=1 exec "$venv/bin/python" -W ignore -m pytest -rs -n 2 --dist loadfile "$@"
