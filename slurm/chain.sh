#!/bin/bash
# Submit a job as a chain of links, each of which goes on where the one before stopped: for sites that allow no requeue
# after the time limit, or that prefer short jobs. A link that fails or is cancelled ends the chain; links that come
# after the run's end find DONE and stop at once.
#
#   slurm/chain.sh 5 [sbatch options] slurm/train.sbatch      # prints a job id a line
set -eu
if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: chain.sh LINKS [sbatch options] JOB.sbatch" >&2
    exit 2
fi
links=$1 previous='' submitted=()
shift
for ((link = 1; link <= links; link++)); do
    export REMIT_CHAIN=$link/$links
    if ! previous=$(sbatch --parsable --kill-on-invalid-dep=yes ${previous:+--dependency=afterok:$previous} "$@"); then
        # Half a chain would hand over to nobody.
        ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
        echo "link $link of $links was not accepted; the ${#submitted[@]} before it are cancelled" >&2
        exit 1
    fi
    previous=${previous%%;*}  # a federation appends the cluster's name
    submitted+=("$previous")
done
printf '%s\n' "${submitted[@]}"
