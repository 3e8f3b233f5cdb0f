#!/bin/bash
# What the tests of a SLURM on 127.0.0.1 need, from Debian's or Ubuntu's packages. Without root or apt: what is missing.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge libslurm-dev gcc shellcheck)
PATH=$PATH:/usr/sbin:/sbin

missing=()
for program in slurmctld slurmd sbatch munged gcc shellcheck; do
    command -v "$program" > /dev/null || missing+=("$program")
done
[[ -e /usr/include/slurm/spank.h ]] || missing+=(slurm/spank.h)
((${#missing[@]})) || exit 0

if ((EUID != 0)) || ! command -v apt-get > /dev/null; then
    echo "missing: ${missing[*]}; as root, on Debian or Ubuntu: apt-get install ${packages[*]}" >&2
    exit 1
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; } > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    exit 1
fi
