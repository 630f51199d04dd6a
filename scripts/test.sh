#!/usr/bin/env bash
# Sets up .venv once, then runs every check: ruff, mypy and the tests. Leaves nothing running and, outside of
# .venv, nothing lying about.
#   scripts/test.sh [--fast] [argument of pytest ...]     --fast leaves out the tests marked slow
# Tests run three at a time where they can, unless there are arguments for pytest.
# Exits with pytest's code; with 1 when the tests pass and another check does not.
set -euo pipefail
caller_dir=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh

pytest_arguments=()
whole=1
for argument; do
    case $argument in
        --fast) pytest_arguments+=(-m "not slow") ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) pytest_arguments+=("$argument") && whole=0 ;;
    esac
done

lock .venv
make_venv .venv
if ! stamped .venv dependencies "$(dependencies_hash .venv dev)"; then
    printf 'installing the dependencies into .venv; PyTorch is large, this takes some minutes ...\n'
    install_dependencies .venv dev
fi
build_kernels .venv || true
build_npu_stand_in .venv || true # where it cannot be had, its tests skip
unlock

# What the tests start inherits this; the name tells it from a service that runs here anyway.
export MINDIE_TEST_RUN=$$
export HYPOTHESIS_STORAGE_DIRECTORY=$PWD/.venv/cache/hypothesis
failed=0

check() {
    printf '\n== %s\n' "$*"
    "$@" || failed=1
}

# Daemons of this run that still live, and shared memory that was not there before it.
leftovers() {
    local process name
    for process in /proc/[0-9]*; do
        { read -r name < "$process/comm"; } 2> /dev/null || continue
        if [[ $name == mindieservice_d ]] &&
            grep -qzx "MINDIE_TEST_RUN=$MINDIE_TEST_RUN" "$process/environ" 2> /dev/null; then
            printf 'process %s in %s\n' "${process#/proc/}" "$(readlink "$process/cwd" || true)"
        fi
    done
    shared_memory | comm -13 <(printf '%s\n' "$shared_before") -
}

shared_memory() {
    find /dev/shm -maxdepth 1 -name "mindie_${UID}_*" | sort
}

shared_before=$(shared_memory)
check .venv/bin/ruff check --cache-dir .venv/cache/ruff
check .venv/bin/ruff format --check --cache-dir .venv/cache/ruff
check .venv/bin/mypy --cache-dir .venv/cache/mypy
code=0

run_pytest() {
    printf '\n== pytest %s\n' "$*"
    .venv/bin/python -m pytest -o cache_dir=.venv/cache/pytest "${pytest_arguments[@]}" "$@" || code=$?
}

if ((whole)); then
    # what computes much or in several ranks has both cores for itself
    alone=(tests/e2e/test_correctness.py tests/e2e/test_parallel.py)
    # files stay whole, for what their tests share is made once, in the order of tests/conftest.py; a thread each,
    # for they fill two cores
    OMP_NUM_THREADS=1 run_pytest -n 3 --dist loadfile --no-loadscope-reorder "${alone[@]/#/--ignore=}"
    run_pytest "${alone[@]}"
else
    run_pytest
fi

left=$(leftovers)
if [[ -n $left ]]; then
    printf '\nleft behind by the tests:\n%s\n' "$left" >&2
    failed=1
fi
((failed)) && printf '\nA check before or after the tests failed; see above.\n' >&2
exit "$((code ? code : failed))"
