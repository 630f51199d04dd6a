#!/usr/bin/env bash
# Sets up an installation directory as the manual knows it and starts the service in it. Run again, it changes
# nothing that is in place; what has changed in this tree since is brought up to date.
set -euo pipefail
umask 027 # the service warns about files that others may read

usage() {
    cat << 'EOF'
Usage: scripts/serve.sh [option ...]

Install into mindie-service/ below this repository, make demonstration certificates if there are none,
start mindieservice_daemon and wait until it serves.

  --dir DIR               another installation directory
  --port N                port of the inference interfaces (config.json: ServerConfig.port)
  --management-port N     port of the health and control interfaces (ServerConfig.managementPort)
  --metrics-port N        port of the Prometheus metrics (ServerConfig.metricsPort)
  --http, --https         without or with TLS and client certificates (ServerConfig.httpsEnabled)
  -h, --help              this text

These are written to DIR/conf/config.json, which is otherwise yours: it is copied once, never replaced.
PYTHON=/path/to/python3 names the interpreter (3.10 or newer); pip's own settings, such as PIP_INDEX_URL and
PIP_EXTRA_INDEX_URL, apply.

A service that is starting in DIR is waited for; one that is stopping is waited for and started again.

Exit codes: 0 serving (also when it was already), otherwise 1 or that of mindieservice_daemon.
EOF
}

caller_dir=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh

readonly success_line="Daemon start success!"
readonly patience_s=60 # with a service that has served and does not answer any more
home=$PWD/mindie-service
port="" management_port="" metrics_port="" https=""

parse_arguments() {
    while (($#)); do
        case $1 in
            --dir=* | --port=* | --management-port=* | --metrics-port=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                continue
                ;;
            --dir | --port | --management-port | --metrics-port)
                (($# > 1)) || die "$1 needs a value"
                ;;
            --http | --https)
                [[ $1 == --https ]] && https=true || https=false
                shift
                continue
                ;;
            -h | --help) usage && exit 0 ;;
            *) die "unknown option $1; see scripts/serve.sh --help" ;;
        esac
        case $1 in
            --dir) home=$(cd -- "$caller_dir" && realpath -m -- "$2") ;;
            --port) port=$2 ;;
            --management-port) management_port=$2 ;;
            --metrics-port) metrics_port=$2 ;;
        esac
        [[ $1 == --dir || $2 =~ ^[0-9]{1,5}$ ]] || die "$1 $2: not a port number"
        shift 2
    done
}

step() {
    printf '%-15s %s\n' "$1" "$2"
}

# The parent among the processes of a daemon that was started in this directory; nothing if there is none.
running_pid() {
    local process name pid
    for process in /proc/[0-9]*; do
        { read -r name < "$process/comm"; } 2> /dev/null || continue
        [[ $name == mindieservice_d && $(readlink "$process/cwd") == "$(realpath -m "$home")" ]] || continue
        pid=${process#/proc/}
        # the children of a daemon carry its name too
        read -r name < "/proc/$(awk '/^PPid/ {print $2}' "$process/status")/comm" 2> /dev/null || name=""
        [[ $name == mindieservice_d ]] || printf '%s\n' "$pid"
    done | head -n 1
}

install_everything() {
    local started=$SECONDS
    step "installing to" "$home"
    stamped "$home" begun serve.sh || stamp "$home" begun serve.sh
    make_venv "$home"
    if stamped "$home" dependencies "$(dependencies_hash "$home")"; then
        step "dependencies" "unchanged"
    else
        step "dependencies" "being installed; the first time takes some minutes, PyTorch is large ..."
        install_dependencies "$home"
        step "" "installed in $((SECONDS - started)) s"
    fi
    rest_started=$SECONDS
    install_sources
    install_kernels
    install_model
    mkdir -p "$home/conf" "$home/logs"
    if [[ -e $home/conf/config.json ]]; then
        step "conf" "config.json unchanged"
    else
        cp config.json "$home/conf/.config.json.new"
        mv "$home/conf/.config.json.new" "$home/conf/config.json"
        step "conf" "config.json copied"
    fi
    set_listeners
    make_certificates
}

make_certificates() {
    if [[ -n $(ls -A "$home/security" 2> /dev/null) ]]; then
        step "security" "certificates unchanged"
        return
    fi
    rm -rf "$home/.security.new"
    "$home/bin/python" scripts/make_certs.py --dir "$home/.security.new" > /dev/null
    rmdir "$home/security" 2> /dev/null || true
    mv "$home/.security.new" "$home/security" # all or nothing
    step "security" "demonstration certificates made; replace them before others can reach this service"
}

sources_hash() {
    hash_files setup.cfg pyproject.toml daemon endpoint engine worker
}

model_hash() {
    hash_files models/mindie-tiny
}

install_sources() {
    local hash build=$work/build
    hash=$(sources_hash)
    if stamped "$home" sources "$hash"; then
        step "service" "unchanged"
        return
    fi
    # built from a copy: setuptools leaves build/ behind, and would ship again what is no longer in the tree
    unstamp "$home" sources
    mkdir "$build"
    cp -R setup.cfg pyproject.toml README.md LICENSE daemon endpoint engine worker "$build"
    pip_install "$home" --no-deps --no-index --no-build-isolation --force-reinstall "$build"
    stamp "$home" sources "$hash"
    step "service" "bin/mindieservice_daemon installed"
}

install_kernels() {
    local complaint
    if complaint=$(build_kernels "$home" 2>&1); then
        step "kernels" "compiled for this machine"
    else
        step "kernels" "$complaint"
    fi
}

install_model() {
    local hash
    hash=$(model_hash)
    if stamped "$home" model "$hash" && [[ -d $home/models/mindie-tiny ]]; then
        step "model" "models/mindie-tiny unchanged"
        return
    fi
    unstamp "$home" model
    mkdir -p "$home/models"
    rm -rf "$home/models/mindie-tiny" "$home/models/.mindie-tiny.new"
    cp -R models/mindie-tiny "$home/models/.mindie-tiny.new"
    mv "$home/models/.mindie-tiny.new" "$home/models/mindie-tiny"
    stamp "$home" model "$hash"
    step "model" "models/mindie-tiny copied"
}

# edit_listeners write|compare: prints what was given of the listeners and differs from what config.json has.
edit_listeners() {
    "$home/bin/python" - "$1" "$home/conf/config.json" "$port" "$management_port" "$metrics_port" "$https" << 'EOF'
import json
import os
import sys
from pathlib import Path

action, path, given = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
try:
    config = json.loads(path.read_text(encoding="utf-8-sig"))
    server = config["ServerConfig"]
    wanted = zip(("port", "managementPort", "metricsPort", "httpsEnabled"), given, strict=True)
    values = {key: json.loads(value.lstrip("0") or "0") for key, value in wanted if value}
    changes = {key: value for key, value in values.items() if server.get(key) != value}
    server.update(changes)
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"serve.sh: the listeners cannot be set in {path}: {type(error).__name__}: {error}")
if changes and action == "write":
    fresh = path.with_name(".config.json.new")
    fresh.write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.chmod(path.stat().st_mode & 0o777)
    os.replace(fresh, path)
print(", ".join(f"{key} {json.dumps(value)}" for key, value in changes.items()))
EOF
}

set_listeners() {
    local changed
    [[ -n $port$management_port$metrics_port$https ]] || return 0
    changed=$(edit_listeners write)
    if [[ -n $changed ]]; then
        step "" "set in config.json: $changed"
    fi
}

# The service's own word: "ready", "silent" when nobody listens, "unknown" when it cannot be asked (no client
# certificate it accepts, or a configuration that has been changed since), otherwise what it is busy with.
ask_service() {
    "$home/bin/python" - "$home" << 'EOF'
import http.client
import json
import os
import ssl
import sys
from pathlib import Path

import mindie_server.daemon.launch as launch

sys.path.insert(0, str(Path(launch.__file__).parents[1]))
from daemon.config import load_settings  # noqa: E402
from engine.errors import StartupError  # noqa: E402

home = Path(sys.argv[1])
try:
    settings = load_settings(home / "conf" / "config.json", dict(os.environ), home / "bin" / "mindieservice_daemon")
except StartupError:
    print("unknown")
    sys.exit()
listener = next(one for one in settings.endpoint.listeners if "management" in one.planes)
address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.address, listener.address)
try:
    if listener.tls:
        client = home / "security" / "client"
        context = ssl.create_default_context(cafile=client / "ca.pem")
        context.load_cert_chain(client / "client.pem", client / "client.key.pem")
        connection = http.client.HTTPSConnection(address, listener.port, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection(address, listener.port, timeout=10)
    connection.request("GET", "/v2/health/ready")
    answer = connection.getresponse()
    body = answer.read()
    print("ready" if answer.status == 200 else json.loads(body)["message"])
except ssl.SSLEOFError:
    print("silent")
except (ssl.SSLError, FileNotFoundError, PermissionError, ValueError, LookupError, TypeError):
    print("unknown")
except (OSError, http.client.HTTPException):
    print("silent")
EOF
}

# The service was running when we came: returns when it has ended, or exits when it serves.
join_service() {
    local answer told="" silent_since=$SECONDS
    while [[ -n $daemon_pid ]]; do
        answer=$(ask_service)
        if [[ $answer == ready || $answer == unknown ]]; then
            leave_running
            exit 0
        fi
        [[ $answer == silent ]] || silent_since=$SECONDS
        if ((SECONDS - silent_since > patience_s)) && grep -qsxF "$success_line" "$home/output.log"; then
            die "process $daemon_pid runs in $home and does not answer; see output.log there, or kill $daemon_pid"
        fi
        [[ $answer == "$told" ]] || step "waiting" "for process $daemon_pid: ${answer/#silent/starting or ending}"
        told=$answer
        sleep 0.5
        daemon_pid=$(running_pid)
    done
}

leave_running() {
    local others
    others=$(edit_listeners compare)
    [[ -z $others ]] ||
        die "the service runs in $home with other settings than $others; stop it first: kill $daemon_pid"
    printf 'mindieservice_daemon is running already in %s; nothing was changed.\n' "$home"
    if ! stamped "$home" sources "$(sources_hash)" || ! stamped "$home" model "$(model_hash)"; then
        printf 'This tree has changed since it was installed there: stop the service and run this again.\n'
    fi
    printf '\n'
    print_summary
}

start_daemon() {
    step "starting" "nohup ./bin/mindieservice_daemon > output.log 2>&1 &"
    cd -- "$home"
    : > output.log
    export MINDIE_LOG_PATH=${MINDIE_LOG_PATH-$home/logs}
    nohup ./bin/mindieservice_daemon > output.log 2>&1 < /dev/null 9<&- &
    daemon_pid=$!
    cd -- "$OLDPWD"
}

# A terminal's Ctrl+C has reached the service already: for it this is the second signal, which ends it at once, so
# neither may fail the script before it has said what happened.
stop_service() {
    kill "$daemon_pid" 2> /dev/null || true
    wait "$daemon_pid" || true
    die "interrupted; the service was stopped"
}

show_message() { # LEVEL MESSAGE
    local text=$2
    case $1 in
        INFO) ;;
        WARN) text="warning: $text" ;;
        *) return ;; # errors are shown together, with what else explains the end
    esac
    ((${#text} <= 200)) || text="${text:0:200} ... (see output.log)"
    printf '    %s\n' "$text"
}

# Shows the log's messages until the success line; returns 1 when the process has ended without it.
follow_start() {
    local line rest="" alive=1
    local entry='^\[[^]]*\] \[[0-9]+\] \[[0-9]+\] \[[a-z]+\] \[([A-Z]+)\] \[[^]]*\] : (.*)$'
    exec 3< "$home/output.log"
    while :; do
        while IFS= read -r line <&3; do
            line=$rest$line rest=""
            if [[ $line == "$success_line" ]]; then
                exec 3<&-
                return 0
            elif [[ $line =~ $entry && ${BASH_REMATCH[2]} != "$success_line" ]]; then
                show_message "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
            fi
        done
        rest+=$line # the beginning of a line that is still being written
        ((alive)) || break
        # one more look at the file after the end, for the last words
        kill -0 "$daemon_pid" 2> /dev/null || alive=0
        # waited for like this: bash forgets a Ctrl+C that meets it reaping a command that has ended by itself
        ((!alive)) || { sleep 0.1 & wait $!; }
    done
    exec 3<&-
    return 1
}

explain_failure() {
    local code=0 cause
    wait "$daemon_pid" || code=$?
    # it ends like that only when it is told to; bash may have missed the Ctrl+C that told both
    ((code)) || die "the service was stopped before it was ready"
    # errors of the log, and what was written as it is: findings about the configuration, tracebacks
    cause=$(grep -vE '^(nohup: .*|\[[^]]*\] \[[0-9]+\] \[[0-9]+\] \[[a-z]+\] \[(DEBUG|INFO|WARN)\] .*)?$' \
        "$home/output.log" | sed -E 's/^\[[^]]*\] \[[0-9]+\] \[[0-9]+\] \[[a-z]+\] (\[[A-Z]+\]) \[[^]]*\] : /\1 /' |
        tail -n 40) || true
    {
        printf '\nmindieservice_daemon ended with exit code %d before it was ready:\n' "$code"
        printf '%s\n' "${cause:-$(tail -n 15 "$home/output.log")}" | sed 's/^/    /'
        printf 'The whole log: %s\n' "$home/output.log"
    } >&2
    exit "$code"
}

# Tells where the service is, as the service itself reads its configuration.
print_summary() {
    "$home/bin/python" - "$home" "$daemon_pid" << 'EOF'
import json
import os
import shlex
import sys
from pathlib import Path

import mindie_server.daemon.launch as launch

sys.path.insert(0, str(Path(launch.__file__).parents[1]))
from daemon.config import load_settings  # noqa: E402
from engine.errors import StartupError  # noqa: E402

home, pid = Path(sys.argv[1]), sys.argv[2]
try:
    settings = load_settings(home / "conf" / "config.json", dict(os.environ), home / "bin" / "mindieservice_daemon")
except StartupError as error:
    sys.exit(f"{home}/conf/config.json has been changed since the service was started:\n{error}")

where = {"0.0.0.0": "127.0.0.1", "::": "::1"}
curl = "curl"
for listener in settings.endpoint.listeners:
    address = where.get(listener.address, listener.address)
    host = f"[{address}]" if ":" in address else address
    url = f"{'https' if listener.tls else 'http'}://{host}:{listener.port}"
    print(f"{' + '.join(listener.planes):<28} {url}")
    if "business" in listener.planes:
        base = url
        if listener.tls:
            client = home / "security" / "client"
            files = (("cacert", "ca.pem"), ("cert", "client.pem"), ("key", "client.key.pem"))
            curl += "".join(f" --{option} {shlex.quote(str(client / name))}" for option, name in files)
body = {
    "model": settings.model.name,
    "messages": [{"role": "user", "content": "Tell me a short story about a brave cat."}],
    "max_tokens": 200,
}
print(f"process {pid}, log {home}/output.log, configuration {home}/conf/config.json")
print(f"\nWhich model is there:\n\n{curl} {base}/v1/models")
print(f"\nAsk it something:\n\n{curl} -H 'Content-Type: application/json' "
      f"-d {shlex.quote(json.dumps(body))} {base}/v1/chat/completions")
print(f"\nStop the service:\n\nkill {pid}")
EOF
}

parse_arguments "$@"
# set for another installation, they would send this one to the other's configuration
unset MINDIE_LLM_HOME_PATH MIES_INSTALL_PATH MIES_CONFIG_JSON_PATH
if [[ -d $home && ! -e $home/pyvenv.cfg && ! -e $home/.stamp-begun && -n $(ls -A "$home") ]]; then
    die "$home holds something else; name an empty or a new directory with --dir"
fi
lock "$home"
daemon_pid=$(running_pid)
join_service

rest_started=$SECONDS
install_everything
start_daemon
# Ctrl+C while waiting means the service, too
trap stop_service INT TERM
follow_start || explain_failure
trap - INT TERM
printf '\nServing %d s after the dependencies were there.\n\n' "$((SECONDS - rest_started))"
print_summary
