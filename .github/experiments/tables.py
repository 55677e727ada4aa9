"""The tables and pictures of RESULTS.md, from the folders of runs.

python .github/experiments/tables.py ablation RUNS HELD_OUT [--size 64]
python .github/experiments/tables.py steps RUN [RUN …] [--every 1000]
python .github/experiments/tables.py ranges RUN [RUN …] --from STEP
python .github/experiments/tables.py picture OUT HELD_OUT CHECKPOINT [CHECKPOINT …]
python .github/experiments/tables.py colours HELD_OUT
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parents[2]))
import vaegan  # noqa: E402, it lies in the repository's root


def read_log(run):
    """The records of a run: a dict for every ten steps."""
    with open(run / "log.jsonl", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def mean_of(records, term):
    """The mean of a term over the records that have it; None if none has."""
    values = [record[term] for record in records if term in record]
    return statistics.fmean(values) if values else None


def show(value, digits):
    """A number as text; a dash for None."""
    return "–" if value is None else format(value, digits)


def print_table(head, rows):
    """Print rows of texts in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def measure(run, dataset, perceptual):
    """What the table says of a run: {column: text}."""
    vae, content = vaegan.load_autoencoder(run / "last.pt")
    measured = vaegan.evaluate(vae, dataset, perceptual=perceptual)
    records = read_log(run)
    last = records[-30:]  # of ten steps each
    norms = [r["grad_norm_dec"] for r in records if "grad_norm_dec" in r and r["step"] > 50]
    lambdas, bound = [r["lam"] for r in last if "lam" in r], content["config"]["lambda_max"]
    at_bound = None
    if lambdas and bound > 0:
        at_bound = statistics.fmean(lam > 0.999 * bound for lam in lambdas)
    collapsed = "no"
    events = [record["event"] for record in records if "event" in record]
    if events:  # collapse at step 340: rebound is 8.58 (limit 3.5); likely cause: …
        collapsed = events[0].removeprefix("collapse at ").partition(" (limit")[0]
    return {
        "PSNR, dB": show(measured["psnr"], ".2f"),
        "SSIM": show(measured["ssim"], ".3f"),
        "LPIPS-alex ↓": show(measured["lpips"], ".3f"),
        "sharpness": show(measured["sharpness"], ".2f"),
        "d_acc": show(mean_of(last, "d_acc"), ".2f"),
        "λ": show(mean_of(last, "lam"), ".2g"),
        "λ at its bound": show(at_bound, ".0%"),
        "largest ‖∇dec‖": show(max(norms, default=None), ".1f"),
        "grad_ratio": show(mean_of(last, "grad_ratio"), ".2f"),
        "collapsed": collapsed,
    }


def ablation(runs, held_out, size):
    """The folders RUNS/VARIANT-SEED: a row for each variant, with a value for each seed. d_acc, λ
    and grad_ratio are of the last 300 steps; the largest norm is that after step 50."""
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


def steps(runs, every):
    """A row for each run and step: val_ terms of that step, others as means of the 100 steps up to
    it. LPIPS is of the net that trains."""
    terms = dict(val_psnr=".2f", val_ssim=".3f", val_lpips=".3f", val_sharpness=".2f")
    terms.update(d_acc=".2f", lam=".2g")
    rows = []
    for run in runs:
        records = read_log(run)
        for end in range(every, records[-1]["step"] + 1, every):
            recent = [record for record in records if end - 100 < record["step"] <= end]
            cells = [show(mean_of(recent, term), digits) for term, digits in terms.items()]
            rows.append([f"`{run.name}`", str(end), *cells])
    print_table(["run", "step", *terms], rows)


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


def picture(out, held_out, checkpoints, size, images):
    """A PNG, enlarged twice: photographs, and below them what each checkpoint makes of them."""
    dataset = Subset(vaegan.ImageFolder(held_out, size, train=False), images)
    vaes = [vaegan.load_autoencoder(path)[0] for path in checkpoints]
    vaegan.save_grid(out, dataset, "cpu", *vaes)
    with Image.open(out) as grid:
        grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(out)


@torch.no_grad()
def colours(held_out):
    """R² of a straight line from a new encoder's moments (kl-f8's at half width) to the mean
    brightness and chroma of blocks: fitted on 30 images, judged on 30 others."""
    dataset = vaegan.ImageFolder(held_out, 128, train=False)
    x = vaegan.to_model(torch.stack([dataset[i] for i in range(60)]), "cpu")
    y = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    blocks = F.avg_pool2d(torch.einsum("ij,bjhw->bihw", y, x), 8)
    target = blocks.permute(0, 2, 3, 1).flatten(0, 2)  # (60·16·16, 3)
    half, rows = len(target) // 2, []
    for start in ("PyTorch's", "ours"):
        torch.manual_seed(0)
        encoder = vaegan.AutoencoderKL(ch=64).encoder
        if start == "PyTorch's":
            for conv in [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]:
                conv.reset_parameters()
        moments = torch.cat([encoder(part) for part in x.split(10)]).permute(0, 2, 3, 1)
        moments = F.pad(moments.flatten(0, 2), (0, 1), value=1.0)
        fit = torch.linalg.lstsq(moments[:half], target[:half]).solution
        error = (moments[half:] @ fit - target[half:]).pow(2).mean(0)
        rows.append([start, *[f"{1 - r:.2f}" for r in (error / target[half:].var(0)).tolist()]])
    print_table(["first weights", "luma", "Cb", "Cr"], rows)


def main():
    """Read the command line, and run the function that it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("ablation", help="what each part of the recipe does").add_argument
    add("runs", type=Path, help="folder of the folders VARIANT-SEED")
    add("held_out", help="folder of images: their largest centre squares")
    add("--size", type=int, default=64, help="side of the crops in pixels")
    add = commands.add_parser("steps", help="how runs develop").add_argument
    add("runs", type=Path, nargs="+")
    add("--every", type=int, default=1000, help="steps between rows")
    add = commands.add_parser("ranges", help="of the logged terms").add_argument
    add("runs", type=Path, nargs="+")
    add("--from", type=int, required=True, dest="start", help="step with the GAN at full weight")
    add = commands.add_parser("picture", help="photographs and reconstructions").add_argument
    add("out", type=Path, help="file of the PNG")
    add("held_out")
    add("checkpoints", nargs="+")
    add("--size", type=int, default=96, help="side of the crops in pixels")
    add("--images", type=int, nargs="+", default=range(8), help="numbers of up to eight images")
    add = commands.add_parser("colours", help="what first weights do to colour").add_argument
    add("held_out")
    arguments = vars(parser.parse_args())
    run = dict(ablation=ablation, steps=steps, ranges=ranges, picture=picture, colours=colours)
    run[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
