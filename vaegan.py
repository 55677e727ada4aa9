"""vaegan.py: train the autoencoder of Stable Diffusion (KL-VAE + PatchGAN), in one readable file.

    python vaegan.py train --data DIR                         a folder of images; again: continues
    torchrun --nproc-per-node 8 vaegan.py train --data DIR    the same on 8 GPUs
    python vaegan.py eval --checkpoint run/sd-DIR/best.pt --data OTHER

For images x in [-1, 1] of N = 3·H·W values, z ~ q(z|x) = N(mean, std²), and x̂ = decode(z):

    autoencoder     L_G = L_rec + kl_weight·KL(q ‖ N(0, I))/N - w(t)·disc_weight·λ·E[D(x̂)]
    reconstruction  L_rec = |x - x̂| + perceptual_weight·LPIPS(x, x̂)      Rombach et al. 2022
    adaptive λ      λ = ‖∇L_rec‖ / (‖∇E[D(x̂)]‖ + ε), at most lambda_max   Esser et al. 2021, eq. 7
    discriminator   L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]  Lim & Ye 2017
    warm-up         w(t) = 0 until L_rec has saturated and D has a lead, then a linear ramp to 1

This is latent-diffusion's objective divided by N: there the pixel term and LPIPS are summed over
the values of an image, here they are means. So kl_weight and disc_weight keep their published
meaning, λ does not grow with the image, and a gradient norm of 1 means the same at every size.
"""

import argparse
import copy
import io
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import time
import warnings
from collections import OrderedDict
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

# RANK counts only under torchrun; elsewhere it may be left over from something else.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))

# ---- 2. Configuration: one dataclass is the flags, their help, and the record in a checkpoint.
NETS = ("vgg", "alex", "squeeze")  # of LPIPS


class UsageError(ValueError):
    """Bad input, in one line that names the flag or file and the way out; exit status 2."""


def arg(default, help, tiny=None, least=0, most=1e9, choices=None):
    """A field of Config that is also a flag. tiny: its default in preset tiny, if it differs."""
    limits = dict(least=least, most=most, choices=choices)
    return field(default=default, metadata=dict(limits, help=help, tiny=tiny))


@dataclass(frozen=True)
class Config:
    """All that decides a run. The defaults are preset sd, which is kl-f8; preset tiny learns in
    minutes on a CPU. Raises UsageError for values that cannot work."""

    data: str = arg("", "folder of images, searched recursively; none: built-in dead leaves")
    val: str = arg("", "folder of held-out images; none: every 20th file of --data")
    image_size: int = arg(256, "side of the square crops in pixels", tiny=64)
    batch_size: int = arg(12, "images a batch, in each process", tiny=4, least=1)
    workers: int = arg(8, "processes that load images; 0: the training process itself", tiny=0)
    ch: int = arg(128, "channels of the first level", tiny=16, least=1)
    ch_mult: tuple = arg((1, 2, 4, 4), "channels of each level / ch", tiny=(1, 2, 4))
    num_res_blocks: int = arg(2, "residual blocks a level (decoder: one more)", tiny=1, least=1)
    z_channels: int = arg(4, "channels of the latent", least=1)
    ndf: int = arg(64, "channels of the discriminator's first layer", tiny=32, least=1)
    init: str = arg("", "start from this file: SD 1.x, 2.x, XL, 3, FLUX.1 or one of ours")
    freeze_encoder: bool = arg(False, "train the decoder alone; latents do not change")
    pixel_loss: str = arg("l1", "pixel term, a mean over values", choices=("l1", "l2"))
    perceptual_weight: float = arg(1.0, "weight of LPIPS; 0: off", tiny=0.0)
    perceptual_net: str = arg("vgg", "network of LPIPS", tiny="squeeze", choices=NETS)
    kl_weight: float = arg(1e-6, "weight of an image's KL divided by 3·H·W", tiny=1e-2)
    disc_weight: float = arg(0.5, "weight of the GAN; 0: no GAN")
    adaptive: bool = arg(True, "multiply the GAN's weight by λ, VQGAN eq. 7")
    lambda_max: float = arg(0.05, "largest λ; 0: no bound")
    r1: float = arg(0.0, "γ of D's R1 penalty, every 16 steps; 10 is usual; 0: off")
    disc_start: str = arg("plateau", "step from which D trains; plateau: once L_rec has saturated")
    disc_lead: int = arg(1000, "steps D trains before its loss reaches the decoder", tiny=50)
    disc_ramp: int = arg(5000, "steps from no to full weight of the GAN", tiny=100)
    steps: int = arg(200_000, "updates of the autoencoder", tiny=1500, least=10)
    lr: float = arg(1e-4, "learning rate (LDM: 4.5e-6 an image of the update)", tiny=4e-4)
    lr_disc: float = arg(1e-4, "the discriminator's learning rate", tiny=5e-4)
    clip: float = arg(1.0, "largest gradient norm of encoder, decoder, D; 0: no clipping")
    ema: float = arg(0.999, "decay of averaged weights; 0: no averaging", tiny=0.98, most=0.9999)
    accumulate: int = arg(1, "batches an update", least=1)
    seed: int = arg(0, "of weights, crops and noise", most=2**62)
    device: str = arg("auto", "to train on", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = arg("auto", "of the networks", choices=("auto", "fp32", "bf16", "fp16"))
    recompute: bool = arg(True, "half of the memory for a few percent of the time", tiny=False)
    preset: str = arg("auto", "auto: sd on a CUDA GPU, else tiny", choices=("auto", "sd", "tiny"))
    out: str = arg("", "folder of the run; none: run/PRESET-NAME, NAME being --data's")
    sample_every: int = arg(1000, "steps between validations with pictures", tiny=100, least=10)
    save_every: int = arg(1000, "steps between saves of last.pt", tiny=100, least=10)
    on_collapse: str = arg("stop", "stop: back to the save before", choices=("stop", "warn"))

    def __post_init__(self):
        """Check all values. Lists, as JSON has them, become tuples, and paths text."""
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for f in fields(self):
            if isinstance(f.default, str):
                object.__setattr__(self, f.name, str(getattr(self, f.name)))
            value, about = getattr(self, f.name), f.metadata
            if about["choices"] and value not in about["choices"]:
                self.refuse(f.name, f"choose from {', '.join(about['choices'])}")
            if isinstance(value, (int, float)) and not about["least"] <= value <= about["most"]:
                self.refuse(f.name, f"must lie between {about['least']} and {about['most']}")
        for name in ("steps", "sample_every", "save_every"):
            if getattr(self, name) % 10 > 0:
                self.refuse(name, "must be a multiple of 10, as a record is made every 10 steps")
        if self.disc_start != "plateau" and not self.disc_start.isdecimal():
            self.refuse("disc_start", "must be a step or the word plateau")
        data, val, out = [Path(folder).resolve() for folder in (self.data, self.val, self.out)]
        if self.data and self.val and (data.is_relative_to(val) or val.is_relative_to(data)):
            self.refuse("val", "shares images with --data; give folders beside each other")
        if self.out and ((self.data and out == data) or (self.val and out == val)):
            self.refuse("out", "is a folder of images, and its pictures would become some")
        if min(self.ch_mult, default=0) < 1:
            self.refuse("ch_mult", "must be positive")
        if self.freeze_encoder and not self.init:
            self.refuse("freeze_encoder", "a new encoder is not worth keeping; give --init FILE")
        f = 2 ** (len(self.ch_mult) - 1)
        if self.image_size < 32 or self.image_size % f > 0:  # LPIPS with alex needs 32
            self.refuse("image_size", f"must be a multiple of {f}, and at least 32")

    def refuse(self, name, reason):
        """Raise UsageError about a flag."""
        raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: {reason}")

    @property
    def folder(self):
        """The folder of the run: --out, or one with the names of preset and data."""
        name = Path(self.data).resolve().name if self.data else "leaves"
        return Path(self.out or f"run/{self.preset}-{name}")

    @classmethod
    def of(cls, preset="auto", **flags):
        """A preset's values, then --init's widths, then the flags, which must agree with those."""
        if preset == "auto":
            has_gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
            preset = "sd" if has_gpu else "tiny"
        values, widths = {}, {}
        if preset == "tiny":
            tiny = {f.name: f.metadata["tiny"] for f in fields(cls)}
            values = {name: value for name, value in tiny.items() if value is not None}
        if flags.get("init"):
            place = {name: flags[name] for name in ("data", "out") if name in flags}
            file = file_of_init(flags["init"], cls(preset=preset, **place).folder)
            widths = load_autoencoder(file)[0].widths
            values.update(widths, disc_start="0")  # a trained reconstruction has saturated
        cfg = cls(**{**values, **flags, "preset": preset})
        for name, width in widths.items():
            if getattr(cfg, name) != width:
                cfg.refuse(name, f"{file} has {width}; leave the flag out")
        return cfg


# Sections 3 to 6 depend on torch and the standard library alone (Perceptual on lpips too). To reuse
# them, copy section 3 whole, and of 4 to 6 and 8 any piece with what it lists under "Needs:".
# ---- 3. Autoencoder: kl-f8's computation under CompVis' names, so that files open elsewhere.


def group_norm(channels):
    """32 groups if 32 divides `channels`, else about channels/4; in fp32 under CUDA's autocast."""
    groups = 32 if channels % 32 == 0 else math.gcd(channels, max(channels // 4, 1))
    return nn.GroupNorm(groups, channels, eps=1e-6)


def norm_silu_conv(norm, conv, x, recompute=False):
    """conv(silu(norm(x))). recompute: norm and SiLU run again in backward, to save memory."""
    if recompute:
        options = dict(use_reentrant=False, preserve_rng_state=False)
        return checkpoint(norm_silu_conv, norm, conv, x, **options)
    return conv(F.silu(norm(x)))


class ResnetBlock(nn.Module):
    """x + two times norm, SiLU, convolution."""

    recompute = False  # set by AutoencoderKL

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # at first x passes unchanged: see AutoencoderKL
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = norm_silu_conv(self.norm1, self.conv1, x, self.recompute)
        h = norm_silu_conv(self.norm2, self.conv2, h, self.recompute)
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """x + single-head self-attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):
        """(B, C, H, W) -> the same."""
        h = self.norm(x)
        q, k, v = [conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)]
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H·W, C): one head
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


def downsample(channels):
    """A stride-2 convolution, zeros at right and bottom: (B, C, H, W) -> (B, C, H/2, W/2)."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    nn.init.dirac_(conv.weight)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels):
    """Nearest neighbours, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.dirac_(conv.weight)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def level(c_in, c_out, num_blocks, **resampling):
    """Residual blocks at one resolution, then perhaps downsample= or upsample=. CompVis' names."""
    widths = [c_in] + num_blocks * [c_out]
    blocks = nn.Sequential(*[ResnetBlock(a, b) for a, b in itertools.pairwise(widths)])
    return nn.Sequential(OrderedDict(block=blocks, **resampling))


def middle(channels):
    """Block, attention, block, at the lowest resolution. CompVis' names."""
    block_1, block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=AttnBlock(channels), block_2=block_2))


class Encoder(nn.Module):
    """Image to moments, at 1/f of the size, f = 2^(levels - 1)."""

    recompute = False  # set by AutoencoderKL

    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.Sequential()
        c = ch
        for i, mult in enumerate(ch_mult):
            is_last = i == len(ch_mult) - 1
            resampling = {} if is_last else dict(downsample=downsample(ch * mult))
            self.down.append(level(c, ch * mult, num_res_blocks, **resampling))
            c = ch * mult
        self.mid = middle(c)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 2 * z_channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv_out.weight, nonlinearity="linear")  # or noise drowns z

    def forward(self, x):
        """(B, in_channels, H, W) -> (B, 2·z_channels, H/f, W/f)."""
        h = self.mid(self.down(self.conv_in(x)))  # (B, ch·ch_mult[-1], H/f, W/f)
        return norm_silu_conv(self.norm_out, self.conv_out, h, self.recompute)


class Decoder(nn.Module):
    """Latent to image."""

    recompute = False  # set by AutoencoderKL

    def __init__(self, out_channels, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        c = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = middle(c)
        levels = []  # from coarse to fine, as they run
        for i in reversed(range(len(ch_mult))):
            c_out = ch * ch_mult[i]
            resampling = dict(upsample=upsample(c_out)) if i > 0 else {}
            levels.append(level(c, c_out, num_res_blocks + 1, **resampling))
            c = c_out
        self.up = nn.ModuleList(reversed(levels))  # CompVis counts them from fine to coarse
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z):
        """(B, z_channels, h, w) -> (B, out_channels, h·f, w·f)."""
        h = self.mid(self.conv_in(z))  # (B, ch·ch_mult[-1], h, w)
        for up in reversed(self.up):
            h = up(h)  # in the end (B, ch·ch_mult[0], h·f, w·f)
        return norm_silu_conv(self.norm_out, self.conv_out, h, self.recompute)


class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, std²), diagonal; logvar is clamped to [-30, 20] as in LDM.
    Source: Kingma & Welling 2014, appendix B. moments: (B, 2C, h, w), mean before logvar."""

    def __init__(self, moments):
        mean, logvar = moments.chunk(2, dim=1)  # (B, C, h, w) each
        self.mean = mean.contiguous()  # MPS convolves a view of half the channels wrongly
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """z = mean + std·ε, ε ~ N(0, I): (B, C, h, w), differentiable."""
        return self.mean + self.std * torch.empty_like(self.mean).normal_(generator=generator)

    def mode(self):
        """The mean: (B, C, h, w)."""
        return self.mean

    def kl(self):
        """KL(q ‖ N(0, I)) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The KL autoencoder; the defaults are kl-f8 of Stable Diffusion 1.x, of 83,653,863 parameters.
    Source: Rombach et al. 2022; CompVis ldm/models/autoencoder.py. x: (B, in_channels, H, W) in
    [-1, 1], multiples of f = 2^(levels - 1); z: (B, z_channels, H/f, W/f); x_hat: as x, unbounded.
    All have x's dtype, under autocast too. quant_conv=False: the layout of SD3 and FLUX.1.
    recompute: keep at most 40 % of the activations, with the same gradients. The first weights are
    ours, those of an identity: with random ones colour is lost before z, and is learned late."""

    def __init__(
        self,
        in_channels=3,
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=4,
        quant_conv=True,
        recompute=False,
    ):
        super().__init__()
        self.widths = dict(ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks)
        self.widths.update(z_channels=z_channels)
        self.encoder = Encoder(in_channels, **self.widths)
        self.decoder = Decoder(in_channels, **self.widths)
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if quant_conv:
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
            self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
            nn.init.dirac_(self.quant_conv.weight)
            nn.init.dirac_(self.post_quant_conv.weight)
        for module in self.modules():
            module.recompute = recompute

    @property
    def last_layer(self):
        """The weight at which λ compares two gradients: (in_channels, ch, 3, 3)."""
        return self.decoder.conv_out.weight

    def encode(self, x):
        """(B, in_channels, H, W) -> DiagonalGaussian of (B, z_channels, H/f, W/f)."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)).to(x.dtype))

    def decode(self, z):
        """(B, z_channels, h, w) -> (B, in_channels, h·f, w·f)."""
        return self.decoder(self.post_quant_conv(z)).to(z.dtype)

    def forward(self, x, sample=True, generator=None):
        """-> (x_hat, posterior). sample=False decodes the mean."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if sample else posterior.mode()
        return self.decode(z), posterior


# ---- 4. Discriminator: is this patch of 70×70 pixels from a photograph?


class PatchDiscriminator(nn.Module):
    """70×70 PatchGAN: one realness logit for each of many overlapping patches.
    Source: Isola et al. 2017, §6.1.2; layout and N(0, 0.02) weights of taming-transformers; with
    spectral norm (Miyato et al. 2018), not BatchNorm, D works at batch 1, treats real and fake
    alike, and is smooth. x: (B, in_channels, H, W) of at least 24×24 pixels."""

    def __init__(self, in_channels=3, ndf=64, n_layers=3, spectral=True):
        super().__init__()
        widths = [in_channels] + [ndf * min(2**i, 8) for i in range(n_layers + 1)] + [1]
        strides = n_layers * [2] + [1, 1]
        self.convs = nn.ModuleList()
        for c_in, c_out, stride in zip(widths, widths[1:], strides):
            conv = nn.Conv2d(c_in, c_out, 4, stride, padding=1)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            self.convs.append(nn.utils.parametrizations.spectral_norm(conv) if spectral else conv)

    def forward(self, x):
        """-> logits (B, 1, H/8 - 2, W/8 - 2), of x's dtype."""
        h = x
        for i, conv in enumerate(self.convs):
            if i > 0:
                h = F.leaky_relu(h, 0.2)
            # Reading a spectrally normalised weight runs a power iteration, here in fp32.
            with torch.autocast(x.device.type, enabled=False):
                weight = conv.weight
            h = F.conv2d(h, weight, conv.bias, conv.stride, conv.padding)
        return h.to(x.dtype)


# ---- 5. Losses, and when the adversarial one is switched on.


def hinge_d_loss(logits_real, logits_fake):
    """½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]: 1 if D tells nothing apart, 0 if it has won.
    Source: Lim & Ye 2017; ½ as in taming-transformers. Logits of any shape -> scalar."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_g_loss(logits_fake):
    """-E[D(x̂)], of either sign. Source: Lim & Ye 2017. Logits of any shape -> scalar."""
    return -logits_fake.mean()


def adaptive_weight(g_rec, g_adv, eps=1e-4, max_weight=0.05):
    """λ = ‖g_rec‖ / (‖g_adv‖ + ε), at most max_weight.
    λ guards against a D too strong: λ·g_adv is never stronger than g_rec. Its bound guards against
    one too weak: without it λ amplifies a D that knows nothing, the decoder outruns it, and D stays
    at chance. g_rec, g_adv: gradients of both losses at the decoder's last layer -> scalar without
    a graph. Source: Esser et al. 2021, eq. 7; ε is latent-diffusion's, and so is the bound: 1e4 for
    sums over 3·256² values, so 0.05 for means. max_weight=math.inf: no bound. NaN if g_adv is not
    finite (fp16 overflow), so that GradScaler skips the step: 0 would pass, without the GAN."""
    norm = g_adv.norm()
    weight = (g_rec.norm() / (norm + eps)).clamp(max=max_weight)
    return torch.where(norm.isfinite(), weight, math.nan).detach()


class Perceptual(nn.Module):
    """LPIPS, the distance of two images in the features of a trained network: frozen, in eval mode.
    Source: Zhang et al. 2018, eq. 1. net: vgg, alex or squeeze. Raises ImportError where package or
    weights cannot be had; it never falls back to untrained ones."""

    def __init__(self, net="vgg"):
        super().__init__()
        try:
            import lpips

            self.lpips = lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()
        except Exception as error:  # no package, no network, a torn file, …
            place = f"{torch.hub.get_dir()}/checkpoints"
            way_out = f"put it into {place}, or train with --perceptual-weight 0"
            raise ImportError(f"LPIPS net {net}: {error}; {way_out}") from None

    def train(self, mode=True):
        """Stay in eval mode, whatever the parent does, for LPIPS has dropout."""
        return super().train(False)

    def features(self, x):
        """(B, 3, H, W) -> a list of (B, C, h, w), each pixel of unit length."""
        layers = self.lpips.net(self.lpips.scaling_layer(x))
        return [F.normalize(f.to(x.dtype), dim=1, eps=1e-10) for f in layers]

    def forward(self, x, x_hat):
        """x, x_hat: (B, 3, H, W) in [-1, 1] -> (B,). x gets no gradient."""
        layers = zip(self.lpips.lins, self.features(x.detach()), self.features(x_hat))
        with torch.autocast(x.device.type, enabled=False):
            return sum(head((a - b) ** 2).mean(dim=(1, 2, 3)) for head, a, b in layers)


class WarmUp:
    """When the GAN is switched on.

        step       0 ........ T ........ T + lead ........ T + lead + ramp ........
        D trains       no         yes               yes                   yes
        w(t)           0           0           rises linearly to 1         1

    start: T, or "plateau": once the reconstruction loss has saturated. That is when its median in a
    window of `steps`/20 steps is above 0.97 times that in the window before, in three comparisons
    running, one each half window; or when half of `steps` are over."""

    def __init__(self, start="plateau", lead=0, ramp=0, steps=200_000):
        self.start = None if start == "plateau" else int(start)
        self.lead, self.ramp, self.latest = lead, ramp, steps // 2
        self.window = max(steps // 200, 5)  # in records of ten steps
        self.losses = []  # of up to two windows
        self.flat = 0  # comparisons in a row without a fall

    def observe(self, rec_loss, step):
        """Feed the reconstruction loss of a record, every ten steps. It may decide T."""
        if self.start is not None:
            return
        self.losses.append(rec_loss)
        if len(self.losses) >= 2 * self.window:
            before = statistics.median(self.losses[: self.window])
            now = statistics.median(self.losses[self.window :])
            self.flat = self.flat + 1 if now > 0.97 * before else 0
            self.losses = self.losses[self.window // 2 :]
        if self.flat == 3 or step >= self.latest:
            self.start = step

    def trains_disc(self, step):
        """Whether D trains in the update that follows `step` finished ones."""
        return self.start is not None and step >= self.start

    def weight(self, step):
        """w(t) in [0, 1] in that update."""
        if not self.trains_disc(step) or step < self.start + self.lead:
            return 0.0
        if step >= self.start + self.lead + self.ramp:
            return 1.0
        return (step - self.start - self.lead) / self.ramp

    def state_dict(self):
        """What continuing needs."""
        return dict(start=self.start, losses=self.losses, flat=self.flat)

    def load_state_dict(self, state):
        """Continue; a T given as a step wins over the saved one."""
        if self.start is None:
            self.start, self.flat = state["start"], state["flat"]
            self.losses = list(state["losses"])


# ---- 6. Collapse: its signs, each a number with a limit, and the rule by which they stop a run.


def high_frequency_energy(x):
    """Spectral energy above half of Nyquist, a mean over all values: (B, C, H, W) -> (B,)."""
    like = dict(dtype=x.dtype, device=x.device)
    rows, columns = [torch.hann_window(n, periodic=False, **like) for n in x.shape[-2:]]
    spectrum = torch.fft.fft2(x * torch.outer(rows, columns), norm="ortho")
    power = torch.view_as_real(spectrum).pow(2).sum(-1)  # abs() compiles a kernel on a GPU
    rows, columns = [torch.fft.fftfreq(n, **like) for n in x.shape[-2:]]
    cycles_a_pixel = torch.hypot(rows[:, None], columns)
    return (power * (cycles_a_pixel > 0.25)).mean(dim=(1, 2, 3))


class CollapseError(AssertionError):
    """Training has collapsed: step, sign, value, limit, likely cause, remedy (flags to change)."""

    def __init__(self, step, sign, value, limit, cause, remedy):
        self.step, self.sign, self.value, self.limit = step, sign, value, limit
        self.cause, self.remedy = cause, remedy
        text = f"collapse at step {step}: {sign} is {value:.3g} (limit {limit:g})"
        super().__init__(f"{text}; likely cause: {cause}; remedy: {remedy}")


class CollapseMonitor:
    """Notices, from a record every ten steps, that the training of a VAE-GAN goes wrong.
    Feed assert_healthy with what `look` measures and with means of ten steps of grad_norm_dec
    (before clipping), grad_ratio (w·‖∇adv‖/‖∇rec‖), l2, rec_loss and kl_dim; all are optional.
    What users describe, and the sign or logged term that shows it:

        the gradient norm explodes    spike; domination says that it is the GAN's
        the reconstruction rebounds   rebound, in dB of l2 and rec_loss
        the KL goes to 0              kl_gone; z_ignored where the decoder ignores z all the same
        noise, saturation, ringing    noise; the terms saturation and high_freq are only logged

    Collapsed: a term is not finite; or a sign of DAMAGE is over its limit, and one was so in the
    record before, or one of CAUSES in the newest six records. z_ignored and noise count once
    there was a picture (correlation over ½), if the GAN dominates, or after 100 records.
    CollapseMonitor(rebound=4.0) sets a limit.
    Needs: CollapseError, high_frequency_energy."""

    SIGNS = {  # sign: limit, what is measured, remedy
        "domination": (3.0, "gradient of GAN / reconstruction", "--adaptive, lower --disc-weight"),
        "spike": (5.0, "decoder's gradient norm in deviations", "lower --lr or --disc-weight"),
        "rebound": (3.5, "dB of the reconstruction above its best", "lower --lr or --disc-weight"),
        "z_ignored": (0.95, "error with own z / another's", "lower --disc-weight or --kl-weight"),
        "noise": (0.75, "1 - correlation of x̂ with x", "lower --disc-weight or --lr"),
        "kl_gone": (10.0, "peak of the KL / now", "lower --kl-weight"),
    }
    CAUSES = ("domination", "spike")
    DAMAGE = ("rebound", "z_ignored", "noise", "kl_gone")
    STATE = ("count", "history", "values", "over", "best_corr", "peak_kl", "best_level")

    def __init__(self, **limits):
        unknown = limits.keys() - self.SIGNS.keys()
        if unknown:
            raise TypeError(f"no such sign: {', '.join(unknown)}")
        self.limits = {sign: row[0] for sign, row in self.SIGNS.items()} | limits
        self.count = 0  # records so far
        self.history = []  # the newest 21 records
        self.values = {}  # {sign: its value} in the newest record
        self.over = [{}]  # {sign: its value} over the limit, of the newest six records; {}: none
        self.best_corr = 0.0
        self.peak_kl = 0.03  # largest kl_dim, within [0.03, 1]: a KL that never rose is gone, too
        self.best_level = dict(l2=math.inf, rec_loss=math.inf)  # dB

    @staticmethod
    @torch.no_grad()
    def look(x, x_hat):
        """Measure images and their reconstructions, (B, 3, H, W) -> 0-d tensors, without a sync."""
        x, x_hat = x.float(), x_hat.float()
        a = x - x.mean(dim=(0, 2, 3), keepdim=True)
        b = x_hat - x_hat.mean(dim=(0, 2, 3), keepdim=True)
        norms = ((a.square().mean() + 1e-3) * (b.square().mean() + 1e-3)).sqrt()
        energy, energy_hat = [high_frequency_energy(image).mean() for image in (x, x_hat)]
        side = max(min(x.shape[-2:]) // 16, 1)
        small, small_hat = F.avg_pool2d(x, side), F.avg_pool2d(x_hat, side)  # low-passed
        own = (small - small_hat).abs().mean()
        other = (small - small_hat.roll(1, 0)).abs().mean()  # with the z of the next image
        return dict(
            corr=((a * b).mean() + 1e-3) / norms,  # about 1 if both are flat, 0 if one is
            saturation=(x_hat.abs() > 1).float().mean() - (x.abs() > 1).float().mean(),
            high_freq=energy_hat / energy.clamp(min=1e-12),
            other_z=(other + 0.002) / (own + 0.001),
            batch_spread=(small - small.roll(1, 0)).abs().mean(),
        )

    def assert_healthy(self, step, terms):
        """Feed the record of a step, {term: number or 0-d tensor}. Raises CollapseError."""
        terms = {name: float(value) for name, value in terms.items()}
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if broken:
            cause = f"overflow of {', '.join(broken)}; all terms: {terms}"
            remedy = "lower --lr, or --precision fp32"
            raise CollapseError(step, "non_finite", len(broken), 0, cause, remedy)
        self.measure(terms)
        over = {sign: v for sign, v in self.values.items() if v > self.limits[sign]}
        self.over = [*self.over, over][-6:]
        lately = {}  # the newest value over its limit of each sign, in these six records
        for signs in self.over:
            lately |= signs
        causes = [sign for sign in self.CAUSES if sign in lately]
        damage = [sign for sign in self.DAMAGE if sign in over]
        was_damaged = any(sign in self.over[-2] for sign in self.DAMAGE)
        if damage and (causes or was_damaged):
            sign, culprit = damage[0], causes[0] if causes else damage[0]
            _, meaning, remedy = self.SIGNS[culprit]
            cause = f"{culprit}: {meaning} was {lately[culprit]:.3g}"
            raise CollapseError(step, sign, over[sign], self.limits[sign], cause, remedy)

    def recent(self, term, count):
        """The values of a term in the newest `count` records, of those that have it."""
        return [record[term] for record in self.history[-count:] if term in record]

    def measure(self, record):
        """Set self.values from a record and the 20 before it, for the signs with terms."""
        signs = {}
        self.history = [*self.history, record][-21:]
        self.count += 1
        if "grad_ratio" in record:
            signs["domination"] = record["grad_ratio"]

        # Robust deviations of log ‖∇decoder‖ above the 20 records before.
        norms = [math.log(max(norm, 1e-12)) for norm in self.recent("grad_norm_dec", 21)]
        if "grad_norm_dec" in record and len(norms) > 5:
            usual = statistics.median(norms[:-1])
            spread = 1.4826 * statistics.median(abs(norm - usual) for norm in norms[:-1])
            signs["spike"] = (norms[-1] - usual) / max(spread, 0.2)

        # Mean dB of the newest two records above the best, the lowest mean of five in a row; the
        # best is raised by 0.005 dB a record, so that an old one fades.
        rise = dict(l2=0.0, rec_loss=0.0)
        for term in rise:
            levels = [10 * math.log10(max(value, 1e-12)) for value in self.recent(term, 5)]
            if len(levels) == 5:
                best = min(self.best_level[term] + 0.005, statistics.fmean(levels))
                self.best_level = self.best_level | {term: best}
                rise[term] = statistics.fmean(levels[-2:]) - best
        # Both have to rise: the GAN alone raises l2. With l1 rec_loss is an amplitude: half the dB.
        signs["rebound"] = min(rise["l2"], 2 * rise["rec_loss"])

        # Medians of three records, so that one odd batch does not count.
        corr, other_z = self.recent("corr", 3), self.recent("other_z", 3)
        if corr:
            self.best_corr = max(self.best_corr, statistics.median(corr))
        is_dominated = record.get("grad_ratio", 0.0) > self.limits["domination"]
        has_picture = self.best_corr > 0.5 or is_dominated or self.count >= 100
        if corr and has_picture:
            signs["noise"] = 1 - statistics.median(corr)
        spreads = self.recent("batch_spread", 21)
        are_alike = bool(spreads) and statistics.median(spreads) < 0.1  # photographs: 0.34 to 0.54
        if other_z and has_picture and not are_alike:  # else another's z says nothing
            signs["z_ignored"] = 1 / max(statistics.median(other_z), 1e-12)

        if "kl_dim" in record:
            self.peak_kl = max(self.peak_kl, min(record["kl_dim"], 1.0))
            signs["kl_gone"] = self.peak_kl / max(record["kl_dim"], 1e-12)
        self.values = signs

    def state_dict(self):
        """What continuing needs."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state):
        """Continue; the limits stay those of this monitor."""
        for name in self.STATE:
            setattr(self, name, state[name])


# ---- 7. Data: a folder of images, or dead leaves, as uint8.


def seed_of(*numbers):
    """A 63-bit seed. Where randomness comes from: weights --seed; noise in z (seed, step, rank);
    order of files (seed, pass); crop (seed, pass, place); dead leaves (seed, i). All follow from
    the step, so on a CPU a stopped run goes on to the bit."""
    return random.Random(repr(numbers)).getrandbits(63)


def to_model(images, device):
    """(B, 3, H, W) uint8 -> float in [-1, 1] on the device, in channels-last layout."""
    images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
    return images.float() / 127.5 - 1.0


def pixels_of(image):
    """An RGB image as (3, H, W) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def find_images(root, suffixes):
    """The images in a folder and below, sorted by name. Each real folder counts once; below the
    root what is hidden, __MACOSX and the folders of runs are left out."""
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        is_run = "log.jsonl" in names and folder != str(root)  # with its samples
        if real in seen or is_run:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith((".", "__MACOSX")))
        images = [name for name in names if name.lower().endswith(suffixes)]
        files += [f"{folder}/{name}" for name in images if not name.startswith(".")]
    return sorted(files)


class ImageFolder(Dataset):
    """Square crops of all images in a folder and below: (3, size, size) uint8.
    train=True: item i, for any i >= 0, is of the i-th file of endless shuffled passes: a square at
    random, ½ to 1 times the shorter side (latent-diffusion's ImageNet data), flipped or not; it is
    a function of (seed, i). train=False: the largest centre square of the i-th file by name.
    hold_out=n: every n-th file is for train=False, the others for train=True. For a file that
    cannot be decoded, which is reported once, another one stands in, drawn at random.
    Raises UsageError if none can be decoded."""

    def __init__(self, root, size, train=True, seed=0, hold_out=0):
        self.root, self.size, self.is_train, self.seed = root, size, train, seed
        kinds = Image.registered_extensions()  # {suffix: kind}
        left_out = {"EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB"}  # programs, films, data
        self.formats = sorted(set(Image.OPEN) & (set(kinds.values()) - left_out))
        suffixes = tuple(suffix for suffix, kind in kinds.items() if kind in self.formats)
        self.files = find_images(root, suffixes)
        if not self.files:
            raise UsageError(f"{root}: no folder with images, of {' '.join(suffixes)}")
        if hold_out and len(self.files) > 1:
            held_out = self.files[::hold_out]
            self.files = sorted(set(self.files) - set(held_out)) if train else held_out
        self.reported = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # by workers
        self.epoch, self.order = None, None  # the newest shuffled pass
        try:
            self.decode_or_replace(0, None)
        except OSError as error:
            raise UsageError(error) from None

    def __len__(self):
        """The number of files."""
        return len(self.files)

    def __getitem__(self, i):
        """Crop i."""
        if not self.is_train:
            generator = torch.Generator().manual_seed(seed_of(self.seed, i))
            image = self.decode_or_replace(range(len(self))[i], generator)
            return self.crop(image, 1.0, 0.5, 0.5)
        epoch, k = divmod(i, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator).tolist()
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, k))
        size, left, top, flip = torch.rand(4, generator=generator).tolist()
        image = self.decode_or_replace(self.order[k], generator)
        pixels = self.crop(image, (1 + size) / 2, left, top)
        return pixels.flip(2) if flip < 0.5 else pixels

    def decode_or_replace(self, k, generator):
        """The image of file k, or where that is broken another one."""
        try:
            return self.decode(self.files[k])
        except Exception as error:  # decoders raise what they like
            if not self.reported[k]:
                self.reported[k] = True
                tqdm.write(f"skipped {self.files[k]!r}: {error}", file=sys.stderr)
        for other in torch.randperm(len(self), generator=generator).tolist():
            with suppress(Exception):
                return self.decode(self.files[other])
        raise OSError(f"{self.root}: none of {len(self)} images can be decoded")

    def decode(self, file):
        """A file as an upright RGB image, a large JPEG at 1/2, 1/4 or 1/8 of its size."""
        if not os.path.isfile(file):  # to open a pipe would wait for ever
            raise ValueError("it is no file")
        with Image.open(file, formats=self.formats) as image:
            image.draft("RGB", (2 * self.size, 2 * self.size))
            # Mode I has 32 bits, but of a PNG or PGM only 16.
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError("floats or 32-bit integers, whose range is not known")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, rounded; 257 = 65535/255
                image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
            return image.convert("RGB")

    def crop(self, image, size, left, top):
        """A square of `size` times the shorter side; left, top: 0 to 1, ½ is the middle."""
        side = size * min(image.size)
        x, y = left * (image.width - side), top * (image.height - side)
        box = (x, y, x + side, y + side)
        return pixels_of(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box))


class DeadLeaves(Dataset):
    """Occluding discs with radii ∝ r^-3: edges at all scales, as in photographs (Lee, Mumford &
    Huang 2001), each with a grating. Item i is a function of (seed, i): (3, size, size) uint8."""

    def __init__(self, size, seed=0, length=100_000):
        self.size, self.seed, self.length = size, seed, length

    def __len__(self):
        """The number of images."""
        return self.length

    def __getitem__(self, i):
        """Image i, drawn twice as large."""
        if i >= self.length:
            raise IndexError(i)
        side = 2 * self.size
        r_min, r_max = 6.0, side / 2
        area = 2 * math.pi * r_min**2 * math.log(r_max / r_min)  # of a disc, on average
        n = int(4 * (1.5 * side) ** 2 / area)  # four layers, so that e^-4 of the area stays black
        u = torch.rand(9, n, generator=torch.Generator().manual_seed(seed_of(self.seed, i)))
        r = (r_min**-2 + u[0] * (r_max**-2 - r_min**-2)) ** -0.5  # pdf ∝ r^-3
        x, y = (u[1:3] * 1.5 - 0.25) * side  # some centres lie outside
        boxes = torch.stack([x - r, y - r, x + r, y + r], 1).tolist()
        tints = 0.1 + 0.8 * u[3] + 0.3 * (u[3:6] - u[3])  # grey with a tint
        fills = (255 * torch.cat([tints, u[6:]]).clamp(0, 1)).int().T.tolist()
        colour, wave = Image.new("RGB", (side, side)), Image.new("RGB", (side, side))
        on_colour, on_wave = ImageDraw.Draw(colour), ImageDraw.Draw(wave)
        for box, fill in zip(boxes, fills):
            on_colour.ellipse(box, fill=tuple(fill[:3]))
            on_wave.ellipse(box, fill=tuple(fill[3:]))
        frequency, angle, contrast = pixels_of(wave) / 255  # of the grating that each pixel has
        row, column = torch.arange(side)[:, None], torch.arange(side)
        across = torch.cos(2 * math.pi * angle) * column + torch.sin(2 * math.pi * angle) * row
        grating = 51 * contrast**2 * torch.sin(2 * math.pi / (4 * 8**frequency) * across)
        return F.avg_pool2d(pixels_of(colour) + grating, 2).round().clamp(0, 255).to(torch.uint8)


# ---- 8. The training step: one forward and one backward of the autoencoder a batch.


def average_over_ranks(tensor):
    """The mean over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def generator_step(
    vae,
    x,
    *,
    adversary=None,
    perceptual=None,
    pixel_loss="l1",
    perceptual_weight=1.0,
    kl_weight=1e-6,
    weight=0.5,
    adaptive=True,
    lambda_max=0.05,
    autocast=nullcontext,
    scale=1.0,
    generator=None,
):
    """Accumulate the autoencoder's gradient of L_G -> x_hat, detached, and terms.
    Each loss is differentiated down to x̂ and no further; the sum of these image gradients goes
    through the autoencoder, once: by the chain rule the textbook's gradient.
    x: (B, 3, H, W) in [-1, 1]. vae(x, generator=…) -> (x_hat, posterior with kl() and mean), with a
    last_layer, perhaps wrapped in DistributedDataParallel. adversary(x, image) -> -E[D(image)], or
    an alternative loss, a scalar. weight: w(t)·disc_weight; 0: no adversary. autocast(): context of
    the networks; losses, norms and λ have x's dtype. scale: factor of all gradients, a float or 0-d
    tensor. terms: 0-d tensors, means before weighting: l1, l2, lpips, rec_loss, kl (nats an image),
    kl_dim (a latent dimension); with an adversary g_loss, its weight w, lam (if adaptive) and
    grad_ratio (w·‖∇adv‖/‖∇rec‖). Needs: adaptive_weight, average_over_ranks."""
    last_layer = getattr(vae, "module", vae).last_layer
    with autocast():
        x_hat, posterior = vae(x, generator=generator)  # its only forward
    kl = posterior.kl().mean()

    # Differentiate each loss down to the image, and no further.
    image = x_hat.detach().requires_grad_()
    l1 = (x - image).abs().mean()
    l2 = (x - image).pow(2).mean()
    lpips = torch.zeros_like(l1)
    if perceptual is not None:
        with autocast():
            lpips = perceptual(x, image).mean()
    rec_loss = (l1 if pixel_loss == "l1" else l2) + perceptual_weight * lpips
    (image_grad,) = torch.autograd.grad(scale * rec_loss, image)
    kl_dim = kl / posterior.mean[0].numel()
    terms = dict(l1=l1, l2=l2, lpips=lpips, rec_loss=rec_loss, kl=kl, kl_dim=kl_dim)

    # λ = ‖∇L_rec‖ / (‖∇L_adv‖ + ε) at the last layer: both image gradients through one convolution.
    if adversary is not None and weight > 0:
        with autocast():
            adv_loss = adversary(x, image)
        (adv_grad,) = torch.autograd.grad(scale * adv_loss, image)
        (rec_last,) = torch.autograd.grad(x_hat, last_layer, image_grad, retain_graph=True)
        (adv_last,) = torch.autograd.grad(x_hat, last_layer, adv_grad, retain_graph=True)
        both = torch.stack([rec_last, adv_last]) / scale
        rec_last, adv_last = average_over_ranks(both)  # else each rank had its own λ
        w = torch.full_like(l1, weight)
        if adaptive:
            terms["lam"] = adaptive_weight(rec_last, adv_last, max_weight=lambda_max)
            w = w * terms["lam"]
        image_grad = image_grad + w * adv_grad
        terms.update(g_loss=adv_loss, w=w, grad_ratio=w * adv_last.norm() / rec_last.norm())

    # With g = ∂L/∂x̂ held fixed, ∂(Σ x̂·g)/∂θ = (∂x̂/∂θ)ᵀ·g = ∂L/∂θ.
    # In one call: with two, DDP would average after the first and leave out the second.
    kl_loss = scale * kl_weight * kl / x[0].numel()
    ((x_hat * image_grad).sum() + kl_loss).backward()
    return x_hat.detach(), {name: value.detach() for name, value in terms.items()}


def discriminator_step(
    disc, x, x_hat, *, loss=hinge_d_loss, penalty=None, r1=0.0, autocast=nullcontext, scale=1.0
):
    """Accumulate D's gradient of L_D, on the images that generator_step has just seen and made.
    x, x_hat: (B, 3, H, W). loss(logits of x, of x̂) and penalty(x, x_hat) -> scalar. r1: γ of R1,
    with which the step runs in fp32. -> terms, 0-d tensors: d_loss, logits_real, logits_fake, d_acc
    (share of patches that D judges rightly). Needs: hinge_d_loss."""
    # L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))] + γ/2 E‖∇D(x)‖²
    x, x_hat = x.detach().requires_grad_(r1 > 0), x_hat.detach()
    with nullcontext() if r1 > 0 else autocast():
        real, fake = disc(torch.cat([x, x_hat])).chunk(2)  # one batch: no batch statistics
    d_loss = loss(real, fake)
    total = d_loss
    if r1 > 0:  # Mescheder et al. 2018, eq. 9, where D(x) is the sum of an image's logits
        (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
        total = total + r1 / 2 * gradient.pow(2).sum(dim=(1, 2, 3)).mean()
    if penalty is not None:
        total = total + penalty(x, x_hat)
    (scale * total).backward()
    d_acc = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    terms = dict(d_loss=d_loss, logits_real=real.mean(), logits_fake=fake.mean(), d_acc=d_acc)
    return {name: value.detach() for name, value in terms.items()}


# ---- 9. Training: what a run holds, and the loop.
VERSION = 3  # of checkpoints


class Trainer:
    """All that a run holds. A subclass may replace adversary, d_loss, penalty and spectral.
    Ranks start equal (same seed) and stay equal (averaged gradients)."""

    spectral = True  # spectral norm in D
    d_loss = staticmethod(hinge_d_loss)  # None: no D trains
    penalty = None  # penalty(x, x_hat) -> scalar, added to d_loss

    def adversary(self, x, x_hat):
        """The loss that brings texture, -> scalar."""
        return hinge_g_loss(self.disc(x_hat))

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.folder = cfg.folder
        self.has_gan = cfg.disc_weight > 0
        self.step = 0  # updates done
        self.best = (False, -math.inf)  # of best.pt: was the GAN at full weight; score
        self.latents = dict(scaling_factor=None, shift_factor=None)
        self.unread = []  # terms since the last record

        # Data.
        hold_out = 0 if cfg.val else 20
        self.train_set = DeadLeaves(cfg.image_size, cfg.seed, length=10**9)
        val_set = DeadLeaves(cfg.image_size, cfg.seed + 1, length=64)
        if cfg.data:
            self.train_set = ImageFolder(cfg.data, cfg.image_size, True, cfg.seed, hold_out)
        if cfg.val or cfg.data:
            val_set = ImageFolder(cfg.val or cfg.data, cfg.image_size, False, cfg.seed, hold_out)
        every = (len(val_set) + 255) // 256  # so that at most 256 images are measured
        self.val_set = Subset(val_set, range(0, len(val_set), every))

        # Networks.
        torch.manual_seed(cfg.seed)
        if cfg.init:
            file = file_of_init(cfg.init, self.folder)
            self.vae, _ = load_autoencoder(file, cfg.recompute)
        else:
            widths = (cfg.ch, cfg.ch_mult, cfg.num_res_blocks, cfg.z_channels)
            self.vae = AutoencoderKL(3, *widths, recompute=cfg.recompute)
        self.vae.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.vae)  # averaged: what is shown, measured, and saved for use
        for encoder in (self.vae.encoder, self.vae.quant_conv):
            encoder.requires_grad_(not cfg.freeze_encoder)
        self.disc = PatchDiscriminator(3, cfg.ndf, spectral=self.spectral)
        self.disc.to(device, memory_format=torch.channels_last)
        self.vae_ddp, self.disc_ddp = self.vae, self.disc
        if WORLD_SIZE > 1:
            self.vae_ddp = DistributedDataParallel(self.vae, gradient_as_bucket_view=True)
            self.disc_ddp = DistributedDataParallel(self.disc, gradient_as_bucket_view=True)
        self.noise = torch.Generator(device)

        # Losses.
        self.perceptual = None
        if cfg.perceptual_weight > 0:
            if RANK == 0 and WORLD_SIZE > 1:
                Perceptual(cfg.perceptual_net)  # may download; then the others find the file
            wait_for_ranks()
            self.perceptual = Perceptual(cfg.perceptual_net)
            self.perceptual.to(device, memory_format=torch.channels_last)

        # Optimisers.
        self.enc_params = [*self.vae.encoder.parameters(), *self.vae.quant_conv.parameters()]
        self.dec_params = [*self.vae.decoder.parameters(), *self.vae.post_quant_conv.parameters()]
        adam = dict(betas=(0.5, 0.9), fused=device.type != "mps")
        self.opt_vae = torch.optim.Adam(self.enc_params + self.dec_params, cfg.lr, **adam)
        self.opt_disc = torch.optim.Adam(self.disc.parameters(), cfg.lr_disc, **adam)

        # Precision of the networks; None: fp32.
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.precision)
        if cfg.precision == "auto" and device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if has_bf16 else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

        # Watchers.
        self.warm_up = WarmUp(cfg.disc_start, cfg.disc_lead, cfg.disc_ramp, cfg.steps)
        self.monitor = CollapseMonitor()

    def autocast(self):
        """The context in which the networks run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def batches(self):
        """This rank's batches, (B, 3, H, W) uint8, from the next image on, without end."""
        size = self.cfg.batch_size
        first = self.step * self.cfg.accumulate * WORLD_SIZE + RANK  # ranks take batches in turn
        indices = (range(k * size, (k + 1) * size) for k in itertools.count(first, WORLD_SIZE))
        options = dict(num_workers=self.cfg.workers, worker_init_fn=ignore_signals)
        options.update(pin_memory=self.device.type == "cuda")
        loader = iter(DataLoader(self.train_set, batch_sampler=indices, **options))
        if self.cfg.workers > 0:  # torch's handler would raise in the middle of anything
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from loader
        except Exception as error:  # a killed worker, a folder that is gone, a full /dev/shm, …
            reason = " ".join(str(error).splitlines()[-1:])  # below a worker's traceback
            way_out = "the same command goes on from the last save, with --workers 0 if need be"
            raise OSError(f"no more images, {reason}; {way_out}") from None

    def update(self, batches):
        """One update of the autoencoder, and of D once it trains, from cfg.accumulate batches."""
        cfg, step = self.cfg, self.step
        trains_disc = self.has_gan and self.d_loss is not None and self.warm_up.trains_disc(step)
        self.noise.manual_seed(seed_of(cfg.seed, step, RANK))
        self.opt_vae.zero_grad()
        self.opt_disc.zero_grad()
        scale = self.scaler.scale(torch.ones((), device=self.device))  # fp16's loss scale, else 1
        precision = dict(autocast=self.autocast, scale=scale / cfg.accumulate)
        for _ in range(cfg.accumulate):
            x = to_model(next(batches), self.device)
            x_hat, terms = generator_step(
                self.vae_ddp,
                x,
                adversary=self.adversary,  # not called while its weight is 0
                perceptual=self.perceptual,
                pixel_loss=cfg.pixel_loss,
                perceptual_weight=cfg.perceptual_weight,
                kl_weight=cfg.kl_weight,
                weight=cfg.disc_weight * self.warm_up.weight(step),
                adaptive=cfg.adaptive,
                lambda_max=cfg.lambda_max or math.inf,
                generator=self.noise,
                **precision,
            )
            self.unread.append(terms)
            if trains_disc:
                r1 = 16 * cfg.r1 if step % 16 == 0 else 0.0  # each 16th step: Karras 2020, §3.1
                losses = dict(loss=self.d_loss, penalty=self.penalty, r1=r1)
                terms = discriminator_step(self.disc_ddp, x, x_hat, **losses, **precision)
                self.unread.append(terms)

        # GradScaler's order: unscale, clip and step each optimiser, then one update of the scale.
        max_norm = cfg.clip or math.inf
        clip = nn.utils.clip_grad_norm_
        norms = {}
        self.scaler.unscale_(self.opt_vae)
        if not cfg.freeze_encoder:
            norms["grad_norm_enc"] = clip(self.enc_params, max_norm)
        norms["grad_norm_dec"] = clip(self.dec_params, max_norm)
        self.scaler.step(self.opt_vae)
        if trains_disc:
            self.scaler.unscale_(self.opt_disc)
            norms["grad_norm_disc"] = clip(self.disc.parameters(), max_norm)
            self.scaler.step(self.opt_disc)
        self.scaler.update()
        self.unread.append(norms)

        decay = cfg.ema if step > 0 else 0.0  # the first update copies
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(list(self.ema.parameters()), list(self.vae.parameters()), None)
        self.step += 1
        if self.step % 10 == 0:
            self.unread.append(self.monitor.look(x, x_hat))

    def read_record(self):
        """-> the means of ten steps over all ranks, in one transfer from the device.
        What an fp16 overflow does: an optimiser whose gradients overflowed skips its step, the
        scale is halved, and here the terms of those gradients are left out. But a loss that is not
        finite, and any term once the scale is below 1, stays: then the monitor stops the run."""
        series = {}
        for terms in self.unread:
            for name, value in terms.items():
                series.setdefault(name, []).append(value.float())
        self.unread = []
        means = torch.stack([torch.stack(values).mean() for values in series.values()])
        means = average_over_ranks(means).tolist()
        record = dict(step=self.step, **dict(zip(series, means)))
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            norms = ("grad_norm_enc", "grad_norm_dec", "grad_norm_disc")
            for name in (*norms, "grad_ratio", "lam", "w"):
                if not math.isfinite(record.get(name, 0.0)):
                    del record[name]
        return record

    def validate(self):
        """Measure and draw the averaged weights, keep the best -> the val_ terms of the log."""
        measured = evaluate(self.ema, self.val_set, self.device, self.perceptual)
        self.latents = {name: measured[name] for name in self.latents}
        save_grid(self.folder / f"samples/{self.step:07d}.png", self.val_set, self.device, self.ema)
        score = measured["psnr"] if measured["lpips"] is None else -measured["lpips"]
        score = float(average_over_ranks(torch.tensor(score)))  # the same on all, to the bit
        has_texture = not self.has_gan or self.warm_up.weight(self.step - 1) == 1
        if (has_texture, score) > self.best:  # a GAN at full weight beats any without
            self.best = (has_texture, score)
            write_whole(self.folder / "best.pt", self.state_dict())
        return {f"val_{name}": value for name, value in measured.items() if value is not None}

    def save(self):
        """Write last.pt; the one before becomes previous.pt."""
        write_whole(self.folder / "last.pt", self.state_dict(), self.folder / "previous.pt")

    def report_collapse(self, error):
        """Make previous.pt the new last.pt, for a collapse shows up to 50 steps late, and last.pt
        may have it. Write collapse.json, collapse.png (rows: image, that save, now)."""
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if RANK == 0 and previous.exists():
            os.replace(previous, last)
        report = dict(vars(error), signs=self.monitor.values, limits=self.monitor.limits)
        write_whole(self.folder / "collapse.json", json.dumps(report, indent=1).encode())
        restored, saved = load_autoencoder(last)
        restored.to(self.device)
        save_grid(self.folder / "collapse.png", self.val_set, self.device, restored, self.vae)
        tqdm.write(f"{last} is that of step {saved['step']}, from which the remedy's flags go on")

    PARTS = ("vae", "disc", "opt_vae", "opt_disc", "scaler", "warm_up", "monitor")

    def state_dict(self):
        """What a checkpoint holds. `state_dict`, the averaged weights, opens in diffusers as it is;
        `training` is what continuing takes, with the weights that are trained."""
        training = {name: getattr(self, name).state_dict() for name in self.PARTS}
        training["best"] = self.best
        weights = {name: weight.contiguous() for name, weight in self.ema.state_dict().items()}
        about = dict(self.latents, version=VERSION, step=self.step, config=asdict(self.cfg))
        return dict(about, state_dict=weights, training=training)

    def load_state_dict(self, saved):
        """Continue from a checkpoint, at the learning rates given now."""
        training = saved["training"]
        for name in self.PARTS:
            if training[name]:  # the scaler's is empty in fp32
                getattr(self, name).load_state_dict(training[name])
        self.opt_vae.param_groups[0]["lr"] = self.cfg.lr
        self.opt_disc.param_groups[0]["lr"] = self.cfg.lr_disc
        self.ema.load_state_dict(saved["state_dict"])
        self.step = saved["step"]
        judged_by = ("perceptual_weight", "perceptual_net", "image_size")
        if all(saved["config"][name] == getattr(self.cfg, name) for name in judged_by):
            self.best = training["best"]  # else the scores do not compare
        self.latents = {name: saved[name] for name in self.latents}

    def begin_or_continue(self):
        """Continue from the newest save, or begin the folder. Raises UsageError where it is not of
        this run."""
        file = newest_save(self.folder)
        if file:
            saved = read_file(file)
            if saved.get("version") != VERSION:
                way_out = f"take --init {self.folder / 'best.pt'} and another --out"
                raise UsageError(f"{file} is of another edition of vaegan.py; {way_out}")
            for name in ("data", "val", "init"):
                before, now = saved["config"][name], getattr(self.cfg, name)
                if bool(before) != bool(now) or Path(before).resolve() != Path(now).resolve():
                    raise UsageError(f"{file} has --{name} {before!r}; give this one its own --out")
            try:
                self.load_state_dict(saved)
            except Exception as error:  # whatever does not fit
                way_out = "take the flags it was trained with, or another --out"
                raise UsageError(f"{file}: {str(error)[:200]}; {way_out}") from None
            tqdm.write(f"{self.folder}: continues after step {self.step} of {self.cfg.steps}")
        wait_for_ranks()  # all have read before one writes
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.json", json.dumps(asdict(self.cfg)).encode())
        log = self.folder / "log.jsonl"  # of which the whole records up to this step stay
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        kept = [x for x in lines if x.endswith(b"}\n") and json.loads(x)["step"] <= self.step]
        write_whole(log, b"".join(kept))
        if not file:
            self.save()


def train(cfg, signals=(), trainer=Trainer):
    """Train as cfg says, alone or as one of torchrun's processes; the same cfg again continues.
    Raises UsageError before it writes anything, CollapseError after a report, and after a save
    KeyboardInterrupt(number, text), once `signals` has the number of a signal."""
    run = trainer(cfg, launch(cfg.device))
    images = f"{len(run.train_set)} images" if cfg.data else "dead leaves"
    tqdm.write(f"preset {cfg.preset} on {run.device}, {images} to {run.folder}")
    run.begin_or_continue()
    bar = tqdm(total=cfg.steps, initial=run.step, disable=RANK > 0, dynamic_ncols=True)
    with closing(run.batches()) as batches, bar:
        while run.step < cfg.steps:
            run.update(batches)
            bar.update()
            if run.step % 10 > 0:
                continue  # below: the only place that waits for the device

            record = run.read_record()
            if run.has_gan:
                run.warm_up.observe(record["rec_loss"], run.step)
            is_done, error = run.step == cfg.steps, None
            try:
                run.monitor.assert_healthy(run.step, record)
            except CollapseError as collapse:
                error, record["event"] = collapse, str(collapse)
            stops = error is not None and (cfg.on_collapse == "stop" or error.sign == "non_finite")
            if not stops and (is_done or run.step % cfg.sample_every == 0):
                record |= run.validate()
            if RANK == 0:  # before the save, or a kill could lose the record
                with open(run.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            if stops:
                run.report_collapse(error)
                raise error
            if error is not None:
                tqdm.write(str(error))
            interrupted = average_over_ranks(torch.tensor(float(len(signals)))) > 0  # on any rank
            if is_done or interrupted or run.step % cfg.save_every == 0:
                run.save()
            shown = [n for n in ("d_acc", "kl_dim", "l1", "lpips", "w") if n in record]
            bar.set_postfix({name: f"{record[name]:.3g}" for name in shown})
            if interrupted and not is_done:
                number = max(signals, default=signal.SIGTERM)  # that of another rank
                raise KeyboardInterrupt(number, f"saved step {run.step}; the same command goes on")
    tqdm.write(f"{run.folder}: {run.step} steps done; a larger --steps goes on from here")


# ---- 10. Processes, files, pictures.
# Rank 0 alone writes. DDP averages gradients; average_over_ranks those of λ, records and the score.


def launch(kind):
    """-> the device of a kind; auto: CUDA if there is one. Under torchrun it joins the others."""
    has = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if kind == "auto":
        kind = "cuda" if has["cuda"] else "cpu"
    if not has[kind]:
        raise UsageError(f"--device {kind}: there is none on this machine; take --device auto")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(TORCHRUN.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"there is no {device}; take a smaller --nproc-per-node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return device


def wait_for_ranks():
    """Return once all processes are here."""
    average_over_ranks(torch.zeros(()))  # on the CPU, so by gloo


def catch_signals():
    """-> a list that gets the number of a SIGINT or SIGTERM: train saves within ten steps, main
    exits with 128 + number. A second one of a kind kills at once (not under torchrun)."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        if not TORCHRUN:  # torchrun and its cluster may each send one
            signal.signal(number, signal.SIG_DFL)
        if RANK == 0:  # print is not for handlers
            os.write(2, b"\nvaegan.py: saves within ten steps, then stops\n")

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def ignore_signals(worker):
    """Let a worker live on when a signal goes to all processes, for the run needs its images until
    it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def newest_save(folder):
    """last.pt; previous.pt if a kill came while that was renamed; None if there is neither."""
    saves = [folder / "last.pt", folder / "previous.pt"]
    return next((file for file in saves if file.exists()), None)


def file_of_init(init, folder):
    """The file --init; if that is gone, the newest save of the run, which holds all of it."""
    if Path(init).exists():
        return init
    return newest_save(folder) or init


def write_whole(path, content, older=None):
    """Rank 0 writes bytes, or a dict by torch.save: beside, flushed, renamed, so never half a file;
    what was there is kept as `older`. The others wait: if one left, torchrun would kill rank 0."""
    if RANK == 0:
        if isinstance(content, dict):
            buffer = io.BytesIO()  # into a file on a full disk torch.save raises a RuntimeError
            torch.save(content, buffer)
            content = buffer.getbuffer()
        beside = path.with_name(path.name + ".tmp")
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}; what was there is whole") from None
        if older is not None and path.exists():
            os.replace(path, older)
        os.replace(beside, path)
    wait_for_ranks()


@torch.no_grad()
def save_grid(path, dataset, device, *autoencoders):
    """A PNG of up to eight images, and below them what each autoencoder makes of their means."""
    x = to_model(next(iter(DataLoader(dataset, 8))), device)
    rows = [x] + [vae(x, sample=False)[0] for vae in autoencoders]
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, rows·H, 8·W)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def read_file(path):
    """-> the tensors and plain values of a .safetensors file or one of torch.save; never code."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:  # its text names safetensors, which is to be installed
        raise
    except Exception as error:  # whatever stands in the file; torch's text advises to run code
        reason = f"{type(error).__name__}: it is missing, torn, or has code as Lightning's have"
        way_out = "give a .safetensors; if it is a run's last.pt, move it away for previous.pt"
        raise UsageError(f"{path} cannot be read, {reason}; {way_out}") from None


DIFFUSERS = (  # a pattern in the names of others, what CompVis writes there
    (r"^((first_stage_model|vae|module|_orig_mod)\.)+", ""),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_out\.0|proj_attn", "proj_out"),
    (r"attn_1\.(to_)?([qkv])(uery|ey|alue)?\.", r"attn_1.\2."),
)


def compvis_state(weights):
    """The weights of an autoencoder under CompVis' names, which may be diffusers', or prefixed."""
    upsamplers = len([n for n in weights if re.search(r"up_blocks.*upsamplers.*bias", n)])
    state = {}
    for name, weight in weights.items():  # diffusers counts up_blocks from the coarsest
        name = re.sub(r"up_blocks\.(\d)", lambda i: f"up_blocks.{upsamplers - int(i[1])}", name)
        for pattern, replacement in DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if ".attn_1." in name and weight.dim() == 2:
            weight = weight[:, :, None, None]  # a linear layer as a 1×1 convolution
        if name.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            state[name] = weight
    return state


def load_autoencoder(path, recompute=False):
    """-> the AutoencoderKL in a file, of the widths found there, and all that the file holds.
    Names may be CompVis' or diffusers'. Raises UsageError that says what does not fit."""
    content = weights = read_file(path)
    for wrapper in ("model", "ema", "state_dict"):
        if isinstance(content.get(wrapper), dict):
            weights = content[wrapper]
    try:
        if "bn.running_mean" in weights:
            raise ValueError("this is FLUX.2's, which is of another kind")
        state = compvis_state(weights)
        if "encoder.conv_in.bias" not in state:
            raise ValueError(f"no encoder.conv_in, but {', '.join(list(weights)[:4])}, …")
        ch = len(state["encoder.conv_in.bias"])
        z_channels = state["decoder.conv_in.weight"].shape[1]
        blocks = [n for n in state if re.fullmatch(r"encoder\.down\.0\.block\.\d\.conv1\.bias", n)]
        levels = [n for n in state if re.fullmatch(r"encoder\.down\.\d\.block\.0\.conv1\.bias", n)]
        ch_mult = [len(state[name]) // ch for name in sorted(levels)]
        quant_conv = "quant_conv.weight" in state
        vae = AutoencoderKL(3, ch, ch_mult, len(blocks), z_channels, quant_conv, recompute)
        vae.load_state_dict(state)
        if not all(weight.isfinite().all() for weight in state.values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # whatever the file holds
        way_out = "give Stable Diffusion's, or a checkpoint of vaegan.py"
        raise UsageError(f"{path} is no KL autoencoder ({str(error)[:200]}); {way_out}") from None
    return vae, content


# ---- 11. Measures, of images in [-1, 1]: one number an image, (B,).


def psnr(x, x_hat):
    """10·log10(1/MSE) in dB, of images scaled to [0, 1]; 100 dB if equal."""
    return -10 * torch.log10(((x - x_hat) / 2).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10))


def ssim(x, x_hat):
    """Structural similarity, 1 if equal: the mean over channels and whole windows, in fp32.
    Source: Wang et al. 2004, eq. 13: Gaussian window of 11 px, σ 1.5, K 0.01, 0.03, range 1."""
    taps = torch.exp(-(torch.arange(-5, 6, device=x.device) ** 2) / (2 * 1.5**2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2).expand(x.shape[1], 1, 11, 11)

    def blur(image):
        return F.conv2d(image.contiguous(), window, groups=x.shape[1])  # never in TF32

    x, y = (x.float() + 1) / 2, (x_hat.float() + 1) / 2
    mx, my = blur(x), blur(y)
    variances = blur(x * x) - mx * mx + blur(y * y) - my * my
    covariance = blur(x * y) - mx * my
    similarity = (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
    similarity = similarity * (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return similarity.mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(vae, dataset, device="cpu", perceptual=None, batch_size=8):
    """Measure uint8 images, decoded from the posteriors' means and clamped -> dict: images, their
    number; means psnr (dB), ssim, lpips (or None), kl_dim (nats a latent dimension); sharpness,
    high-frequency energy of x̂ / x; scaling_factor and shift_factor, 1/std and mean of z."""
    noise, rows = torch.Generator(device).manual_seed(0), []
    for images in DataLoader(dataset, batch_size):
        x = to_model(images, device)
        posterior = vae.encode(x)
        x_hat = vae.decode(posterior.mode()).clamp(-1, 1)
        z = posterior.sample(noise).flatten(1)
        row = dict(psnr=psnr(x, x_hat), ssim=ssim(x, x_hat), kl_dim=posterior.kl() / z.shape[1])
        row.update(energy=high_frequency_energy(x), energy_hat=high_frequency_energy(x_hat))
        row.update(z=z.mean(1), z_square=z.pow(2).mean(1))
        if perceptual is not None:
            row["lpips"] = perceptual(x, x_hat)
        rows.append(row)
    mean = {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}
    variance = max(mean["z_square"] - mean["z"] ** 2, 1e-20)
    result = {name: mean.get(name) for name in ("psnr", "ssim", "lpips", "kl_dim")}
    result.update(images=len(dataset), sharpness=mean["energy_hat"] / mean["energy"])
    result.update(scaling_factor=variance**-0.5, shift_factor=mean["z"])
    return result


# ---- 12. The command line.


def parse(argv):
    """-> {"command": …, flag: value}; of train's flags those that are given."""
    options = dict(usage=argparse.SUPPRESS, allow_abbrev=False)  # so that an error is one line
    parser = argparse.ArgumentParser("vaegan.py", description=__doc__.splitlines()[0], **options)
    commands = parser.add_subparsers(dest="command", required=True, prog="vaegan.py")
    sub = commands.add_parser("train", help="train, or continue, on a folder of images", **options)
    for f in fields(Config):
        about = f.metadata
        text = about["help"]
        if about["tiny"] is not None:
            text += f" (sd: {f.default}, tiny: {about['tiny']})"
        elif f.default != "":
            text += f" (default: {f.default})"
        kind = dict(type=type(f.default), choices=about["choices"])
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        if isinstance(f.default, tuple):
            kind = dict(type=int, nargs="+")
        flag = "--" + f.name.replace("_", "-")
        sub.add_argument(flag, help=text, default=argparse.SUPPRESS, **kind)
    sub = commands.add_parser("eval", help="measure autoencoders on images", **options)
    add = sub.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help="any file that --init takes")
    add("--data", default="", metavar="DIR", help="folder of images, all of them; none: leaves")
    add("--image-size", type=int, default=0, help="side of the crops; 0: as trained, else 256")
    add("--perceptual-net", default="alex", choices=NETS)
    add("--save", default="", metavar="DIR", help="folder for compare.png")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return vars(parser.parse_args(argv))


def eval_command(checkpoint, data, image_size, perceptual_net, save, device):
    """Print a table of what evaluate gives, a row a checkpoint; draw compare.png with `save`."""
    vaes, steps = [], []
    for path in checkpoint:
        vae, content = load_autoencoder(path)
        vaes.append(vae)
        steps.append(content.get("step", "–"))
        if content.get("version") == VERSION:
            image_size = image_size or content["config"]["image_size"]
    image_size = image_size or 256
    for vae in vaes:
        Config(image_size=image_size, ch_mult=vae.widths["ch_mult"], device=device)  # or refuse
    device = launch(device)
    dataset = DeadLeaves(image_size, seed=-1, length=64)  # on which no run has trained
    if data:
        dataset = ImageFolder(data, image_size, train=False)
    perceptual, about = None, f"LPIPS-{perceptual_net}"
    try:
        perceptual = Perceptual(perceptual_net).to(device)
    except ImportError as error:
        about = f"LPIPS not measured, as {error}"
    columns = ("psnr", "ssim", "lpips", "sharpness", "kl_dim", "scaling_factor", "shift_factor")
    print(f"{len(dataset)} centre crops of {image_size} px, decoded means, {about}\n")
    print(f"| checkpoint | step | {' | '.join(columns)} |\n{'|---' * 9}|")
    for path, vae, step in zip(checkpoint, vaes, steps):
        measured = evaluate(vae.to(device), dataset, device, perceptual)
        cells = ["–" if measured[name] is None else f"{measured[name]:.4g}" for name in columns]
        print(f"| {path} | {step} | {' | '.join(cells)} |", flush=True)
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        save_grid(Path(save) / "compare.png", dataset, device, *vaes)


def main(argv=None, trainer=Trainer):
    """Run a command line -> exit status: 0 done, 1 a fault of the machine, 2 bad input,
    3 collapsed, 130 and 143 interrupted by SIGINT and SIGTERM."""
    try:
        flags = parse(argv)
        if flags.pop("command") == "eval":
            eval_command(**flags)
        else:
            train(Config.of(**flags), catch_signals(), trainer)
        return 0
    except SystemExit as error:  # of argparse, which has said all
        return error.code
    except (UsageError, ImportError) as error:
        status, text = 2, error
    except CollapseError as error:
        status, text = 3, error
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        status, text = 1, f"{type(error).__name__}: {error}"
    except RuntimeError as error:  # another rank has ended, or a CPU is out of memory
        if not re.search("by peer|can't allocate memory", str(error)):
            raise
        status, text = 1, error
    except KeyboardInterrupt as error:
        number, text = error.args or (signal.SIGINT, "interrupted")
        status = 128 + number
    if status == 1 or RANK == 0:
        tqdm.write(f"vaegan.py: {' '.join(str(text).split())[:600]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a λ or a file name that the terminal cannot show
    warnings.filterwarnings("ignore", module="torchvision")  # its words about lpips
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115, rank 0 speaks for all
    exit_status = main()
    if exit_status > 0 and RANK > 0:
        time.sleep(2)  # rank 0 speaks first, or torchrun ends it
    sys.stdout.flush()
    # sys.exit would wait for the workers of images, and aborted in 8 of 66 runs of two gloo ranks.
    os._exit(exit_status)
