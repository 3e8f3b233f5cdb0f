#!/bin/bash
# buildah and debootstrap, from Debian's or Ubuntu's packages where root and apt are there. Where they cannot be had, the
# test is skipped and says so.
set -euo pipefail
packages=(buildah debootstrap)
PATH=$PATH:/usr/sbin:/sbin

missing=0
for program in "${packages[@]}"; do
    command -v "$program" > /dev/null || missing=1
done
if ((!missing || EUID != 0)) || ! command -v apt-get > /dev/null; then
    exit 0
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; } > "$log" 2>&1; then
    tail -n 5 "$log" >&2
fi
