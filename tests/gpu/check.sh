#!/bin/bash
# Check on one GPU what was built on processors: `losses` (packs against trl), `speed` (steps, memory, sampling); both by default.
#   tests/gpu/check.sh wheels   once, where packages can be had: the wheels that a machine with torch lacks, into .wheels (19 MB)
#   tests/gpu/check.sh          there, offline; each part ends within 5 minutes. Without a GPU, or with --dry: a dry run
# PYTHON: the interpreter that has torch; WHEELS: the folder; TARGET: its Python, for `wheels`; OUT: where the JSON files go
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)} wheels=${WHEELS:-.wheels}

if [ "${1:-}" = wheels ]; then
  names='trl|transformers|datasets|peft|pydantic|pydantic[-_]core|annotated[-_]types|typing[-_]inspection|typing[-_]extensions|fastcore|dill|multiprocess'
  platforms=$(for n in manylinux_2_28 manylinux_2_17 manylinux2014; do echo "--platform ${n}_x86_64"; done)
  rm -rf "$wheels"
  # shellcheck disable=SC2046,SC2086
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "${TARGET:-3.12}" $platforms -d "$wheels" \
    $(grep -iE "^($names)==" constraints.txt)
  du -sh "$wheels"
  exit
fi
if ! "$python" -c 'import sys, importlib.util as own; sys.exit(own.find_spec("trl") is None)'; then
  compgen -G "$wheels/*.whl" >/dev/null || { echo "check: $python has no trl and $wheels no wheels; run \`tests/gpu/check.sh wheels\` where packages can be had" >&2; exit 2; }
  folder=$(mktemp -d)
  site=$folder/site-packages  # by that name dill knows that they are libraries
  trap 'rm -rf "$folder"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=${site:+$site:}$PWD:$PWD/tests/bench${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
case "$*" in *-*)
  "$python" tests/gpu/gpu_check.py "$@"
  exit ;;
esac
failed=0
for part in ${*:-losses speed}; do  # each in a process of its own, for an error of CUDA stays in its process
  timeout -k 5 285 "$python" tests/gpu/gpu_check.py "$part" || failed=$?
done
exit "$failed"
