"""What the collapse monitor says of healthy and of ruined runs: two tables, after all runs.

    python .github/experiments/collapse.py PHOTOS HELD_OUT [--seed 100]

Preset tiny, 32 px, 500 steps, the GAN at full weight from step 300 on; two runs at a time, with a
thread each. A provoked run has flags that may ruin it, or an event at step 300. It is ruined once
its averaged weights, on 16 held-out crops, are more than 3 dB below their best, or from step 200 on
reconstruct an image from another image's z as well as from its own, or a term is not finite. It is
saturated where the share of values outside [-1, 1] is 0.2 above the images', and rings where their
energy above half of Nyquist is three times the images'.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import count, repeat
from pathlib import Path

import torch
from alternatives import ALTERNATIVES  # before vaegan: it puts the root on sys.path
from PIL import Image, ImageDraw

import vaegan

FLAGS = "train --preset tiny --image-size 32 --device cpu --steps 500 --on-collapse warn "
FLAGS += "--disc-start 200 --disc-lead 50 --disc-ramp 50 --sample-every 10 "
COLD = "--disc-start 0 --disc-lead 0 --disc-ramp 0"
LPIPS = "--perceptual-weight 1"


def raise_lr(run, factor):
    """Multiply the autoencoder's learning rate."""
    run.opt_vae.param_groups[0]["lr"] *= factor


def perturb(run, deviations):
    """Add noise to the weights, in standard deviations of each tensor."""
    for p in run.vae.parameters():
        p.data += deviations * p.std(correction=0) * torch.randn(p.shape)


def hold_posterior(run, logvar):
    """Let q(z|x) be N(0, exp(logvar)) for all x. 0: the prior; 20: nothing but noise."""
    conv = run.vae.quant_conv.requires_grad_(False)
    conv.weight.data.zero_()
    conv.bias.data = torch.tensor(4 * [0.0] + 4 * [float(logvar)])  # means and logvars


def blacken(run, side):
    """Let all images of the training set be black."""
    run.train_set.decode = lambda file: Image.new("RGB", (side, side))


def rows(*flags, gan="hinge", events=(None,)):
    """A row for each text of flags, with each event. gan: hinge, or the name of an alternative."""
    return [(text, gan, event) for text in flags for event in events]


HEALTHY = [
    *rows("", "--batch-size 2", "--batch-size 8", "--batch-size 16", "--lr 1e-3", LPIPS, COLD),
    *rows("--image-size 64", "--image-size 48 --batch-size 8", f"--image-size 64 {LPIPS}"),
    *rows("--lr 1e-4 --lr-disc 1e-4", "--disc-start plateau --steps 1000", "--kl-weight 1e-6"),
    *rows("--kl-weight 1e-1", "--pixel-loss l2", "--disc-weight 0", "--disc-weight 1"),
    *rows("--lambda-max 0", f"--lambda-max 0 {LPIPS}", "--data= --val="),
    *rows("--data=drawings --val=", "--data=alike --val="),
    *rows("", LPIPS, gan="ns"),
    *rows("", gan="wgan-gp"),
]
PROVOKED = [
    *rows(*[f"--no-adaptive --disc-weight {weight}" for weight in (1, 3, 10, 100)]),
    *rows(*[f"--no-adaptive --disc-weight {weight} {COLD}" for weight in (1, 3, 10, 100)]),
    *rows("--no-adaptive --disc-weight 10 --clip 0", f"--no-adaptive --disc-weight 3 {LPIPS}"),
    *rows("--no-adaptive --disc-weight 10", gan="no-spectral"),
    *rows("--lambda-max 0 --disc-weight 5", "--lambda-max 0 --disc-weight 20"),
    *rows("--no-adaptive --disc-weight 1 --lr-disc 1e-2", "--kl-weight 10", "--kl-weight 30"),
    *rows("", events=[(raise_lr, 30), (perturb, 1), (perturb, 3), (blacken, 99)]),
    *rows("", events=[(hold_posterior, 20), (hold_posterior, 0)]),
    *rows("--disc-weight 0", events=[(raise_lr, 30), (perturb, 10)]),
    *rows("--precision fp16", events=[(perturb, 1e9)]),
]


def draw_images():
    """Write drawings on white ground, and the same so pale that they are alike; 16 are held out."""
    os.makedirs("drawings")
    os.makedirs("alike")
    grey = Image.new("RGB", (96, 96), "grey")
    for i in range(320):
        drawing = Image.new("RGB", (96, 96), "white")
        for fill in ("red", "gold", "royalblue", None, None, None):
            x, y, width, height = torch.randint(8, 64, (4,)).tolist()
            ImageDraw.Draw(drawing).ellipse((x, y, x + width, y + height), fill, "black", 2)
        drawing.save(f"drawings/{i}.png")
        Image.blend(drawing, grey, 0.9).save(f"alike/{i}.png")


def train(row, data, seed):
    """Train a row -> {term of its log: first step that has it}; a sign has it over its limit."""
    flags, gan, event = row

    class Watched(ALTERNATIVES.get(gan, vaegan.Trainer)):
        @torch.no_grad()
        def validate(self):
            """Every ten steps, after the monitor has seen the record -> more of its terms."""
            x = vaegan.to_model(torch.stack([self.val_set[i] for i in range(16)]), self.device)
            x_hat, _ = self.ema(x, sample=False)
            psnr = float(vaegan.psnr(x, x_hat.clamp(-1, 1)).mean())
            self.best = max(self.best, (False, psnr))  # as Trainer keeps it for best.pt
            look = self.monitor.look(x, x_hat)
            ignores_z = look["other_z"] < 1.05 and look["batch_spread"] > 0.1  # else all are alike
            facts = dict(saturated=look["saturation"] > 0.2, rings=look["high_freq"] > 3)
            facts["ruined"] = psnr < self.best[1] - 3 or (ignores_z and self.step >= 200)
            if self.step == 300 and event:
                event[0](self, event[1])
            return self.monitor.over[-1] | {name: True for name in facts if facts[name]}

    torch.set_num_threads(1)
    argv = [*FLAGS.split(), *data, *flags.split(), f"--seed={seed}", f"--out={seed}"]
    status = vaegan.main(argv, trainer=Watched)
    steps = {}
    for record in map(json.loads, Path(f"{seed}/log.jsonl").read_text().splitlines()):
        for term in record:
            steps.setdefault(term, record["step"])
    if status == 3:  # a term is not finite, after which nothing is measured
        steps.setdefault("ruined", steps["event"])
    return steps


def main():
    """Run the rows in a temporary folder, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("held_out", type=Path, help="folder of at least 16 others")
    parser.add_argument("--seed", type=int, default=100, help="of row 0; row 1 has the next")
    args = parser.parse_args()
    data = [f"--data={args.photos.resolve()}", f"--val={args.held_out.resolve()}"]
    signs, number = list(vaegan.CollapseMonitor.SIGNS), len(HEALTHY)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        os.chdir(folder)
        draw_images()
        outcomes = list(pool.map(train, HEALTHY + PROVOKED, repeat(data), count(args.seed)))

    print("\n| flags | GAN | event | ruined | stopped | signs |" + "\n|" + "---|" * 6)
    for (flags, gan, event), steps in zip(HEALTHY + PROVOKED, outcomes):
        happened = f"{event[0].__name__} {event[1]:g}" if event else ""
        shown = ", ".join(f"{sign} {steps[sign]}" for sign in signs if sign in steps)
        when = f"{steps.get('ruined', '')} | {steps.get('event', '')}"
        print(f"| `{flags or 'default'}` | {gan} | {happened} | {when} | {shown} |")

    stopped = [steps for steps in outcomes[:number] if "event" in steps]
    ruined = [steps for steps in outcomes[number:] if "ruined" in steps]
    missed = [steps for steps in ruined if steps.get("event", 1e9) > steps["ruined"] + 50]
    print(f"\nHealthy runs stopped: {len(stopped)} of {number}.")
    print(f"Ruined runs not stopped within 50 steps: {len(missed)} of {len(ruined)}.\n")
    print("| sign | ruined runs with it | median of steps from the ruin to it |\n|---|---|---|")
    for sign in [*signs, "saturated", "rings"]:
        delays = [steps[sign] - steps["ruined"] for steps in ruined if sign in steps]
        median = f"{statistics.median(delays):+g}" if delays else "–"
        print(f"| {sign} | {len(delays)} | {median} |")


if __name__ == "__main__":
    main()
