#!/bin/sh
# Runs the C tests, then the Python tests: all of both, even if some fail. Needs BUILD and PYTHON.
set -u
failed=0

echo "== C tests"
ctest --test-dir "$BUILD" --output-on-failure --no-tests=error || failed=1

echo "== Python tests"
# The package is tested as built, from the build folder, without being installed.
PYTHONPATH="$PWD/$BUILD/python${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m pytest tests/python -q -rs || failed=1

exit $failed
