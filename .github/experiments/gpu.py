"""vaegan.py on a GPU: how exact, how fast, what would be faster, and a run.

    python .github/experiments/gpu.py PHOTOS [--seconds 420] [--out run/gpu]
    python .github/experiments/gpu.py --dry                  all of it on a CPU, with tiny networks

Prints tables; --out gets gpu.json, and the run's log and samples. What fails is a row. It wants the
packages of the tests, and without a network a TORCH_HOME with LPIPS' SqueezeNet."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import vaegan  # noqa: E402, it lies in the repository's root

parser = argparse.ArgumentParser()
parser.add_argument("photos", nargs="?", default="", help="folder of images; none: dead leaves")
parser.add_argument("--seconds", type=float, default=420, help="for all of it")
parser.add_argument("--out", type=Path, default=Path("run/gpu"))
parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny networks")
args = parser.parse_args()

START, DEVICE = time.time(), vaegan.launch("cpu" if args.dry else "cuda")
N, UPDATES, MATRIX = (2, 1, 256) if args.dry else (16, 5, 8192)
STEP = f"--preset sd --precision bf16 --batch-size {N} --disc-start 0 --disc-lead 0 --disc-ramp 0"
RUN = "--preset sd --sample-every 200 --disc-start 400 --disc-lead 100 --disc-ramp 200"
if args.dry:
    STEP += " --ch 32 --ndf 8 --image-size 32"
    RUN = "--preset tiny --device cpu --steps 30 --sample-every 30 --disc-start 10 --disc-lead 0"
LPIPS = "--perceptual-net squeeze --perceptual-weight 1"
try:
    vaegan.Perceptual("squeeze")
except ImportError as error:
    print(f"Without LPIPS: {error}")
    LPIPS = "--perceptual-weight 0"
FOUND, KNOWN = [], {}  # all rows; what one measures for others
A = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=DEVICE)


def table(title, rows, share=0.65):
    """Measure, print and save rows, {name: function}, until this share of the time is over."""
    columns = []
    for name, measure in rows.items():
        row = {title: name}
        try:
            assert time.time() < START + share * args.seconds, "skipped: its time is over"
            row |= measure()
        except Exception as error:
            row["failed"] = repr(error)[:200]
        FOUND.append(row)
        (args.out / "gpu.json").write_text(json.dumps(FOUND, indent=1))
        if columns != list(row):
            columns = list(row)
            print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


def machine():
    """The card; the speed of a product of bf16 matrices; the work on an image; the tests."""
    card = subprocess.getoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    matrix = torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=torch.bfloat16)
    seconds = Timer("matrix @ matrix", globals=locals()).blocked_autorange(min_run_time=1).median
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x_hat, _ = vaegan.AutoencoderKL()(torch.zeros(1, 3, 256, 256))
        x_hat.sum().backward()
    KNOWN.update(peak=2 * MATRIX**3 / seconds / 1e12, work=counter.get_total_flops() / 1e12)
    tests = subprocess.getoutput(f"{sys.executable} -m pytest -q -k gpu {ROOT}/test_vaegan.py")
    return dict(torch=torch.__version__, **KNOWN, tests=tests.split("\n")[-1])


def one_step(precision):
    """Terms of a step of small networks: in fp64 on the CPU, else errors relative to these."""
    import test_vaegan as t

    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    low = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)
    autocast = partial(torch.autocast, DEVICE.type, low, enabled=low is not None)
    options = dict(autocast=autocast, scale=1024.0)  # for fp16
    like = dict(dtype=torch.double) if precision == "fp64" else dict(device=DEVICE)
    t.SMALL["ch"] = 32
    vae, disc = [net.to(**like) for net in t.small_nets()]
    t.quiet_posterior(vae)
    x = t.images(2, 64).to(**like)
    gan = dict(adversary=lambda x, x_hat: -disc(x_hat).mean(), lambda_max=torch.inf)
    x_hat, terms = vaegan.generator_step(vae, x, **gan, **options)
    terms |= vaegan.discriminator_step(disc, x, x_hat, **options)
    terms.update(grad_vae=t.gradients(vae).norm(), grad_disc=t.gradients(disc).norm())
    found = {name: float(terms[name]) for name in ("rec_loss", "d_loss", "lam", "grad_vae", "grad_disc")}
    if precision == "fp64":
        KNOWN["exact"] = found
        return found
    return {name: value / KNOWN["exact"][name] - 1 for name, value in found.items()}


def timed(flags="", place="vaegan.Trainer", new=vaegan.Trainer):
    """The whole step, with LPIPS, D and the optimisers; perhaps something is replaced in it."""
    torch.cuda.empty_cache()
    flags = vaegan.parse(["train", *STEP.split(), *LPIPS.split(), *flags.split()])
    del flags["command"]
    cfg = vaegan.Config.of(**flags)
    with patch(place, new):
        run = vaegan.Trainer(cfg, DEVICE)
        shape = (cfg.batch_size, 3, cfg.image_size, cfg.image_size)
        images = itertools.repeat(torch.randint(256, shape, dtype=torch.uint8, device=DEVICE))
        run.update(images)  # cuDNN tries its algorithms
        if not args.dry:
            torch.cuda.reset_peak_memory_stats()
        seconds = Timer("run.update(images)", globals=locals()).timeit(UPDATES).mean
    speed, memory = cfg.batch_size / seconds, torch.cuda.max_memory_allocated() / 2**30
    return {"images/s": speed, "share of peak": speed * KNOWN["work"] / KNOWN["peak"], "GiB": memory}
