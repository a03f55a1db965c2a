#!/usr/bin/env bash
# Sets up on a fresh machine, then runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/utils/environment.sh"
environment requirements.txt tests/requirements.txt
exec "$PYTHON" -m pytest "$@"
