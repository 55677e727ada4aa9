"""vaegan.py: train the autoencoder of Stable Diffusion (KL-VAE + PatchGAN), in one readable file.

    python vaegan.py train --data DIR                         a folder of images; again: continues
    torchrun --nproc-per-node 8 vaegan.py train --data DIR    the same on 8 GPUs
    python vaegan.py eval --checkpoint run/sd-DIR/best.pt --data DIR

For images x in [-1, 1] of N = 3·H·W values, z ~ q(z|x) = N(mean, std²), and x̂ = decode(z):

    autoencoder     L_G = L_rec + kl_weight·KL(q ‖ N(0, I))/N - w(t)·disc_weight·λ·E[D(x̂)]
    reconstruction  L_rec = |x - x̂| + perceptual_weight·LPIPS(x, x̂)      Rombach et al. 2022
    adaptive λ      λ = ‖∇L_rec‖ / (‖∇E[D(x̂)]‖ + ε)  at the last layer   Esser et al. 2021, eq. 7
    discriminator   L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]  Lim & Ye 2017
    warm-up         w(t) = 0 until L_rec has saturated, then a linear ramp to 1

This is latent-diffusion's objective divided by N: there the pixel term and LPIPS are summed over
the values of an image, here they are means. So kl_weight and disc_weight keep their published
meaning, λ does not grow with the image, and a gradient norm of 1 means the same at every size.
"""
import argparse, contextlib, copy, hashlib, io, itertools, json, math, os, re, signal, statistics
import sys, time, warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 2. Configuration: one dataclass is the flags, their help, and the record in each checkpoint.

class UsageError(ValueError):
    """Bad input, in one line that names the flag or file and the way out; the command exits with 2."""

def step_or_plateau(text):
    """Parse --disc-start."""
    return text if text == "plateau" else int(text)

def arg(group, default, help, least=0, choices=None, parse=None):
    """A field of Config that is also a flag: its group in --help, its text, its limits."""
    parse = parse or type(default)
    return field(default=default, metadata=dict(group=group, help=help, least=least, choices=choices,
                                                parse=parse))

# The defaults in Config are preset sd, which is kl-f8. Preset tiny learns in two minutes on a CPU.
TINY = dict(image_size=64, batch_size=4, workers=0, ch=16, ch_mult=(1, 2, 4), num_res_blocks=1,
            ndf=32, perceptual_weight=0.0, perceptual_net="squeeze", kl_weight=1e-2, disc_lead=50,
            disc_ramp=100, steps=1500, lr=1e-3, lr_disc=5e-4, ema=0.98, recompute=False,
            sample_every=100, save_every=100)
TEXTURES = ("hinge", "ns", "wgan-gp", "focal", "gram", "sobel", "none")

@dataclass(frozen=True)
class Config:
    """All that decides a run. Raises UsageError for values that cannot work."""
    data: str = arg("data", "", "folder of images, searched recursively; empty: dead leaves")
    val: str = arg("data", "", "folder of held-out images; empty: every 20th file of --data")
    image_size: int = arg("data", 256, "side of the square crops in pixels", least=24)
    batch_size: int = arg("data", 12, "images a batch, in each process", least=1)
    workers: int = arg("data", 8, "processes that load images; 0: the training process itself")
    ch: int = arg("model", 128, "channels of the first level", least=1)
    ch_mult: tuple = arg("model", (1, 2, 4, 4), "channels of each level / ch", least=1, parse=int)
    num_res_blocks: int = arg("model", 2, "residual blocks a level (decoder: one more)", least=1)
    z_channels: int = arg("model", 4, "channels of the latent", least=1)
    ndf: int = arg("model", 64, "channels of the discriminator's first layer", least=1)
    spectral: bool = arg("model", True, "spectral norm in the discriminator")
    init: str = arg("model", "", "start from this file: SD 1.x, 2.x, XL, 3, FLUX.1, or one of ours")
    freeze_encoder: bool = arg("model", False, "train the decoder alone; latents stay the same")
    pixel_loss: str = arg("losses", "l1", "pixel term, a mean over values", choices=("l1", "l2"))
    perceptual_weight: float = arg("losses", 1.0, "weight of LPIPS; 0: off")
    perceptual_net: str = arg("losses", "vgg", "trunk of LPIPS", choices=("vgg", "alex", "squeeze"))
    kl_weight: float = arg("losses", 1e-6, "weight of an image's KL divided by 3·H·W")
    texture: str = arg("losses", "hinge", "GAN, or a loss in its place", choices=TEXTURES)
    disc_weight: float = arg("losses", 0.5, "GAN's gradient / reconstruction's, at the last layer")
    adaptive: bool = arg("losses", True, "scale the GAN's gradient by λ, VQGAN eq. 7")
    r1: float = arg("losses", 0.0, "γ of the R1 penalty on D, every 16 steps; 10 is usual; 0: off")
    disc_start: object = arg("warm-up", "plateau", "step from which D trains; plateau: once L_rec has "
                             "saturated, by half of --steps; with --init 0", parse=step_or_plateau)
    disc_lead: int = arg("warm-up", 1000, "steps D trains before the decoder feels it")
    disc_ramp: int = arg("warm-up", 5000, "steps from no to full weight of the GAN")
    steps: int = arg("optimiser", 200_000, "updates of the autoencoder", least=10)
    lr: float = arg("optimiser", 1e-4, "learning rate (LDM: 4.5e-6 an image of the update)")
    lr_disc: float = arg("optimiser", 1e-4, "the discriminator's learning rate")
    clip: float = arg("optimiser", 1.0, "largest gradient norm of encoder, decoder and D; 0: any")
    ema: float = arg("optimiser", 0.999, "decay of the averaged weights that are saved; 0: off")
    accumulate: int = arg("optimiser", 1, "batches an update", least=1)
    seed: int = arg("optimiser", 0, "of weights, crops and noise")
    device: str = arg("machine", "auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = arg("machine", "auto", "of the networks; auto: bf16 or fp16 on a CUDA GPU, "
                         "else fp32", choices=("auto", "fp32", "bf16", "fp16"))
    recompute: bool = arg("machine", True, "half of the memory for a few percent of the time")
    preset: str = arg("run", "sd", "sd: kl-f8 at 256 px; tiny: two minutes on a CPU; auto: sd on a "
                      "CUDA GPU, else tiny", choices=("auto", "sd", "tiny"))
    out: str = arg("run", "", "folder of the run; empty: run/PRESET-NAME, with the name of --data")
    sample_every: int = arg("run", 1000, "steps between validations, each with a picture", least=10)
    save_every: int = arg("run", 1000, "steps between saves of last.pt", least=10)
    on_collapse: str = arg("run", "stop", "stop: with status 3, back to the last healthy save; warn: "
                           "say so and go on", choices=("stop", "warn"))

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # JSON has lists only
        for f in fields(self):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices and value not in choices:
                self.refuse(f.name, f"choose from {', '.join(choices)}")
            for number in value if f.name == "ch_mult" else [value]:
                if isinstance(number, (int, float)) and not least <= number < math.inf:
                    self.refuse(f.name, f"must be at least {least}")
        for name in ("steps", "sample_every", "save_every", "disc_start"):
            if getattr(self, name) != "plateau" and getattr(self, name) % 10:
                self.refuse(name, "must be a multiple of 10, as a record is made every 10 steps")
        factor = 2 ** (len(self.ch_mult) - 1)
        if self.image_size % factor:
            self.refuse("image_size", f"{len(self.ch_mult)} levels need a multiple of {factor}")
        if self.ema > 1:
            self.refuse("ema", "must be at most 1")
        if self.val and not self.data:
            self.refuse("val", "there is no --data that it is held out from; give that too")
        if self.freeze_encoder and not self.init:
            self.refuse("freeze_encoder", "a new encoder is not worth keeping; give --init FILE")
        if self.texture == "gram" and not self.perceptual_weight:
            self.refuse("texture", "compares features of LPIPS; give --perceptual-weight 1 too")

    def refuse(self, name, reason):
        raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: {reason}")

    @classmethod
    def of(cls, preset="auto", **flags):
        """A preset's values; over them the widths of the file --init; over them the flags."""
        if preset == "auto":
            preset = "sd" if torch.cuda.is_available() and flags.get("device") != "cpu" else "tiny"
        values = dict(TINY) if preset == "tiny" else {}
        widths = {}
        if flags.get("init"):
            widths = load_autoencoder(flags["init"])[0].widths
            values.update(widths, disc_start=0)  # a trained reconstruction has saturated
        cfg = cls(**{**values, **flags, "preset": preset})
        for name, width in widths.items():
            if getattr(cfg, name) != width:
                cfg.refuse(name, f"{cfg.init} has {width}; leave the flag out")
        return cfg

    @property
    def folder(self):
        """The run's folder; without --out, runs on other data get another one."""
        name = Path(self.data).resolve().name if self.data else "leaves"
        return Path(self.out or f"run/{self.preset}-{name}")

    @property
    def has_gan(self):
        """Whether a GAN, or what stands in its place, is ever to be felt."""
        return self.disc_weight > 0 and self.texture != "none"

# Sections 3 to 6 depend on torch and the standard library alone (Perceptual on lpips too): copy all
# of section 3, and of the others what you want, with what a docstring names under "Needs:".

# ---- 3. Autoencoder: kl-f8's computation, under CompVis' parameter names so that files open elsewhere.
# Source of all of it: CompVis latent-diffusion, ldm/modules/diffusionmodules/model.py.

class GroupNorm(nn.GroupNorm):
    """CompVis' 32 groups where 32 divides `channels`, else groups of at least four channels.
    (B, channels, H, W) -> the same, in fp32 under autocast too: bf16 would be slower on a CPU."""
    def __init__(self, channels):
        groups = 32 if channels % 32 == 0 else math.gcd(channels, max(channels // 4, 1))
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))

def norm_silu_conv(norm, conv, x, recompute=False):
    """conv(silu(norm(x))). recompute: norm and SiLU run again in the backward pass, to save memory.
    Autograd then keeps x alone. The convolution runs once: recomputation stops at its input."""
    if recompute:
        return checkpoint(norm_silu_conv, norm, conv, x, use_reentrant=False, preserve_rng_state=False)
    return conv(F.silu(norm(x)))

class ResnetBlock(nn.Module):
    """x + two times norm, SiLU, convolution. (B, c_in, H, W) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = norm_silu_conv(self.norm1, self.conv1, x, self.recompute)
        h = norm_silu_conv(self.norm2, self.conv2, h, self.recompute)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h

class AttnBlock(nn.Module):
    """x + single-head self-attention over all positions. (B, C, H, W) -> the same."""
    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = [conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)]
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H·W, C): one head
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))  # (B, C, H, W)

class Downsample(nn.Module):
    """Stride-2 convolution, with zeros at right and bottom. (B, C, H, W) -> (B, C, H/2, W/2)."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom

class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2H, 2W)."""
    def __init__(self, channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def double(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def forward(self, x):
        if self.recompute:  # as in norm_silu_conv
            return checkpoint(self.double, x, use_reentrant=False, preserve_rng_state=False)
        return self.double(x)

def residual_level(c_in, c_out, n, recompute):
    """n residual blocks, the first of which changes the width; a change of size may be added."""
    level = nn.Sequential()
    level.block = nn.Sequential(ResnetBlock(c_in, c_out, recompute))
    for _ in range(n - 1):
        level.block.append(ResnetBlock(c_out, c_out, recompute))
    return level

def middle(channels, recompute):
    """Block, attention, block, at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels, recompute),
                                     attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels, recompute)))

class Encoder(nn.Module):
    """Image to moments: (B, in_channels, H, W) -> (B, 2·z_channels, H/f, W/f), f = 2^(levels - 1)."""
    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, z_channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.Sequential()
        c = ch
        for i, mult in enumerate(ch_mult):
            self.down.append(residual_level(c, ch * mult, num_res_blocks, recompute))
            c = ch * mult
            if i < len(ch_mult) - 1:
                self.down[i].downsample = Downsample(c)
        self.mid = middle(c, recompute)
        self.norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, ch, H, W)
        h = self.mid(self.down(h))  # (B, ch·ch_mult[-1], H/f, W/f)
        return norm_silu_conv(self.norm_out, self.conv_out, h, self.recompute)

class Decoder(nn.Module):
    """Latent to image: (B, z_channels, h, w) -> (B, out_channels, h·f, w·f)."""
    def __init__(self, out_channels, ch, ch_mult, num_res_blocks, z_channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        c = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = middle(c, recompute)
        self.up = nn.ModuleList()  # up[0] is the finest level and runs last
        for i, mult in reversed(list(enumerate(ch_mult))):
            self.up.insert(0, residual_level(c, ch * mult, num_res_blocks + 1, recompute))
            c = ch * mult
            if i > 0:
                self.up[0].upsample = Upsample(c, recompute)
        self.norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))  # (B, ch·ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h)  # in the end (B, ch·ch_mult[0], h·f, w·f)
        return norm_silu_conv(self.norm_out, self.conv_out, h, self.recompute)

class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, std²), diagonal; logvar is clamped to [-30, 20] as in LDM.
    Source: Kingma & Welling 2014, appendix B. moments: (B, 2C, h, w), mean before logvar."""
    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """z = mean + std·ε, ε ~ N(0, I): (B, C, h, w), differentiable."""
        like = dict(device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, **like)

    def mode(self):
        """The mean: (B, C, h, w)."""
        return self.mean

    def kl(self):
        """KL(q ‖ N(0, I)) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

class AutoencoderKL(nn.Module):
    """The KL autoencoder; the defaults are kl-f8 of Stable Diffusion 1.x, of 83,653,863 parameters.
    Source: Rombach et al. 2022; CompVis ldm/models/autoencoder.py. x: (B, in_channels, H, W) in
    [-1, 1]; z: (B, z_channels, H/f, W/f); x_hat: as x, but unbounded. Posterior and x_hat have x's
    dtype, under autocast too. quant_conv=False: the layout of SD3 and FLUX.1. recompute: keep at most
    40 % of the activations, with the same gradients. Raises ValueError unless f divides H and W."""
    def __init__(self, in_channels=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4,
                 quant_conv=True, recompute=False):
        super().__init__()
        self.widths = dict(ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks,
                           z_channels=z_channels)
        self.encoder = Encoder(in_channels, **self.widths, recompute=recompute)
        self.decoder = Decoder(in_channels, **self.widths, recompute=recompute)
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if quant_conv:
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
            self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    @property
    def last_layer(self):
        """The weight at which λ compares two gradients: (in_channels, ch, 3, 3)."""
        return self.decoder.conv_out.weight

    def encode(self, x):
        factor = 2 ** (len(self.widths["ch_mult"]) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"image of {x.shape[-2]}×{x.shape[-1]}: {factor} must divide both")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)).to(x.dtype))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z)).to(z.dtype)

    def forward(self, x, sample=True, generator=None):
        """-> (x_hat, posterior). sample=False decodes the mean."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if sample else posterior.mode()
        return self.decode(z), posterior

# ---- 4. Discriminator: is this patch of 70×70 pixels from a photograph?

class PatchDiscriminator(nn.Module):
    """70×70 PatchGAN with spectral norm: one realness logit for each of many overlapping patches.
    Source: Isola et al. 2017, §6.1.2; layout and N(0, 0.02) weights of taming-transformers. Spectral
    norm (Miyato et al. 2018) replaces BatchNorm: D works at batch 1, treats real and fake alike, and
    its slope is bounded. Each forward in training mode does one power iteration. x: (B, in_channels,
    H, W) -> logits (B, 1, H/8 - 2, W/8 - 2) of x's dtype. Raises ValueError under 24 px."""
    def __init__(self, in_channels=3, ndf=64, n_layers=3, spectral=True):
        super().__init__()
        widths = [in_channels] + [ndf * min(2 ** i, 8) for i in range(n_layers + 1)] + [1]
        self.min_size = 3 * 2 ** n_layers
        self.convs = nn.ModuleList()
        for i in range(n_layers + 2):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride=2 if i < n_layers else 1, padding=1)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            self.convs.append(spectral_norm(conv) if spectral else conv)

    def forward(self, x):
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(f"image of {x.shape[-2]}×{x.shape[-1]}: D needs {self.min_size} px")
        h = x
        for i, conv in enumerate(self.convs):
            if i > 0:
                h = F.leaky_relu(h, 0.2)
            with torch.autocast(x.device.type, enabled=False):
                weight = conv.weight  # with its power iteration in fp32
            h = F.conv2d(h, weight, conv.bias, conv.stride, conv.padding)
        return h.to(x.dtype)

# ---- 5. Losses, and when the adversarial one comes on.

def hinge_d_loss(logits_real, logits_fake):
    """½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]: 1 if D tells nothing apart, 0 if it has won.
    Source: Lim & Ye 2017; ½ as in taming-transformers. Logits of any shape -> their mean."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())

def hinge_g_loss(logits_fake):
    """-E[D(x̂)], of either sign. Source: Lim & Ye 2017. Logits of any shape -> scalar."""
    return -logits_fake.mean()

def adaptive_weight(g_rec, g_adv, eps=1e-4, max_weight=math.inf):
    """λ = ‖g_rec‖ / (‖g_adv‖ + ε), at most max_weight: λ·g_adv is then as strong as g_rec.
    In a loop of your own, with W the weight of the decoder's last layer and g_loss = -D(x_hat).mean():

        g_rec, = torch.autograd.grad(rec_loss, W, retain_graph=True)
        g_adv, = torch.autograd.grad(g_loss, W, retain_graph=True)
        (rec_loss + 0.5 * adaptive_weight(g_rec, g_adv) * g_loss).backward()

    g_rec, g_adv: gradients of one shape -> scalar without a graph. Source: Esser et al. 2021, eq. 7,
    which has no bound; ε is latent-diffusion's, whose bound of 1e4 for losses that are summed over an
    image would be 1e4/N here: 0.05 at 256 px, which does bind."""
    return (g_rec.norm() / (g_adv.norm() + eps)).clamp(max=max_weight).detach()

def r1_penalty(logits_real, x):
    """E‖∇ₓ D(x)‖², D(x) being an image's sum of logits. L_D gets γ/2 of it: D stays flat around x.
    Source: Mescheder et al. 2018, eq. 9. logits_real: (B, …), computed from x: (B, 3, H, W), which
    requires grad -> scalar with a graph to D's weights."""
    gradient, = torch.autograd.grad(logits_real.sum(), x, create_graph=True)
    return gradient.pow(2).sum(dim=(1, 2, 3)).mean()

class Perceptual(nn.Module):
    """LPIPS, the distance of two images in the features of a trained network: frozen, in eval mode.
    Source: Zhang et al. 2018, eq. 1; trunk and linear heads of the `lpips` package. x, x_hat:
    (B, 3, H, W) in [-1, 1] -> (B,), with a gradient to x_hat alone. Under autocast the trunk runs in
    low precision, the distance in x's. Raises an error of lpips, torchvision or the network if the
    trunk's weights are neither on disk nor to be downloaded: never a random trunk."""
    def __init__(self, net="vgg"):
        super().__init__()
        import lpips
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about lpips
            self.lpips = lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # nothing wakes its dropout

    def features(self, x):
        """Of each layer, of unit length (without lpips' NaN gradient at 0): a list of (B, C, h, w)."""
        layers = self.lpips.net(self.lpips.scaling_layer(x))
        return [F.normalize(f.to(x.dtype), dim=1, eps=1e-10) for f in layers]

    def forward(self, x, x_hat):
        with torch.no_grad():
            real = self.features(x)
        distance = 0.0
        for head, a, b in zip(self.lpips.lins, real, self.features(x_hat)):
            with torch.autocast(x.device.type, enabled=False):
                distance = distance + head((a - b) ** 2).mean(dim=(1, 2, 3))
        return distance

class WarmUp:
    """When the GAN comes on.

        step       0 ........ T ........ T + lead ........ T + lead + ramp ........
        D trains       no         yes               yes                   yes
        w(t)           0           0           rises linearly to 1         1

    start: T, or "plateau": half a window apart, the median of the last `window` losses is compared with
    that of the window before. T is where it fell by less than `tolerance` at `patience` comparisons in
    a row, or the step `latest`. Noise hardly moves a median, still less three times in a row."""
    def __init__(self, start="plateau", lead=0, ramp=0, window=10, tolerance=0.03, patience=3,
                 latest=math.inf):
        self.start = None if start == "plateau" else start
        self.lead, self.ramp = lead, ramp
        self.window, self.tolerance = window, tolerance
        self.patience, self.latest = patience, latest
        self.losses, self.flat = [], 0  # flat: comparisons in a row without a fall

    def observe(self, rec_loss, step):
        """Feed the reconstruction loss after `step` steps, a number -> whether that decides T."""
        if self.start is not None:
            return False
        self.losses.append(rec_loss)
        if len(self.losses) == 2 * self.window:
            before = statistics.median(self.losses[:self.window])
            now = statistics.median(self.losses[self.window:])
            self.flat = self.flat + 1 if now > (1 - self.tolerance) * before else 0
            self.losses = self.losses[(self.window + 1) // 2:]
        if self.flat >= self.patience or step >= self.latest:
            self.start = step
        return self.start is not None

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
        return dict(start=self.start, losses=self.losses, flat=self.flat)

    def load_state_dict(self, state):
        if self.start is None:  # else the step given now counts
            self.__dict__.update(copy.deepcopy(state))

# ---- 6. Collapse: its signs, each a number with a limit, and the rule by which they stop a run.

def high_frequency_energy(x):
    """Spectral energy above half of Nyquist, a mean over all values: (B, C, H, W) -> (B,).
    A Hann window hides the jump from one border to the opposite one."""
    height, width = x.shape[-2:]
    like = dict(dtype=x.dtype, device=x.device)
    window = torch.outer(torch.hann_window(height, periodic=False, **like),
                         torch.hann_window(width, periodic=False, **like))
    spectrum = torch.view_as_real(torch.fft.fft2(x * window, norm="ortho"))
    cycles_a_pixel = torch.hypot(torch.fft.fftfreq(height, **like)[:, None],
                                 torch.fft.fftfreq(width, **like))
    return (spectrum.pow(2).sum(-1) * (cycles_a_pixel > 0.25)).mean(dim=(1, 2, 3))

@dataclass(eq=False)
class CollapseError(AssertionError):
    """Training has collapsed: when, by which sign, the likely cause, and the flags to change."""
    step: int
    sign: str
    value: float
    limit: float
    meaning: str
    cause: str
    remedy: str

    def __str__(self):
        return (f"collapse at step {self.step}: {self.sign}: {self.meaning}\n"
                f"  likely cause: {self.cause}\n  remedy: {self.remedy}")

class CollapseMonitor:
    """Notices, from a record every ten steps, that the training of a VAE-GAN goes wrong.

        monitor = CollapseMonitor()                     # or CollapseMonitor(rebound=3.0): other limits
        ...
        if step % 10 == 0:
            record = dict(l2=…, rec_loss=…, kl_dim=…, grad_ratio=…, grad_norm_dec=…)    # ten steps' means
            monitor.assert_healthy(step, record | monitor.look(x, x_hat))   # raises CollapseError

    A sign is up while its value exceeds its limit; one whose terms are missing is not. The rule: a run
    has collapsed when damage is up in two records running, or in one within five records of a cause,
    or when a term is not finite. Other signs stop nothing. Signs of the picture count once there has
    been one (correlation over ½), while the GAN dominates, or after `grace` records.
    Needs: CollapseError, high_frequency_energy."""
    TERMS = ("grad_ratio", "grad_norm_dec", "l2", "rec_loss", "kl_dim", "corr", "other_z",
             "saturation", "high_freq")
    CAUSES = ("domination", "spike")
    DAMAGE = ("rebound", "z_ignored", "noise", "kl_gone")
    OF_THE_PICTURE = ("z_ignored", "noise", "ringing")
    SIGNS = dict(  # sign: limit, what a value {} means, remedy
        domination=(3.0, "the GAN's gradient is {:.3g} times the reconstruction's at the last layer",
                    "--adaptive where it is off, else a smaller --disc-weight"),
        spike=(5.0, "the decoder's gradient norm is {:.3g} deviations above its usual",
               "a smaller --lr or --disc-weight; --adaptive where it is off; a longer --disc-ramp"),
        rebound=(2.5, "the reconstruction is {:.3g} dB worse than at its best",
                 "a smaller --lr; with a GAN a smaller --disc-weight or a longer --disc-ramp"),
        z_ignored=(0.95, "the error with an image's own z is {:.3g} of that with another image's",
                   "a smaller --disc-weight or --kl-weight"),
        noise=(0.75, "1 - correlation of reconstruction and image is {:.3g}",
               "a smaller --disc-weight or --lr"),
        kl_gone=(10.0, "the KL is {:.3g} times below its peak", "a smaller --kl-weight"),
        saturation=(0.1, "a share of {:.3g} of the values lies outside of [-1, 1]", "a smaller --lr"),
        ringing=(2.0, "x̂ has {:.3g} times the high frequencies of x", "a smaller --disc-weight"))

    def __init__(self, grace=100, **limits):
        if not limits.keys() <= self.SIGNS.keys():
            raise TypeError(f"signs are {', '.join(self.SIGNS)}; not {', '.join(limits)}")
        self.limits = {sign: limits.get(sign, row[0]) for sign, row in self.SIGNS.items()}
        self.grace = grace
        self.record = 0  # how many have been fed
        self.series = {term: [] for term in self.TERMS}  # their last 21 values
        self.best = dict(corr=0.0, kl_dim=0.03, l2=math.inf, rec_loss=math.inf)
        self.values, self.up = {}, []  # of the newest record: {sign: value}, signs that are up
        self.last_up = {}  # {sign: [record, value] when it was last up}

    @staticmethod
    @torch.no_grad()
    def look(x, x_hat):
        """Measure images and their reconstructions, (B, 3, H, W) -> 0-d tensors, without a sync.
        Where images are flat or alike, small constants, as in SSIM, keep that from being a sign."""
        x, x_hat = x.float(), x_hat.float()
        a = x - x.mean(dim=(0, 2, 3), keepdim=True)
        b = x_hat - x_hat.mean(dim=(0, 2, 3), keepdim=True)
        variance, flat = a.pow(2).mean(), 1e-3
        corr = (a * b).mean() / (variance * b.pow(2).mean()).sqrt().clamp(min=1e-12)
        energy = high_frequency_energy(x).mean().clamp(min=1e-12)
        terms = dict(corr=(corr * variance + flat) / (variance + flat),  # 1 where x is flat
                     saturation=(x_hat.abs() > 1).float().mean() - (x.abs() > 1).float().mean(),
                     high_freq=high_frequency_energy(x_hat).mean() / energy)
        if len(x) > 1:  # error with another image's z over that with its own
            side = max(min(x.shape[-2:]) // 16, 1)
            small, small_hat = F.avg_pool2d(x, side), F.avg_pool2d(x_hat, side)
            own = (small - small_hat).abs().mean()
            other = (small - small_hat.roll(1, 0)).abs().mean()
            terms["other_z"] = (other + 0.002) / (own + 0.001)
        return terms

    def assert_healthy(self, step, terms):
        """Feed the record of a step, {term: number or 0-d tensor}. Raises CollapseError."""
        terms = {name: float(value) for name, value in terms.items()}
        for name, value in terms.items():
            if not math.isfinite(value):
                raise CollapseError(step, "non_finite", value, math.inf, f"{name} is {value}",
                                    f"an overflow, all terms: {terms}", "a smaller --lr; --precision fp32")
        was_damaged = any(sign in self.up for sign in self.DAMAGE)
        self.record += 1
        self.values = {sign: value for sign, value in self.measure(terms).items() if value == value}
        self.up = [sign for sign, value in self.values.items() if value > self.limits[sign]]
        has_picture = self.best["corr"] > 0.5 or self.record >= self.grace
        if not has_picture and "domination" not in self.up:
            self.up = [sign for sign in self.up if sign not in self.OF_THE_PICTURE]
        for sign in self.up:
            self.last_up[sign] = [self.record, self.values[sign]]

        causes = [sign for sign in self.CAUSES if self.record - self.last_up.get(sign, [-9])[0] <= 5]
        damage = [sign for sign in self.DAMAGE if sign in self.up]
        if damage and (causes or was_damaged):
            sign, to_mend = damage[0], (causes + damage)[0]
            cause = self.describe(causes[0]) if causes else "no known one: a large --lr, other images?"
            raise CollapseError(step, sign, self.values[sign], self.limits[sign], self.describe(sign),
                                cause, self.SIGNS[to_mend][2])

    def measure(self, terms):
        """-> {sign: value}; nan, which exceeds no limit, where a term is missing."""
        for term in self.TERMS:
            self.series[term] = [*self.series[term], terms.get(term, math.nan)][-21:]
        kl_dim = self.series["kl_dim"][-1]  # nats a latent dimension
        self.best["kl_dim"] = max(self.best["kl_dim"], min(kl_dim, 1.0))
        self.best["corr"] = max(self.best["corr"], self.median("corr"))
        return dict(
            domination=self.series["grad_ratio"][-1],
            spike=self.deviations("grad_norm_dec"),
            rebound=min(self.rise("l2"), 2 * self.rise("rec_loss")),  # both: texture may cost PSNR
            z_ignored=1 / self.median("other_z"),
            noise=1 - self.median("corr"),
            kl_gone=self.best["kl_dim"] / max(kl_dim, 1e-12),
            saturation=self.median("saturation"),
            ringing=self.median("high_freq"))

    def median(self, term, last=3):
        """Of the last three records, so that one odd batch does not count."""
        return float(torch.tensor(self.series[term][-last:]).median())

    def rise(self, term):
        """dB of the last 2 records above the best 5 running, which is forgotten by 0.005 dB a record."""
        levels = 10 * torch.tensor(self.series[term][-5:]).clamp(min=1e-12).log10()
        if len(levels) < 5 or levels.isnan().any():
            return 0.0
        self.best[term] = min(self.best[term] + 0.005, float(levels.mean()))
        return float(levels[-2:].mean()) - self.best[term]

    def deviations(self, term):
        """Robust deviations of the logarithm above the 20 records before: what lasts becomes usual."""
        levels = torch.tensor(self.series[term]).clamp(min=1e-12).log()
        if len(levels) <= 5:
            return 0.0
        usual = levels[:-1].nanmedian()
        spread = 1.4826 * (levels[:-1] - usual).abs().nanmedian()
        return float((levels[-1] - usual) / spread.clamp(min=0.2))

    def describe(self, sign):
        return f"{self.SIGNS[sign][1].format(self.last_up[sign][1])} (limit {self.limits[sign]:g})"

    @property
    def alarm(self):
        """Whether a cause or damage is up."""
        return any(sign in self.up for sign in self.CAUSES + self.DAMAGE)

    def state_dict(self):
        names = ("record", "series", "best", "values", "up", "last_up")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state):
        self.__dict__.update(copy.deepcopy(state))

# ---- 7. Data: a folder of images, or dead leaves. Datasets give uint8; the device makes it [-1, 1].

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which is a program

def seed_of(*numbers):
    """A 63-bit seed of integers, so well mixed that (seed, step) and (seed, step + 1) share nothing."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

class ImageFolder(torch.utils.data.Dataset):
    """Square crops of all images in a folder and below: (3, size, size) uint8.
    train=True: item i, for any i >= 0, is of the i-th file of endless shuffled passes, cropped and
    flipped at random: a function of (seed, i). train=False: the centre of the i-th file by name.
    hold_out=n: every n-th file, from the first that can be decoded, is for train=False, the rest for
    train=True; 0: all are for both. Small images are enlarged. A file that cannot be decoded is
    reported once, and the next one stands in. Raises UsageError if none can.
    Needs: UsageError, FORMATS, seed_of, and the packages pillow and tqdm."""
    def __init__(self, root, size, train=True, seed=0, hold_out=0):
        self.root, self.size = root, size
        self.is_train, self.seed = train, seed
        kinds = Image.registered_extensions()
        self.files = []
        for folder, _, names in os.walk(root, followlinks=True):
            self.files += [os.path.join(folder, name) for name in names
                           if kinds.get(os.path.splitext(name)[1].lower()) in FORMATS]
        self.files.sort()
        self.epoch, self.order = None, None  # the newest shuffled pass
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # with workers
        first, _ = self.decodable(0)
        if hold_out and len(self.files) > 1:
            held_out = self.files[first::hold_out]
            rest = [file for file in self.files if file not in set(held_out)]
            self.files = rest if train else held_out
            self.decodable(0)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        if not self.is_train:
            return self.crop(self.decodable(range(len(self))[i])[1])  # IndexError past the end
        epoch, k = divmod(i, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator).tolist()
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, k))
        return self.crop(self.decodable(self.order[k])[1], generator)

    def decodable(self, k):
        """-> index and image of file k, or of the next one that can be decoded."""
        for index in itertools.chain(range(k, len(self)), range(k)):
            try:
                return index, self.decode(self.files[index])
            except Exception as error:  # decoders raise what they like
                if not self.broken[index]:
                    self.broken[index] = True
                    tqdm.write(f"skipped {self.files[index]!r}: {error}", file=sys.stderr)
        raise UsageError(f"{self.root}: no image here or below; give a folder that holds some")

    def decode(self, file):
        """-> an RGB image, upright; transparency becomes white."""
        with Image.open(file, formats=FORMATS) as image:
            image.draft("RGB", (2 * self.size, 2 * self.size))  # a large JPEG at 1/2, 1/4 or 1/8
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey; 257 = 65535/255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")

    def crop(self, image, generator=None):
        """A random square, perhaps flipped; without a generator the centre: (3, size, size) uint8."""
        side = min(self.size, *image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        if generator:
            x = int(torch.randint(image.width - side + 1, (), generator=generator))
            y = int(torch.randint(image.height - side + 1, (), generator=generator))
        box = (x, y, x + side, y + side)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.size, self.size, 3).permute(2, 0, 1)
        if generator and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(2)
        return pixels

class DeadLeaves(torch.utils.data.Dataset):
    """Occluding discs with a power-law size: images with edges at all scales, as photographs have.
    Source: Lee, Mumford & Huang 2001: radii ∝ r^-3 make the statistics scale-invariant. Each disc has
    a colour and a grating. Item i, for any i >= 0, is a function of (seed, i): (3, size, size) uint8.
    Needs: seed_of, and the package pillow."""
    def __init__(self, size, seed=0, length=100_000):
        self.size, self.seed, self.length = size, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(seed_of(self.seed, i))
        side = 2 * self.size  # drawn twice as large
        r_min, r_max = 6.0, side / 2
        area = 2 * math.pi * r_min ** 2 * math.log(r_max / r_min)  # of a disc, on average
        n = int(4 * (1.5 * side) ** 2 / area)  # four layers: e^-4 is uncovered
        u = torch.rand(9, n, generator=generator)
        r = (r_min ** -2 + u[0] * (r_max ** -2 - r_min ** -2)) ** -0.5  # pdf ∝ r^-3
        x, y = (u[1:3] * 1.5 - 0.25) * side  # some centres lie outside
        canvas = Image.new("I", (side, side))
        draw = ImageDraw.Draw(canvas)
        for leaf, box in enumerate(torch.stack([x - r, y - r, x + r, y + r], 1).tolist()):
            draw.ellipse(box, fill=leaf)
        leaf = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.int32)
        leaf = leaf.view(side, side).long()  # which disc is on top
        colour = 0.1 + 0.8 * u[3] + 0.3 * (u[3:6] - u[3])  # (3, n): grey with a tint
        frequency, angle = 2 * math.pi / (4 * 8 ** u[6]), 2 * math.pi * u[7]
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        phase = frequency[leaf] * (angle.cos()[leaf] * column + angle.sin()[leaf] * row)
        grating = 0.2 * u[8][leaf] ** 2 * phase.sin()  # (side, side)
        image = F.avg_pool2d(colour[:, leaf] + grating, 2)  # (3, size, size)
        return (image * 255).round().clamp(0, 255).to(torch.uint8)

def open_data(cfg):
    """-> training set, held-out set. Needs: ImageFolder, DeadLeaves."""
    if not cfg.data:
        leaves = DeadLeaves(cfg.image_size, cfg.seed)
        return leaves, DeadLeaves(cfg.image_size, cfg.seed + 1, length=64)
    hold_out = 0 if cfg.val else 20
    train_set = ImageFolder(cfg.data, cfg.image_size, True, cfg.seed, hold_out)
    return train_set, ImageFolder(cfg.val or cfg.data, cfg.image_size, False, cfg.seed, hold_out)

def to_model(images, device):
    """(B, 3, H, W) uint8 -> float in [-1, 1] on the device, in channels-last layout."""
    images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
    return images.float() / 127.5 - 1.0

# ---- 8. The training step: one forward and one backward of the autoencoder a batch.

def generator_step(vae, x, *, adversary=None, perceptual=None, pixel_loss="l1", perceptual_weight=1.0,
                   kl_weight=1e-6, weight=0.5, adaptive=True, autocast=contextlib.nullcontext,
                   scale=1.0, generator=None):
    """Accumulate the autoencoder's gradient of L_G -> x_hat, detached, and terms.
    Each loss is differentiated down to x̂ and no further; the sum of these image gradients goes through
    the autoencoder, once. By the chain rule that is the textbook's gradient, of two autograd.grad calls
    at the last layer for λ and a backward of the total loss.
    x: (B, 3, H, W) in [-1, 1]. vae: may be wrapped in DistributedDataParallel. adversary(x, image) ->
    scalar: -E[D(image)], or another loss in its place. weight: w(t)·disc_weight; 0 leaves it out.
    autocast(): the networks' context; losses, norms and λ are of x's dtype. scale: factor of all
    gradients, a float or 0-d tensor (fp16's scale, 1/accumulate). generator: of the noise in z.
    terms: 0-d tensors, means over the batch before weighting: l1, l2, lpips, rec_loss, kl (nats an
    image), kl_dim (nats a latent dimension); with an adversary g_loss, lam (λ), w (weight·λ, or weight),
    grad_ratio (w·‖∇adv‖/‖∇rec‖). D's own gradients stay as they are.
    Needs: adaptive_weight, average_over_ranks."""
    N = x[0].numel()
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
    image_grad, = torch.autograd.grad(scale * rec_loss, image)
    terms = dict(l1=l1, l2=l2, lpips=lpips, rec_loss=rec_loss, kl=kl,
                 kl_dim=kl / posterior.mean[0].numel())

    # λ = ‖∇L_rec‖ / (‖∇L_adv‖ + ε) at the last layer: both image gradients through one convolution.
    if adversary is not None and weight > 0:
        with autocast():
            adv_loss = adversary(x, image)
        adv_grad, = torch.autograd.grad(scale * adv_loss, image)
        rec_last, = torch.autograd.grad(x_hat, last_layer, image_grad, retain_graph=True)
        adv_last, = torch.autograd.grad(x_hat, last_layer, adv_grad, retain_graph=True)
        rec_last, adv_last = average_over_ranks(torch.stack([rec_last, adv_last]) / scale)
        lam = adaptive_weight(rec_last, adv_last)
        w = weight * lam if adaptive else torch.full_like(lam, weight)
        image_grad = image_grad + w * adv_grad
        terms.update(g_loss=adv_loss, lam=lam, w=w, grad_ratio=w * adv_last.norm() / rec_last.norm())

    # One backward of the autoencoder in one call: with two, ranks would average after the first.
    outputs, gradients = [x_hat], [image_grad]
    if kl.requires_grad:  # not with a frozen encoder
        outputs.append(kl_weight * kl / N)
        gradients.append(scale * torch.ones_like(kl))
    torch.autograd.backward(outputs, gradients)
    return x_hat.detach(), {name: value.detach() for name, value in terms.items()}

def discriminator_step(disc, x, x_hat, *, loss=hinge_d_loss, penalty=None, r1=0.0,
                       autocast=contextlib.nullcontext, scale=1.0):
    """Accumulate D's gradient of L_D, on the images that generator_step has just seen and made -> terms.
    x, x_hat: (B, 3, H, W). loss(logits of x, logits of x̂) -> scalar. penalty(x, x_hat) -> scalar with a
    graph to D's weights, in fp32. r1: γ of R1; where it is not 0 the step runs in fp32. scale: factor of
    all gradients. terms: 0-d tensors d_loss, logits_real, logits_fake, d_acc (the share of patches that
    D judges rightly). The autoencoder gets no gradient. Needs: r1_penalty."""
    # L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))] + γ/2 E‖∇D(x)‖²
    x, x_hat = x.detach().requires_grad_(r1 > 0), x_hat.detach()
    with contextlib.nullcontext() if r1 > 0 else autocast():
        real, fake = disc(torch.cat([x, x_hat])).chunk(2)  # one batch: no batch statistics
    d_loss = loss(real, fake)
    total = d_loss
    if r1 > 0:
        total = total + r1 / 2 * r1_penalty(real, x)
    if penalty is not None:
        total = total + penalty(x, x_hat)
    (scale * total).backward()
    d_acc = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    terms = dict(d_loss=d_loss, logits_real=real.mean(), logits_fake=fake.mean(), d_acc=d_acc)
    return {name: value.detach() for name, value in terms.items()}

# ---- 9. Training: what a run holds, and the loop.

class Trainer:
    """All that a run holds. Each rank has one: they start equal (same seed) and stay equal (averaged
    gradients). Rank 0 alone writes, and the others wait for it. Needs: all of the file."""
    def __init__(self, cfg, device, rank=0, world=1):
        self.cfg, self.folder = cfg, cfg.folder
        self.device, self.rank, self.world = device, rank, world
        self.train_set, val_set = open_data(cfg)
        self.val_set = torch.utils.data.Subset(val_set, range(0, len(val_set), len(val_set) // 256 + 1))
        self.step, self.drawn = 0, 0  # updates done; images drawn for them, by all ranks
        self.best, self.latents = -math.inf, dict(scaling_factor=None, shift_factor=None)
        self.unread, self.clock = [], time.perf_counter()  # terms since the last record, its time
        self.alarmed = False  # whether a cause or damage has been up since last.pt

        layout = dict(device=device, memory_format=torch.channels_last)
        self.perceptual = None
        if cfg.perceptual_weight:
            self.perceptual = load_perceptual(cfg.perceptual_net).to(**layout)
        torch.manual_seed(cfg.seed)
        if cfg.init:
            self.vae, _ = load_autoencoder(cfg.init, cfg.recompute)
        else:
            self.vae = AutoencoderKL(3, cfg.ch, cfg.ch_mult, cfg.num_res_blocks, cfg.z_channels,
                                     recompute=cfg.recompute)
        self.vae.to(**layout)
        self.average = copy.deepcopy(self.vae)  # what is shown, measured and saved
        self.vae.encoder.requires_grad_(not cfg.freeze_encoder)
        self.vae.quant_conv.requires_grad_(not cfg.freeze_encoder)
        wgan = cfg.texture == "wgan-gp"  # its penalty bounds D instead of spectral norm
        self.disc = PatchDiscriminator(3, cfg.ndf, spectral=cfg.spectral and not wgan).to(**layout)
        self.d_loss = {"hinge": hinge_d_loss, "ns": non_saturating_d_loss,
                       "wgan-gp": wasserstein_d_loss}.get(cfg.texture)
        self.noise = torch.Generator(device)

        encoder = [*self.vae.encoder.parameters(), *self.vae.quant_conv.parameters()]
        decoder = [*self.vae.post_quant_conv.parameters(), *self.vae.decoder.parameters()]
        groups = [dict(name="enc", params=encoder, full_lr=cfg.lr),
                  dict(name="dec", params=decoder, full_lr=cfg.lr),
                  dict(name="disc", params=list(self.disc.parameters()), full_lr=cfg.lr_disc)]
        self.optimiser = torch.optim.Adam(groups, betas=(0.5, 0.9), fused=device.type != "mps")
        self.dtype = choose_dtype(cfg.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.warm_up = WarmUp(cfg.disc_start, cfg.disc_lead, cfg.disc_ramp, max(cfg.steps // 200, 5),
                              latest=cfg.steps // 2)  # window: a twentieth of the run
        self.monitor = CollapseMonitor()
        self.parts = dict(vae=self.vae, disc=self.disc, optimiser=self.optimiser, scaler=self.scaler,
                          warm_up=self.warm_up, monitor=self.monitor)
        self.vae_ddp, self.disc_ddp = self.vae, self.disc
        if world > 1:
            self.vae_ddp = DistributedDataParallel(self.vae, gradient_as_bucket_view=True)
            self.disc_ddp = DistributedDataParallel(self.disc, gradient_as_bucket_view=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def adversary(self, x, x_hat):
        """The loss that brings texture: -E[D(x̂)], or a road not taken."""
        texture = self.cfg.texture
        if texture in ("focal", "sobel"):
            return {"focal": focal_frequency_loss, "sobel": sobel_loss}[texture](x, x_hat).mean()
        if texture == "gram":
            return gram_loss(self.perceptual.features(x), self.perceptual.features(x_hat)).mean()
        if texture == "ns":
            return non_saturating_g_loss(self.disc(x_hat))
        return hinge_g_loss(self.disc(x_hat))

    def penalty(self, x, x_hat):
        return 10 * gradient_penalty(self.disc, x, x_hat, self.noise)  # 10: Gulrajani et al. 2017, §4

    def batches(self):
        """This rank's batches, from the image on that comes next: (B, 3, H, W) uint8, without an end."""
        size = self.cfg.batch_size
        starts = itertools.count(self.drawn + self.rank * size, self.world * size)
        yield from torch.utils.data.DataLoader(
            self.train_set, batch_sampler=(range(start, start + size) for start in starts),
            num_workers=self.cfg.workers, worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda")

    def update(self, batches):
        """One update of the autoencoder, and of D once it trains, from cfg.accumulate batches."""
        cfg, step = self.cfg, self.step
        trains_disc = cfg.has_gan and self.d_loss and self.warm_up.trains_disc(step)
        self.optimiser.zero_grad()
        self.noise.manual_seed(seed_of(cfg.seed, step, self.rank))
        scale = self.scaler.scale(torch.ones((), device=self.device)) / cfg.accumulate
        for k in range(cfg.accumulate):
            x = to_model(next(batches), self.device)
            for net in (self.vae_ddp, self.disc_ddp):  # ranks average once an update
                net.require_backward_grad_sync = k + 1 == cfg.accumulate
            x_hat, terms = generator_step(
                self.vae_ddp, x, adversary=self.adversary if cfg.has_gan else None,
                perceptual=self.perceptual, pixel_loss=cfg.pixel_loss,
                perceptual_weight=cfg.perceptual_weight, kl_weight=cfg.kl_weight,
                weight=cfg.disc_weight * self.warm_up.weight(step), adaptive=cfg.adaptive,
                autocast=self.autocast, scale=scale, generator=self.noise)
            if trains_disc:
                terms |= discriminator_step(
                    self.disc_ddp, x, x_hat, loss=self.d_loss, autocast=self.autocast, scale=scale,
                    penalty=self.penalty if cfg.texture == "wgan-gp" else None,
                    r1=16 * cfg.r1 if step % 16 == 0 else 0.0)  # lazy: Karras et al. 2020, §3.1
            self.unread.append(terms)

        self.scaler.unscale_(self.optimiser)
        for group in self.optimiser.param_groups:
            if group["params"][0].grad is not None:  # else a frozen encoder, or D before it trains
                norm = clip_grad_norm_(group["params"], cfg.clip or math.inf)
                self.unread.append({f"grad_norm_{group['name']}": norm})
        self.scaler.step(self.optimiser)
        self.scaler.update()
        average = get_ema_multi_avg_fn(cfg.ema if step > 0 else 0.0)  # the first update copies
        average(list(self.average.parameters()), list(self.vae.parameters()), None)
        self.step += 1
        self.drawn += self.world * cfg.batch_size * cfg.accumulate
        if self.step % 10 == 0:
            self.unread.append(self.monitor.look(x, x_hat))

    def read_record(self, signals):
        """-> the means of ten steps over all ranks, in one transfer; the signal that any of them got.
        What an fp16 overflow does: the scaler has skipped the step and halved its scale, so what that
        step says of gradients is left out. With a scale below 1 it stays in, and stops the run."""
        names = [name for terms in self.unread for name in terms]
        values = [value.float() for terms in self.unread for value in terms.values()]
        values = average_over_ranks(torch.stack(values)).tolist()
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        series = {}
        for name, value in zip(names, values):
            of_gradients = name in ("lam", "w") or name.startswith("grad_")
            if math.isfinite(value) or not (may_skip and of_gradients):
                series.setdefault(name, []).append(value)
        self.unread = []
        record = {name: statistics.fmean(values) for name, values in series.items()}
        images = 10 * self.world * self.cfg.batch_size * self.cfg.accumulate
        record.update(lr=self.cfg.lr, images_per_s=images / (time.perf_counter() - self.clock))
        return dict(step=self.step, **record), max_over_ranks(signals[0][0] if signals else 0)

    def due(self, every):
        return self.step % every == 0 or self.step == self.cfg.steps

    @property
    def gan_comes_on(self):
        """Whether the ten steps after this record are the first with w > 0."""
        return self.warm_up.weight(self.step - 1) == 0 < self.warm_up.weight(self.step + 9)

    def validate(self):
        """Measure the averaged weights, draw a picture, keep the best -> the val_ terms of the log."""
        record = {}
        if self.rank == 0:
            measured = evaluate(self.average, self.val_set, self.device, self.perceptual,
                                self.cfg.batch_size)
            self.latents = {name: measured[name] for name in self.latents}
            for name in ("psnr", "ssim", "lpips", "sharpness"):
                if measured[name] is not None:
                    record[f"val_{name}"] = measured[name]
            self.draw(self.folder / f"samples/{self.step:07d}.png", self.average)
            score = -record.get("val_lpips", -record["val_psnr"])
            if self.cfg.has_gan and self.warm_up.weight(self.step - 1) < 1:
                score -= 1e6  # no blurred image stays the best
            if score > self.best:
                self.best = score
                self.write(self.folder / "best.pt")
        max_over_ranks()
        return record

    @torch.no_grad()
    def draw(self, path, *nets):
        """Up to eight held-out images, below them what each autoencoder makes of them."""
        some = [self.val_set[i] for i in range(min(8, len(self.val_set)))]
        x = to_model(torch.stack(some), self.device)
        save_grid([x] + [vae(x, sample=False)[0] for vae in nets], path)

    def append(self, record):
        """Write a record to log.jsonl."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        self.clock = time.perf_counter()

    def save(self):
        """Write last.pt. healthy.pt becomes the save before it if no cause or damage was up since; at the
        start, and at the last record before the GAN is felt, it becomes this one."""
        last, healthy = self.folder / "last.pt", self.folder / "healthy.pt"
        if self.rank == 0:
            if last.exists() and not self.alarmed:
                write_whole(healthy, last.read_bytes())
            self.write(last)
            if self.step == 0 or self.gan_comes_on and not self.monitor.alarm:
                write_whole(healthy, last.read_bytes())
        self.alarmed = False
        max_over_ranks()

    def report_collapse(self, error):
        """Write collapse.json and collapse.png (rows: image, healthy, now); go back to healthy.pt."""
        if self.rank == 0:
            report = dict(asdict(error), signs=self.monitor.values, limits=self.monitor.limits)
            write_whole(self.folder / "collapse.json", json.dumps(report, indent=1).encode())
            checkpoint = read_file(self.folder / "healthy.pt")
            healthy = copy.deepcopy(self.vae)
            healthy.load_state_dict(checkpoint["training"]["vae"])
            self.draw(self.folder / "collapse.png", healthy, self.vae)  # the average would lag behind
            write_whole(self.folder / "last.pt", (self.folder / "healthy.pt").read_bytes())
            cut_log(self.folder / "log.jsonl", checkpoint["step"])
            self.say(f"{self.folder}: collapse.png and collapse.json show it; the same command, with the "
                     f"flags of the remedy, goes on from step {checkpoint['step']}")
        max_over_ranks()

    def state_dict(self):
        """What a checkpoint holds; its `state_dict`, the averaged weights, opens in diffusers."""
        training = {name: part.state_dict() for name, part in self.parts.items()}
        return dict(state_dict=self.average.state_dict(), config=asdict(self.cfg), step=self.step,
                    **self.latents, training=dict(training, drawn=self.drawn, best=self.best))

    def write(self, path):
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        write_whole(path, buffer.getbuffer())

    def load_state_dict(self, checkpoint):
        """Continue from what state_dict gave. A D that has not trained yet may be of another kind."""
        training = checkpoint["training"]
        start = training["warm_up"]["start"]
        if start is None or start >= checkpoint["step"]:
            training["disc"] = None
        for name, part in self.parts.items():
            if training[name]:  # the scaler's is empty in fp32
                part.load_state_dict(training[name])
        self.average.load_state_dict(checkpoint["state_dict"])
        self.step, self.drawn, self.best = checkpoint["step"], training["drawn"], training["best"]
        self.latents = {name: checkpoint[name] for name in self.latents}

    def begin_or_continue(self):
        """Go on from last.pt, or where there is none from healthy.pt; else begin the folder."""
        saves = [path for path in (self.folder / "last.pt", self.folder / "healthy.pt") if path.exists()]
        if saves:
            try:
                self.load_state_dict(read_file(saves[0]))
            except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
                raise UsageError(f"{saves[0]}: {one_line(error)}; take the flags that it was trained with "
                                 "or another --out, or move it away: then healthy.pt is taken") from None
            self.say(f"{self.folder}: continues after step {self.step} of {self.cfg.steps}")
        max_over_ranks()  # all have read before one writes
        if self.rank == 0:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            cut_log(self.folder / "log.jsonl", self.step)
            write_whole(self.folder / "config.json", json.dumps(asdict(self.cfg), indent=1).encode())
        if not saves:
            self.save()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

def train(cfg):
    """Train as cfg says, alone or as one of torchrun's processes; the same cfg again continues.
    Raises UsageError before anything is written; CollapseError after a report; OSError where a file
    cannot be written; KeyboardInterrupt(number of the signal, text) after a save. Needs: all of the file."""
    device, rank, world = launch(cfg.device)
    run = Trainer(cfg, device, rank, world)
    run.begin_or_continue()
    warned = False
    with caught_signals(rank) as signals, contextlib.closing(run.batches()) as batches, \
            tqdm(total=cfg.steps, initial=run.step, disable=rank > 0, dynamic_ncols=True) as bar:
        while run.step < cfg.steps:
            run.update(batches)
            bar.update()
            if run.step % 10:
                continue  # below: the only place that waits for the device

            record, stop = run.read_record(signals)
            if cfg.has_gan and run.warm_up.observe(record["rec_loss"], run.step):
                record["event"] = "the reconstruction loss has saturated: D starts to train"
            try:
                run.monitor.assert_healthy(run.step, record)
            except CollapseError as error:
                if cfg.on_collapse == "stop" or error.sign == "non_finite":
                    run.report_collapse(error)
                    raise
                if not warned:
                    record["event"] = str(error)
                warned = True
            run.alarmed |= run.monitor.alarm

            if run.due(cfg.sample_every):
                record |= run.validate()
            run.append(record)  # before the save, or a kill could lose it
            if run.due(cfg.save_every) or run.gan_comes_on or stop:
                run.save()
            if stop and run.step < cfg.steps:
                raise KeyboardInterrupt(stop, f"interrupted; {run.folder}/last.pt holds step {run.step}, "
                                        "the same command goes on")
            if "event" in record:
                run.say(f"step {run.step}: {record['event']}")
            shown = [name for name in ("l1", "lpips", "kl_dim", "d_acc", "grad_ratio") if name in record]
            bar.set_postfix({name: f"{record[name]:.3g}" for name in shown})
    run.say(f"{run.folder}: {run.step} steps done; a larger --steps goes on from here")

# ---- 10. Processes, files, pictures.

def launch(kind):
    """Of a device's kind, or auto -> device, rank, number of processes; joins torchrun's others.
    Needs: UsageError."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if kind == "auto":
        kind = [name for name in available if available[name]][0]
    if not available[kind]:
        raise UsageError(f"--device {kind}: there is none on this machine; take --device auto")
    device = torch.device(kind)
    if kind == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay the same
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device, 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                            timeout=timedelta(minutes=30))
    return device, dist.get_rank(), dist.get_world_size()

def choose_dtype(precision, device):
    """Of autocast; None for fp32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)

def average_over_ranks(tensor):
    """The mean over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor

def max_over_ranks(number=0):
    """Wait for all processes (torchrun would end rank 0 in its write) -> the largest of their integers."""
    largest = torch.tensor(number)  # on the CPU: by gloo
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)

@contextlib.contextmanager
def caught_signals(rank):
    """-> a list that gets (number, time) of each SIGINT and SIGTERM. One that comes a second later ends
    the process; not before, for torchrun and the cluster may both send the first."""
    caught = []

    def catch(number, frame):
        caught.append((number, time.monotonic()))
        if caught[-1][1] - caught[0][1] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if rank == 0:  # print is not for handlers
            os.write(2, b"\nvaegan.py: saves within ten steps and stops; once more: stops at once\n")

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def ignore_signals(worker):
    """For a process that loads images: the one that trains decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def one_line(error):
    """An error's text, at most 300 characters of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

def load_perceptual(net):
    """Perceptual(net), or UsageError with the way out. Needs: Perceptual, UsageError, one_line."""
    try:
        return Perceptual(net)
    except Exception as error:  # no package, no network, a torn file, …
        raise UsageError(f"--perceptual-net {net}: {one_line(error)}; its ImageNet weights are downloaded "
                         f"or belong in {torch.hub.get_dir()}/checkpoints; else take another net, or "
                         "--perceptual-weight 0") from None

def write_whole(path, content):
    """Write bytes beside, flush them to the disk, rename: there is never half a file."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)

def cut_log(path, step):
    """Keep the whole records of log.jsonl up to a step."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"}\n")]
    write_whole(path, b"".join(line for line in whole if json.loads(line)["step"] <= step))

def save_grid(rows, path):
    """Write rows of images, each (n, 3, H, W) in [-1, 1], as one PNG."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, rows·H, n·W)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    write_whole(path, buffer.getbuffer())

def read_file(path):
    """-> what a .safetensors file, or one of torch.save, holds: tensors and plain values, never code.
    Raises UsageError. Needs: UsageError, one_line."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever stands in the file
        raise UsageError(f"{path} cannot be read ({one_line(error)}); give another file, or move it away; "
                         ".safetensors take `pip install safetensors`") from None

DIFFUSERS = (  # what stands in diffusers' names, and in CompVis'
    (r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.(to_out\.0|proj_attn)", "attn_1.proj_out"),
    (r"attn_1\.(to_)?([qkv])(uery|ey|alue)?\.", r"attn_1.\2."),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"), (r"conv_norm_out", "norm_out"),
    (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_shortcut", "nin_shortcut"))

def compvis_weights(weights):
    """{name: tensor} in CompVis' or diffusers' names, bare or below first_stage_model. or vae. -> the
    autoencoder's, in CompVis' names. Needs: DIFFUSERS."""
    for prefix in ("first_stage_model.", "vae."):
        if prefix + "decoder.conv_in.weight" in weights:
            weights = {name.removeprefix(prefix): weight for name, weight in weights.items()
                       if name.startswith(prefix)}
    ups = [name for name in weights if re.fullmatch(r"decoder\.up_blocks\.\d\.resnets\.0\.conv1\.bias", name)]
    result = {}
    for name, weight in weights.items():
        for pattern, replacement in DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if ups and name.startswith("decoder.up."):  # which diffusers counts from the coarsest
            level = len(ups) - 1 - int(name.split(".")[2])
            name = re.sub(r"up\.\d", f"up.{level}", name)
        if ".attn_1." in name and weight.dim() == 2:
            weight = weight[:, :, None, None]  # a linear layer as a 1×1 convolution
        if name.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            result[name] = weight
    return result

def load_autoencoder(path, recompute=False):
    """-> the AutoencoderKL in a file, of the widths found there, and all that the file holds.
    Raises UsageError that says what is missing, unknown or misshapen. Needs: read_file, compvis_weights."""
    content = read_file(path)
    try:
        weights = content.get("state_dict", content)
        if "bn.running_mean" in weights:
            raise ValueError("FLUX.2's, which is of another kind")
        weights = compvis_weights(weights)
        ch, blocks = len(weights["encoder.conv_in.weight"]), "encoder.down.{}.block.{}.conv1.weight"
        mult, n = [], 0
        while blocks.format(len(mult), 0) in weights:
            mult.append(len(weights[blocks.format(len(mult), 0)]) // ch)
        while blocks.format(0, n) in weights:
            n += 1
        vae = AutoencoderKL(3, ch, mult, n, weights["decoder.conv_in.weight"].shape[1],
                            "quant_conv.weight" in weights, recompute)
        vae.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no KL autoencoder ({one_line(error)}); give Stable Diffusion's, "
                         "or a checkpoint of vaegan.py") from None
    return vae, content

# ---- 11. Measures, of images in [-1, 1]: one number an image, (B,).

def psnr(x, x_hat):
    """10·log10(1/MSE) in dB, of images scaled to [0, 1]; 100 dB if equal."""
    return -10 * torch.log10(((x - x_hat) / 2).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10))

def ssim(x, x_hat):
    """Structural similarity, 1 if equal: the mean over channels and whole windows, in fp32.
    Source: Wang et al. 2004, eq. 13: Gaussian window of 11 px, σ 1.5, K 0.01, 0.03, range 1."""
    x, y = (x.contiguous().float() + 1) / 2, (x_hat.contiguous().float() + 1) / 2  # no TF32
    taps = torch.exp(-torch.arange(-5, 6, device=x.device) ** 2 / (2 * 1.5 ** 2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    images = torch.stack([x, y, x * x, y * y, x * y])
    blurred = F.conv2d(images.flatten(0, 1), window, groups=x.shape[1]).unflatten(0, images.shape[:2])
    mx, my, xx, yy, xy = blurred
    similarity = (2 * mx * my + 0.01 ** 2) / (mx * mx + my * my + 0.01 ** 2)
    similarity *= (2 * (xy - mx * my) + 0.03 ** 2) / (xx - mx * mx + yy - my * my + 0.03 ** 2)
    return similarity.mean(dim=(1, 2, 3))

@torch.no_grad()
def evaluate(vae, dataset, device="cpu", perceptual=None, batch_size=8):
    """Measure a dataset of uint8 images, reconstructed from the posteriors' means and clamped -> dict:
    images, how many; psnr (dB), ssim, lpips (None without `perceptual`): means; sharpness, the
    high-frequency energy of all x̂ over that of all x; kl_dim, nats a latent dimension; of samples z
    scaling_factor, 1/std, and shift_factor, the mean, over all values (Rombach et al. 2022, appendix G).
    Needs: to_model, psnr, ssim, high_frequency_energy."""
    noise, rows = torch.Generator(device).manual_seed(0), []
    for images in torch.utils.data.DataLoader(dataset, batch_size):
        x = to_model(images, device)
        posterior = vae.encode(x)
        x_hat = vae.decode(posterior.mode()).clamp(-1, 1)
        z = posterior.sample(noise).flatten(1)
        row = dict(psnr=psnr(x, x_hat), ssim=ssim(x, x_hat), kl_dim=posterior.kl() / z.shape[1],
                   energy=high_frequency_energy(x), energy_hat=high_frequency_energy(x_hat),
                   z=z.mean(1), z_square=z.pow(2).mean(1))
        if perceptual is not None:
            row["lpips"] = perceptual(x, x_hat)
        rows.append(row)
    mean = {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}
    std = math.sqrt(max(mean["z_square"] - mean["z"] ** 2, 1e-20))
    return dict(images=len(dataset), psnr=mean["psnr"], ssim=mean["ssim"], lpips=mean.get("lpips"),
                sharpness=mean["energy_hat"] / mean["energy"], kl_dim=mean["kl_dim"],
                scaling_factor=1 / std, shift_factor=mean["z"])

# ---- 12. Roads not taken: what was not chosen for texture.

def non_saturating_d_loss(logits_real, logits_fake):
    """½ E[softplus(-D(x))] + ½ E[softplus(D(x̂))]: ln 2 if D tells nothing apart, 0 if it has won.
    Source: Goodfellow et al. 2014, eq. 1. Logits of any shape -> their mean."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())

def non_saturating_g_loss(logits_fake):
    """E[softplus(-D(x̂))]. Source: Goodfellow et al. 2014, §3. Logits of any shape -> scalar."""
    return F.softplus(-logits_fake).mean()

def wasserstein_d_loss(logits_real, logits_fake):
    """E[D(x̂)] - E[D(x)], beside gradient_penalty; the decoder's loss is hinge_g_loss.
    Source: Gulrajani et al. 2017, eq. 3. Logits of any shape -> scalar."""
    return logits_fake.mean() - logits_real.mean()

def gradient_penalty(disc, x, x_hat, generator=None):
    """E(‖∇D(x̃)‖ - 1)² at random x̃ between x and x̂, D(x̃) being an image's mean logit; L_D gets 10 of it.
    Source: Gulrajani et al. 2017, eq. 3. x, x_hat: (B, 3, H, W) -> scalar with a graph to D's weights."""
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    between = (u * x + (1 - u) * x_hat).detach().requires_grad_()
    logits = disc(between).flatten(1).mean(1)
    gradient, = torch.autograd.grad(logits.sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()

def focal_frequency_loss(x, x_hat, alpha=1.0):
    """Mean of w·|F(x) - F(x̂)|² over frequencies: the worse reconstructed, the larger its weight
    w = |F(x) - F(x̂)|^alpha over its maximum, a constant; F: a channel's orthonormal Fourier transform.
    Source: Jiang et al. 2021, eq. 8 and 9. x, x_hat: (B, C, H, W) -> (B,)."""
    square = torch.view_as_real(torch.fft.fft2(x - x_hat, norm="ortho")).pow(2).sum(-1)
    w = square.detach() ** (alpha / 2)  # (B, C, H, W)
    w = w / w.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (w * square).mean(dim=(1, 2, 3))

def gram_loss(features, features_hat):
    """Σ over layers of ‖G - Ĝ‖², G = f·fᵀ/(h·w): which features come together, wherever they are.
    Source: Gatys et al. 2016, eq. 3 to 5, for features of unit length. Lists of (B, C, h, w) -> (B,)."""
    loss = 0.0
    for f, f_hat in zip(features, features_hat):
        f, f_hat = f.flatten(2), f_hat.flatten(2)  # (B, C, h·w)
        difference = (f @ f.transpose(1, 2) - f_hat @ f_hat.transpose(1, 2)) / f.shape[2]
        loss = loss + difference.pow(2).sum(dim=(1, 2))
    return loss

def sobel_loss(x, x_hat):
    """Mean |S(x) - S(x̂)| over Sobel's two derivatives; that of a ramp is its slope.
    Source: Sobel & Feldman 1968. x, x_hat: (B, C, H, W) -> (B,)."""
    d = x - x_hat
    rows = (d[:, :, :-2] + 2 * d[:, :, 1:-1] + d[:, :, 2:]) / 4  # smooth one way, differentiate
    columns = (d[..., :-2] + 2 * d[..., 1:-1] + d[..., 2:]) / 4  # the other way
    along = (rows[..., 2:] - rows[..., :-2]).abs() / 2
    across = (columns[:, :, 2:] - columns[:, :, :-2]).abs() / 2
    return (along + across).mean(dim=(1, 2, 3)) / 2

# ---- 13. The command line.

class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line."""
    def error(self, message):
        raise UsageError(message)

def parse(argv):
    """-> {"command": …, flag: value}; of train's flags those that are given."""
    parser = Parser(prog="vaegan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="train on a folder of images; again: continue",
                              argument_default=argparse.SUPPRESS, allow_abbrev=False)
    names = dict.fromkeys(f.metadata["group"] for f in fields(Config))
    groups = {name: sub.add_argument_group(name) for name in names}
    for f in fields(Config):
        default = f"{f.default}; tiny: {TINY[f.name]}" if f.name in TINY else f.default
        options = dict(help=f"{f.metadata['help']} (default: {default})")
        if isinstance(f.default, bool):
            options.update(action=argparse.BooleanOptionalAction)
        else:
            options.update(type=f.metadata["parse"], choices=f.metadata["choices"])
        if f.name == "ch_mult":
            options.update(nargs="+")
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), **options)
    sub = commands.add_parser("eval", help="measure autoencoders on a folder of images", allow_abbrev=False)
    sub.add_argument("--checkpoint", required=True, nargs="+", help="last.pt, best.pt, or what --init takes")
    sub.add_argument("--data", default="", help="folder of images; none: dead leaves")
    sub.add_argument("--image-size", type=int, default=0, help="side of the crops; 0: as trained, else 256")
    sub.add_argument("--perceptual-net", default="alex", choices=("vgg", "alex", "squeeze"))
    sub.add_argument("--save", default="", help="folder for compare.png and a folder of PNGs each")
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return vars(parser.parse_args(argv))

def eval_command(checkpoint, data, image_size, perceptual_net, save, device):
    """Print a table of what evaluate gives, a row a checkpoint; with `save` also draw."""
    device, _, _ = launch(device)
    files = [load_autoencoder(path) for path in checkpoint]
    size = image_size or files[0][1].get("config", {}).get("image_size", 256)
    dataset = ImageFolder(data, size, train=False) if data else DeadLeaves(size, 1, length=64)
    perceptual = None
    try:
        perceptual = load_perceptual(perceptual_net).to(device)
    except UsageError as error:
        print(f"LPIPS is not measured: {error}", file=sys.stderr)
    print(f"{len(dataset)} centre crops of {size} px, decoded means, LPIPS-{perceptual_net}\n\n| checkpoint | "
          "step | PSNR, dB | SSIM | LPIPS ↓ | sharpness | KL a dimension | scale | shift |\n" + "|---" * 9 + "|")
    for path, (vae, content) in zip(checkpoint, files):
        m = evaluate(vae.to(device), dataset, device, perceptual)
        lpips = "not measured" if m["lpips"] is None else f"{m['lpips']:.3f}"
        print(f"| {path} | {content.get('step', '–')} | {m['psnr']:.2f} | {m['ssim']:.3f} | {lpips} | "
              f"{m['sharpness']:.3f} | {m['kl_dim']:.2f} | {m['scaling_factor']:.5f} | "
              f"{m['shift_factor']:.4f} |")

def main(argv=None):
    """Run a command line -> exit status: 0 done, 1 a fault of the machine, 2 bad input, 3 collapsed,
    130 and 143 interrupted by SIGINT and SIGTERM."""
    try:
        flags = parse(argv)
        if flags.pop("command") == "eval":
            eval_command(**flags)
        else:
            train(Config.of(flags.pop("preset", "auto"), **flags))
        return 0
    except UsageError as error:
        status, text = 2, error
    except CollapseError as error:
        status, text = 3, error
    except (OSError, torch.OutOfMemoryError) as error:
        status, text = 1, one_line(error)
    except KeyboardInterrupt as error:
        number, text = error.args or (signal.SIGINT, "interrupted")
        status = 128 + number
    if status == 1 or int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"vaegan.py: {text}", file=sys.stderr)
    return status

if __name__ == "__main__":
    exit_status = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Two gloo ranks with DDP and sys.exit aborted in 8 of 66 runs, in 0 of 22 with os._exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
