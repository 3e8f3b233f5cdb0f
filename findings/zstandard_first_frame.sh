#!/bin/bash
# zstandard 0.25.0: what does its stream_reader give of a file of two frames, as `cat a.zst b.zst` and pzstd make it?
# Guess: both, as gzip.open gives all members of a .gz. Seen: the first one, then the end of the file, without a word;
# read_across_frames=True is needed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet zstandard==0.25.0
"$work/venv/bin/python" - <<'P'
import gzip
import io

import zstandard

lines = (b"one\n", b"two\n")
joined = b"".join(map(zstandard.compress, lines))
plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(joined)).read()
across = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(joined), read_across_frames=True).read()
packed = gzip.decompress(b"".join(map(gzip.compress, lines)))
print(f"zstandard {zstandard.__version__}: {plain}, with read_across_frames {across}; gzip {packed}")
assert (plain, across, packed) == (b"one\n", b"one\ntwo\n", b"one\ntwo\n"), "this version does otherwise"
P
