"""What the collapse monitor says of healthy and of ruined runs.

    python .github/experiments/collapse.py PHOTOS HELD_OUT [--seed 100] 2> progress.txt

Preset tiny, 32 px, 500 steps, the GAN at full weight from step 300 on. A provoked run has flags
that may ruin it, or an event at step 300. It is ruined once its averaged weights, on 16 held-out
crops, are more than 3 dB below their best, or from step 200 on reconstruct an image from another
image's z as well as from its own, or once a term is not finite.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from alternatives import ALTERNATIVES  # before vaegan: it puts the root on sys.path
from PIL import Image, ImageDraw, ImageEnhance

import vaegan

FLAGS = "train --preset tiny --image-size 32 --device cpu --steps 500 --on-collapse warn "
FLAGS += "--disc-start 200 --disc-lead 50 --disc-ramp 50 --sample-every 10 "
COLD = "--disc-start 0 --disc-lead 0 --disc-ramp 0"
LPIPS = "--perceptual-weight 1"


def raise_lr(run, factor):
    """An event: the autoencoder's learning rate grows."""
    run.opt_vae.param_groups[0]["lr"] *= factor


def perturb(run, deviations):
    """An event: noise in the weights, in standard deviations of each tensor."""
    for p in run.vae.parameters():
        p.data += deviations * p.std(correction=0) * torch.randn(p.shape)


def hold_posterior(run, logvar):
    """An event: q(z|x) is N(0, exp(logvar)) for all x. 0: the prior, 20: nothing but noise."""
    conv = run.vae.quant_conv.requires_grad_(False)
    conv.weight.data.zero_()
    conv.bias.data = torch.tensor(4 * [0.0] + 4 * [float(logvar)])


def blacken(run, side):
    """An event: all images of the training set are black."""
    run.train_set.decode = lambda file: Image.new("RGB", (side, side))


def rows(*flags, images="photos", gan="hinge", event=()):
    """A row for each text of flags. gan: hinge, or an alternative; event: function, argument."""
    return [(text, images, gan, event) for text in flags]


HEALTHY = [
    *rows("", "--batch-size 2", "--batch-size 8", "--batch-size 16"),
    *rows("--image-size 64", "--image-size 48 --batch-size 8", LPIPS, f"{LPIPS} --image-size 64"),
    *rows("--lr 1e-4 --lr-disc 1e-4", "--lr 1e-3", "--pixel-loss l2", "--kl-weight 1e-6"),
    *rows("--kl-weight 1e-1", "--disc-start plateau --steps 1000", COLD, "--disc-weight 0"),
    *rows("--disc-weight 1", "--lambda-max 0", f"--lambda-max 0 {LPIPS}"),
    *rows("", images="leaves"),
    *rows("", images="drawings"),
    *rows("", images="alike"),
    *rows("", LPIPS, gan="ns"),
    *rows("", gan="wgan-gp"),
]
PROVOKED = [
    *rows(*[f"--no-adaptive --disc-weight {weight}" for weight in (1, 3, 10, 100)]),
    *rows(*[f"--no-adaptive --disc-weight {weight} {COLD}" for weight in (1, 3, 10, 100)]),
    *rows(f"--no-adaptive --disc-weight 3 {LPIPS}", "--no-adaptive --disc-weight 10 --clip 0"),
    *rows("--no-adaptive --disc-weight 10", gan="no-spectral"),
    *rows("--no-adaptive --disc-weight 1 --lr-disc 1e-2", "--kl-weight 10", "--kl-weight 30"),
    *rows("--lambda-max 0 --disc-weight 5", "--lambda-max 0 --disc-weight 20"),
    *rows("", "--disc-weight 0", event=(raise_lr, 30)),
    *rows("", event=(perturb, 1)),
    *rows("", event=(perturb, 3)),
    *rows("--disc-weight 0", event=(perturb, 10)),
    *rows("--precision fp16", event=(perturb, 1e9)),
    *rows("", event=(hold_posterior, 20)),
    *rows("", event=(hold_posterior, 0)),
    *rows("", event=(blacken, 99)),
]


def draw_images(folder, photo):
    """Write 16 drawings on white ground, and 16 pale copies of a photograph, each a bit brighter."""
    dice = torch.Generator().manual_seed(0)
    pale = ImageEnhance.Contrast(photo).enhance(0.25)  # so that its crops are alike too
    for i in range(16):
        drawing = Image.new("RGB", (96, 96), "white")
        for fill in ("red", "gold", "royalblue", None, None, None):
            x, y, width, height = torch.randint(8, 64, (4,), generator=dice).tolist()
            box = (x, y, x + width, y + height)
            ImageDraw.Draw(drawing).ellipse(box, fill, outline="black", width=2)
        drawing.save(folder / f"drawings/{i}.png")
        ImageEnhance.Brightness(pale).enhance(0.9 + 0.01 * i).save(folder / f"alike/{i}.png")


def train(row, argv):
    """Train a row to its end -> its log, which has also the signs that were over their limits."""
    _, _, gan, event = row

    class Watched(ALTERNATIVES.get(gan, vaegan.Trainer)):
        best_psnr = 0.0

        def update(self, batches):
            if self.step == 300 and event:
                event[0](self, event[1])
            super().update(batches)

        @torch.no_grad()
        def validate(self):
            """Every ten steps, after the monitor has seen the record."""
            x = vaegan.to_model(torch.stack([self.val_set[i] for i in range(16)]), self.device)
            x_hat, _ = self.ema(x, sample=False)
            psnr = float(vaegan.psnr(x, x_hat.clamp(-1, 1)).mean())
            self.best_psnr = max(self.best_psnr, psnr)
            is_ruined = psnr < self.best_psnr - 3
            terms = self.monitor.look(x, x_hat)
            if self.step >= 200 and terms["batch_spread"] > 0.1:  # else the images are alike
                is_ruined = is_ruined or float(terms["other_z"]) < 1.05
            return dict(self.monitor.over[-1], psnr=psnr, is_ruined=is_ruined)

    with contextlib.redirect_stdout(sys.stderr):  # what training prints
        status = vaegan.main(argv, trainer=Watched)
    return status
