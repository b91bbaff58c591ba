#!/bin/sh
# Collects what kvpress needs on a machine with a GPU, no network, Python 3.12, torch and a newer
# transformers: sh docs/benchmarks/real/kvpress_wheels.sh FOLDER (14 MB). There:
#
#     python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
#     PYTHONPATH=SITE python3 docs/benchmarks/real/kvpress_real.py --help
#
# transformers below 5.3 wants tokenizers up to 0.23.0 and huggingface_hub below 2. kvpress also
# names datasets, fire, pandas, peft and requests, for presses that fetch something: the script
# does without.
set -eu

"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$1" \
    kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2 cachetools==5.5.2 typer-slim==0.24.0
du -sh "$1"
