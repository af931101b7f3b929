"""`amazon-ft up`: a server, both work pools, their workers and all deployments on this machine, until Ctrl-C.

Everything started here runs in a session of its own, so that a terminal's Ctrl-C reaches this process alone, which then
ends the workers before the server; and under flows/running/supervisor.py, so that it ends too when this process is killed,
flow runs first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console

from flows.running import supervisor
from flows.running.gpus import Gpu, visible_gpus
from flows.running.interruption import Interrupted
from flows.running.pools import CPU_POOL, CUDA_POOL, online_workers
from flows.server import deploy
from flows.server.ephemeral import wait_until_healthy
from flows.server.registration import Choices, register
from flows.server.standing import announced, standing_api
from tasks.refs import ConfigError, PipelineError, home

ONLINE_SECONDS = 180
WORKER_SECONDS, SERVER_SECONDS = supervisor.RUN_SECONDS + 2 * supervisor.END_SECONDS, 2 * supervisor.END_SECONDS
STAY_SECONDS = 10
"""A process that ends earlier than this after its start would do so again."""


@dataclass(frozen=True)
class UpOptions:
    """Options of the command."""

    host: str = "127.0.0.1"
    port: int = 4200
    ui: bool = True
    database_url: str | None = None

    @property
    def url(self) -> str:
        """The server's own, for programs on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


@dataclass
class Started:
    """A process, and how to start it again."""

    command: tuple[str, ...]
    process: psutil.Popen
    at: float = field(default_factory=time.monotonic)


@dataclass
class Processes:
    """The processes that were started, in order: the server, the worker of pool cpu, those of pool cuda."""

    env: dict[str, str]
    started: dict[str, Started] = field(default_factory=dict[str, Started])

    def start(self, name: str, *command: str) -> psutil.Popen:
        """`prefect COMMAND` with its output in a log of its own."""
        log = log_of(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        guarded = supervisor.guarded("prefect", *command)
        with log.open("ab") as output:
            process = psutil.Popen(guarded, stdout=output, stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        self.started[name] = Started(command, process)
        return process

    def stop(self) -> None:
        """End trainings first, then what waits for them, then the server, which hears how all of them ended."""
        processes = [item.process for item in self.started.values()]
        for group, seconds in (
            (processes[2:], WORKER_SECONDS),
            (processes[1:2], WORKER_SECONDS),
            (processes[:1], SERVER_SECONDS),
        ):
            supervisor.end_processes(group, seconds)

    def revive(self, console: Console) -> None:
        """Start again what ended by itself.

        Raises:
            PipelineError: when it had only just been started.
        """
        for name, item in list(self.started.items()):
            if (code := item.process.poll()) is None:
                continue
            if time.monotonic() - item.at < STAY_SECONDS:
                raise PipelineError(
                    f"up: {name}: ended with exit code {code} within {STAY_SECONDS} s; expected it to stay. "
                    f"Its log is {log_of(name)}."
                )
            console.print(f"{name} ended with exit code {code} and is started again; its log is {log_of(name)}", soft_wrap=True)
            self.start(name, *item.command)


def log_of(name: str) -> Path:
    """Where a process's output goes."""
    return home() / "logs" / f"{name}.log"


def run_until_interrupted(options: UpOptions, console: Console) -> None:
    """Start everything, say how to use it, and stay until interrupted.

    Raises:
        ConfigError: when the port is taken, or a server is up for this root.
        PipelineError: when a part does not start or does not stay.
    """
    _check_port(options)
    if there := standing_api():
        raise ConfigError(f"up: {home()}: a server is up for this root: got {there}; expected none. Use it, or end it first.")
    gpus = visible_gpus()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    with _processes(options) as processes:
        os.environ["PREFECT_API_URL"] = f"{options.url}/api"
        say(f"starting the server; the first time, it makes its database. Logs: {log_of('server').parent}")
        server = processes.start("server", *server_command(options))
        wait_until_healthy(f"{options.url}/api", server, log_of("server"))
        deploy.set_up_pools(deploy.PoolType.PROCESS, max(1, len(gpus)), say=say)
        names = _start_workers(processes, len(gpus))
        say(f"starting workers {', '.join(names)}")
        register(Choices(), say=say)
        _wait_until_online(names)
        _tell(options, gpus, say)
        with suppress(Interrupted), announced(f"{options.url}/api"):
            while True:
                processes.revive(console)
                time.sleep(1)


def environment(options: UpOptions) -> dict[str, str]:
    """Variables that server, workers and flow runs share."""
    shared = {
        "PREFECT_API_URL": f"{options.url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "AMAZON_FT_HOME": str(home()),
        "AMAZON_FT_DATA": str(Path(os.environ.get("AMAZON_FT_DATA") or ".").absolute()),
        "DO_NOT_TRACK": "1",
    }
    other = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": options.database_url,
        "PREFECT_SERVER_UI_API_URL": os.environ.get("PREFECT_SERVER_UI_API_URL") or _api_for_browsers(options),
    }
    return shared | {name: url for name, url in other.items() if url}


def _api_for_browsers(options: UpOptions) -> str | None:
    """Where the interface on another machine finds the API; None if only this machine is listened to."""
    return f"http://{socket.getfqdn()}:{options.port}/api" if options.host == "0.0.0.0" else None


@contextmanager
def _processes(options: UpOptions) -> Generator[Processes]:
    processes = Processes({**os.environ, **environment(options)})
    try:
        yield processes
    finally:
        processes.stop()


def server_command(options: UpOptions) -> list[str]:
    """The arguments of `prefect` that start the server."""
    return ["server", "start", "--host", options.host, "--port", str(options.port), "--ui" if options.ui else "--no-ui"]


def _start_workers(processes: Processes, gpus: int) -> dict[str, str]:
    """One worker for the parent flows, and as many for trainings as there are GPUs; {worker: pool}.

    Each of these sees all GPUs, of which a training takes free ones, as many as it is to have.
    """
    processes.start("cpu-0", *worker_command("cpu-0", CPU_POOL))
    for number in range(max(1, gpus)):
        processes.start(f"cuda-{number}", *worker_command(f"cuda-{number}", CUDA_POOL, "--limit", "1"))
    workers = [name for name in processes.started if name != "server"]
    return {name: CPU_POOL if name == "cpu-0" else CUDA_POOL for name in workers}


def worker_command(name: str, pool: str, *options: str) -> list[str]:
    """The arguments of `prefect` that start a worker."""
    return ["worker", "start", "--name", name, "--pool", pool, "--type", "process", *options]


def _wait_until_online(names: dict[str, str]) -> None:
    give_up = time.monotonic() + ONLINE_SECONDS
    while waiting := [name for name, pool in names.items() if name not in online_workers(pool)]:
        if time.monotonic() > give_up:
            raise PipelineError(f"up: worker {waiting[0]}: not online after {ONLINE_SECONDS} s. Its log is {log_of(waiting[0])}.")
        time.sleep(0.2)


def _tell(options: UpOptions, gpus: Sequence[Gpu], say: Callable[[str], None]) -> None:
    trains = f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU here: the cuda worker trains on the CPU (device=cpu recipes)"
    lines = (
        "",
        f"server:    {options.url}" if options.ui else f"server:    {options.url}/api (without UI)",
        f"training:  {trains}",
        "",
        "In another shell:",
        f"  export PREFECT_API_URL={options.url}/api",
        f"  prefect deployment run amazon-ft/{'default' if gpus else 'demo'}",
        "",
        "Ctrl-C ends the server and its workers; a training writes a checkpoint first.",
    )
    for line in lines:
        say(line)


def _check_port(options: UpOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ConfigError(
                f"up: {options.host}:{options.port}: {error.strerror}; expected a free port. Use --port, or the server there "
                f"(export PREFECT_API_URL=http://{options.host}:{options.port}/api; amazon-ft deploy)."
            ) from error


def serve_pool(pool: str, name: str | None, *, healthcheck: bool) -> int:
    """Be a worker of a pool at PREFECT_API_URL; one run at a time where it trains. Returns Prefect's exit code."""
    options = (["--limit", "1"] if pool == CUDA_POOL else []) + (["--with-healthcheck"] if healthcheck else [])
    named = ["--name", name] if name else []
    return supervisor.supervise(os.getppid(), ["prefect", "worker", "start", "--pool", pool, *named, *options])
