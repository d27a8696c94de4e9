#!/usr/bin/env bash
# Run the GPU tests and the main comparisons on a GPU machine, with or without a network, in at most 8 minutes.
#
#   bench/gpu.sh [FOLDER]      write results to FOLDER, by default $OUT or bench-gpu
#
# If a part fails, the others still run, and the exit code is 1. Wheels in ./.whl are installed first. Without a clone, set
# TEMPOSAE_COMMIT to the commit that is measured.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench-gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
log=$out/log.txt summary=$out/summary.txt
: >"$log"; : >"$summary"
deadline=$((SECONDS + 470)) failed=0

say() { echo "$*" | tee -a "$summary"; }

# part NAME SECONDS COMMAND...: run a command; its output goes to the log, its outcome to the summary
part() {
  local name=$1 limit=$2 began=$SECONDS code=0 left=$((deadline - SECONDS))
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 10)); then say "$name: skipped, no time left"; return; fi
  timeout -k 5 "$limit" "$@" >"$site/part" 2>&1 || code=$?
  { echo "== $name: $*"; cat "$site/part"; } >>"$log"
  ((code)) && failed=1
  case $code in
    0) say "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: stopped after $limit s" ;;
    *) say "$name: failed with code $code after $((SECONDS - began)) s"; tail -n 15 "$site/part" ;;
  esac
}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/temposae" # the repository's root is the package
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
if compgen -G '.whl/*.whl' >/dev/null; then
  part wheels 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site/wheels" .whl/*.whl
  export PYTHONPATH=$site:$site/wheels${PYTHONPATH#"$site"}
fi

python3 - <<'PYTHON' 2>&1 | tee -a "$summary"
import importlib.util as util
import platform

names = "torch triton numpy pydantic typer rich yaml safetensors matplotlib transformer_lens pytest pytest_timeout pytest_benchmark"
missing = [name for name in (*names.split(), "sparsify", "sae_lens", "dictionary_learning") if not util.find_spec(name)]
if util.find_spec("torch"):
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "NO GPU"
    print(f"{gpu}; python {platform.python_version()}, torch {torch.__version__}")
print("missing:", ", ".join(missing) or "nothing")
PYTHON

has() { python3 -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
bench() { local name=$1 limit=$2; shift 2; part "$name" "$limit" python3 -m temposae "$@"; }

if has pytest; then
  options=(-q -m gpu -p no:cacheprovider --ignore=tests/bench/test_ops.py) # ops are timed below
  # without the plugin, pytest would reject the timeout in pyproject.toml
  has pytest_timeout || options+=(-o addopts="--import-mode=importlib -ra")
  part tests 150 python3 -m pytest "${options[@]}"
  say "tests: $(grep -E '(passed|failed|error|skipped).* in [0-9.]+s' "$site/part" | tail -n 1)"
else
  say "tests: skipped, pytest is missing"
fi
size=(--device cuda --n 8192 --d 2304 --k 64)
bench headline 170 bench step "${size[@]}" --f 65536 --own --json "$out/headline.json"
bench peers 100 bench peers --steps 20 --rounds 1 --json "$out/peers.json"
bench small 80 bench step "${size[@]}" --f 16384 --json "$out/small.json"
temposae_only=(--provider temposae --rounds 8)
bench activations 40 bench step "${size[@]}" --f 65536 "${temposae_only[@]}" --activation batchtopk --activation jumprelu \
  --json "$out/activations.json"
bench several 30 bench step "${size[@]}" --f 2304 "${temposae_only[@]}" --dictionaries 8 --json "$out/several.json"
bench ops 50 bench ops "${size[@]}" --f 65536 --json "$out/ops.json"
bench profile 40 profile "${size[@]}" --f 65536 --steps 3 --trace "$out/trace.json" --json "$out/profile.json"

for name in headline small activations several ops; do
  [ -s "$out/$name.json" ] && python3 -m temposae bench table "$out/$name.json" | tee -a "$summary"
done
echo
head -n 12 "$summary" | grep -E '^[a-z]+: |; python'
echo "all results: $out"
exit $failed
