"""Does a run that was killed, stopped or started twice end as one that was left alone?

    python -m experiments.kill                  # at every write, 60 times at random, 40 signals
    python -m experiments.kill --every 12 --random 10 --signals 10
    python -m experiments.kill --soak           # 1,000 images, 2,000 updates: does memory grow?

Every case is one command on the toy pack, run as a real process. It is killed (SIGKILL) before
each of its writes (files opened to be written, renamed, deleted; folders made), one after the
other, and then at random moments, up to three times in a row. The same command is started again; in
the end its folder must hold exactly the files of the run that was left alone, byte for byte. Exits
with 1 if one does not.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import dginstyle

SMALL = ["--steps", "8", "--save-every", "3", "--batch", "1", "--sample-steps", "1"]
CASES = {  # name: (words of the command, processes)
    "generate": (["generate", "--num", "5", "--batch", "2", "--data", "toy:sunny:6"], 1),
    "generate, two processes": (["generate", "--num", "5", "--batch", "1", "--no-mrlf", "--data",
                                 "toy:sunny:6"], 2),
    "train, both stages": (["train", "--data", "toy:sunny:6", "--cache", "0", *SMALL], 1),
    "train dreambooth, data workers": (["train", "dreambooth", "--data", "toy:sunny:6", "--cache",
                                        "0", "--workers", "2", *SMALL], 1),
    "segment train, EMA": (["segment", "train", "--data", "toy:sunny:6", "--ema", "0.9",
                            *SMALL[:6]], 1),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def start(words, out, kill_at=0, processes=1):
    """The command as forked processes of one group -> their ids. The first kills itself before its
    write number `kill_at`."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT":
                           str(port), "MASTER_ADDR": "localhost", "LOCAL_RANK": str(rank)}
        if rank == 0:
            sys.addaudithook(Killer(out, kill_at))
        code = 1
        try:
            code = dginstyle.main([*words, "--out", str(out)])
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


class Killer:
    """Audit hook: counts the writes below a folder, and kills the process before one of them."""

    def __init__(self, out, kill_at):
        self.out, self.kill_at, self.writes, self.pid = str(out), kill_at, 0, os.getpid()

    def __call__(self, event, args):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        inside = isinstance(args[0], (str, Path)) and str(args[0]).startswith(self.out + "/")
        if not inside or (event == "open" and not args[2] & WRITES) or os.getpid() != self.pid:
            return
        self.writes += 1
        if self.writes == self.kill_at:
            os.kill(self.pid, signal.SIGKILL)


def finish(pids, after=None, number=signal.SIGKILL):
    """Wait for the processes, or send them a signal after some seconds -> their exit codes."""
    end, codes = time.time() + (1e9 if after is None else after), {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        dead = any(code < 0 for code in codes.values())  # nobody waits for a process that is gone
        if time.time() > end or dead:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL if dead else number)
            end = 1e18
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def tree(out, but=()):
    """{name: bytes} of all files below a folder."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*"))
            if f.is_file() and not f.name.endswith(but)}


def compare(out, whole, but=()):
    """Names of the files that differ from those of the run that was left alone."""
    have, want = tree(out, but), {n: b for n, b in whole.items() if not n.endswith(but)}
    return sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))


def run_case(name, folder, every, kills, stops, rng):
    """-> row of the table, faults."""
    words, processes = CASES[name]
    faults, writes, done, ended, number = [], 0, 0, [], 0
    out = folder / "whole"
    begin = time.time()
    assert not any(finish(start(words, out, 0, processes))), out.with_suffix(".log").read_text()
    seconds, whole = time.time() - begin, tree(out)

    def again(out, what, but=()):
        codes = finish(start(words, out, 0, processes))
        differ = compare(out, whole, but) if not any(codes) else ["it ended with " + str(codes)]
        if differ:
            faults.append(f"{name}, {what}: {', '.join(differ)} ({out})")
            print(faults[-1], file=sys.stderr, flush=True)

    while True:
        out, number = folder / f"run{number}", number + 1
        codes = finish(start(words, out, 1 + writes * every, processes))
        if codes[0] != -signal.SIGKILL:
            break  # there are no more writes than that
        again(out, f"killed before write {1 + writes * every}")
        writes += 1
    while done < kills:
        out, number = folder / f"run{number}", number + 1
        for _ in range(rng.randint(1, 3)):
            finish(start(words, out, 0, processes), rng.uniform(0, seconds))
            done += 1
        again(out, "killed at random")
    for k in range(stops):
        out, number = folder / f"run{number}", number + 1
        sent = (signal.SIGTERM, signal.SIGINT)[k % 2]
        codes = finish(start(words, out, 0, processes), rng.uniform(0.1, seconds), sent)
        ended.append(codes[0])
        if set(codes) - {0, 128 + sent, -signal.SIGKILL}:
            faults.append(f"{name}, {sent.name}: ended with {codes} ({out})")
        again(out, sent.name, ".before.pt")  # it saved where the other run did not
    codes = ", ".join(f"{ended.count(c)} x {c}" for c in sorted(set(ended)))
    return (f"| {name} | {writes} | {done} | {stops} ({codes}) | {len(whole)} files | "
            f"{len(faults)} |"), faults


def soak(words, folder, count, total):
    """Memory of a process after a tenth of its work, before its last item, at the end, in MiB."""
    out = folder / "soak"
    pid, = start(words, out)
    sizes = {}
    while not (done := os.waitpid(pid, os.WNOHANG)[0]):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        sizes[count(out)] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        time.sleep(0.5)
    assert done
    tenth = next(size for n, size in sizes.items() if n >= total / 10)
    *_, last = (size for n, size in sizes.items() if n < total)
    return tenth, last, sizes[max(sizes)]


def run_soak(folder):
    def images(out):
        return len(list((out / "images").glob("*.png"))) if out.is_dir() else 0

    def steps(out):
        log = out / "log.jsonl"
        return 50 * len(log.read_text().splitlines()) if log.is_file() else 0

    train = ["segment", "train", "--data", "toy:sunny:60", "--steps", "2000", "--workers", "0",
             "--batch", "2"]
    make = ["generate", "--num", "1000", "--batch", "8", "--steps", "2"]
    cases = {"generate, 1,000 images": (make, images, 1000),
             "segment train, 2,000 steps": (train, steps, 2000)}
    print("| run | MiB after a tenth | before the end | growth | with what is drawn at the end |\n"
          "|---|---|---|---|---|")
    worst = 0
    for k, (name, (words, count, total)) in enumerate(cases.items()):
        (folder / str(k)).mkdir()
        tenth, last, end = soak(words, folder / str(k), count, total)
        worst = max(worst, last / tenth - 1)
        print(f"| {name} | {tenth:.0f} | {last:.0f} | {last / tenth - 1:+.1%} | {end:.0f} |",
              flush=True)
    return int(worst > 0.03)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th write")
    parser.add_argument("--random", type=int, default=60, help="in all cases together")
    parser.add_argument("--signals", type=int, default=40, help="in all cases together")
    parser.add_argument("--only", default="", help="the cases with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soak", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill"))
    if args.soak:
        return run_soak(folder)
    print("| command | killed at a write | at random | signals (exit codes) | left | differ |\n"
          "|---|---|---|---|---|---|", flush=True)
    faults = []
    for k, name in enumerate(name for name in CASES if args.only in name):
        (folder / str(k)).mkdir()
        row, found = run_case(name, folder / str(k), args.every,
                              args.random // len(CASES), args.signals // len(CASES),
                              random.Random(f"{args.seed} {name}"))
        print(row, flush=True)
        faults += found
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
