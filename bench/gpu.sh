#!/usr/bin/env bash
# Run the plan of bench/gpu_plan.py on a GPU machine, with or without a network, in at most 560 seconds.
#
#   bench/gpu.sh [FOLDER]              write results to FOLDER, by default $OUT or bench-gpu
#   bench/gpu.sh --dry-run [FOLDER]    the whole plan at toy size on a CPU, through Triton's interpreter
#
# If a step fails, the others still run, and the exit code is 1. Wheels in ./.whl are installed first, and temposae need not
# be installed. Without a clone, set TEMPOSAE_COMMIT to the commit that is measured. PYTHON names the interpreter, by
# default python3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
trap : INT TERM # the plan stops its step and writes what it has
ln -s "$PWD" "$site/temposae" # the repository's root is the package
mkdir "$site/temposae.egg-info" # parts are found by the package's entry points
sed -n 's/^version = "\(.*\)"/Metadata-Version: 2.1\nName: temposae\nVersion: \1/p' pyproject.toml >"$site/temposae.egg-info/PKG-INFO"
printf '[temposae.parts]\ntemposae = temposae.variants\n' >"$site/temposae.egg-info/entry_points.txt"
export PYTHONPATH=$site:$site/wheels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if compgen -G '.whl/*.whl' >/dev/null; then
  timeout -k 5 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site/wheels" .whl/*.whl || echo "wheels: not installed"
fi
"$python" -m temposae.bench.gpu_plan --work "$site" --seconds $((560 - SECONDS)) "$@"
