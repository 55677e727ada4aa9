"""What gpu.py measures: the card; updates of vaegan.py in other precisions; variants of the update.

A variant is flags over the base's, and functions that change a Trainer before its first update."""

import gc
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import vaegan  # noqa: E402, it lies in the repository's root

TO_MODEL = vaegan.to_model
PRECISIONS = ("fp64", "fp32", "TF32", "bf16", "fp16")
EXACT = {}  # the terms in fp64


def card(device, size):
    """The card, and the most TFLOP/s of bf16 matrices of size x size."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    timer = Timer("torch.mm(matrix, matrix)", globals=dict(matrix=matrix))
    seconds = min(timer.timeit(50).mean for _ in range(6))
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    about = dict(driver=subprocess.getoutput(query), torch=torch.__version__)
    return dict(about, peak=2 * size**3 / seconds / 1e12)


def networks(run):
    """All that a Trainer has."""
    return [net for net in vars(run).values() if isinstance(net, nn.Module)]


def precision(base, images, device, name):
    """The terms of one update, without noise in z; but for fp64 their errors relative to fp64."""
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    flags = dict(lambda_max=0.0, precision=name if name in ("bf16", "fp16") else "fp32")
    if name == "fp64":
        device = torch.device("cpu")
    run = vaegan.Trainer(vaegan.Config.of(**base | flags), device)  # always of the same weights
    run.vae.forward = partial(run.vae.forward, sample=False)
    for conv in run.vae.modules():
        if isinstance(conv, nn.Conv2d) and not conv.weight.any():
            nn.init.dirac_(conv.weight)  # or its residual branch would be silent
    vaegan.to_model = TO_MODEL
    if name == "fp64":
        for net in networks(run):
            net.double()
        vaegan.to_model = lambda *batch: TO_MODEL(*batch).double()
    run.update(iter([images[:2, :, :64, :64]]))
    found = {term: float(value) for terms in run.unread for term, value in terms.items()}
    if name == "fp64":
        EXACT.update(found)
        return found
    return {term: found[term] / EXACT[term] - 1 for term in found if EXACT[term] != 0}


def speed(base, images, device, flags, *changes):
    """Five updates of a new Trainer, after two that do not count. TFLOP/s: of the work that has to
    be done, a forward and a backward of each network."""
    gc.collect()  # the Trainer before
    torch.cuda.empty_cache()
    vaegan.to_model = TO_MODEL
    with device:  # which makes the random weights
        run = vaegan.Trainer(vaegan.Config.of(**base | flags), device)
    n = run.cfg.batch_size
    x = vaegan.to_model(images[:n], device)
    with FlopCounterMode(display=False) as counter, run.autocast():
        x_hat, _ = run.vae(x)
        loss = run.disc(x_hat).mean()
        if run.perceptual is not None:
            loss = loss + run.perceptual(x, x_hat).mean()
        loss.backward()
    for change in changes:
        change(run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = itertools.repeat(images[:n])
    timer = Timer("update(batches)", globals=dict(update=run.update, batches=batches))
    seconds = timer.timeit(5 if device.type == "cuda" else 1).mean
    memory = torch.cuda.max_memory_allocated() / 2**30
    rate = counter.get_total_flops() / seconds / 1e12
    return {"images/s": n / seconds, "TFLOP/s": rate, "GiB": memory}


def nchw(run):
    """NCHW instead of channels last."""
    for net in networks(run):
        net.to(memory_format=torch.contiguous_format)
    vaegan.to_model = lambda *batch: TO_MODEL(*batch).contiguous()


def diffusers(run):
    """diffusers' autoencoder instead of ours."""
    import diffusers  # noqa: F401, if it were missing the tests would skip

    from test_vaegan import Diffusers

    run.vae = Diffusers(run.cfg.ch).to(run.device, memory_format=torch.channels_last)
    run.opt_vae = torch.optim.Adam(run.vae.parameters(), fused=True)


def textbook(run):
    """latent-diffusion's update: autoencoder and LPIPS run for each of the two optimisers."""
    from test_vaegan import textbook_step

    perceptual = run.perceptual or (lambda x, x_hat: torch.zeros(len(x), device=x.device))

    def update(batches):
        x = vaegan.to_model(next(batches), run.device)
        run.opt_vae.zero_grad()
        with run.autocast():
            textbook_step(run.vae, run.disc, x, perceptual, 1e-6, 0.5, run.noise)
        run.opt_vae.step()
        run.opt_disc.zero_grad()
        with run.autocast():
            x_hat, _ = run.vae(x, generator=run.noise)
            perceptual(x, x_hat)
            loss = vaegan.hinge_d_loss(run.disc(x), run.disc(x_hat.detach()))
        loss.backward()
        run.opt_disc.step()

    run.update = update


def norm_low(run):
    """Group norm, and so SiLU, in the precision of its input, which is not fp32."""

    def forward(norm, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)

    for norm in run.vae.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.forward = partial(forward, norm)


def transposed(run):
    """Nearest x2 and convolution by w as one transposed convolution, by A·w·Aᵀ."""
    a = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=run.device)

    def forward(conv, x):
        with torch.autocast(x.device.type, enabled=False):
            kernel = (conv.weight.flatten(2) @ torch.kron(a, a).T).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)

    for level in run.vae.decoder.up[1:]:
        level.upsample.nearest = nn.Identity()
        level.upsample.conv.forward = partial(forward, level.upsample.conv)


def compiled(run):
    """torch.compile of all but the last convolution: λ is a derivative through that alone."""
    torch._dynamo.config.recompile_limit = 64  # beyond it, parts would run as they are
    for part in (run.vae.encoder, run.vae.decoder.mid, *run.vae.decoder.up):
        part.compile(backend="inductor" if run.device.type == "cuda" else "aot_eager")


def throughput(n):
    """{name: (flags, changes …)}: from the base, of batch size n, one factor at a time."""
    keep = dict(recompute=False)
    return {
        "base": ({},),
        "textbook": (keep, textbook),
        "textbook, diffusers": (keep, diffusers, textbook),
        "textbook, NCHW": (keep, nchw, textbook),
        f"batch {n // 2}": (dict(batch_size=n // 2),),
        f"batch {2 * n}": (dict(batch_size=2 * n),),
        "no recompute": (keep,),
        "NCHW": ({}, nchw),
        "fp16": (dict(precision="fp16"),),
        "TF32": (dict(precision="fp32"),),
    }


CHANGES = {"base": ({},), "norm in bf16": ({}, norm_low), "transposed": ({}, transposed)}
COMPILE = {"base": ({},), "compiled": (dict(recompute=False), compiled)}
