#!/usr/bin/env python3
"""Runs a real ClickHouse server, HTTP and TCP, out of the chdb-core wheel until SIGTERM or SIGINT.

usage: clickhouse_server.py FOLDER HTTP_PORT TCP_PORT

The wheel carries the whole engine, servers included, but only answers queries by itself. The SQL command
SYSTEM START LISTEN opens the servers, for as long as the session's query runs: so one query sleeps for ever, and
killing that query is an orderly stop. The data in FOLDER outlives this process; a second one on it is refused.
"""

import ctypes
import glob
import importlib.util
import os
import shutil
import signal
import sys
import threading
import urllib.request

MARK = "the query that keeps the servers open"
SERVE = f"""
SYSTEM START LISTEN HTTP;
SYSTEM START LISTEN TCP;
SELECT sleepEachRow(1), '{MARK}' FROM system.numbers FORMAT Null
SETTINGS max_block_size = 1, max_threads = 1, function_sleep_max_microseconds_per_block = 0
"""
CONFIG = """<clickhouse>
    <listen_host>127.0.0.1</listen_host>
    <http_port>{http}</http_port>
    <tcp_port>{tcp}</tcp_port>
    <users_config>users.xml</users_config>
</clickhouse>
"""
USERS = """<clickhouse>
    <profiles><default/></profiles>
    <quotas><default/></quotas>
    <users>
        <default>
            <password/>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
        </default>
    </users>
</clickhouse>
"""
# The user for BI, added as on any server: this one takes no CREATE USER.
READER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "config", "clickhouse-users.xml")
STOP_SECONDS = 10


def load_engine():
    """The wheel's extension alone: `import chdb` opens and closes a session, after which no server starts."""
    found = (so for folder in sys.path for so in glob.glob(os.path.join(folder, "chdb", "_chdb.abi3.so")))
    library = next(found, None)
    if library is None:
        sys.exit("chdb-core is not installed in this Python; run deploy/local/install")
    # Its own symbols first, so that it does not pick up another libstdc++ or allocator.
    ctypes.CDLL(library, mode=sys.getdlopenflags() | os.RTLD_DEEPBIND)
    spec = importlib.util.spec_from_file_location("chdb._chdb", library)
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    return engine


def serve(engine, folder, outcome):
    """Blocks until the query is killed; leaves the reason in `outcome`."""
    try:
        result = engine.query(SERVE, "CSV", path=folder)
        outcome.append(str(result.error_message()) if result.has_error() else "")
    except Exception as error:  # the engine has no error type of its own
        outcome.append(str(error))


def kill_query(http):
    """Ends the query and with it the servers; leaves the hard way if the engine does not hear."""
    sql = f"KILL QUERY WHERE query LIKE '%{MARK}%' AND query NOT LIKE 'KILL%'"
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{http}/", data=sql.encode(), timeout=STOP_SECONDS).read()
    except OSError as error:
        print(f"no orderly stop: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, http, tcp = os.path.abspath(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    with open("config.xml", "w", encoding="utf-8") as config:  # the engine reads it from the working directory
        config.write(CONFIG.format(http=http, tcp=tcp))
    with open("users.xml", "w", encoding="utf-8") as users:
        users.write(USERS)
    os.makedirs("users.d", exist_ok=True)
    shutil.copy(READER, "users.d/reader.xml")

    asked_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.set())

    outcome = []
    server = threading.Thread(target=serve, args=(load_engine(), folder, outcome))
    server.start()
    print(f"ClickHouse: http://127.0.0.1:{http}, tcp 127.0.0.1:{tcp}, data in {folder}", flush=True)
    while server.is_alive() and not asked_to_stop.wait(0.2):
        pass
    if server.is_alive():
        kill_query(http)
        server.join(STOP_SECONDS)
    if server.is_alive():
        os._exit(1)
    if asked_to_stop.is_set():
        print("stopped", flush=True)
    else:
        sys.exit(f"ClickHouse ended by itself: {''.join(outcome)}")


main()
