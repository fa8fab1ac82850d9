"""A training run that can be stopped anywhere: loop, checkpoints, folder, processes.

Used by every stage of DGInStyle (U^S, ControlNet) and by the segmenters; `open_run` also guards the
folder of `generate`. Sample i and the noise of step i depend on (seed, i) alone and every file is
written beside and renamed, so a run that was killed and started again ends with the same weights.

    optimise        the loop: autocast, accumulation, EMA, DDP, learning rate, log, checkpoints
    open_run        a run's folder: the same settings, one run at a time
    open_data       the data sets of a run, and rare class sampling over them

Use alone, beside data.py, with any nets and any loss:
    net = torch.nn.Linear(2, 1)
    loss = lambda batch: net(batch[0]).square().mean()
    draw = lambda rng: (torch.from_numpy(rng.normal(size=2)).float(),)
    optimise("line", loss, {"net": net}, draw, args, save)     # args: recipes.LOOP's
"""

import contextlib
import copy
import datetime
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import data
from data import UserError

if os.name == "posix":  # elsewhere nothing keeps two runs out of one folder
    import fcntl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# settings that may change between two runs of one training
RESUMABLE = ("steps", "workers", "save_every", "device", "stage", "eval_data", "eval_fit",
             "weights", "images", "sample_steps", "guidance", "compile")


# --------------------------------------------------------------------------------------------
# The loop


class Objective(torch.nn.Module):
    """The nets in training and the loss of a batch as one module, which is what DDP wraps."""

    def __init__(self, loss, nets):
        super().__init__()
        self.nets, self.loss = torch.nn.ModuleDict(nets), loss

    def forward(self, batch):
        return self.loss(batch)


def optimise(stage, loss, nets, draw, args, save, groups=None):
    """The training loop of every stage: AdamW on all that requires gradients in `nets`.

    loss    function of a batch, the list of what draw's tensors collate to, on the device; it
            returns a scalar tensor
    nets    {name: Module}, the networks that are trained; what is frozen stays outside
    draw    function of a numpy Generator: one sample, a tuple of tensors
    save    function of a dict like `nets`, in eval mode: writes them in their final form; with
            --ema it gets the averaged ones
    groups  the optimiser's parameter groups, each with its own lr; None: all weights alike

    Rerunning resumes from the last checkpoint in OUT/checkpoints. Under torchrun every process
    brings a batch of its own to each update. UserError when the loss or a weight is NaN.
    After Ctrl-C or SIGTERM the step is ended, a checkpoint written and KeyboardInterrupt raised.
    """
    rank, world = ranks(args.device)
    device, file = torch.device(args.device), Path(args.out, "checkpoints", f"{stage}.pt")
    objective = Objective(loss, nets).to(device, memory_format=torch.channels_last).train()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        groups or [{"params": parameters, "lr": args.lr, "weight_decay": args.weight_decay}],
        betas=(0.9, 0.999), eps=1e-8, fused=device.type != "mps")
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(args) == "fp16")
    average = copy.deepcopy(objective.nets) if args.ema else objective.nets
    states = {"nets": objective.nets, "optimizer": optimizer, "scaler": scaler}
    states |= {"average": average} if args.ema else {}

    with open_run(args, f"{stage}.json", RESUMABLE), stopping(world) as asked:
        first = resume(file, states)
        if args.compile:
            objective.compile()
        parallel = objective if world == 1 else torch.nn.parallel.DistributedDataParallel(
            objective, gradient_as_bucket_view=True)  # no second copy of the gradients
        batches, mean = iter(loader(draw, args, first)), None
        bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=stage,
                   disable=rank > 0, mininterval=1)
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step * world + rank)  # noise, t, dropout
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_factor(args, step)
            value = update(parallel, optimizer, scaler, batches, args)
            mean = value if mean is None else torch.lerp(value, mean, 0.98)
            if args.ema:
                follow(average, objective.nets, args.ema, step)

            done, stop = step + 1, bool(asked)
            saves = done % args.save_every == 0 or done == args.steps
            if saves or stop or done % 10 == 0:  # only now does the program wait for the device
                check_finite(stage, done, mean, objective.nets if saves or stop else None)
                bar.set_postfix(loss=f"{mean.item():.4f}", refresh=False)
            if rank == 0 and (saves or done % 50 == 0):
                with open(Path(args.out, "log.jsonl"), "a") as log:
                    row = {"stage": stage, "step": done, "loss": round(mean.item(), 6)}
                    log.write(json.dumps(row) + "\n")
            if rank == 0 and saves:
                save(average.eval())
                average.train()
            if rank == 0 and (saves or stop):  # last, so that no final form is ever missing
                write_checkpoint(file, done, states)
            if stop:
                raise KeyboardInterrupt(*asked)
        barrier(world)  # the next stage reads what the first process wrote


def update(parallel, optimizer, scaler, batches, args):
    """One optimiser step over --accumulate batches -> mean loss, a tensor on the device.

    parallel: the Objective, or DDP around it; batches: iterator over [tensor (B,…), …].
    """
    device, precision = torch.device(args.device), choose_precision(args)
    total = torch.zeros((), device=device)
    for _ in range(args.accumulate):
        batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        with torch.autocast(device.type, DTYPES[precision], precision != "fp32"):
            loss = parallel(batch) / args.accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    if args.clip:
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], args.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def follow(average, nets, ema, step):
    """--ema: average <- decay average + (1 - decay) nets, with a short memory at the start."""
    decay = min(ema, (step + 1) / (step + 10)) if step else 0
    weights = zip(average.state_dict().values(), nets.state_dict().values(), strict=True)
    for kept, new in weights:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:  # BatchNorm's number of batches
            kept.copy_(new)


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


def loader(draw, args, first):
    """Batches of this process from update `first` on, in order, made by --workers processes.

    The default is one worker for every core of this process, up to 8. `draw` is a closure, which
    only a forked process can share: none where fork is missing (Windows) or unsafe (macOS).
    """
    rank, world = ranks(args.device)
    per_step = args.batch * args.accumulate * world  # samples in one update
    workers = args.workers
    if sys.platform in ("win32", "darwin"):
        workers = 0
    elif workers is None:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, cores)

    def make(numbers):
        """Sample i of a run is a function of (seed, i) alone: in any order, worker or restart."""
        return default_collate([draw(np.random.default_rng([args.seed, i])) for i in numbers])

    return DataLoader(
        range(first * per_step + rank, args.steps * per_step, world), args.batch, collate_fn=make,
        num_workers=workers, multiprocessing_context="fork" if workers else None,
        pin_memory=args.device.startswith("cuda"))


def check_finite(stage, step, loss, nets=None):
    """UserError if the running mean of the loss or a weight is NaN: neither is ever saved."""
    values = [loss, *(nets.state_dict().values() if nets else ())]
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"{stage}: the loss or a weight is NaN by step {step}; the last checkpoint "
                        "is kept; lower --lr or try --precision fp32")


def write_checkpoint(file, step, states):
    """All that `resume` needs, in place of the checkpoint before it. UserError on a full disk."""
    saved = {name: state.state_dict() for name, state in states.items()}
    with data.replacing(file) as beside:
        try:
            torch.save({"step": step, **saved}, beside)
        except RuntimeError as error:  # what torch makes of a full disk
            raise UserError(f"{file} cannot be written, is the disk full? {error}") from None


def resume(file, states):
    """Read the checkpoint, if there is one -> the step to go on from."""
    if not file.is_file():
        return 0
    with data.reading(file, "a checkpoint of this run (to begin anew, delete it)"):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for name, state in states.items():
            state.load_state_dict(saved[name])
    say(f"{file.stem}: resumes from step {saved['step']}")
    return saved["step"]


# --------------------------------------------------------------------------------------------
# A run's folder


def open_run(args, name, free, fresh=False):
    """Make --out, or take it up again if it holds a run with the same settings -> its lock file.

    The run is alone in the folder until the file is closed: a context manager. name: the file of
    the settings; free: those that may differ between the runs that share a folder; fresh: a first
    run needs an empty folder. The first of several processes does it all. UserError for another
    run's folder, or while another run is at work there.
    """
    rank, world = ranks(args.device)
    if rank > 0:
        barrier(world)  # until the first process is through
        return contextlib.nullcontext()
    out, file = Path(args.out), Path(args.out, name)
    if fresh and out.is_dir() and set(os.listdir(out)) - {".lock"} and not file.is_file():
        raise UserError(f"--out {out} is not empty and holds no run of this command")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        if os.name == "posix":  # a lock of the process: the system frees it when it is killed
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another run is at work in {out}; wait for it, or choose another "
                        "--out") from None
    settings = {key: str(value) for key, value in sorted(vars(args).items())
                if key not in ("out", "run", "command")}
    old = data.read_json(file) if file.is_file() else settings
    if differ := [key for key in settings if key not in free and old.get(key) != settings[key]]:
        raise UserError(f"--out {out} holds a run with other settings ({', '.join(differ)}); "
                        "choose another folder")
    with data.replacing(file) as beside:
        beside.write_text(json.dumps(settings, indent=2) + "\n")
    barrier(world)
    return lock


# --------------------------------------------------------------------------------------------
# Its data


def read_classes(args):
    return data.Classes.from_json(args.classes) if args.classes else data.CITYSCAPES


def open_sets(specs, args, split, labels_only=False):
    """Words of --data -> data sets by data.open_set, each reported in one line."""
    sets = [data.open_set(spec, read_classes(args), args.seed, split, labels_only)
            for spec in specs]
    say(*(opened.report() for opened in sets), sep="\n")
    return sets


def open_data(args, labels_only=False):
    """All sets of --data -> (data.Joined, its Classes)."""
    if not args.data:
        raise UserError("--data is missing: name one or more data set folders")
    return data.Joined(open_sets(args.data, args, "train", labels_only)), read_classes(args)


def file_draw(pairs, args):
    """-> draw(rng): (class, file) by RCS (section 3.4), or with --no-rcs (None, any file)."""
    if not args.rcs:
        return lambda rng: (None, int(rng.integers(len(pairs))))
    return data.RareClassSampler(data.class_counts(pairs), args.rcs_temperature,
                                 args.rcs_min_pixels).draw


# --------------------------------------------------------------------------------------------
# Devices, processes and signals


def choose_device(name):
    """auto -> the best device there is; UserError for one that cannot be used."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return name


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


def say(*lines, **how):
    """Print; of several processes only the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*lines, **how)


def interrupt(number, frame):
    """The handler of SIGTERM: the program ends as after Ctrl-C."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def stopping(world):
    """Yield a list that Ctrl-C or SIGTERM puts its number in: the loop then ends after the step.

    A second one ends the run at once, and so does the first one to one of several processes, which
    would wait for the others forever.
    """
    asked = []

    def ask(number, frame):
        if asked or world > 1:
            interrupt(number, frame)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
