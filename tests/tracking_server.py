"""A tracking server for a team: MLflow with passwords, on a PostgreSQL of its own. `make services`, `make services-stop`.

    python tests/tracking_server.py start FOLDER [--port 5000] [--name tracker.example.org]
    python tests/tracking_server.py stop FOLDER

The folder holds database, artefacts, logs and secrets; started again, the server goes on with them. PostgreSQL comes from
the system's packages (`apt-get install postgresql`) and runs as the user postgres where this is started by root. Secrets
lie in files that their owner alone may read, and reach the servers through these and the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

START_LIMIT_S = 600
USER = "shoal"
DATABASE_SETTINGS = "\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nport = {port}\n"
AUTH = """[mlflow]
default_permission = READ
database_uri = {database}
admin_username = {user}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_postgres(program: str) -> str:
    """The newest PostgreSQL's program; Debian keeps it off the path. Raises FileNotFoundError."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: float(path.parts[-3]))
    found = str(places[-1]) if places else shutil.which(program)
    if not found:
        raise FileNotFoundError(f"no {program!r} here: apt-get install postgresql")
    return found


@dataclass(frozen=True)
class Services:
    """MLflow and PostgreSQL in a folder. `name` is how other machines reach them; without one, this machine alone does."""

    folder: Path
    port: int = 5000
    name: str | None = None

    def start(self) -> str:
        """Starts what does not run, and waits until it answers; returns the server's URI."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._read_secrets()
        self._start_postgres(held)
        if self.find_server() is None:
            self._start_mlflow(held)
        return held["uri"]

    def stop(self) -> None:
        """Ends both; what they hold stays."""
        if server := self.find_server():
            family = [server, *server.children(recursive=True)]
            for process in family:
                process.terminate()
            for process in psutil.wait_procs(family, timeout=20)[1]:
                process.kill()
        if self._postgres_runs():
            self._run_postgres("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")

    @property
    def client(self) -> Path:
        """A shell script that sets what a client needs."""
        return self.folder / "client.env"

    def _read_secrets(self) -> dict[str, str]:
        """Passwords, keys and ports, drawn at the first start."""
        file = self.folder / "secrets.json"
        if file.exists():
            return json.loads(file.read_text())
        port = self.port or free_port()
        held = {name: secrets.token_hex(16) for name in ("password", "postgres_password", "flask_key")}
        held |= {"port": str(port), "postgres_port": str(free_port()), "uri": f"http://{self.name or '127.0.0.1'}:{port}"}
        values = {"URI": held["uri"], "USERNAME": USER, "PASSWORD": held["password"]}
        _write_private(self.client, "".join(f"export MLFLOW_TRACKING_{name}={value}\n" for name, value in values.items()))
        _write_private(file, json.dumps(held))
        return held

    @property
    def _home(self) -> Path:
        return self.folder / "postgres"

    def _run_postgres(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """One of PostgreSQL's programs, as a user who is not root. Its servers must not hold on to our output."""
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        said = self._home / "said.txt"
        with said.open("w") as file:
            done = subprocess.run(
                [find_postgres(program), *words], cwd=self._home, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                text=True, check=False, **user,
            )  # fmt: skip
        done.stdout = said.read_text()
        return done

    def _postgres_runs(self) -> bool:
        return (self._home / "data").exists() and self._run_postgres("pg_ctl", "-D", "data", "status").returncode == 0

    def _start_postgres(self, held: dict[str, str]) -> None:
        self._home.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self._home, "postgres", "postgres")
            _require_entry(self.folder)
        if not (self._home / "data").exists():
            self._make_cluster(held)
        if not self._postgres_runs():
            started = self._run_postgres("pg_ctl", "-D", "data", "-l", "log.txt", "-w", "start")
            if started.returncode:
                raise RuntimeError(f"PostgreSQL does not start, see {self._home / 'log.txt'}:\n{started.stdout}")

    def _make_cluster(self, held: dict[str, str]) -> None:
        """A cluster whose only user has a password, made aside."""
        password, part = self._home / "password", self._home / "part"
        shutil.rmtree(part, ignore_errors=True)
        _write_private(password, held["postgres_password"])
        if os.geteuid() == 0:
            shutil.chown(password, "postgres", "postgres")
        options = ("-U", "mlflow", "--auth=scram-sha-256", "--encoding=UTF8", "--pwfile=password")
        made = self._run_postgres("initdb", "-D", "part", *options)
        password.unlink()
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}")
        with (part / "postgresql.conf").open("a") as settings:
            settings.write(DATABASE_SETTINGS.format(port=held["postgres_port"]))
        part.rename(self._home / "data")

    def find_server(self) -> psutil.Process | None:
        """MLflow's process, if it runs: the same process, not another one of its number."""
        try:
            pid, started = json.loads((self.folder / "mlflow.pid").read_text())
            process = psutil.Process(pid)
            return process if process.create_time() == started else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def _start_mlflow(self, held: dict[str, str]) -> None:
        database = f"postgresql+psycopg2://mlflow:{held['postgres_password']}@127.0.0.1:{held['postgres_port']}/postgres"
        auth, port = self.folder / "auth.ini", held["port"]
        _write_private(auth, AUTH.format(database=database, user=USER))
        # A request for any other host is refused (DNS rebinding).
        hosts = ",".join(f"{host}:{port}" for host in ("localhost", "127.0.0.1", self.name) if host)
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "0.0.0.0" if self.name else "127.0.0.1", "--port", port,
            # On a busy machine a worker takes longer to import MLflow than uvicorn waits: it would be killed for ever.
            "--workers", "2", "--uvicorn-opts", "--timeout-worker-healthcheck 120",
            "--app-name", "basic-auth", "--serve-artifacts",
            "--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", hosts,
        ]  # fmt: skip
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_AUTH_ADMIN_USERNAME": USER, "MLFLOW_AUTH_ADMIN_PASSWORD": held["password"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": held["flask_key"], "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip
        with (self.folder / "mlflow.txt").open("w") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.folder / "mlflow.pid").write_text(json.dumps([process.pid, psutil.Process(process.pid).create_time()]))
        _wait_for(f"http://127.0.0.1:{port}/health", process, self.folder / "mlflow.txt")


def _write_private(file: Path, text: str) -> None:
    """A file that its owner alone may read, from the first byte on."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)


def _require_entry(folder: Path) -> None:
    """Raises PermissionError if the user postgres cannot get into the folder."""
    for place in (folder, *folder.parents):
        if not place.stat().st_mode & 0o001:
            raise PermissionError(
                f"PostgreSQL runs as the user postgres, who may not enter {str(place)!r}; choose another folder"
            )


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"MLflow does not start, see {log}:\n{log.read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=5000, help="of a first start (default: %(default)s)")
    parser.add_argument("--name", help="name or address under which other machines reach it (default: none does)")
    given = parser.parse_args()
    services = Services(given.folder.resolve(), given.port, given.name)
    try:
        if given.action == "stop":
            services.stop()
            return
        uri = services.start()
    except (OSError, RuntimeError) as error:
        sys.exit(f"services: {error}")
    print(f"MLflow on PostgreSQL: {uri}  (user {USER}; password in {services.client})")
    print(f"source {services.client} && shoal search my.yaml --tracking-uri {uri}")


if __name__ == "__main__":
    main()
