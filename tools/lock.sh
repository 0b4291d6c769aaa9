#!/usr/bin/env bash
# Write the lock files: exact versions and hashes of all dependencies, for each Python that setup.py supports.
#   bash tools/lock.sh                        after a change of setup.py: keep locked versions, add missing packages
#   bash tools/lock.sh --upgrade              the newest versions inside setup.py's ranges
#   bash tools/lock.sh --upgrade-package NAME
# Then run the tests, and commit requirements/. Versions are those for Linux on x86_64.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv="${MOETRON_VENV:-.venv}/bin/uv"
[ -x "$uv" ] || { echo "lock: no $uv; run bash tools/setup_env.sh first" >&2; exit 2; }
torch="torch==$(sed -n 's/^readonly TORCH_VERSION=//p' tools/setup_env.sh)"
read -r first end < <(sed -n 's/.*python_requires=">=3\.\([0-9]*\),<3\.\([0-9]*\)".*/\1 \2/p' setup.py)

# compile PYTHON OUTPUT ARG...: torch and its CUDA libraries are left out, since their build depends on the machine.
compile() {
  local python="$1" output="$2"
  shift 2
  "$uv" pip compile --quiet --python-version "$python" --python-platform linux --generate-hashes --no-emit-index-url \
    --no-emit-find-links --annotation-style line --custom-compile-command "bash tools/lock.sh" --constraints <(echo "$torch") \
    --output-file "$output" "$@" setup.py requirements/environment.in >/dev/null
  awk '/^[a-z0-9]/ { out = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/ } !out' "$output" >"$output.new"
  mv "$output.new" "$output"
}

for ((minor = first; minor < end; minor++)); do
  lock="requirements/py3$minor"
  compile "3.$minor" "$lock-dev.lock" --extra dev "$@"
  compile "3.$minor" "$lock.lock" --constraints "$lock-dev.lock"
  echo "lock: $lock.lock ($(grep -c '^[a-z0-9]' "$lock.lock") packages), $lock-dev.lock" \
    "($(grep -c '^[a-z0-9]' "$lock-dev.lock") packages)"
done
