#!/bin/sh
# Makes the environment that kvpress is measured in: sh docs/benchmarks/peers/setup.sh [FOLDER]
#
# It is not amkv's own: kvpress wants transformers below 5.3, amkv 5.17 or newer. PYTHON names the
# interpreter (3.11 or newer). torch goes in first, so that kvpress finds its wish granted and does
# not bring another build: on a machine without a GPU, point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL
# at PyTorch's CPU builds, or gigabytes of CUDA packages come along.
set -eu

folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/amkv-peers}

"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet torch==2.13.0
"$folder/bin/python" -m pip install --quiet kvpress==0.5.5 transformers==5.2.0
"$folder/bin/python" -m pip check
"$folder/bin/python" -c 'import kvpress, torch, transformers; print(torch.__version__, transformers.__version__)'
echo "ready: $folder/bin/python docs/benchmarks/peers/kvpress_recall.py --help"
