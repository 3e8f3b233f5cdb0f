#!/bin/bash
# Install what tests need besides Python, from Debian's or Ubuntu's packages. Without root or apt: say what is missing.
#
#   tests/packages.sh "PROGRAM-OR-FILE ..." PACKAGE ...      # the first say whether anything has to be done
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
read -ra needed <<< "$1"
shift

missing=()
for name in "${needed[@]}"; do
    command -v "$name" > /dev/null || [[ -e $name ]] || missing+=("$name")
done
((${#missing[@]})) || exit 0

if ((EUID != 0)) || ! command -v apt-get > /dev/null; then
    echo "missing: ${missing[*]}; as root, on Debian or Ubuntu: apt-get install $*" >&2
    exit 1
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends "$@"; } > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    exit 1
fi
