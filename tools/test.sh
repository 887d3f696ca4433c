#!/usr/bin/env bash
# Sets up a virtual environment (VENV, .venv by default) with everything a developer needs, and passes the tests:
# formatting, lint, types, then the default suite. Arguments go to pytest: `bash tools/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install -q -c constraints.txt -e '.[dev]'
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
"$venv/bin/pytest" -n 2 "$@"
