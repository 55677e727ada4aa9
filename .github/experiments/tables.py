"""The tables and pictures of RESULTS.md, from the folders of runs.

    python .github/experiments/tables.py ablation RUNS HELD_OUT [--size 64]
    python .github/experiments/tables.py steps RUN [RUN …] [--every 1000]
    python .github/experiments/tables.py ranges RUN [RUN …] --from STEP
    python .github/experiments/tables.py colours RUN [RUN …] HELD_OUT
    python .github/experiments/tables.py picture OUT HELD_OUT CHECKPOINT [CHECKPOINT …]

HELD_OUT is a folder of images, of which the largest centre squares are taken.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parents[2]))
import vaegan  # noqa: E402, it lies in the repository's root


def read_log(run):
    """The records of a run: a dict for every ten steps."""
    with open(run / "log.jsonl", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def mean_of(records, term, first, last):
    """The mean of a term over the records of steps `first` to `last`; None if none has it."""
    values = [r[term] for r in records if term in r and first <= r["step"] <= last]
    return statistics.fmean(values) if values else None


def show(value, digits):
    """A number as text; a dash for None."""
    return "–" if value is None else format(value, digits)


def print_table(head, rows):
    """Print rows of texts in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def share_at_bound(records, cfg):
    """Of the records with the GAN at full weight, the share in which λ stayed at its bound."""
    if not cfg.adaptive or cfg.lambda_max == 0:
        return None
    stayed = []
    for record in records:
        lam, w = record.get("lam", 0.0), record.get("w", 0.0)
        if w > 0 and w >= 0.999 * cfg.disc_weight * lam:  # it is less during the ramp
            stayed.append(lam >= 0.999 * cfg.lambda_max)
    return statistics.fmean(stayed) if stayed else None


def collapse_of(run, records):
    """Sign and step of a run's collapse, as it reported them or wrote them into its log; else as
    the monitor of today finds them in the log."""
    if (run / "collapse.json").exists():
        report = json.loads((run / "collapse.json").read_text(encoding="utf8"))
        return f"{report['sign']} at {report['step']}"
    for record in records:
        event = re.search(r"collapse at step (\d+): (\w+)", record.pop("event", ""))
        if event:
            return f"{event[2]} at {event[1]}"
    monitor = vaegan.CollapseMonitor()
    try:
        for record in records:
            monitor.assert_healthy(record["step"], record)
    except vaegan.CollapseError as error:
        return f"{error.sign} at {error.step}"
    return "no"


def measure(run, dataset, perceptual):
    """What the table says of a run: {column: text}."""
    vae, content = vaegan.load_autoencoder(run / "last.pt")
    measured = vaegan.evaluate(vae, dataset, perceptual=perceptual)
    cfg = vaegan.Config(**content["config"])
    records = read_log(run)
    end = records[-1]["step"]
    start = end - 290  # a record is of ten steps
    lam = mean_of(records, "lam", start, end) if cfg.adaptive else None
    norms = [r["grad_norm_dec"] for r in records if r["step"] > 50 and "grad_norm_dec" in r]
    return {
        "PSNR, dB": show(measured["psnr"], ".2f"),
        "SSIM": show(measured["ssim"], ".3f"),
        "LPIPS-alex ↓": show(measured["lpips"], ".3f"),
        "sharpness": show(measured["sharpness"], ".2f"),
        "d_acc": show(mean_of(records, "d_acc", start, end), ".2f"),
        "λ": show(lam, ".2g"),
        "λ at its bound": show(share_at_bound(records, cfg), ".0%"),
        "largest ‖∇dec‖": show(max(norms, default=None), ".1f"),
        "grad_ratio": show(mean_of(records, "grad_ratio", start, end), ".2f"),
        "collapsed": collapse_of(run, records),
    }


def ablation(runs, held_out, size):
    """The folders RUNS/VARIANT-SEED: a row for each variant, with a value for each seed. d_acc, λ
    and grad_ratio are means of the last 300 steps; the largest norm is that after step 50."""
    dataset = vaegan.ImageFolder(held_out, size, train=False)
    perceptual = vaegan.Perceptual("alex")
    variants = {}
    for run in sorted(runs.glob("*-*")):
        variant = run.name.rpartition("-")[0]
        variants.setdefault(variant, []).append(measure(run, dataset, perceptual))
    rows = []
    for variant, seeds in variants.items():
        columns = list(seeds[0])
        rows.append([f"`{variant}`", *[", ".join(seed[c] for seed in seeds) for c in columns]])
    print_table(["", *columns], rows)


def state_at(records, step):
    """Held-out measures at a step; d_acc and λ as means of the 100 steps up to it."""
    terms = [("val_psnr", step, ".2f"), ("val_lpips", step, ".3f"), ("val_sharpness", step, ".2f")]
    terms += [("d_acc", step - 90, ".2f"), ("lam", step - 90, ".2g")]
    return ", ".join(show(mean_of(records, term, first, step), d) for term, first, d in terms)


def steps(runs, every):
    """A row for each run, a column for each step in which one of them was measured."""
    logs = [read_log(run) for run in runs]
    measured = {r["step"] for records in logs for r in records if "val_psnr" in r}
    columns = [step for step in sorted(measured) if step % every == 0]
    rows = []
    for run, records in zip(runs, logs):
        rows.append([f"`{run.name}`", *[state_at(records, step) for step in columns]])
    print("Each cell: PSNR in dB, LPIPS, sharpness, d_acc, λ\n")
    print_table(["", *[f"step {step}" for step in columns]], rows)


def ranges(runs, start):
    """5 % and 95 % quantiles of what is logged every ten steps, over all records from a step on."""
    values = {}
    for run in runs:
        for record in read_log(run):
            for term, value in record.items():
                if record["step"] >= start and isinstance(value, float) and "val_" not in term:
                    values.setdefault(term, []).append(value)
    rows = []
    for term, series in values.items():
        quantiles = statistics.quantiles(series, n=20, method="inclusive")
        rows.append([f"`{term}`", f"{quantiles[0]:.3g}", f"{quantiles[-1]:.3g}"])
    print_table(["term", "5 %", "95 %"], rows)


def chroma(x):
    """Cb and Cr of BT.601: (B, 3, H, W) -> (B, 2, H, W)."""
    red, green, blue = x.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.cat([0.564 * (blue - luma), 0.713 * (red - luma)], dim=1)


@torch.no_grad()
def colours(runs, held_out):
    """Whether colours are learned: the share of the squared error that lies in the images' mean
    colours, and the mean |(Cb, Cr)| of reconstructions over that of images."""
    rows = []
    for run in runs:
        vae, content = vaegan.load_autoencoder(run / "last.pt")
        dataset = vaegan.ImageFolder(held_out, content["config"]["image_size"], train=False)
        x = torch.stack([dataset[i] for i in range(len(dataset))])
        x = vaegan.to_model(x, "cpu")  # (B, 3, H, W)
        x_hat = torch.cat([vae(part, sample=False)[0] for part in x.split(8)]).clamp(-1, 1)
        error = x - x_hat
        share = error.mean(dim=(2, 3)).square().mean() / error.square().mean()
        ratio = chroma(x_hat).norm(dim=1).mean() / chroma(x).norm(dim=1).mean()
        decibels = vaegan.psnr(x, x_hat).mean()
        rows.append([f"`{run.name}`", f"{decibels:.2f}", f"{share:.3f}", f"{ratio:.2f}"])
    print_table(["", "PSNR, dB", "share of mean colours", "chroma"], rows)


def picture(out, held_out, checkpoints, size, images):
    """A PNG, enlarged twice: photographs, and below them what each checkpoint makes of them."""
    dataset = Subset(vaegan.ImageFolder(held_out, size, train=False), images)
    vaes = [vaegan.load_autoencoder(path)[0] for path in checkpoints]
    vaegan.save_grid(out, dataset, "cpu", *vaes)
    with Image.open(out) as grid:
        grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(out)


def main():
    """Read the command line, and run the function that it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("ablation", help="what each part of the recipe does").add_argument
    add("runs", type=Path, help="folder of the folders VARIANT-SEED")
    add("held_out")
    add("--size", type=int, default=64, help="side of the crops in pixels")
    add = commands.add_parser("steps", help="how runs develop").add_argument
    add("runs", type=Path, nargs="+")
    add("--every", type=int, default=1000, help="steps between columns")
    add = commands.add_parser("ranges", help="of the logged terms").add_argument
    add("runs", type=Path, nargs="+")
    add("--from", type=int, required=True, dest="start", help="step with the GAN at full weight")
    add = commands.add_parser("colours", help="whether colours are learned").add_argument
    add("runs", type=Path, nargs="+")
    add("held_out")
    add = commands.add_parser("picture", help="photographs and reconstructions").add_argument
    add("out", type=Path, help="file of the PNG")
    add("held_out")
    add("checkpoints", nargs="+")
    add("--size", type=int, default=96, help="side of the crops in pixels")
    add("--images", type=int, nargs="+", default=range(8), help="numbers of up to eight images")
    arguments = vars(parser.parse_args())
    functions = dict(ablation=ablation, steps=steps, ranges=ranges, colours=colours)
    functions["picture"] = picture
    functions[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
