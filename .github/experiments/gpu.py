"""vaegan.py on a GPU: how exact, how fast, what would be faster, and a run.

    python .github/experiments/gpu.py PHOTOS [--seconds 420] [--out run/gpu]
    python .github/experiments/gpu.py --dry                  all of it on a CPU, with tiny networks

Prints tables; --out gets gpu.json and the run with its log and samples. What fails is a row. It
wants the packages of the tests, and without a network a TORCH_HOME with LPIPS' SqueezeNet."""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gpu_variants  # before vaegan: it puts the root on sys.path
import torch

import vaegan

parser = argparse.ArgumentParser()
parser.add_argument("photos", nargs="?", default="", help="folder of images; none: dead leaves")
parser.add_argument("--seconds", type=float, default=420, help="for all of it")
parser.add_argument("--out", type=Path, default=Path("run/gpu"))
parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny networks")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)

DEVICE = vaegan.launch("cpu" if args.dry else "cuda")
SIZE = 32 if args.dry else 256
BASE = dict(preset="sd", batch_size=16, precision="bf16", disc_start="0", disc_lead=0, disc_ramp=0)
if args.dry:
    BASE.update(batch_size=2, ch=32, ndf=8)
LPIPS = dict(perceptual_net="squeeze", perceptual_weight=1.0)
try:
    vaegan.Perceptual("squeeze")
except ImportError as error:
    print(f"Without LPIPS: {error}")
    LPIPS = dict(perceptual_weight=0.0)
BASE.update(LPIPS)
photos = vaegan.ImageFolder(args.photos, SIZE) if args.photos else vaegan.DeadLeaves(SIZE)
IMAGES = torch.stack([photos[i] for i in range(2 * BASE["batch_size"])])
if not args.dry:
    IMAGES = IMAGES.pin_memory()  # as a run's are, or their copy would be waited for


def tests():
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "test_vaegan.py"]
    done = subprocess.run(command, cwd=gpu_variants.ROOT, capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip()
    return dict(status=done.returncode, pytest=text[text.rfind("\n") + 1 :])


def train():
    """The newest value of each term of a run, which goes on until the time is over."""
    flags = "--preset sd --steps 1000000 --sample-every 300 --save-every 1000000"
    flags += " --disc-start 400 --disc-lead 100 --disc-ramp 200"
    if args.dry:
        flags = "--preset tiny --device cpu --image-size 32 --steps 30 --sample-every 30"
        flags += " --disc-start 10 --disc-lead 0 --disc-ramp 10"
    flags += "".join(f" --{name.replace('_', '-')} {value}" for name, value in LPIPS.items())
    folder, output = args.out / "run", args.out / "run.txt"
    command = [sys.executable, gpu_variants.ROOT / "vaegan.py", "train", *flags.split()]
    command += ["--data", args.photos, "--out", folder]
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        process.wait(START + args.seconds - 15 - time.time())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        process.kill()
        for save in folder.glob("*.pt"):
            save.unlink()  # it is large
    if process.returncode not in (0, 130):
        return dict(failed=f"exit status {process.returncode}: {output.read_text()[-200:]!r}")
    last, log = {}, folder / "log.jsonl"
    for line in log.read_text().splitlines():
        last.update(json.loads(line))
    seconds = log.stat().st_mtime - (folder / "config.json").stat().st_mtime  # with validations
    n = vaegan.Config.of("tiny" if args.dry else "sd").batch_size
    terms = {name: last.get(name) for name in ("step", "val_psnr", "val_lpips", "d_acc", "lam")}
    return {"status": process.returncode, **terms, "images/s": last["step"] * n / seconds}


def ring(number, frame):
    """What the alarm clock does."""
    raise TimeoutError("out of time")


def show(title, found, peak):
    """Print a block: of numbers the medians of all turns."""
    rows = []
    for name, turns in found.items():
        row = {title: name}
        for turn in turns:
            for key, value in turn.items():
                values = [other[key] for other in turns if key in other]
                row[key] = statistics.median(values) if isinstance(value, float) else value
        rows.append(row)
        if "TFLOP/s" in row:
            row["share of peak"] = row["TFLOP/s"] / peak
            row["base / it"] = rows[0].get("images/s", math.nan) / row["images/s"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells)} |", flush=True)


START = time.time()
signal.signal(signal.SIGALRM, ring)
speed = partial(gpu_variants.speed, BASE, IMAGES, DEVICE)
precision = partial(gpu_variants.precision, BASE, IMAGES, DEVICE)
blocks = (  # title, seconds, rounds, what is measured, {row: its arguments}
    ("card", 5, 1, gpu_variants.card, {"": (DEVICE, 256 if args.dry else 8192)}),
    ("tests", 30, 1, tests, {"": ()}),
    ("precision", 20, 1, precision, {name: (name,) for name in gpu_variants.PRECISIONS}),
    ("throughput", 120, 99, speed, gpu_variants.throughput(BASE["batch_size"])),
    ("changes", 30, 99, speed, gpu_variants.CHANGES),
    ("torch.compile", 60, 99, speed, gpu_variants.COMPILE),
    ("training", 150, 1, train, {"": ()}),
)
results = {}
for title, seconds, rounds, measure, variants in blocks:
    end = time.time() + args.seconds * seconds / 415
    found = results[title] = {name: [] for name in variants}
    for name in list(variants) * (1 if args.dry else rounds):
        turns = found[name]
        if turns and (time.time() > end or "failed" in turns[-1]):
            continue
        signal.alarm(max(int(end - time.time()) + 30, 1))  # each row gets a turn, if they are short
        try:
            turns.append(measure(*variants[name]))
        except Exception as error:
            turns.append(dict(failed=repr(error)[:200]))
        signal.alarm(0)
    show(title, found, peak=results["card"][""][0].get("peak", math.nan))
    (args.out / "gpu.json").write_text(json.dumps(results, indent=1))
if args.dry and "'failed'" in str(results):
    sys.exit("a row has failed")
