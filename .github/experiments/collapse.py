"""What the collapse monitor says of healthy and of ruined runs.

    python .github/experiments/collapse.py PHOTOS HELD_OUT [--seed 100] [--rows 0-9]

Preset tiny, 32 px, 500 steps, the GAN at full weight from step 300 on; two runs at a time, with a
thread each, in half an hour for all. A provoked run has flags that may ruin it, or an event at step
300. It is ruined once its averaged weights, on 16 held-out crops, are more than 3 dB below their
best, or from step 200 on reconstruct an image from another image's z as well as from its own.
"""

import argparse
import contextlib
import io
import re
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from alternatives import ALTERNATIVES  # before vaegan: it puts the root on sys.path
from PIL import Image, ImageDraw, ImageEnhance

import vaegan

FLAGS = "train --preset tiny --image-size 32 --device cpu --steps 500 --on-collapse warn "
FLAGS += "--disc-start 200 --disc-lead 50 --disc-ramp 50 --sample-every 10"
COLD = "--disc-start 0 --disc-lead 0 --disc-ramp 0"
LPIPS = "--perceptual-weight 1"
SYMPTOMS = [  # sign, what users describe
    ("spike", "the gradient norm explodes"),
    ("rebound", "the reconstruction rebounds"),
    ("kl_gone", "the KL goes to 0"),
    ("noise", "noise, saturation, ringing"),
    ("z_ignored", "noise, saturation, ringing"),
]

# ---- Events, which happen to a run at step 300.


def raise_lr(run, factor):
    """The autoencoder's learning rate."""
    for group in run.opt_vae.param_groups:
        group["lr"] *= factor


def perturb(run, deviations):
    """Add noise to the autoencoder's weights, in standard deviations of each tensor."""
    for p in run.vae.parameters():
        p.data += deviations * p.std(correction=0) * torch.randn(p.shape)


def hold_moments(run, first, value):
    """Hold the moments from channel `first` on at a value: 0 to 3 are means, 4 to 7 logvars."""
    conv = run.vae.quant_conv.requires_grad_(False)
    conv.weight.data[first:] = 0
    conv.bias.data[first:] = value


def blacken(run):
    """All images of the training set are black from now on."""

    def black(file):
        return Image.new("RGB", (99, 99))

    run.train_set.decode = black


# ---- The rows of the table: flags, images, GAN, event with its arguments.


def rows(*flags, images="photos", gan="hinge", event=()):
    """A row for each text of flags. images: a folder of `main`; gan: hinge, or an alternative."""
    return [(text, images, gan, event) for text in flags]


HEALTHY = [
    *rows("", "--batch-size 2", "--batch-size 8", "--batch-size 16", "--batch-size 32 --steps 400"),
    *rows("--image-size 64", "--image-size 48 --batch-size 8", f"{LPIPS} --image-size 64", LPIPS),
    *rows("--lr 1e-3", "--lr 1e-4 --lr-disc 1e-4", "--lr 2e-3 --lr-disc 1e-3 --batch-size 2"),
    *rows(COLD, "--disc-start plateau --steps 1000", "--pixel-loss l2"),
    *rows("--kl-weight 1e-6", "--kl-weight 1e-1", "--disc-weight 0", "--disc-weight 1"),
    *rows("--lambda-max 0", f"--lambda-max 0 {LPIPS}", "--lambda-max 0 --disc-weight 1"),
    *rows("", LPIPS, "--batch-size 2 --image-size 64", "--lambda-max 0", images="leaves"),
    *rows("", "--lambda-max 0", images="drawings"),
    *rows("", "--lambda-max 0", images="alike"),
    *rows("", LPIPS, "--lambda-max 0", gan="ns"),
    *rows("", "--lambda-max 0", gan="wgan-gp"),
]
PROVOKED = [
    *rows(*[f"--no-adaptive --disc-weight {weight}" for weight in (1, 3, 10, 100)]),
    *rows(*[f"--no-adaptive --disc-weight {weight} {COLD}" for weight in (1, 3, 10, 100)]),
    *rows(*[f"--lambda-max 0 --disc-weight {weight}" for weight in (3, 5, 20)]),
    *rows("--disc-weight 20", "--disc-weight 100", "--lambda-max 0 --clip 0"),
    *rows("--no-adaptive --disc-weight 10 --clip 0", "--lambda-max 0 --lr-disc 1e-2"),
    *rows("--no-adaptive --disc-weight 1 --lr-disc 1e-2", "--kl-weight 10", "--kl-weight 30"),
    *rows(f"--no-adaptive --disc-weight 3 --image-size 64 {LPIPS}"),
    *rows("--no-adaptive --disc-weight 10", images="leaves"),
    *rows("--lambda-max 0", "--no-adaptive --disc-weight 10", gan="no-spectral"),
    *rows(f"--lambda-max 0 --disc-weight 1 {LPIPS}", gan="wgan-gp"),
    *rows("", "--disc-weight 0", event=(raise_lr, 30)),
    *rows("", event=(perturb, 1)),
    *rows("", event=(perturb, 3)),
    *rows("--disc-weight 0", event=(perturb, 10)),
    *rows("--precision fp16", event=(perturb, 1e9)),
    *rows("", event=(hold_moments, 4, 20)),
    *rows("", event=(hold_moments, 0, 0)),
    *rows("", event=(blacken,)),
]
ROWS = HEALTHY + PROVOKED


def draw_folders(folder, photo):
    """Write 16 drawings on white ground, and 16 copies of a photograph, darker and brighter, which
    is made pale, so that its crops are alike too. -> {name: (for training, held out)}."""
    drawings, alike = folder / "drawings", folder / "alike"
    drawings.mkdir()
    alike.mkdir()
    dice = torch.Generator().manual_seed(0)
    pale = ImageEnhance.Contrast(photo).enhance(0.25)
    for i in range(16):
        drawing = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(drawing)
        for fill in ("red", "gold", "royalblue", None, None, None):
            x, y, width, height = torch.randint(8, 64, (4,), generator=dice).tolist()
            shape = draw.ellipse if x > y else draw.rectangle
            shape((x, y, x + width, y + height), fill, outline="black", width=2)
        drawing.save(drawings / f"{i:02d}.png")
        ImageEnhance.Brightness(pale).enhance(0.9 + 0.01 * i).save(alike / f"{i:02d}.png")
    return dict(drawings=(drawings, drawings), alike=(alike, alike))


@dataclass
class Outcome:
    """What becomes of a row. A step of 0 is never."""

    number: int
    ruined: int = 0  # step
    stopped: int = 0  # step at which the monitor would have stopped it
    sign: str = ""  # by which
    first_over: dict = field(default_factory=dict)  # {sign: the first step over its limit}
    psnrs: list = field(default_factory=list)  # every ten steps

    @property
    def kind(self):
        if self.number < len(HEALTHY):
            return "healthy"
        return "ruined" if self.ruined else "provoked"


def watch(number, folders, seed):
    """Train row `number` to its end -> Outcome."""
    torch.set_num_threads(1)
    flags, images, gan, event = ROWS[number]
    outcome = Outcome(number)

    class Watched(ALTERNATIVES.get(gan, vaegan.Trainer)):
        def update(self, batches):
            if self.step == 300 and event:
                happen, *arguments = event
                happen(self, *arguments)
            super().update(batches)

        @torch.no_grad()
        def validate(self):
            """Every ten steps, after the monitor has seen the record."""
            for sign in self.monitor.over[-1]:
                outcome.first_over.setdefault(sign, self.step)
            x = vaegan.to_model(torch.stack([self.val_set[i] for i in range(16)]), self.device)
            x_hat, _ = self.average(x, sample=False)
            outcome.psnrs.append(float(vaegan.psnr(x, x_hat.clamp(-1, 1)).mean()))
            is_ruined = outcome.psnrs[-1] < max(outcome.psnrs) - 3
            terms = self.monitor.look(x, x_hat)
            if self.step >= 200 and terms["batch_spread"] > 0.1:  # else the images are alike
                is_ruined = is_ruined or terms["other_z"] < 1.05
            if is_ruined and not outcome.ruined:
                outcome.ruined = self.step
            return {}

    data, val = folders[images]
    argv = [*FLAGS.split(), *flags.split(), f"--seed={seed + number}"]
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        argv += [f"--data={data}", f"--val={val}", f"--out={out}"]
        status = vaegan.main(argv, trainer=Watched)
    if status not in (0, 3):  # done, collapsed
        raise RuntimeError(f"row {number}: {printed.getvalue()[-500:]}")
    collapse = re.search(r"collapse at step (\d+): (\w+)", printed.getvalue())
    if collapse:
        outcome.stopped, outcome.sign = int(collapse[1]), collapse[2]
    return outcome


def print_row(outcome):
    """A row of the table."""
    flags, images, gan, event = ROWS[outcome.number]
    happened = ""
    if event:
        happened = " ".join([event[0].__name__, *[f"{value:g}" for value in event[1:]]])
    cells = [str(outcome.number), outcome.kind, images, gan, f"`{flags}`", happened]
    cells += [str(outcome.ruined or ""), str(outcome.stopped or ""), outcome.sign]
    cells += [", ".join(outcome.first_over), f"{outcome.psnrs[-1]:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def print_summary(outcomes):
    """What the monitor has missed, and when each symptom that users describe was shown."""
    healthy = [outcome for outcome in outcomes if outcome.kind == "healthy"]
    ruined = [outcome for outcome in outcomes if outcome.kind == "ruined"]
    stopped = [outcome.number for outcome in healthy if outcome.stopped]
    in_time = [outcome for outcome in ruined if 0 < outcome.stopped <= outcome.ruined + 50]
    missed = [outcome.number for outcome in ruined if outcome not in in_time]
    print(f"\nRows ruined, but not stopped within 50 steps: {missed or 'none'}.")
    print(f"Rows healthy, but stopped: {stopped or 'none'}.\n")
    print("| symptom | sign | over its limit in ruined runs | first, after the ruin | in healthy |")
    print("|---" * 5 + "|")
    for sign, symptom in SYMPTOMS:
        shown = [outcome for outcome in ruined if sign in outcome.first_over]
        delays = [outcome.first_over[sign] - outcome.ruined for outcome in shown]
        delay = f"{statistics.median(delays):+g} steps" if delays else "–"
        alarms = len([outcome for outcome in healthy if sign in outcome.first_over])
        counts = f"{len(shown)} of {len(ruined)} | {delay} | {alarms} of {len(healthy)}"
        print(f"| {symptom} | {sign} | {counts} |")


def main():
    """Run the rows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="folder of photographs")
    parser.add_argument("held_out", help="folder of at least 16 others")
    parser.add_argument("--seed", type=int, default=100, help="of row 0; row 1 has the next")
    parser.add_argument("--rows", default=f"0-{len(ROWS) - 1}", help="the first and the last one")
    args = parser.parse_args()
    first, last = [int(number) for number in args.rows.split("-")]
    outcomes = []
    print("| | | images | GAN | flags | event | ruined | stopped | by | signs | dB |")
    print("|---" * 11 + "|")
    with tempfile.TemporaryDirectory() as folder:
        photo = Image.open(vaegan.ImageFolder(args.photos, 32).files[0]).convert("RGB")
        folders = dict(photos=(args.photos, args.held_out), leaves=("", ""))
        folders.update(draw_folders(Path(folder), photo))
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            watch_row = partial(watch, folders=folders, seed=args.seed)
            for outcome in pool.map(watch_row, range(len(ROWS))[first : last + 1]):
                print_row(outcome)
                outcomes.append(outcome)
    print_summary(outcomes)


if __name__ == "__main__":
    main()
