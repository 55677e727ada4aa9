"""What the collapse monitor says of healthy and of ruined runs.

    python .github/experiments/collapse.py PHOTOS HELD_OUT [--seed 100] [--rows 0-9]

Preset tiny, 32 px, 500 steps, the GAN at full weight from step 300 on; two runs at a time, with a
thread each. A provoked run has flags that may ruin it, or an event at step 300. It is ruined if on
16 held-out crops the averaged weights are more than 3 dB below their best, or from step 200 on
reconstruct an image from another image's z as well as from its own.
"""

import argparse
import contextlib
import io
import math
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageEnhance

sys.path.insert(0, str(Path(__file__).parents[2]))
import vaegan  # noqa: E402, it lies in the repository's root
from alternatives import ALTERNATIVES  # noqa: E402, it imports vaegan

FLAGS = "train --preset tiny --image-size 32 --device cpu --steps 500 --on-collapse warn "
FLAGS += "--disc-start 200 --disc-lead 50 --disc-ramp 50 --sample-every 10"
COLD = "--disc-start 0 --disc-lead 0 --disc-ramp 0"
LPIPS = "--perceptual-weight 1"
SYMPTOMS = {  # sign: what users describe
    "spike": "the gradient norm explodes",
    "rebound": "the reconstruction rebounds",
    "kl_gone": "the KL goes to 0",
    "noise": "noise, saturation, ringing",
    "z_ignored": "noise, saturation, ringing",
}

# ---- Events, which happen to a run at step 300.


def raise_lr(run, factor):
    """The autoencoder's learning rate."""
    for group in run.opt_vae.param_groups:
        group["lr"] *= factor


def perturb(run, deviations):
    """Add noise to the autoencoder's weights, in standard deviations of each tensor."""
    for p in run.vae.parameters():
        p.data += deviations * p.std(correction=0) * torch.randn(p.shape)


def drown_z(run, logvar):
    """Hold the posterior's variance at e^logvar, whatever the image."""
    conv = run.vae.quant_conv.requires_grad_(False)
    conv.weight.data[run.cfg.z_channels :] = 0
    conv.bias.data[run.cfg.z_channels :] = logvar


def empty_z(run):
    """Hold the posterior at N(0, I), whatever the image."""
    for p in run.vae.quant_conv.requires_grad_(False).parameters():
        p.data.zero_()


def black_images(run):
    """All images of the training set are black from now on."""
    run.train_set.crop = lambda *box: torch.zeros(3, 32, 32, dtype=torch.uint8)


def overflow(run, factor):
    """Drive the decoder out of the range of fp16."""
    run.vae.decoder.conv_in.weight.data *= factor


# ---- The runs.


class Run(NamedTuple):
    """Flags, a folder of images ("": dead leaves), an alternative GAN, an event, its arguments."""

    flags: str
    images: str = "photos"
    gan: str = "hinge"
    event: tuple = ()


def runs(*flags, **options):
    """A run for each text of flags."""
    return [Run(text, **options) for text in flags]


HEALTHY = [
    *runs("", "--batch-size 2", "--batch-size 8", "--batch-size 16", "--batch-size 32 --steps 400"),
    *runs("--image-size 64", "--image-size 48 --batch-size 8", f"{LPIPS} --image-size 64", LPIPS),
    *runs("--lr 1e-3", "--lr 1e-4 --lr-disc 1e-4", "--lr 2e-3 --lr-disc 1e-3 --batch-size 2"),
    *runs(COLD, "--disc-start plateau --steps 1000", "--pixel-loss l2"),
    *runs("--kl-weight 1e-6", "--kl-weight 1e-1", "--disc-weight 0", "--disc-weight 1"),
    *runs("--lambda-max 0", f"--lambda-max 0 {LPIPS}", "--lambda-max 0 --disc-weight 1"),
    *runs("", LPIPS, "--batch-size 2 --image-size 64", "--lambda-max 0", images=""),
    *runs("", "--lambda-max 0", images="drawings"),
    *runs("", "--lambda-max 0", images="alike"),
    *runs("", LPIPS, "--lambda-max 0", gan="ns"),
    *runs("", "--lambda-max 0", gan="wgan-gp"),
]
PROVOKED = [
    *runs(*[f"--no-adaptive --disc-weight {weight}" for weight in (1, 3, 10, 100)]),
    *runs(*[f"--no-adaptive --disc-weight {weight} {COLD}" for weight in (1, 3, 10, 100)]),
    *runs(*[f"--lambda-max 0 --disc-weight {weight}" for weight in (3, 5, 20)]),
    *runs("--disc-weight 20", "--disc-weight 100", "--clip 0 --lambda-max 0"),
    *runs("--no-adaptive --disc-weight 10 --clip 0", "--lambda-max 0 --lr-disc 1e-2"),
    *runs("--no-adaptive --disc-weight 1 --lr-disc 1e-2", "--kl-weight 10", "--kl-weight 30"),
    *runs(f"--no-adaptive --disc-weight 3 --image-size 64 {LPIPS}"),
    *runs("--no-adaptive --disc-weight 10", images=""),
    *runs("--lambda-max 0", "--no-adaptive --disc-weight 10", gan="no-spectral"),
    *runs(f"--lambda-max 0 --disc-weight 1 {LPIPS}", gan="wgan-gp"),
    *runs("", "--disc-weight 0", event=(raise_lr, 30)),
    *runs("", event=(perturb, 1)),
    *runs("", event=(perturb, 3)),
    *runs("--disc-weight 0", event=(perturb, 10)),
    *runs("", event=(drown_z, 20)),
    *runs("", event=(empty_z,)),
    *runs("", event=(black_images,)),
    *runs("--precision fp16", event=(overflow, 1e9)),
]


def draw_folders(photos, folder):
    """-> folders of 16 images: drawings on white ground; a photograph, more or less bright."""
    dice = torch.Generator().manual_seed(0)
    photo = vaegan.ImageFolder(photos, 96, train=False).decode(vaegan.find_images(photos)[0])
    for name in ("drawings", "alike"):
        (folder / name).mkdir()
    for i in range(16):
        drawing = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(drawing)
        for fill in ("red", "gold", "royalblue", None, None, None):
            x, y, width, height = torch.randint(8, 64, (4,), generator=dice).tolist()
            shape = draw.ellipse if x > y else draw.rectangle
            shape((x, y, x + width, y + height), fill, outline="black", width=2)
        drawing.save(folder / f"drawings/{i:02d}.png")
        ImageEnhance.Brightness(photo).enhance(0.9 + 0.01 * i).save(folder / f"alike/{i:02d}.png")
    return {name: (folder / name, folder / name) for name in ("drawings", "alike")}
