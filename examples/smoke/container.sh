#!/bin/bash
# Build the Dockerfile's cpu-smoke image and train in it: `make docker-smoke`.
#
#   examples/smoke/container.sh [COMMAND ...]     # what runs in the container; default: the image's own, make smoke
#
# ENGINE: docker, podman or buildah; default: the first of them that is here. BUILD_ARGS: more arguments of the build,
# such as --build-arg CPU_BASE_IMAGE=debian:bookworm-slim. BUILDAH_STORE: a folder that holds buildah's images.
set -euo pipefail
cd "$(dirname "$0")/../.."
image=remit-megatron:cpu-smoke
read -ra build_args <<< "${BUILD_ARGS:-}"

engine=${ENGINE:-}
for name in docker podman buildah; do
    [[ -n $engine ]] || ! command -v "$name" > /dev/null || engine=$name
done
[[ -n $engine ]] || { echo "container.sh: neither docker nor podman nor buildah is here: install one" >&2; exit 2; }

if [[ $engine != buildah ]]; then
    "$engine" build --target cpu-smoke --tag "$image" "${build_args[@]}" .
    exec "$engine" run --rm --init "$image" "$@"
fi

# buildah needs no daemon, and with these settings neither user namespaces nor overlay mounts: it works in a container.
buildah=(buildah --storage-driver vfs)
[[ -z ${BUILDAH_STORE:-} ]] || buildah+=(--root "$BUILDAH_STORE/store" --runroot "$BUILDAH_STORE/run")
"${buildah[@]}" bud --isolation chroot --format docker --target cpu-smoke --tag "localhost/$image" "${build_args[@]}" .
container=$("${buildah[@]}" from --pull-never "localhost/$image")
trap '"${buildah[@]}" rm "$container" > /dev/null' EXIT
(($#)) || set -- make smoke
"${buildah[@]}" run --isolation chroot --workingdir /opt/remit_megatron "$container" -- "$@"
