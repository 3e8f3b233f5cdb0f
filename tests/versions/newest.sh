#!/bin/bash
# An environment with another Megatron-Core on top of one that has the rest.
#
#   tests/versions/newest.sh PYTHON FOLDER [MEGATRON-CORE]     # PYTHON: of the environment below; default: 0.19.2
#
# --ignore-requires-python: from 0.17 on Megatron-Core asks for Python 3.12, and its wheels for 3.11 work.
set -euo pipefail
python=$1 folder=$2 version=${3:-0.19.2}
stamp=$folder/.installed-$version
[[ ! -e $stamp ]] || exit 0
rm -rf "$folder"
"$python" -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/below.pth"
pwd > "$site/source.pth"
# Into a folder and not into the environment: pip would uninstall the version below.
"$python" -m pip install --quiet --disable-pip-version-check --ignore-requires-python --no-deps --target "$site" \
    "megatron-core==$version"
touch "$stamp"
