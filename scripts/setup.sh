#!/usr/bin/env bash
# Make .venv from requirements.lock and install the package into it. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=""; [ "$(id -u)" = 0 ] || root="sudo"
python=""
for candidate in python3 python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$candidate; break; fi
done
if [ -z "$python" ] || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "installing Python with venv from Debian's packages …"
  $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null
  python=python3
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing the locked requirements into .venv …"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
touch .venv/ready
