"""Run one command under a time limit and measure it from outside: wall time, CPU time, memory of its process tree.

Memory is read from /proc about every 20 ms. ``statm`` (RSS) is cheap and read every time; ``smaps_rollup`` (PSS,
which counts a page shared by two processes once) walks the page tables and is read only where the RSS allows a new
peak. A spike between two samples is still seen by the kernel's own high-water mark of the largest process,
``ru_maxrss``.
Where there is no /proc (macOS), ``ru_maxrss`` alone remains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_S = 0.02
RESCAN_S = 0.1  # /proc is listed this often; between two listings only known processes are read
ENDING_S = 10.0  # a killed process of many gigabytes needs a moment to give them back
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One finished command.

    ``peak_mb`` is the larger of the tree's summed PSS and the largest process's ``ru_maxrss``; ``peak_rss_mb`` is the
    tree's summed RSS, which counts shared pages once per process.
    """

    returncode: int
    timed_out: bool
    wall_s: float
    cpu_s: float
    peak_mb: float
    peak_rss_mb: float
    processes: int
    message: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.timed_out

    @property
    def failure(self) -> str:
        """One line that says how the command ended, with its own last words."""
        if self.timed_out:
            return f"time limit, stopped after {self.wall_s:.0f} s"
        how = f"signal {-self.returncode}" if self.returncode < 0 else f"exit code {self.returncode}"
        return f"{how}: {self.message}" if self.message else how

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def process_table() -> dict[int, tuple[int, int]]:
    """Every process of the machine: pid -> (parent pid, session id). Empty where there is no /proc."""
    table = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # The command name may hold spaces and parentheses; the fields after its last ")" do not.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended between the listing and the reading
        table[int(entry.name)] = (int(fields[1]), int(fields[3]))
    return table


def tree_of(root: int, table: Mapping[int, tuple[int, int]]) -> set[int]:
    """The descendants of ``root`` with itself, and every process of its session (an orphan has lost its parent)."""
    tree = {pid for pid, (_, session) in table.items() if session == root} | ({root} & table.keys())
    while True:
        children = {pid for pid, (parent, _) in table.items() if parent in tree} - tree
        if not children:
            return tree
        tree |= children


def rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0  # ended


def pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # ended, or a kernel before 4.14: the RSS stands in
    return rss_bytes(pid)


class TreeSampler(threading.Thread):
    """Samples the memory of one process tree until it is stopped."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.peak_rss_bytes = 0
        self.peak_pss_bytes = 0
        self.seen: set[int] = {root}
        self._stopped = threading.Event()

    def run(self) -> None:
        tree: set[int] = {self.root}
        next_scan = next_pss = 0.0
        rss_at_pss = 0
        while not self._stopped.is_set():
            now = time.monotonic()
            if now >= next_scan:
                tree = tree_of(self.root, process_table())
                self.seen |= tree
                next_scan = now + RESCAN_S
            rss = sum(rss_bytes(pid) for pid in tree)
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
            # PSS <= RSS, so no new PSS peak hides below the old one.
            if rss > self.peak_pss_bytes and (now >= next_pss or rss > 1.01 * rss_at_pss):
                self.peak_pss_bytes = max(self.peak_pss_bytes, sum(pss_bytes(pid) for pid in tree))
                rss_at_pss, next_pss = rss, now + RESCAN_S
            self._stopped.wait(SAMPLE_S)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def has_ended(pid: int) -> bool:
    """Whether no such process runs: none of that number, or one that only waits for its parent to ask (a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def kill_all(pids: Iterable[int]) -> None:
    """Stop these processes, and return when they have ended: what is measured next must not run beside their end."""
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended by itself
            os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + ENDING_S  # one that hangs in the kernel never ends
    while not all(map(has_ended, pids)) and time.monotonic() < give_up:
        time.sleep(SAMPLE_S)


def kill_tree(root: int) -> None:
    """Stop a process that was not waited for yet (so that its number is still its own) and all below it."""
    kill_all(tree_of(root, process_table()) or {root})


def kill_orphans(session: int) -> None:
    """Stop what an ended session leader left behind."""
    kill_all(pid for pid, (_, own) in process_table().items() if own == session and pid != session)


def last_words(text: str, limit: int = 300) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t-=+|*#")]
    return lines[-1][:limit] if lines else ""


def run_limited(
    command: Sequence[str], *, limit_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Run:
    """Run ``command`` in a session of its own, stop its whole tree after ``limit_s``, and measure it."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        sampler = TreeSampler(process.pid)
        sampler.start()
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            kill_tree(process.pid)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: leave nothing running behind
            kill_tree(process.pid)
            raise
        finally:
            timer.cancel()
            sampler.stop()
        wall_s = time.perf_counter() - start
        timer.join()  # it may still be stopping the rest of the tree
        kill_orphans(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    max_rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(
        returncode=process.returncode,
        timed_out=timed_out.is_set(),
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mb=max(sampler.peak_pss_bytes, max_rss_bytes) / MIB,
        peak_rss_mb=max(sampler.peak_rss_bytes, max_rss_bytes) / MIB,
        processes=len(sampler.seen),
        message=last_words(text),
    )
