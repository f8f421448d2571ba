# shellcheck shell=bash disable=SC2034,SC2120,SC2119
# What all scripts here share: where things are, words for the user, and processes that are ended by their own
# identity and never by a name. Sourced, not run.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
CACHE=${WEIR_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/weir}
KAFKA_VERSION=4.4.0
CHDB_VERSION=26.9.0 # ClickHouse 26.9 as a Python wheel
KAFKA=$CACHE/kafka-$KAFKA_VERSION
CHDB=$CACHE/chdb-$CHDB_VERSION
PYTHON=$CHDB/venv/bin/python
NGINX=$CACHE/nginx # the program out of its package, for tests
[[ ":$PATH:" == *":$HOME/.cargo/bin:"* ]] || PATH=$PATH:$HOME/.cargo/bin

# ---- words -----------------------------------------------------------------------------------------------------

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' PLAIN=$'\e[0m'
else
    BOLD='' DIM='' RED='' GREEN='' PLAIN=''
fi

say() { printf '%s\n' "$*"; }
title() { printf '\n%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }
begin() { printf '%s … ' "$*"; }
ok() { printf '%sok%s%s\n' "$GREEN" "$PLAIN" "${*:+ $*}"; }
fail() {
    printf '%s%s:%s %s\n' "$RED" "${0##*/}" "$PLAIN" "$*" >&2
    exit 1
}

# usage: the comment that opens the calling script, without its marks.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# step WORDS LOG COMMAND...: runs a quiet command under a line of its own; shows the end of its log if it fails.
step() {
    local words=$1 log=$2
    shift 2
    begin "$words"
    if "$@" >"$log" 2>&1 </dev/null; then
        ok
    else
        failed "$words failed" "$log"
    fi
}

# failed WORDS LOG: ends the line that `begin` began, and the script, with the end of the log.
failed() {
    printf '%sfailed%s\n' "$RED" "$PLAIN"
    printf '%s--- the last lines of %s%s\n' "$DIM" "$2" "$PLAIN" >&2
    tail -n 20 "$2" >&2 || true
    fail "$1; all of its output is in $2"
}

# ---- tools -----------------------------------------------------------------------------------------------------

# find_java: sets JAVA to a Java of at least 17, or fails.
find_java() {
    local candidate
    for candidate in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java || true)" /usr/lib/jvm/*/bin/java; do
        [[ -x $candidate ]] || continue
        (($(java_major "$candidate") >= 17)) || continue
        JAVA=$candidate
        return 0
    done
    return 1
}

# java_major JAVA: its major version, read from the file beside it where there is one since starting it takes long.
java_major() {
    local home version
    home=$(dirname "$(dirname "$(readlink -f "$1")")")
    version=$(sed -n 's/^JAVA_VERSION="\(.*\)"/\1/p' "$home/release" 2>/dev/null) || true
    [[ -n $version ]] || version=$("$1" -version 2>&1 | sed -n '1s/.*"\(.*\)".*/\1/p') || true
    version=${version#1.}
    version=${version%%[!0-9]*}
    printf '%s' "${version:-0}"
}

# class_archive: where the classes of this Kafka under exactly this Java are kept, ready to map.
class_archive() { printf '%s/classes-%s.jsa' "$KAFKA" "$(stat -Lc %Y-%s "$JAVA")"; }

# answers PORT QUESTION START: whether a server on that port answers the question with a line that starts like this.
answers() {
    local line=''
    # In a subshell, since a failed redirection of exec would end the script.
    line=$(
        exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
        printf '%b' "$2" >&3
        IFS= read -r -t 2 line <&3
        printf '%s' "$line"
    ) 2>/dev/null || true
    [[ $line == $3* ]]
}

http_ok() { answers "$1" "GET $2 HTTP/1.0\r\n\r\n" 'HTTP/1.[01] 200'; }
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# need_port PORT WHO [ADVICE]: says who has it, before a server fails on it with a stack trace.
need_port() {
    listening "$1" || return 0
    local owner
    owner=$(ss -ltnpH "sport = :$1" 2>/dev/null | sed -n 's/.*users:(("\([^"]*\)",pid=\([0-9]*\).*/ by \1, pid \2/p') || true
    fail "port $1, which $2 needs, is taken${owner%%$'\n'*}. ${3:-Please stop that, and run this again.}"
}

# ---- one stack: its folder, its lock, its processes ------------------------------------------------------------

# use_stack NAME: everything below works on this stack.
use_stack() {
    [[ $1 =~ ^[a-z0-9][a-z0-9-]*$ ]] || fail "'$1' is no name for a stack: lower case, digits and '-' only"
    STACK=$1
    STATE=$ROOT/.local/$STACK
    mkdir -p "$STATE/pids" "$STATE/log"
}

# lock_stack: one up or down of a stack at a time. Released when the script ends, however it ends.
lock_stack() {
    exec 9>"$ROOT/.local/$STACK.lock"
    flock -w 120 9 || fail "another script has been busy with the stack '$STACK' for two minutes; try again"
}

# stamp PID: "pid start-time boot", which no other process ever has; fails for the dead, also the unburied.
stamp() {
    local stat fields boot
    { read -r stat <"/proc/$1/stat" && read -r boot </proc/sys/kernel/random/boot_id; } 2>/dev/null || return 1
    read -ra fields <<<"${stat##*) }" # what follows the name; the name may hold blanks
    # A killed process is a zombie at once, but holds its ports until its last thread is gone.
    [[ ${fields[0]} != [ZX] ]] || (($(find "/proc/$1/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l) > 1)) || return 1
    printf '%s %s %s' "$1" "${fields[19]}" "$boot"
}

# alive PROCESS: whether the process that this stack started under that name still runs. Sets PID.
alive() {
    local recorded
    recorded=$(cat "$STATE/pids/$1" 2>/dev/null) || return 1
    PID=${recorded%% *}
    [[ -n $PID && $(stamp "$PID") == "$recorded" ]]
}

# start PROCESS COMMAND...: in a session of its own, so that Ctrl-C does not reach it. It writes its own record
# before it becomes the command: whenever this script dies, a running server has its record.
start() {
    local process=$1 log=$STATE/log/$1.log
    shift
    [[ ! -e $log ]] || mv "$log" "$log.before"
    rm -f "$STATE/pids/$process"
    (
        stamp "$BASHPID" >"$STATE/pids/$process.new"
        mv "$STATE/pids/$process.new" "$STATE/pids/$process"
        exec setsid "$@"
    ) </dev/null >"$log" 2>&1 7>&- 8>&- 9>&- &
    disown
    while [[ ! -e $STATE/pids/$process ]] && kill -0 $! 2>/dev/null; do sleep 0.01; done
}

# ready PROCESS SECONDS COMMAND...: waits until the command succeeds; fails with the log if the process ends before.
ready() {
    local process=$1 seconds=$2 log=$STATE/log/$1.log
    local deadline=$((SECONDS + seconds))
    shift 2
    until "$@" >/dev/null 2>&1; do
        alive "$process" || failed "$process ended while it was starting" "$log"
        ((SECONDS < deadline)) || failed "$process was not ready after $seconds s" "$log"
        sleep 0.1
    done
}

# signal PROCESS SIGNAL: to the process itself and nobody else; no matter if it is gone.
signal() { ! alive "$1" || kill -s "$2" "$PID" 2>/dev/null || true; }

# gone PROCESS SECONDS: waits for its end, then kills it.
gone() {
    local deadline=$((SECONDS + $2))
    while alive "$1"; do
        ((SECONDS < deadline)) || signal "$1" KILL
        sleep 0.05
    done
    rm -f "$STATE/pids/$1"
}

# ---- a stack for the time of one script ------------------------------------------------------------------------

# own_stack NAME [SERVER...]: a new and empty stack, which ends with this script; also ends stacks called NAME-…, which its
# children may have started. Only one such script at a time.
own_stack() {
    use_stack "$1"
    exec 7>"$ROOT/.local/$STACK.run.lock"
    flock -n 7 || { begin "waiting for another deploy/local/$STACK in this clone" && flock 7 && ok; }
    end_stacks >/dev/null
    rm -rf "$STATE" "$STATE"-*/
    trap 'trap "" INT TERM HUP; end_stacks' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    "$HERE/up" "$STACK" "${@:2}"
    # shellcheck source=/dev/null
    . "$STATE/env"
}

end_stacks() {
    local folder
    for folder in "$STATE" "$STATE"-*/; do
        [[ ! -d $folder ]] || "$HERE/down" "$(basename "$folder")" --wipe || true
    done
}
