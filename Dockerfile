# Two images. `train`, the default, for GPUs: on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex stay.
# `cpu-smoke`, for any machine: on plain Python or Debian, with everything that `make smoke` needs.
#
#   docker build -t remit-megatron .
#   docker build --target cpu-smoke -t remit-megatron:cpu-smoke .      # or: make docker-smoke
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE_IMAGE=python:3.11-slim-bookworm

FROM ${CPU_BASE_IMAGE} AS cpu-smoke
# A file with certificates that pip is to trust, where a proxy has its own; mount it while building.
ARG PIP_CERT
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/remit_megatron
# First what changes seldom. The stamp is the Makefile's: its targets find the environment made.
COPY pyproject.toml constraints.txt ./
RUN "$(command -v python3.11 || command -v python3)" -m venv .venv \
    && .venv/bin/python -c "import tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['train'], sep='\n')" \
        > /tmp/requirements.txt \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
COPY . ./
RUN .venv/bin/pip install --no-cache-dir --no-deps --editable . && touch .venv/.installed-train
ENV PATH=/opt/remit_megatron/.venv/bin:$PATH
CMD ["make", "smoke"]

FROM ${BASE_IMAGE} AS train
ARG PIP_CERT
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/remit_megatron
COPY pyproject.toml ./
# torch and NumPy stay the base image's: its other packages are built against them.
RUN python -c "import re, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        needed = project['dependencies'] + project['optional-dependencies']['train']; \
        kept = ('torch', 'numpy'); \
        print(*(d for d in needed if re.split('[^a-z]', d)[0] not in kept), sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
COPY . ./
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && remit --version
CMD ["remit", "doctor"]
