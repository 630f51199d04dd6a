# Sourced by serve.sh and test.sh: a virtual environment with the pinned dependencies, made once.
# Expects the working directory to be the repository, and in $caller_dir the one it was started from.
# Everything already there is kept.
# shellcheck shell=bash

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# lock DIRECTORY: until this process or `unlock` ends it, nobody else installs there. Descriptor 9 is the lock.
lock() {
    mkdir -p -- "$1"
    exec 9< "$1"
    if ! flock --nonblock 9; then
        printf 'waiting for another %s, which is at work in %s ...\n' "${0##*/}" "$1"
        flock 9
    fi
}

unlock() {
    exec 9<&-
}

# The first interpreter that is new enough; PYTHON=... names another.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    case ${PYTHON:-} in
        "") ;;
        [!/]*/*) candidates=("$caller_dir/$PYTHON") ;;
        *) candidates=("$PYTHON") ;;
    esac
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.10 or newer is needed and ${PYTHON:-python3} is not (or is not there); install one," \
        "or name it: PYTHON=/path/to/python3 $0"
}

# make_venv DIRECTORY: repairs one whose interpreter has gone.
make_venv() {
    local directory=$1 python
    if "$directory/bin/python" -m pip --version > /dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2> /dev/null ||
        die "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    "$python" -m venv "$directory"
}

# pip_install DIRECTORY ARGUMENT...: silent, unless it fails.
pip_install() {
    local directory=$1
    shift
    if ! "$directory/bin/python" -m pip install -q --disable-pip-version-check "$@" > "$work/pip.log" 2>&1; then
        tail -n 30 "$work/pip.log" >&2
        die "pip could not install into $directory; what it said is above"
    fi
}

# A stamp remembers what a step was done with, so that the step is repeated exactly when that has changed. A step
# takes its stamp away before it begins: one that was interrupted is repeated as well.
stamped() { # DIRECTORY STEP HASH
    [[ -f $1/.stamp-$2 && $(< "$1/.stamp-$2") == "$3" ]]
}

stamp() { # DIRECTORY STEP HASH
    printf '%s\n' "$3" > "$1/.stamp-$2"
}

unstamp() { # DIRECTORY STEP
    rm -f "$1/.stamp-$2"
}

# hash_files PATH...: one hash over names and contents, without what Python caches beside its sources.
hash_files() {
    find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

# build_kernels DIRECTORY: the C++ parts of worker/native for its Python. Fails, having said why, where that cannot
# be done; everything works without them.
build_kernels() {
    "$1/bin/python" -B worker/native/build.py
}

# build_npu_stand_in DIRECTORY: torch_npu and what it needs to run without an NPU, for tests/npu_sim. As above.
build_npu_stand_in() {
    "$1/bin/python" -B scripts/npu_sim.py build > /dev/null
}

dependencies_hash() { # DIRECTORY EXTRA...
    local directory=$1
    shift
    { "$directory/bin/python" --version && printf '%s\n' "$@" && cat setup.cfg constraints.txt; } | sha256sum
}

# install_dependencies DIRECTORY EXTRA...: what setup.cfg asks for, in the releases of constraints.txt.
install_dependencies() {
    local directory=$1
    shift
    "$directory/bin/python" - "$@" > "$work/requirements.txt" << 'EOF'
import configparser
import sys

config = configparser.ConfigParser()
config.read("setup.cfg", encoding="utf-8")
print(config["options"]["install_requires"])
for extra in sys.argv[1:]:
    print(config["options.extras_require"][extra])
print("setuptools")  # builds our own package
EOF
    unstamp "$directory" dependencies
    pip_install "$directory" --constraint constraints.txt --requirement "$work/requirements.txt"
    stamp "$directory" dependencies "$(dependencies_hash "$directory" "$@")"
}
