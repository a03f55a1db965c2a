#!/usr/bin/env bash
# Sets up on a fresh machine, then runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/utils/environment.sh"
environment requirements.txt tests/requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the networks of tests are small: processes pay, threads do not
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
