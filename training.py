"""A training run that can be stopped anywhere: loop, checkpoints, folder, processes.

Used by every stage of DGInStyle (U^S, ControlNet) and by the segmenters; `open_run` also guards the
folder of `generate`. A run is the same bytes whether it went through or was killed and started
again, however often: sample i and the noise of step i depend on the seed and i alone, every file
is written beside and renamed, and what was written after the last checkpoint is written again.

    fit             the loop: autocast, accumulation, EMA, DDP, learning rate, log, checkpoints
    Trained         what changes from update to update, and so what a checkpoint holds
    open_run        a run's folder: the same settings, one run at a time, what was left out
    Stop            Ctrl-C and SIGTERM end a run where it is cheap

Use alone, beside data.py and unet.py (which reads JSON), with any nets and any loss:
    net = torch.nn.Linear(2, 1)
    loss = lambda batch: net(batch[0]).square().mean()
    draw = lambda rng: (torch.from_numpy(rng.normal(size=2)).float(),)
    fit("line", Objective(loss, net=net), draw, args, save)     # args: recipes.LOOP's
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import UserError
from unet import read_json

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None

ADAMW = "betas", "eps", "weight_decay"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# settings that may change between two runs of one training
RESUMABLE = ("steps", "workers", "save_every", "device", "stage", "eval_data", "eval_fit",
             "weights", "save", "images", "sample_steps", "guidance", "compile", "on_error",
             "diff_cache")


# --------------------------------------------------------------------------------------------
# The loop


class Samples(torch.utils.data.Dataset):
    """Sample i of a run is a function of (seed, i) alone: in any order, worker or restart.

    --on-error skip: another one is drawn in place of a sample that cannot be read.
    """

    def __init__(self, draw, args):
        self.draw, self.args = draw, args

    def __getitem__(self, i):
        for k in itertools.count():
            try:
                return self.draw(np.random.default_rng([self.args.seed, i] + [k] * (k > 0)))
            except UserError as error:
                if k == 100:
                    raise
                skip(self.args, error)


class Objective(torch.nn.Module):
    """The nets in training and the loss of a batch as one module, which is what DDP wraps."""

    def __init__(self, loss, **nets):
        super().__init__()
        self.nets, self.loss = torch.nn.ModuleDict(nets), loss

    def forward(self, batch):
        return self.loss(batch)


class Trained:
    """What changes from update to update, and so what a checkpoint holds."""

    def __init__(self, objective, groups, args):
        device = torch.device(args.device)
        self.objective = objective
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            groups or [{"params": self.parameters, "lr": args.lr,
                        "weight_decay": args.weight_decay}],
            betas=(0.9, 0.999), eps=1e-8, fused=device.type != "mps")
        groups = self.optimizer.param_groups  # a checkpoint has them too
        self.rates = [group["lr"] for group in groups]
        self.settings = [[group[key] for key in ADAMW] for group in groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(args) == "fp16")
        # --ema: the average of every weight, and of BatchNorm's statistics with them
        self.weights = [*self.parameters, *(b for b in objective.nets.buffers()
                                            if b.is_floating_point())] if args.ema else []
        self.average = [w.detach().clone() for w in self.weights]
        self.loss = None  # its running mean, for the log

    def states(self):
        return {"nets": self.objective.nets, "optimizer": self.optimizer, "scaler": self.scaler}

    def resume(self, file):
        """Read the newest whole checkpoint, if there is one -> the step to go on from.

        UserError when there are checkpoints and none can be read.
        """
        files = [f for f in (file, before(file)) if f.is_file()]
        for path in files:
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                for name, part in self.states().items():
                    part.load_state_dict(saved[name])
                for mine, theirs in zip(self.average, saved["average"], strict=True):
                    mine.copy_(theirs)
                if saved["loss"] is not None:
                    self.loss = torch.tensor(saved["loss"], device=self.parameters[0].device)
                self.check(saved)
                return int(saved["step"])
            except Exception as error:  # a damaged file raises whatever it likes
                reason = str(error).split("\n")[0]
                reason = f"{path} is no whole checkpoint of this run: {reason}"
                say(reason)
        if files:
            raise UserError(f"{reason}; to begin anew, delete {file.parent}")
        return 0

    def check(self, saved):
        """ValueError unless what was read is finite and fits: what load_state_dict lets pass."""
        moments = [(p, m) for p in self.parameters
                   for m in self.optimizer.state.get(p, {}).values() if m.ndim]
        if any(m.shape != p.shape for p, m in moments) or self.settings != [
                [group[key] for key in ADAMW] for group in self.optimizer.param_groups]:
            raise ValueError("its optimiser is of another run")
        numbers = [*self.objective.nets.state_dict().values(), *self.average,
                   *(m for _, m in moments), torch.tensor(saved["loss"] or 0.0)]
        if not all(v.isfinite().all() for v in numbers) or saved["step"] < 0:
            raise ValueError("it holds numbers that are not finite")

    def write(self, file, step):
        """All that `resume` needs; the checkpoint that was there stays beside it."""
        saved = {name: part.state_dict() for name, part in self.states().items()}
        mean = None if self.loss is None else self.loss.item()
        with data.replacing(file, keep=before(file)) as part:
            try:
                torch.save(plain({"step": step, "average": self.average, "loss": mean, **saved}),
                           part)
            except RuntimeError as error:  # what torch makes of a full disk
                reason = str(error).split("\n")[0]
                raise UserError(f"{file} cannot be written, is the disk full? {reason}") from None

    def follow(self, loss, ema, step):
        """average <- ema average + (1 - ema) weights, with a short memory at the start; the loss
        likewise."""
        if self.average:
            torch._foreach_lerp_(self.average, [w.detach() for w in self.weights],
                                 1 - min(ema, (step + 1) / (step + 10)))
        self.loss = loss if self.loss is None else torch.lerp(loss, self.loss, 0.98)

    @contextlib.contextmanager
    def averaged(self):
        """For a while the nets are in eval mode and, with --ema, hold the averaged weights."""
        trained = [w.detach().clone() for w in self.weights]
        for w, a in zip(self.weights, self.average, strict=True):
            w.data.copy_(a)
        self.objective.eval()
        yield
        self.objective.train()
        for w, t in zip(self.weights, trained, strict=True):
            w.data.copy_(t)


def before(checkpoint):
    """Where the checkpoint before the newest one lies."""
    return checkpoint.with_suffix(".before.pt")


def plain(x):
    """Dicts, lists, tuples and words built anew, so that equal states become equal bytes.

    pickle writes an object that it meets twice as a reference; which ones are the same object
    differs between a run that went through and one that read a checkpoint.
    """
    if isinstance(x, dict):
        return {plain(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(plain(item) for item in x)
    return sys.intern(x) if isinstance(x, str) else x


def lr_factor(args, step):
    """Learning rate of a step as a fraction of --lr."""
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    done = step / args.steps
    decay = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "poly": 1 - done}
    return warm * decay[args.lr_schedule]


def choose_precision(args):
    """fp32, bf16 or fp16: --precision, or half precision on GPUs and fp32 elsewhere."""
    if args.precision != "auto":
        return args.precision
    if not args.device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def update(state, parallel, batches, args):
    """One optimiser step over --accumulate batches -> the loss, a tensor on the device."""
    device, precision = torch.device(args.device), choose_precision(args)
    total = torch.zeros((), device=device)
    for k in range(args.accumulate):
        batch = [part.to(device, non_blocking=True) for part in next(batches)]
        waits = parallel is not state.objective and k < args.accumulate - 1
        with parallel.no_sync() if waits else contextlib.nullcontext():  # DDP adds up once
            with torch.autocast(device.type, DTYPES[precision], precision != "fp32"):
                loss = parallel(batch) / args.accumulate
            state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)
    if args.clip:
        torch.nn.utils.clip_grad_norm_(state.parameters, args.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return total


def fit(stage, objective, draw, args, save, pairs=None, groups=None):
    """The training loop of every stage.

    objective(batch) -> loss; draw(rng) -> one sample, made of `pairs`, whose names an error gives;
    save() writes the nets in their final form, with the averaged weights in place when --ema is
    on; groups: the optimiser's, else all weights alike. Restarting continues from the last
    checkpoint, exactly as if there had been no stop. Under torchrun every process brings a batch of
    its own to each update. UserError when the loss is no longer a number; Interrupted after Ctrl-C
    or SIGTERM, when the step is done and a checkpoint written.
    """
    rank, world = ranks(args.device)
    device, checkpoint = torch.device(args.device), Path(args.out, "checkpoints", f"{stage}.pt")
    with open_run(args, f"{stage}.json", RESUMABLE, pairs), Stop(world, device) as stop:
        objective.to(device, memory_format=torch.channels_last).train()
        if args.compile:
            objective.compile()
        state = Trained(objective, groups, args)
        if first := state.resume(checkpoint):
            say(f"{stage}: going on from step {first}")
        if rank == 0:
            cut_log(Path(args.out, "log.jsonl"), stage, first)
        parallel = objective if world == 1 else torch.nn.parallel.DistributedDataParallel(
            objective, gradient_as_bucket_view=True)  # no second copy of the gradients
        batches, losses = iter(loader(draw, args, first)), []
        bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=stage,
                   disable=rank > 0, mininterval=1)
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step * world + rank)  # noise, t, dropout
            for group, rate in zip(state.optimizer.param_groups, state.rates, strict=True):
                group["lr"] = rate * lr_factor(args, step)
            losses.append(update(state, parallel, batches, args))
            state.follow(losses[-1], args.ema, step)

            done, last = step + 1, step + 1 == args.steps
            saves, stopped = done % args.save_every == 0 or last, stop.asked(done)
            if saves or stopped or done % 10 == 0:  # only now does the program wait for the device
                check_losses(losses, done, stage, draw, pairs, args)
                losses.clear()
                bar.set_postfix(loss=f"{state.loss.item():.4f}", refresh=False)
            if rank == 0 and (done % 50 == 0 or last):
                with open(Path(args.out, "log.jsonl"), "a") as file:
                    row = {"stage": stage, "step": done, "loss": round(state.loss.item(), 6)}
                    file.write(json.dumps(row) + "\n")
            if rank == 0 and saves:
                with state.averaged():
                    save()
            if rank == 0 and (saves or stopped):
                state.write(checkpoint, done)
            if stopped and not last:
                raise Interrupted(stopped, f"{stage}: stopped after step {done}")
        barrier(world)  # the next stage reads what the first process wrote


def loader(draw, args, first):
    """Batches of this process from update `first` on, in order, made by --workers processes."""
    rank, world = ranks(args.device)
    per_step = args.batch * args.accumulate * world  # samples in one update
    processes = workers(args)
    return torch.utils.data.DataLoader(
        Samples(draw, args), args.batch, num_workers=processes,
        sampler=range(first * per_step + rank, args.steps * per_step, world),
        multiprocessing_context="fork" if processes else None,
        pin_memory=args.device.startswith("cuda"))


def workers(args):
    """--workers, or one for every core of this process, up to 8.

    `draw` is a closure, which only a forked process can share: none where that is not to be had
    (Windows) or not safe (macOS).
    """
    if args.workers != 0 and sys.platform in ("win32", "darwin"):
        say(f"--workers 0: {sys.platform} cannot share the data with other processes")
        return 0
    if args.workers is not None:
        return args.workers
    return min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_losses(losses, done, stage, draw, pairs, args):
    """UserError with the step and its pictures if one of the last losses is no number.

    The weights on disk are those of a step before it: a checkpoint is written after this check.
    """
    finite = torch.stack(losses).isfinite().tolist()
    if all(finite):
        return
    rank, world = ranks(args.device)
    step = done - len(losses) + finite.index(False)
    names = []
    if hasattr(pairs, "find"):  # draw them again, to hear which pictures they are made of
        pairs.heard = names
        first, many = step * args.batch * args.accumulate * world, args.batch * args.accumulate
        for j in range(many):
            Samples(draw, args)[first + j * world + rank]
        pairs.heard = None
    raise UserError(f"{stage}: the loss is {losses[finite.index(False)].item()} at step {step + 1} "
                    f"(pictures: {', '.join(dict.fromkeys(names)) or 'not known'}); the last "
                    "checkpoint is kept; lower --lr or try --precision fp32")


def cut_log(file, stage, step):
    """Take out the rows that a stage wrote after the checkpoint from which it goes on."""
    lines = whole_lines(file, stage=str, step=int)
    rows = map(json.loads, lines)
    kept = [line for line, row in zip(lines, rows, strict=True)
            if row["stage"] != stage or row["step"] <= step]
    if file.is_file():
        with data.replacing(file) as part:
            part.write_text("".join(kept))


# --------------------------------------------------------------------------------------------
# A run's folder


@contextlib.contextmanager
def open_run(args, name, free, pairs=None, fresh=False):
    """Make --out, or take it up again if it holds a run with the same settings, and hold it.

    name: the file of the settings; free: those that may differ between the runs that share a
    folder; pairs: the data, for what was left out of them; fresh: a first run needs an empty
    folder. The first of several processes does it all. UserError for another run's folder.
    """
    rank, world = ranks(args.device)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            out, settings = Path(args.out), settings_of(args, free)
            own = {".lock", name + ".part"}  # of a run that was killed before it had a name
            if fresh and not (out / name).is_file() and out.is_dir() and set(os.listdir(out)) - own:
                raise UserError(f"--out {out} is not empty and holds no run of this command")
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            compare_settings(out, name, settings)
            with data.replacing(out / name) as part:
                part.write_text(json.dumps(settings, indent=2) + "\n")
            left_out = [f"{path}: {reason}" for part in getattr(pairs, "sets", ())
                        for path, reason in getattr(part, "skipped", ())]
            count_skipped(out, left_out)
            stack.callback(count_skipped, out)
        barrier(world)
        yield


def settings_of(args, free):
    """What a run's folder remembers of the flags."""
    return {key: str(value) for key, value in sorted(vars(args).items())
            if key not in (*free, "out", "run", "command")}


def compare_settings(out, name, settings):
    """UserError if the folder holds a run whose settings are others."""
    if not (out / name).is_file():
        return
    old = read_json(out / name)
    if differ := [key for key in settings if old.get(key) != settings[key]]:
        raise UserError(f"--out {out} holds a run with other settings ({', '.join(differ)}); "
                        "choose another folder")


@contextlib.contextmanager
def locked(folder):
    """Hold FOLDER/.lock for a while; UserError when another run has it.

    A lock of the process (POSIX): one that is killed lets go of it, and its data workers have none.
    """
    path = Path(folder, ".lock")
    while fcntl:
        file = open(path, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is at work in {folder}; wait for it, or choose another "
                            "--out") from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break  # else the run before has just deleted this file
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if fcntl:
            file.close()


def skip(args, error):
    """--on-error stop: raise it; skip: a line in OUT/skipped.jsonl."""
    if args.on_error == "stop":
        raise error
    with open(Path(args.out, "skipped.jsonl"), "a") as file:
        file.write(json.dumps({"reason": str(error)}) + "\n")


def count_skipped(out, reasons=()):
    """OUT/skipped.jsonl: everything once, in order, and a line that says how much it is."""
    file = out / "skipped.jsonl"
    rows = {json.dumps({"reason": reason}) + "\n" for reason in reasons}
    if rows := rows.union(whole_lines(file, reason=str)):
        with data.replacing(file) as part:
            part.write_text("".join(sorted(rows)))
        say(f"left out so far: {len(rows)}, listed in {file}")


def whole_lines(file, **kinds):
    """The lines of a file that is appended to; a run that was killed may have left half a line.

    UserError for a whole line that is no JSON object with entries of these kinds.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    lines = [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            good = all(isinstance(row[key], kind) for key, kind in kinds.items())
        except (ValueError, RecursionError, TypeError, LookupError):
            good = False
        if not good:
            raise UserError(f"{file}, line {number}: no row of this program; take it out")
    return [line.decode() for line in lines]


# --------------------------------------------------------------------------------------------
# Processes and signals


def ranks(device):
    """(rank, number of processes); under torchrun this joins the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=datetime.timedelta(days=1))  # processes of `generate` meet only at the end
    return rank, world


def barrier(world):
    if world > 1:
        torch.distributed.barrier()


def say(text):
    """Print a line; of several processes only the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: (number of the signal, what was done about it)."""


@contextlib.contextmanager
def signals(handler):
    """Ctrl-C and SIGTERM call handler(number, frame) for a while; other threads hear none."""
    hears = threading.current_thread() is threading.main_thread()
    old = {number: signal.signal(number, handler)
           for number in ((signal.SIGINT, signal.SIGTERM) if hears else ())}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def interrupt(number, frame):
    raise Interrupted(number, "stopped")


class Stop:
    """Ctrl-C and SIGTERM wait for the end of the step; a second one does not."""

    def __init__(self, world, device):
        self.number, self.world, self.device = 0, world, device

    def __call__(self, number, frame):
        if self.number:
            interrupt(number, frame)
        self.number = number

    def __enter__(self):
        self.signals = signals(self)
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.signals.__exit__(None, None, None)
        if self.number and kind is RuntimeError:  # the signal also reached a data worker
            raise Interrupted(self.number, "stopped in the middle of a step") from None

    def asked(self, done):
        """The signal to stop after now, or 0; several processes agree on it every 10 steps."""
        if self.world == 1 or done % 10:
            return self.number * (self.world == 1)
        number = torch.tensor(self.number, device=self.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)
