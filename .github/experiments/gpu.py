"""vaegan.py on a GPU: how exact, how fast, what would be faster, and a run. A failure is a row.
    python .github/experiments/gpu.py PHOTOS [--seconds 480]   results are in run/gpu
    python .github/experiments/gpu.py --dry                    all of it on a CPU, networks tiny
It wants the packages of the tests, and without a network a TORCH_HOME with LPIPS' SqueezeNet."""

import argparse
import json
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from subprocess import getoutput, getstatusoutput
from unittest.mock import patch

import torch
from tables import read_log  # before vaegan: it puts the root on sys.path
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import vaegan

parser = argparse.ArgumentParser()
parser.add_argument("photos", nargs="?", default="", help="folder of images; none: dead leaves")
parser.add_argument("--seconds", type=float, default=480, help="for all of it")
parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny networks")
args = parser.parse_args()
OUT = Path("run/gpu")
OUT.mkdir(parents=True, exist_ok=True)
START, DEVICE = time.time(), vaegan.launch("cpu" if args.dry else "cuda")
STEP = dict(preset="sd", precision="bf16", batch_size=16, perceptual_net="squeeze")
STEP.update(disc_start="0", disc_lead=0, disc_ramp=0)
RUN = "--perceptual-net squeeze --sample-every 200 --disc-start 400 --disc-lead 100 --disc-ramp 200"
if args.dry:
    STEP.update(ch=32, ndf=8, image_size=32, batch_size=2, perceptual_weight=0.0)
    RUN = "--preset tiny --device cpu --steps 10 --sample-every 10 --disc-start 0 --disc-lead 0"
ROWS, KNOWN = [], dict(peak=torch.nan, image=torch.nan)  # what a row measures for others


def table(title, rows):
    """Measure, save and print rows, {name: function}."""
    print(f"\n| {title} | found |\n|---|---|")
    for name, measure in rows.items():
        try:
            found = measure()
        except BaseException as error:  # pytest's skip is no Exception
            found = dict(failed=repr(error))
        ROWS.append({title: name} | found)
        (OUT / "gpu.json").write_text(json.dumps(ROWS, indent=1))
        texts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        print(f"| {name} | {', '.join(texts)[:600]} |", flush=True)


def machine():
    """The card, its speed in TFLOP/s, the TFLOP of kl-f8 an image of 256 px, the tests on a GPU."""
    n = 256 if args.dry else 8192
    matrix = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    seconds = Timer("matrix @ matrix", globals=locals()).blocked_autorange(min_run_time=1).median
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vaegan.AutoencoderKL()(torch.zeros(1, 3, 256, 256))[0].sum().backward()
    KNOWN.update(peak=2 * n**3 / seconds / 1e12, image=counter.get_total_flops() / 1e12)
    card = getoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    tests = f"timeout 99 {sys.executable} -m pytest -qk gpu --tb=line -W ignore test_vaegan.py"
    tests = " / ".join(getoutput(f"cd {Path(__file__).parents[2]}; {tests}").split("\n")[-4:])
    return dict(card=card, torch=torch.__version__, **KNOWN, tests=tests)


def one_step(precision):
    """Terms of a step of small networks: in fp64 on the CPU, else errors relative to these."""
    t = import_module("test_vaegan")  # here, that a row says why it is not there
    low = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)
    autocast = partial(torch.autocast, DEVICE.type, low, enabled=low is not None)
    options = dict(autocast=autocast, scale=1024.0)  # for fp16
    like = dict(dtype=torch.double) if precision == "fp64" else dict(device=DEVICE)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    t.SMALL["ch"] = 32
    vae, disc, x = [thing.to(**like) for thing in (*t.small_nets(), t.images(2, 64))]
    t.quiet_posterior(vae)
    gan = dict(adversary=lambda x, x_hat: -disc(x_hat).mean(), lambda_max=torch.inf)
    x_hat, terms = vaegan.generator_step(vae, x, **gan, **options)
    terms |= vaegan.discriminator_step(disc, x, x_hat, **options)
    terms.update(grad_vae=t.gradients(vae).norm(), grad_disc=t.gradients(disc).norm())
    del terms["lpips"]  # 0, for there is none
    found = KNOWN[precision] = {name: float(value) for name, value in terms.items()}
    return found if precision == "fp64" else {n: found[n] / KNOWN["fp64"][n] - 1 for n in found}


def timed(flags, place="vaegan.Trainer", new=vaegan.Trainer):
    """The whole step, with LPIPS, D and the optimisers; in it what is at `place` is replaced. The
    share of the peak is of the autoencoder's own FLOP, one forward and backward an image."""
    assert args.dry or time.time() < START + 0.5 * args.seconds, "no time was left"
    cfg = vaegan.Config.of(**STEP | flags)
    with patch(place, new):
        run = vaegan.Trainer(cfg, DEVICE)
        shape = (cfg.batch_size, 3, cfg.image_size, cfg.image_size)
        batches = iter(20 * [torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)])
        run.update(batches)  # cuDNN tries its algorithms
        if not args.dry:
            torch.cuda.reset_peak_memory_stats()
        seconds = Timer("run.update(batches)", globals=locals()).timeit(1 if args.dry else 5).mean
    speed, memory = cfg.batch_size / seconds, torch.cuda.max_memory_allocated() / 2**30
    share = speed * KNOWN["image"] / KNOWN["peak"]
    return {"images/s": speed, "of bf16 peak": share, "GiB": memory}


def textbook(vae, x, adversary, perceptual, generator, autocast, **options):
    """generator_step as in latent-diffusion, where D's optimiser runs vae and LPIPS once more."""
    step = import_module("test_vaegan").textbook_step
    lpips = perceptual or (lambda x, x_hat: (x - x_hat).mean(dim=(1, 2, 3)))
    with autocast():
        step(vae, lambda x_hat: -adversary(x, x_hat), x, lpips, 1e-6, 0.5, generator)
        x_hat, _ = vae(x, generator=generator)
        lpips(x, x_hat)
    return x_hat.detach(), {}


def diffusers(_, ch, *widths, recompute):
    """diffusers' autoencoder, with its parts where Trainer looks for them."""
    vae = import_module("test_vaegan").Diffusers(ch)
    for name, part in vae.vae.named_children():
        vae.add_module(name, part)
    return vae


def norm_low(x, groups, weight, bias, eps):
    """Group norm, and so SiLU, in the precision of x, not in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


def train():
    """The last record of a run that is interrupted when the time is over."""
    torch.cuda.empty_cache()
    left = max(START + args.seconds - 20 - time.time(), 150)
    command = f"timeout --foreground --preserve-status -s INT -k 30 {left} {sys.executable} "
    command += f"{vaegan.__file__} train {RUN} --data '{args.photos}' --out {OUT}/run"
    status, output = getstatusoutput(command)
    (OUT / "run.txt").write_text(output)
    assert status in (0, 130), output[-500:]
    last = {name: value for record in read_log(OUT / "run") for name, value in record.items()}
    return {name: last.get(name) for name in ("step", "val_psnr", "val_sharpness", "d_acc", "lam")}


KEEP, BLOCK = dict(recompute=False), vaegan.ResnetBlock.forward
torch._dynamo.config.recompile_limit = 64  # each width is compiled on its own
STEPS = {"base": ({},), "no recompute": (KEEP,)}  # the cheapest and most wanted first
STEPS["textbook"] = (KEEP, "vaegan.generator_step", textbook)
STEPS["diffusers"] = (KEEP, "vaegan.AutoencoderKL", diffusers)
STEPS["norm in bf16"] = ({}, "torch.nn.functional.group_norm", norm_low)
STEPS["transposed"] = ({}, "vaegan.upsample", lambda c: torch.nn.ConvTranspose2d(c, c, 4, 2, 1))
if not args.dry:
    STEPS |= {f"{name}, again": step for name, step in STEPS.items()}
STEPS |= {f"batch {n}": (dict(batch_size=n),) for n in (8, 32)}
STEPS |= {precision: (dict(precision=precision),) for precision in ("fp16", "fp32")}
STEPS["NCHW"] = ({}, "torch.channels_last", torch.contiguous_format)
STEPS["compiled"] = (KEEP, "vaegan.ResnetBlock.forward", torch.compile(BLOCK, dynamic=False))
table("machine", {"here": machine})
table("one step", {name: partial(one_step, name) for name in ("fp64", "fp32", "bf16", "fp16")})
table("whole step", {name: partial(timed, *step) for name, step in STEPS.items()})
table("run", {"sd": train})
sys.exit(args.dry and any("failed" in row for row in ROWS))
