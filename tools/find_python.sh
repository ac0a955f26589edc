#!/usr/bin/env bash
# Print the first Python that runs and is recent enough, or fail.
#
#   tools/find_python.sh MINIMUM CANDIDATE...
#
# The candidate `pyenv` stands for every Python that pyenv keeps, if there is a pyenv. A candidate is
# tried by running it: pyenv's shims are on the PATH for versions that are not switched on, and then
# they fail.
set -u

minimum=$1
shift

candidates=()
for candidate in "$@"; do
    if [ "$candidate" != pyenv ]; then
        candidates+=("$candidate")
    elif command -v pyenv >/dev/null 2>&1; then
        candidates+=("$(pyenv root)"/versions/*/bin/python)
    fi
done

for python in ${candidates[@]+"${candidates[@]}"}; do
    # Print the interpreter's own path, so that a shim is not asked a second time.
    if "$python" -c "
import ensurepip, sys, venv
if sys.version_info < tuple(int(part) for part in '$minimum'.split('.')):
    raise SystemExit(1)
print(sys.executable)
" 2>/dev/null; then
        exit 0
    fi
done
exit 1
