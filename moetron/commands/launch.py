"""Start the ranks of a run on this node: torchrun's place, without its traceback and its imports.

    moetron launch --nproc-per-node 8 train --config RECIPE.yaml ...
    python tools/launch.py --nproc-per-node 2 pretrain_moe.py --config RECIPE.yaml ...

COMMAND is a Python script or a command of moetron. SIGTERM, SIGINT and SIGUSR1 go to every rank; a
rank that fails ends the others; ranks never outlive this process. The exit code is that of the
first rank that failed, else 75 if the ranks stopped, else 0. On several nodes, run it once on each:
with --nnodes, --master-addr, --master-port and, outside SLURM, --node-rank. Codes that all ranks
agree on (75, and 16 and 17 of reruns) come from the first node alone, a few seconds after the
others have returned 0: srun --kill-on-bad-exit would kill nodes that still write.
"""

import argparse
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from moetron.common.errors import UserError
from moetron.common.parent_death import LAUNCHER
from moetron.common.process import EXIT_HUNG, EXIT_RERUN, EXIT_STOPPED, EXIT_USER
from moetron.common.stop_signal import STOP_SIGNALS, EndAtOnce
from moetron.moe.config.schema.paths import ToolParser

POLL_S = 0.05
GRACE_S = 2.0
"""Time for the other ranks to release what they hold after one has failed."""
AGREED = (EXIT_STOPPED, *EXIT_RERUN)
"""Codes of a job's end that all ranks know of."""
AGREED_S = 8.0
"""Time for the launchers of other nodes to end before the first node's."""
_ELSEWHERE = "192.0.2.1"
"""An address of no host (RFC 5737): its route is the default one."""
SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable, torchrun's too: seconds that ranks get after a signal (default 300)."""


class Ranks:
    """The ranks of this node, each in a session of its own, so that signals come from here only."""

    def __init__(self, command: Sequence[str], count: int, environment: dict[str, str]) -> None:
        self._command, self._environment, self._count = command, environment, count
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signal: signal.Signals | None = None
        self._limit_s = float(os.environ.get(SHUTDOWN_S, "300"))
        self._kill_at_s = float("inf")

    def start(self) -> None:
        """Start ranks; none after a signal."""
        first = int(self._environment["NODE_RANK"]) * self._count
        for local in range(self._count):
            if self.signal is not None:
                return
            own = {"RANK": str(first + local), "LOCAL_RANK": str(local)}
            process = subprocess.Popen(
                self._command, env={**self._environment, **own}, start_new_session=True
            )
            self.processes.append(process)
            if self.signal is not None:  # came before the rank was in the list
                process.send_signal(self.signal)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Send a signal to every rank; the first one starts the time that they have to end.

        SIGINT as SIGTERM: a Python that has hardly started answers the former with a traceback.
        """
        if self.signal is None:
            self.signal = signal.SIGTERM if number == signal.SIGINT else signal.Signals(number)
            self._kill_at_s = time.monotonic() + self._limit_s
        for process in self.processes:
            process.send_signal(self.signal)

    def wait(self) -> list[int | None]:
        """Wait for all ranks or the first that fails; return the exit codes at that moment.

        Ranks without one get ``GRACE_S`` and are killed.
        """
        codes = self._codes()
        while None in codes and not any(code is not None and self.ends_all(code) for code in codes):
            if time.monotonic() > self._kill_at_s:
                text = f"launch: killing ranks that did not end after {self._limit_s:g} s"
                print(text, file=sys.stderr)
                break
            time.sleep(POLL_S)
            codes = self._codes()
        deadline_s = time.monotonic() + GRACE_S
        while None in self._codes() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        for process in self.processes:
            process.kill()
            process.wait()
        return codes

    def ends_all(self, code: int) -> bool:
        """Return whether the others cannot continue after a rank ended with ``code``."""
        return code not in (0, EXIT_STOPPED)

    def was_early(self, code: int | None) -> bool:
        """Return whether the forwarded signal itself ended a rank, before its first step."""
        return self.signal is not None and code in (-self.signal, 128 + self.signal)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]


def main() -> int:
    """Run the ranks of this node; return the exit code."""
    with EndAtOnce():
        arguments = parse(sys.argv[1:])
    code = run(arguments)
    if arguments.nnodes == 1 or code not in AGREED:
        return code
    if arguments.node_rank > 0:
        return 0
    time.sleep(AGREED_S)
    return code


def run(arguments: argparse.Namespace) -> int:
    """Run the ranks of this node; return the exit code of the first that failed, or of all."""
    with EndAtOnce():
        ranks = Ranks(command_of(arguments), arguments.nproc_per_node, environment_of(arguments))
    for number in STOP_SIGNALS:
        signal.signal(number, ranks.forward)
    ranks.start()
    codes = ranks.wait()
    if any(map(ranks.was_early, codes)) or not codes:
        assert ranks.signal is not None
        last = ranks.processes[0].returncode if codes else None
        if last != 128 + ranks.signal:  # else rank 0 has printed this line
            print(f"stopped by {ranks.signal.name} before the first step", file=sys.stderr)
        return 128 + ranks.signal
    for rank, code in enumerate(codes, arguments.node_rank * arguments.nproc_per_node):
        if code is not None and ranks.ends_all(code):
            if (
                code not in (EXIT_USER, EXIT_HUNG) and ranks.signal is None
            ):  # else the rank has said enough
                print(f"launch: rank {rank} {_end_text(code)}", file=sys.stderr)
            return code if code > 0 else 128 - code
    if None in codes:
        return 128 + signal.SIGKILL
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _end_text(code: int) -> str:
    """Return how a rank ended."""
    if code > 0:
        return f"failed with exit code {code}"
    hint = " (by hand, or for lack of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(
        prog="launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, text in (("--nproc-per-node", "ranks on this node"), ("--nnodes", "nodes")):
        parser.add_argument(name, type=int, default=1, metavar="N", help=f"{text} (default: 1)")
    parser.add_argument("--node-rank", type=int, help="default of several nodes: SLURM_NODEID")
    address = os.environ.get("MASTER_ADDR")
    parser.add_argument(
        "--master-addr", type=str, default=address, help="first node (several nodes)"
    )
    port = os.environ.get("MASTER_PORT")
    parser.add_argument(
        "--master-port", type=str, default=port, help="its port (default: a free one)"
    )
    parser.add_argument("command", type=str, nargs=argparse.REMAINDER, metavar="COMMAND ...")
    arguments = parser.parse_args(words)
    if arguments.node_rank is None:
        several = arguments.nnodes > 1
        arguments.node_rank = int(os.environ.get("SLURM_NODEID", "0")) if several else 0
    if not arguments.command:
        raise UserError("launch: no COMMAND: give pretrain_moe.py or train, then its flags")
    if arguments.nproc_per_node < 1 or not 0 <= arguments.node_rank < arguments.nnodes:
        raise UserError("launch: needs --nproc-per-node >= 1 and 0 <= --node-rank < --nnodes")
    if arguments.nnodes > 1 and not (arguments.master_addr and arguments.master_port):
        raise UserError("launch: --nnodes above 1 needs --master-addr and --master-port")
    return arguments


def command_of(arguments: argparse.Namespace) -> list[str]:
    """Return the command of every rank."""
    name = arguments.command[0]
    module = [] if name.endswith(".py") else ["-m", "moetron"]
    return [sys.executable, *module, *arguments.command]


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment that the ranks share."""
    return {
        **_gloo_interface(arguments),
        **os.environ,
        "WORLD_SIZE": str(arguments.nnodes * arguments.nproc_per_node),
        "LOCAL_WORLD_SIZE": str(arguments.nproc_per_node),
        "NODE_RANK": str(arguments.node_rank),
        "MASTER_ADDR": arguments.master_addr or "127.0.0.1",
        "MASTER_PORT": arguments.master_port or str(_free_port()),
        LAUNCHER: str(os.getpid()),
    }


def _gloo_interface(arguments: argparse.Namespace) -> dict[str, str]:
    """Name gloo's network interface (CPU ranks, and writers of --async-save).

    It would listen at the address of the host's name: one node needs no network, and on several the
    name may stand for the node itself (127.0.1.1 on Debian), where the others cannot reach it.
    """
    name = "lo" if Path("/sys/class/net/lo").exists() else None
    if arguments.nnodes > 1:
        # On the first node its own address may be a loopback one: that of its default route.
        found = map(_address_towards, (arguments.master_addr, _ELSEWHERE))
        name = next((_interface_of(each) for each in found if each is not None), None)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name}


def _address_towards(host: str) -> str | None:
    """Return this node's address on the way to a host, without sending; None: loopback."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


def _interface_of(address: str) -> str | None:
    known = psutil.net_if_addrs().items()
    return next((name for name, own in known if any(a.address == address for a in own)), None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
