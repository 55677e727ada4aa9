"""vaegan.py: train the autoencoder of Stable Diffusion (KL-VAE + PatchGAN) in one readable file.

    python vaegan.py train --data DIR                         a folder of images; again: continues
    torchrun --nproc-per-node 8 vaegan.py train --data DIR    the same on 8 GPUs
    python vaegan.py eval --checkpoint run/sd-DIR/best.pt --data DIR
    python vaegan.py ablate --preset tiny --data DIR          what each loss and safeguard is worth

For images x in [-1, 1] of N = 3·H·W values, with z ~ q(z|x) = N(mean, std²) and x̂ = decode(z):

    autoencoder     L_G = L_rec + kl_weight·KL(q ‖ N(0, I))/N - w(t)·disc_weight·λ·E[D(x̂)]
    reconstruction  L_rec = |x - x̂| + perceptual_weight·LPIPS(x, x̂)      Rombach et al. 2022
    adaptive λ      λ = ‖∇L_rec‖ / (‖∇E[D(x̂)]‖ + ε)  at the last layer   Esser et al. 2021, eq. 7
    discriminator   L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]  Lim & Ye 2017
    warm-up         w(t) = 0 until L_rec has saturated, then a linear ramp to 1

This is latent-diffusion's objective divided by N: there the pixel term and LPIPS are summed over the
values of an image, here they are means. So kl_weight, disc_weight and ε keep their published meaning,
λ does not grow with the image, and a gradient norm of 1 means the same at every size.

Sections: configuration, autoencoder, discriminator, losses, collapse, data, step and loop, plumbing,
measures, what an update costs, roads not taken, command line.
Every class and function runs when cut out with what its docstring names under "Needs:".
"""

import argparse, contextlib, copy, functools, hashlib, itertools, json, math, os, platform, re
import shlex, shutil, signal, statistics, sys, threading, time, warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ---- Configuration: one dataclass is the command line, its help, and the record in every checkpoint.


class UsageError(ValueError):
    """Bad input in one line: the flag or file, its value, the way out. The command exits with 2."""


class RunError(Exception):
    """What ends a run from outside, a full disk for one, in one line with the way out. It exits with 1."""


def arg(group, default, help, tiny=None, least=0, most=math.inf, parse=None, choices=None):
    """A field of Config that is also a flag. default: preset sd's value; tiny: the other's, if it differs."""
    if default != "":
        help += f" (default: {default})" if tiny is None else f" (sd: {default}, tiny: {tiny})"
    return field(default=default, metadata=dict(group=group, help=help, tiny=tiny, least=least, most=most,
                                                parse=parse or type(default), choices=choices))


def flag_of(name):
    """The flag of a field of Config. Needs: nothing."""
    return "--" + name.replace("_", "-")


def step_or_plateau(text):
    """Parse --disc-start."""
    return text if text == "plateau" else int(text)


@dataclass(frozen=True)
class Config:
    """All that decides a run; the defaults are preset sd, latent-diffusion's kl-f8 (autoencoder_kl_32x32x4).

    Raises UsageError for values that cannot work. Needs: UsageError, arg, flag_of, step_or_plateau, released.
    """
    data: str = arg("data", "", "folder of images, searched recursively; empty: built-in dead leaves")
    val: str = arg("data", "", "folder of held-out images; empty: every 20th file of --data is held out")
    image_size: int = arg("data", 256, "side of the square crops in pixels", tiny=64, least=24)
    batch_size: int = arg("data", 12, "images a batch, in each process", tiny=4, least=1)
    workers: int = arg("data", 8, "processes that load images; 0: the training process itself", tiny=0)

    ch: int = arg("model", 128, "channels of the first level", tiny=16, least=1)
    ch_mult: tuple = arg("model", (1, 2, 4, 4), "channels of each level / ch", (1, 2, 4), least=1, parse=int)
    num_res_blocks: int = arg("model", 2, "residual blocks a level (the decoder: one more)", tiny=1, least=1)
    z_channels: int = arg("model", 4, "channels of the latent", least=1)
    init: str = arg("model", "", "start from the autoencoder in this file, whatever its widths: of Stable "
                    "Diffusion 1.x, 2.x or XL, as .safetensors or .ckpt, diffusers' too, or a save of ours")
    freeze_encoder: bool = arg("model", False, "train the decoder alone: latents stay what they are, so "
                               "diffusion models go on fitting, and a step takes a fifth less arithmetic")
    learn_logvar: bool = arg("model", False, "train on L_rec/exp(s) + s, a likelihood with the learned log "
                             "variance s, instead of L_rec")
    ndf: int = arg("model", 64, "channels of the discriminator's first layer", tiny=32, least=1)

    pixel_loss: str = arg("losses", "l1", "pixel term, a mean over all values", choices=("l1", "l2"))
    perceptual_weight: float = arg("losses", 1.0, "weight of LPIPS; 0: off", tiny=0.0)
    perceptual_net: str = arg("losses", "vgg", "trunk of LPIPS", tiny="squeeze",
                              choices=("vgg", "alex", "squeeze"))
    kl_weight: float = arg("losses", 1e-6, "weight of the KL (of an image, divided by 3·H·W)", tiny=1e-2)
    gan: str = arg("losses", "hinge", "the GAN: hinge, ns (non-saturating), or wgan-gp (without spectral "
                   "norm; D takes twice as long)", choices=("hinge", "ns", "wgan-gp"))
    disc_weight: float = arg("losses", 0.5, "GAN's gradient / reconstruction's, at the last layer; 0: no GAN")
    adaptive: bool = arg("losses", True, "scale the GAN's gradient by λ, VQGAN eq. 7")
    r1: float = arg("losses", 0.0, "γ of the R1 penalty on D, every 16 steps; 10 is usual; 0: off")

    disc_start: object = arg("warm-up", "plateau", "where D starts to train: a step, or plateau: once the "
                             "reconstruction loss has saturated, after half of --steps at the latest; with "
                             "--init 0, for then it has", parse=step_or_plateau)
    disc_lead: int = arg("warm-up", 1000, "steps D trains before the decoder feels it", tiny=50)
    disc_ramp: int = arg("warm-up", 5000, "steps from no to full weight of the GAN", tiny=100)

    steps: int = arg("optimiser", 200_000, "updates of the autoencoder", tiny=1500, least=1)
    lr: float = arg("optimiser", 1e-4, "learning rate (LDM: 4.5e-6 an image of the update)", tiny=1e-3)
    lr_disc: float = arg("optimiser", 1e-4, "the discriminator's learning rate", tiny=5e-4)
    lr_warmup: int = arg("optimiser", 1000, "steps from 0 to the full learning rate; 0: off", tiny=20)
    clip: float = arg("optimiser", 1.0, "largest gradient norm of encoder, of decoder and of D; 0: off")
    ema: float = arg("optimiser", 0.999, "decay of the averaged weights that are saved; 0: off", 0.98, most=1)
    accumulate: int = arg("optimiser", 1, "batches an update", least=1)
    seed: int = arg("optimiser", 0, "of weights, crops and noise", most=2 ** 63)

    device: str = arg("machine", "auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = arg("machine", "auto", "of the networks; losses and λ stay fp32. auto: fp32, on a CUDA "
                         "GPU bf16 or else fp16", choices=("auto", "fp32", "bf16", "fp16"))
    recompute: bool = arg("machine", True, "normalise and activate once more in the backward pass instead of "
                          "keeping the results: less than half of the activations' memory", tiny=False)
    compile: bool = arg("machine", False, "torch.compile the networks: a minute or more at the start; needs "
                        "Triton on a GPU, a C++ compiler on a CPU")

    preset: str = arg("run", "sd", "sd: kl-f8 at 256 px; tiny: a toy that learns in two minutes on a CPU; "
                      "auto: sd on a CUDA GPU, else tiny", choices=("auto", "sd", "tiny"))
    out: str = arg("run", "", "folder of the run; empty: run/PRESET-NAME, with the name of the --data folder")
    resume: bool = arg("run", True, "continue from last.pt in --out; with --no-resume, start anew over it")
    log_every: int = arg("run", 50, "steps between records of log.jsonl", tiny=10, least=1)
    sample_every: int = arg("run", 1000, "steps between validations, each with a picture", tiny=100, least=1)
    save_every: int = arg("run", 1000, "steps between saves of last.pt; one that fails, on a full disk, ends "
                          "the run with status 1 and leaves the one before as it was", tiny=100, least=1)
    on_collapse: str = arg("run", "stop", "stop: with status 3 and a report, back to the last healthy save; "
                           "rollback: on from there, first without GAN, then at half its weight over "
                           "twice the ramp, at most three times; warn: say so and go on",
                           choices=("stop", "rollback", "warn"))

    def __post_init__(self):
        name = Path(self.data).resolve().name if self.data else "leaves"    # no run continues another's data
        object.__setattr__(self, "out", self.out or f"run/{self.preset}-{name}")
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))            # JSON knows lists only
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            numbers = value if f.name == "ch_mult" else [value] * isinstance(value, (int, float))
            if not all(least <= number <= most for number in numbers):
                raise UsageError(f"{flag_of(f.name)} {value}: must be at least {least}"
                                 + (f" and at most {most}" if most < math.inf else ""))
        if self.val and not self.data:
            raise UsageError(f"--val {self.val}: there is no --data it could be held out from; give that too")
        factor = 2 ** (len(self.ch_mult) - 1)
        if self.image_size % factor:
            raise UsageError(f"--image-size {self.image_size}: {len(self.ch_mult)} levels need a multiple of "
                             f"{factor}; take {-(-self.image_size // factor) * factor}")

    @classmethod
    def of(cls, preset, **flags):
        """The values of a preset, over them what the file --init demands, over them explicit flags."""
        tiny = {f.name: f.metadata["tiny"] for f in fields(cls) if f.metadata["tiny"] is not None}
        widths = released(flags["init"])[1] if flags.get("init") else {}
        start = dict(widths, disc_start=0) if widths else {}
        cfg = cls(**{**(tiny if preset == "tiny" else {}), **start, **flags, "preset": preset})
        for name, width in widths.items():
            if getattr(cfg, name) != width:
                raise UsageError(f"{flag_of(name)} {getattr(cfg, name)}: {cfg.init} has {width}; leave the "
                                 "flag out")
        return cfg


# ---- Autoencoder: kl-f8's computation under CompVis' parameter names, so that its files open elsewhere.
# Source of all of it: CompVis latent-diffusion, ldm/modules/diffusionmodules/model.py.


class GroupNorm(nn.GroupNorm):
    """GroupNorm(32, eps 1e-6), CompVis' own wherever `channels` is a multiple of 32; other widths get as many
    groups as leave at least four channels in each, which is what kl-f8 has at 128.

    Always in its weight's precision, fp32, as autocast has it on a GPU: on a CPU its backward pass in bf16
    takes four times as long. (B, channels, H, W) -> the same. Needs: nothing.
    """
    def __init__(self, channels):
        most = 32 if channels % 32 == 0 else max(channels // 4, 1)
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def recomputed(module, f, x):
    """f(x). Where module.recompute is true, autograd keeps nothing of it but x: on the way back f runs again,
    until all is there that its gradient needs. Of a convolution that is the input, so it is not repeated; a
    compiler has to be told.

    Source: Chen et al. 2016, as torch.utils.checkpoint has it. Needs: nothing.
    """
    if not (getattr(module, "recompute", False)
            and (x.requires_grad or any(p.requires_grad for p in module.parameters()))):    # else frozen
        return f(x)
    told = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False,
                      context_fn=told if torch.compiler.is_compiling() else noop_context_fn)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); where the width changes, x goes through a 1×1 convolution.

    (B, c_in, H, W) -> (B, c_out, H, W). Needs: GroupNorm, recomputed.
    """
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = recomputed(self, lambda x: self.conv1(F.silu(self.norm1(x))), x)
        h = recomputed(self, lambda h: self.conv2(F.silu(self.norm2(h))), h)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + single-head self-attention over all H·W positions. (B, C, H, W) -> the same. Needs: GroupNorm."""
    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                         # (B, 1, H·W, C), scale C^-½
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))  # (B, C, H, W)


class Downsample(nn.Sequential):
    """Stride-2 convolution, zeros at right and bottom. (B, C, H, W) -> (B, C, H/2, W/2). Needs: nothing."""
    def __init__(self, channels):
        conv = nn.Conv2d(channels, channels, 3, stride=2)
        super().__init__(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))    # left, right, top, bottom


class Upsample(nn.Sequential):
    """Nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2H, 2W). Needs: recomputed."""
    def __init__(self, channels):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(OrderedDict(up=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv))

    def forward(self, x):
        return recomputed(self, super().forward, x)


def level(c_in, c, n, **then):
    """n residual blocks, the first of which changes the width, then whatever else. Needs: ResnetBlock."""
    block = nn.Sequential(*(ResnetBlock(c if i else c_in, c) for i in range(n)))
    return nn.Sequential(OrderedDict(block=block, **then))


def middle(c):
    """Block, attention, block, at the lowest resolution. Needs: ResnetBlock, AttnBlock."""
    block = ResnetBlock
    return nn.Sequential(OrderedDict(block_1=block(c, c), attn_1=AttnBlock(c), block_2=block(c, c)))


class Encoder(nn.Module):
    """Image to moments: (B, in_channels, H, W) -> (B, 2·z_channels, H/f, W/f), f = 2^(len(ch_mult) - 1).

    Needs: Downsample, level, middle, GroupNorm, recomputed and what those need.
    """
    def __init__(self, in_channels=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4):
        super().__init__()
        widths = [ch] + [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.Sequential()
        for c_in, c in zip(widths, widths[1:]):
            halve = dict(downsample=Downsample(c)) if len(self.down) < len(ch_mult) - 1 else {}
            self.down.append(level(c_in, c, num_res_blocks, **halve))
        self.mid = middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                     # (B, ch, H, W)
        h = self.mid(self.down(h))                              # (B, ch·ch_mult[-1], H/f, W/f)
        return recomputed(self, lambda h: self.conv_out(F.silu(self.norm_out(h))), h)   # (B, 2·z_channels, …)


class Decoder(nn.Module):
    """Latent to image: (B, z_channels, h, w) -> (B, out_channels, h·f, w·f).

    One block a level more than Encoder. Needs: Upsample, level, middle, GroupNorm, recomputed and what those
    need.
    """
    def __init__(self, out_channels=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4):
        super().__init__()
        widths = [ch * mult for mult in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()                               # up[0] is the finest level and runs last
        for c, c_in in zip(widths, widths[1:]):
            double = dict(upsample=Upsample(c)) if len(self.up) else {}
            self.up.append(level(c_in, c, num_res_blocks + 1, **double))
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def body(self, z):
        """All but the last layer, at which λ is taken."""
        h = self.mid(self.conv_in(z))                           # (B, ch·ch_mult[-1], h, w)
        for up in reversed(self.up):
            h = up(h)                                           # (B, ch·ch_mult[0], h·f, w·f) after the last
        return recomputed(self, lambda h: F.silu(self.norm_out(h)), h)      # (B, ch, h·f, w·f)

    def forward(self, z):
        return self.conv_out(self.body(z))                      # (B, out_channels, h·f, w·f)


class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, std²), diagonal; logvar is clamped to [-30, 20] as in LDM.

    Source: Kingma & Welling 2014, appendix B. moments: (B, 2C, h, w), mean before logvar. Needs: nothing.
    """
    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)             # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """z = mean + std·ε, ε ~ N(0, I): (B, C, h, w), differentiable."""
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.std * noise

    def mode(self):
        """The mean: (B, C, h, w)."""
        return self.mean

    def kl(self):
        """KL(q ‖ N(0, I)) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The KL autoencoder; the defaults are kl-f8 of Stable Diffusion 1.x with its 83,653,863 parameters.

    Source: Rombach et al. 2022; CompVis ldm/models/autoencoder.py. x: (B, in_channels, H, W) in [-1, 1],
    z: (B, embed_dim, H/f, W/f), x_hat: as x but unbounded. Posterior and x_hat are of x's dtype, under
    autocast too. recompute: keep 2.7 times fewer activations for the backward pass, all but the convolutions'
    outputs, at 1 to 6 % of its time in fp32; the gradients are the same. Raises ValueError unless f divides
    H and W.
    Needs: Encoder, Decoder, DiagonalGaussian and what those need.
    """
    def __init__(self, in_channels=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4,
                 embed_dim=4, recompute=False):
        super().__init__()
        self.encoder = Encoder(in_channels, ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(in_channels, ch, ch_mult, num_res_blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.factor = 2 ** (len(ch_mult) - 1)
        for module in self.modules():
            module.recompute = recompute

    @property
    def last_layer(self):
        """The weight at which λ compares the two gradients: (in_channels, ch, 3, 3)."""
        return self.decoder.conv_out.weight

    def encode(self, x):
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"image of {x.shape[-2]}×{x.shape[-1]}: {self.factor} must divide both sides")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)).to(x.dtype))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z)).to(z.dtype)

    def forward(self, x, sample=True, generator=None):
        """-> (x_hat, posterior). sample=False decodes the mean."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator) if sample else posterior.mode()), posterior


# ---- Discriminator: is this patch of 70×70 pixels from a photograph?


class PatchDiscriminator(nn.Module):
    """70×70 PatchGAN with spectral norm: one realness logit for each of many overlapping patches.

    Source: Isola et al. 2017, §6.1.2; layout and N(0, 0.02) weights of taming-transformers. Spectral norm
    (Miyato et al. 2018) replaces BatchNorm: D works at batch 1, treats real and fake alike, and its slope is
    bounded. Each forward in training mode does one power iteration. spectral=False: the weights as they are.
    x: (B, in_channels, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2) of x's dtype, under autocast too. Raises
    ValueError under 24 px. Needs: nothing.
    """
    def __init__(self, in_channels=3, ndf=64, n_layers=3, spectral=True):
        super().__init__()
        self.spectral = spectral
        widths = [in_channels] + [ndf * min(2 ** i, 8) for i in range(n_layers + 1)] + [1]
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, 4, stride=2 if i < n_layers else 1, padding=1)
                                   for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])))
        for conv in self.convs:
            nn.init.normal_(conv.weight, 0.0, 0.02)
            spectral_norm(conv)
        self.min_size = 3 * 2 ** n_layers

    def forward(self, x):
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(f"image of {x.shape[-2]}×{x.shape[-1]}: D needs at least {self.min_size} px")
        h = x
        for i, conv in enumerate(self.convs):
            h = F.leaky_relu(h, 0.2) if i else h
            with torch.autocast(x.device.type, enabled=False):  # W/σ(W), its power iteration in fp32
                weight = conv.weight if self.spectral else conv.parametrizations.weight.original
            h = F.conv2d(h, weight, conv.bias, conv.stride, conv.padding)
        return h.to(x.dtype)


# ---- Losses, and when the adversarial one comes on.


def hinge_d_loss(logits_real, logits_fake):
    """½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]: 1.0 if D tells nothing apart, 0.0 if it has won.

    Source: Lim & Ye 2017; ½ as in taming-transformers. Logits of any shape -> their mean. Needs: nothing.
    """
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_g_loss(logits_fake):
    """-E[D(x̂)], of either sign. Source: Lim & Ye 2017. Logits of any shape -> scalar. Needs: nothing."""
    return -logits_fake.mean()


def adaptive_weight(g_rec, g_adv, eps=1e-4, max_weight=1e4):
    """λ = ‖g_rec‖ / (‖g_adv‖ + ε), at most max_weight: with λ·g_adv both gradients are equally strong.

    In a loop of your own, with W the weight of the decoder's last layer and g_loss = -D(x_hat).mean():

        g_rec, g_adv = (torch.autograd.grad(loss, W, retain_graph=True)[0] for loss in (rec_loss, g_loss))
        lam = adaptive_weight(g_rec, g_adv, eps=1e-4 / x[0].numel())        # of losses that are means
        (rec_loss + 0.5 * lam * g_loss).backward()

    generator_step does the same with one backward pass. Source: Esser et al. 2021, eq. 7. ε and the bound are
    latent-diffusion's, whose loss is a sum over the N values of an image; for a mean ε is 1e-4/N. g_rec,
    g_adv: gradients of one shape -> scalar without a graph. Needs: nothing.
    """
    return (g_rec.norm() / (g_adv.norm() + eps)).clamp(max=max_weight).detach()


def r1_penalty(logits_real, x):
    """E‖∇ₓ D(x)‖², D(x) being an image's sum of logits. L_D gets γ/2 of it: D stays flat around real images.

    Source: Mescheder et al. 2018, eq. 9. logits_real: (B, …), computed from x: (B, 3, H, W), which requires
    grad -> scalar with a graph to D's weights. Needs: nothing.
    """
    gradient, = torch.autograd.grad(logits_real.sum(), x, create_graph=True)
    return gradient.pow(2).sum(dim=(1, 2, 3)).mean()


class Perceptual(nn.Module):
    """LPIPS, the distance of two images in the features of a trained network: frozen, always in eval mode.

    Source: Zhang et al. 2018, eq. 1; trunk and linear heads of the `lpips` package, version 0.1. x, x_hat:
    (B, 3, H, W) in [-1, 1] -> (B,), with a gradient to x_hat alone. Under autocast the trunk runs in low
    precision, the distance in x's. F.normalize stands for the package's square root, whose gradient is NaN
    where all features are 0.
    Raises UsageError if the trunk's weights are neither on disk nor downloadable: never a random trunk.
    Needs: UsageError, the package lpips.
    """
    def __init__(self, net="vgg"):
        super().__init__()
        file = dict(vgg="vgg16-397923af.pth", alex="alexnet-owt-7be5be79.pth",          # torchvision's names
                    squeeze="squeezenet1_1-b8a52dc0.pth")[net]
        try:
            import lpips
            with warnings.catch_warnings():                     # lpips calls torchvision in an old way
                warnings.simplefilter("ignore")
                self.lpips = lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()
        except Exception as error:                              # no package, no network, a torn file ...
            raise UsageError(
                f"LPIPS net {net}: {' '.join(str(error).split())}; it needs `pip install lpips` and the file "
                f"{os.path.join(torch.hub.get_dir(), 'checkpoints', file)}: put it there, or take another "
                "--perceptual-net, or --perceptual-weight 0") from None

    def train(self, mode=True):
        return super().train(False)                             # nothing may wake its dropout

    def features(self, x):
        features = self.lpips.net(self.lpips.scaling_layer(x))
        return [F.normalize(f.to(x.dtype), dim=1, eps=1e-10) for f in features]

    def forward(self, x, x_hat):
        with torch.no_grad():
            real = self.features(x)
        layers = zip(self.lpips.lins, real, self.features(x_hat))
        with torch.autocast(x.device.type, enabled=False):
            return sum(lin((a - b) ** 2).mean(dim=(1, 2, 3)) for lin, a, b in layers)


class WarmUp:
    """When the GAN comes on.

        step       0 ........ T ........ T + lead ........ T + lead + ramp ........
        D trains       no         yes               yes                   yes
        w(t)           0           0           rises linearly to 1         1

    start: T, or "plateau": every half window, the median loss of the last `window` steps is compared with
    that of the window before; T is where it fell by less than `tolerance` at `patience` comparisons in a row,
    between the steps `least` and `most`. The noise of batches hardly moves a median, still less three in a
    row, and while the loss falls each window beats the one before. After n restarts w(t) rises to 2^-n over
    2^n·ramp steps. Needs: nothing.
    """
    def __init__(self, start="plateau", lead=0, ramp=0, window=100, tolerance=0.03, patience=3, least=0,
                 most=math.inf):
        self.start, self.reason = (None, "") if start == "plateau" else (start, "as asked for")
        self.lead, self.ramp, self.window, self.least, self.most = lead, ramp, window, least, most
        self.tolerance, self.patience, self.losses, self.flat = tolerance, patience, [], 0
        self.restarts = 0

    def observe(self, rec_loss, step):
        """Feed the reconstruction loss of `step`, a number or 0-d tensor -> True if that decides T."""
        if self.start is not None:
            return False
        self.losses.append(rec_loss)                            # a tensor is read at the next comparison
        if len(self.losses) >= 2 * self.window:
            losses = [float(loss) for loss in self.losses[-2 * self.window:]]
            old, new = (sorted(losses[i:i + self.window])[self.window // 2] for i in (0, self.window))
            self.losses = losses[(self.window + 1) // 2:]
            self.flat = self.flat + 1 if new > (1 - self.tolerance) * old else 0
            if self.flat >= self.patience and step + 1 >= self.least:
                self.start = step + 1
                self.reason = (f"the median loss of {self.window} steps fell by {1 - new / old:.1%}, and "
                               f"{self.flat} times in a row by less than {self.tolerance:.0%}")
        if self.start is None and step + 1 >= self.most:
            self.start, self.reason = step + 1, "this is the latest step for it"
        return self.start is not None

    def restart(self, step, restarts):
        """After a collapse: no GAN until there is a new plateau, within four windows from `step` on."""
        self.start, self.losses, self.flat = None, [], 0
        self.restarts, self.most = restarts, step + 4 * self.window

    @property
    def top(self):
        return 0.5 ** self.restarts

    def trains_disc(self, step):
        return self.start is not None and step >= self.start

    def weight(self, step):
        """w(t) in [0, top]."""
        since, ramp = step - self.start - self.lead if self.trains_disc(step) else -1, self.ramp / self.top
        return 0.0 if since < 0 else self.top * (min(since / ramp, 1.0) if ramp else 1.0)

    def state_dict(self):
        return dict(start=self.start, reason=self.reason, flat=self.flat, restarts=self.restarts,
                    losses=[float(loss) for loss in self.losses], most=self.most)

    def load_state_dict(self, state):
        most = state["most"] if state["restarts"] else self.most
        if self.start is None or state["restarts"]:             # else the step that is asked for now
            self.__dict__.update(state, most=most)


# ---- Collapse: its signs, each a number with a limit, and the rule by which they stop a run.


class CollapseError(AssertionError):
    """Training has collapsed: its text says when and by which sign, the likely cause and the flags to change.

    step, sign, value, threshold, meaning (of the sign, in words), cause, remedy; history: of all signs in the
    last 200 steps, {sign: [[step, value], ...]}. Needs: nothing.
    """
    def __init__(self, step, sign, value, threshold, meaning, cause, remedy, history):
        super().__init__(step, sign, value, threshold, meaning, cause, remedy, history)     # for pickle
        self.step, self.sign, self.value, self.threshold = step, sign, value, threshold
        self.meaning, self.cause, self.remedy, self.history = meaning, cause, remedy, history

    def __str__(self):
        return (f"collapse at step {self.step}: {self.sign}: {self.meaning}\n  likely cause: {self.cause}\n"
                f"  remedy: {self.remedy}")


class CollapseMonitor:
    """Notices when the training of a VAE-GAN goes wrong, and says since when, why, and what to change.

        monitor = CollapseMonitor()
        for step in range(steps):
            terms = ...                                         # of this step: {name: number}
            if step % 10 == 0:
                terms |= monitor.look(x, x_hat)
            monitor.assert_healthy(step, terms)                 # raises CollapseError

    A sign is up while its value exceeds its limit, the keyword argument of its name. m20: the median of the
    last 20 steps (`window`; m10: of half as many), all of which must be fed; looks: of the last 3 looks
    (`looks`) within 200 steps (`memory`). A sign whose terms are not fed is never up.

    cause   domination    m10 of grad_ratio, w·‖∇adv‖/‖∇rec‖ at the last layer
            spike         of log grad_norm_dec: (m10 - median)/(1.4826·MAD, at least 0.2), both of the m10 at
                          the last 200 steps, but for the first 200 that this sign is up
            kl_fall       peak of the m20 of kl_dim (nats a latent dimension), within 0.03 and 1, over m20
            same_data     peak of the looks of x's spread over a batch, over looks
    damage  rebound       dB by which the last 20 steps are above the best 50 in a row, less two standard
                          errors; the best is forgotten by 1 dB in 2000 steps. The smaller of 10·log10 l2 and
                          20·log10 rec_loss: texture may cost PSNR
            z_ignored     looks of the error with an image's own z over that with another one's
            noise         looks of 1 - correlation of x̂ with x
    other   uniform       looks of x's spread over a batch, over x̂'s
            saturation    looks of the share of |x̂| > 1, less that of |x| > 1
            ringing       looks of the energy above half of Nyquist, x̂ over x
            checkerboard  looks of the energy of the differences of differences of neighbours, x̂ over x
            expansion     looks of ‖G(z + δ) - G(z)‖/‖δ‖ over their usual, taken as for spike
            d_won         m20 of d_acc or of half of logits_real - logits_fake, whichever is smaller
            d_died        peak of the m20 of grad_norm_disc over m20, where d_acc is within 0.05 of ½

    Collapsed: a sign of damage is up for `patience` steps, or within 50 steps of one of a cause, or a term is
    not finite. Signs in the picture need a picture: they count once its correlation has been over ½, or
    after `grace` steps, or beside a cause other than spike. Needs: CollapseError, high_frequency_energy.
    """
    CAUSE, DAMAGE = ("same_data", "domination", "kl_fall", "spike"), ("rebound", "z_ignored", "noise")
    PICTURE = ("z_ignored", "noise", "uniform", "ringing", "checkerboard")
    MEANING = dict(             # sign: what its value {} means, and what to do
        domination=("the GAN's gradient is {:.3g} times the reconstruction's at the last layer",
                    "--adaptive where it is off, else a smaller --disc-weight; a longer --disc-ramp"),
        spike=("the decoder's gradient norm is {:.3g} deviations above its usual",
               "a smaller --lr or --disc-weight, --adaptive where it is off, a longer --disc-ramp"),
        kl_fall=("the KL is {:.3g} times below its peak", "a smaller --kl-weight"),
        rebound=("the reconstruction is {:.3g} dB worse than at its best",
                 "a smaller --lr; if the GAN came on, a smaller --disc-weight, a longer --disc-ramp"),
        z_ignored=("the error with an image's own z is {:.3g} of that with another one's",
                   "a smaller --disc-weight or --kl-weight"),
        noise=("1 - correlation of reconstruction and image is {:.3g}", "a smaller --disc-weight or --lr"),
        same_data=("the images of a batch differ {:.3g} times less than they did", "look into --data"),
        uniform=("reconstructions differ {:.3g} times less than their images", "a smaller --kl-weight"),
        saturation=("a share of {:.3g} of the values lies outside of [-1, 1]", "a smaller --lr"),
        ringing=("{:.3g} times the images' high frequencies", "a smaller --disc-weight"),
        checkerboard=("{:.3g} times the images' checkerboard", "a smaller --disc-weight"),
        expansion=("the decoder is {:.3g} times as steep as it was", "a larger --kl-weight"),
        d_won=("D is right by a margin nearly everywhere ({:.3g})", "nothing, with --adaptive; else --r1 10"),
        d_died=("D is at chance, its gradient {:.3g} times below its peak", "another --lr-disc"))

    def __init__(self, *, domination=3.0, spike=5.0, kl_fall=10.0, same_data=20.0, rebound=2.0,
                 z_ignored=0.95, noise=0.75, uniform=4.0, saturation=0.1, ringing=2.0, checkerboard=3.0,
                 expansion=5.0, d_won=0.98, d_died=1000.0, window=20, looks=3, memory=200,
                 patience=20, grace=1000):
        self.limits = dict(
            domination=domination, spike=spike, kl_fall=kl_fall, same_data=same_data, rebound=rebound,
            z_ignored=z_ignored, noise=noise, uniform=uniform, saturation=saturation, ringing=ringing,
            checkerboard=checkerboard, expansion=expansion, d_won=d_won, d_died=d_died)
        self.window, self.looks, self.memory = window, looks, memory
        self.patience, self.grace = patience, grace
        self.first = self.step = None           # the first and the last step that were fed
        self.terms, self.history = {}, {}       # {term or sign: [[step, value], ...]}, recent ones
        self.baseline, self.best = {}, {}       # {sign: values while it was not up}, {term: its extreme}
        self.since = {}                         # {sign that is up: since which step}

    @staticmethod
    @torch.no_grad()
    def look(x, x_hat, z=None, decode=None):
        """Measure images and their reconstructions, (B, 3, H, W) -> {term: 0-d tensor}, without a sync.

        With B > 1: whether x̂ depends on z. With z, (b, C, h, w), and its decoder: how steep that is. Where
        images are flat or alike, small constants, as in SSIM, keep that from being a sign.
        """
        x, x_hat = x.float(), x_hat.float()
        small, small_hat = (F.avg_pool2d(images, min(x.shape[-2:]) // 16 or 1) for images in (x, x_hat))
        a, b = (images - images.mean(dim=(0, 2, 3), keepdim=True) for images in (x, x_hat))
        over = lambda measure: measure(x_hat) / measure(x).clamp(min=1e-12)
        var, var_hat, flat = a.pow(2).mean(), b.pow(2).mean(), 1e-3         # 1 where x is flat: var « flat
        terms = dict(
            corr=((a * b).mean() * var / (var * var_hat).sqrt().clamp(min=1e-12) + flat) / (var + flat),
            saturation=(x_hat.abs() > 1).float().mean() - (x.abs() > 1).float().mean(),
            high_freq=over(lambda images: high_frequency_energy(images).mean()),
            checkerboard=over(lambda images: images.diff(dim=2).diff(dim=3).pow(2).mean()))
        if len(x) > 1:
            own, other = ((small - images).abs().mean() for images in (small_hat, small_hat.roll(1, 0)))
            terms |= dict(other_z=(other + 0.002) / (own + 0.001), spread=small.std(0).mean(),
                          spread_hat=small_hat.std(0).mean())
        if z is not None:
            noise = torch.randn(z.shape, generator=torch.Generator(z.device).manual_seed(0), device=z.device)
            delta = 0.01 * z.std().clamp(min=1e-3) * noise      # the same at each look
            terms["lipschitz"] = (decode(z + delta) - decode(z)).norm() / delta.norm()
        return terms

    def assert_healthy(self, step, terms):
        """Feed the terms of a step, numbers or 0-d tensors. Raises CollapseError."""
        error = self.observe(step, terms)
        if error:
            raise error

    def observe(self, step, terms):
        """As assert_healthy, but -> the CollapseError, or None."""
        terms = {name: float(value) for name, value in terms.items()}
        self.step, self.first = step, step if self.first is None else self.first
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if broken:
            every = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            return CollapseError(step, "non_finite", None, None, f"{', '.join(broken)} not finite",
                                 f"an overflow; all terms: {every}", "a smaller --lr, --precision fp32",
                                 copy.deepcopy(self.history))
        self.remember(self.terms, terms)
        values = {sign: value for sign, value in self.measure().items() if not math.isnan(value)}
        self.remember(self.history, values)
        values |= {sign: self.peak(sign) for sign in self.CAUSE}        # up longer: the damage comes later
        up = [sign for sign, value in values.items() if value > self.limits[sign]]
        causes = [sign for sign in up if sign in self.CAUSE]
        if not (self.best["corr"] > 0.5 or step - self.first >= self.grace or set(causes) - {"spike"}):
            up = [sign for sign in up if sign not in self.PICTURE]
        self.since = {sign: self.since.get(sign, step) for sign in up}
        damage = sorted((sign for sign in up if sign in self.DAMAGE), key=self.since.get)
        if not damage or not causes and step - self.since[damage[0]] < self.patience:
            return None
        sign, cause = damage[0], min(causes or damage, key=(self.CAUSE + self.DAMAGE).index)
        known = self.describe(cause) if causes else "none of the known ones; a large --lr, or other images?"
        return CollapseError(step, sign, values[sign], self.limits[sign], self.describe(sign), known,
                             self.MEANING[cause][1], copy.deepcopy(self.history))

    def describe(self, sign):
        """A sign that is up, in words, with its highest value."""
        meaning = self.MEANING[sign][0].format(self.peak(sign))
        return f"{meaning} (limit {self.limits[sign]:g}), since step {self.since[sign]}"

    def peak(self, sign):
        """Its highest value of the last 50 steps."""
        recent = [value for at, value in self.history.get(sign, ()) if at > self.step - 5 * self.window / 2]
        return max(recent, default=0.0)

    def remember(self, series, values):
        """Append this step's {name: value} to {name: [[step, value], ...]}; drop what is too old."""
        for name, value in values.items():
            series.setdefault(name, []).append([self.step, value])
        for name in series:
            while series[name] and series[name][0][0] <= self.step - self.memory:
                del series[name][0]

    def measure(self):
        """The value of each sign, as the formulas above say; nan where too little has been seen."""
        m20, m10 = (functools.partial(self.median, n=self.window // half) for half in (1, 2))
        looks = functools.partial(self.median, n=self.looks, steps=self.memory)
        norm, steep = math.log(max(m10("grad_norm_dec"), 1e-12)), looks("lipschitz")
        usual_norm, mad = self.usual("spike", norm, least=50)
        acc, died = m20("d_acc"), self.fall("grad_norm_disc", m20("grad_norm_disc"))
        corr = looks("corr")
        self.best["corr"] = max(self.best.get("corr", 0.0), corr)
        return dict(
            domination=m10("grad_ratio"), spike=(norm - usual_norm) / max(1.4826 * mad, 0.2),
            kl_fall=self.fall("kl_dim", m20("kl_dim"), least=0.03, most=1.0),
            rebound=min(self.rise("l2", 10), self.rise("rec_loss", 20)),
            z_ignored=1 / max(looks("other_z"), 1e-12), noise=1 - corr,
            same_data=self.fall("spread", looks("spread")),
            uniform=looks("spread") / max(looks("spread_hat"), 1e-12), saturation=looks("saturation"),
            ringing=looks("high_freq"), checkerboard=looks("checkerboard"),
            expansion=steep / max(self.usual("expansion", steep, least=1)[0], 1e-12),
            d_won=min((m20("logits_real") - m20("logits_fake")) / 2, acc),      # nan if the first one is
            d_died=died if abs(acc - 0.5) < 0.05 else 0.0)

    def median(self, term, n, steps=0):
        """Of the last n values; nan unless there are n in the last `steps` (or n) steps."""
        values = [value for step, value in self.terms.get(term, ())[-n:] if step > self.step - (steps or n)]
        return sorted(values)[n // 2] if len(values) == n else math.nan

    def usual(self, sign, now, least):
        """-> median and MAD of the remembered values of `now`; nan if there are fewer than `least`."""
        values, middle, mad = self.baseline.setdefault(sign, []), math.nan, math.nan
        if len(values) >= least:
            middle = sorted(values)[len(values) // 2]
            mad = sorted(abs(value - middle) for value in values)[len(values) // 2]
        up_for = self.step - self.since.get(sign, self.step)
        if now == now and not 0 < up_for <= self.memory:                # not nan; what lasts becomes usual
            values.append(now)
            del values[:-self.memory]
        return middle, mad

    def fall(self, term, now, least=0.0, most=math.inf):
        """The peak that `now` has had, kept between least and most, over now."""
        self.best[term] = max(self.best.get(term, least), min(now, most))
        return self.best[term] / max(now, 1e-12)

    def rise(self, term, factor):
        """dB of the last 20 steps over the lowest mean of 50 in a row, less two standard errors of 20."""
        short, long = self.window, 5 * self.window // 2
        last = [factor * math.log10(max(value, 1e-12)) for _, value in self.terms.get(term, ())[-long:]]
        if len(last) < long:
            return math.nan
        mean = sum(last) / long
        self.best[term] = min(self.best.get(term, math.inf) + 1 / 2000, mean)
        error = math.sqrt(sum((value - mean) ** 2 for value in last) / (long - 1) / short)
        return sum(last[-short:]) / short - self.best[term] - 2 * error

    def state_dict(self):
        names = ("first", "step", "terms", "history", "baseline", "best", "since")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        self.__dict__.update(copy.deepcopy(state))


# ---- Data: any folder of images, or dead leaves. Datasets give uint8, the device makes it [-1, 1].


class ImageFolder(torch.utils.data.Dataset):
    """Square crops of all images in a folder and below, of any format Pillow reads: (3, size, size) uint8.

    train=True: item i is the i-th of endless shuffled passes, cropped and flipped at random. It depends on
    (seed, i) alone, so no worker count and no restart changes it. train=False: the centre of the i-th file by
    name. hold_out=n: every n-th file is for train=False, the others for train=True; 0: all are for both.
    Images smaller than the crop are enlarged; JPEGs of at least four times the crop are decoded at 1/2, 1/4
    or 1/8, still twice as large as it. EXIF orientation is applied, transparency lies on white, 16 bits are
    made 8, so are floats of [0, 1], and of films the first picture is taken. A file that cannot be decoded is
    reported once, with the reason, and the next one stands in. Raises UsageError if there is no folder, no
    image file, or none that can be decoded; with train=True, if more than half of them cannot.
    Needs: UsageError, seed_of, the packages pillow and tqdm.
    """
    def __init__(self, root, size, train=True, seed=0, hold_out=0):
        if not os.path.isdir(root):
            raise UsageError(f"{root}: no such folder; give one that holds images")
        known = {suffix for suffix, kind in Image.registered_extensions().items()
                 if kind in Image.OPEN and kind != "EPS"}       # EPS is a program, run by Ghostscript
        files, seen = [], set()
        for folder, folders, names in os.walk(root, onerror=self.report if train else None,
                                              followlinks=True):
            if os.path.realpath(folder) in seen:                # links in a circle
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            files += [os.path.join(folder, n) for n in names if os.path.splitext(n)[1].lower() in known]
        if not files:
            raise UsageError(f"{root}: no image files here or below; give a folder that holds images")
        files.sort()
        self.root, self.size, self.is_train, self.seed = root, size, train, seed
        if hold_out and len(files) > 1:
            parts = [files[i::hold_out] for i in range(min(hold_out, len(files)))]      # one of whose files
            held_out = next((part for part in parts if any(map(self.decodes, part))), parts[0])     # decodes
            files = sorted({*files} - {*held_out}) if train else held_out
        self.files, self.epoch, self.order = files, None, None
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()     # one for all workers,
        self.lock = torch.multiprocessing.Lock()                # so that each file is reported by one of them
        self.load(0)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        if not self.is_train:
            return self.load(range(len(self))[i])               # IndexError past the end
        epoch, k = divmod(i, len(self))
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=shuffle).tolist()
        return self.load(self.order[k], torch.Generator().manual_seed(seed_of(self.seed, epoch, k)))

    def load(self, k, generator=None):
        """File k, or the next one that decodes, cropped at random, or without a generator at the centre."""
        skipped = []
        for k in (i % len(self) for i in range(k, k + len(self))):
            if self.broken[k]:
                continue
            try:
                picture = self.crop(self.decode(self.files[k]), generator)
            except Exception as error:                          # decoders raise whatever they like
                with self.lock:
                    skipped += [] if self.broken[k] else [(self.files[k], error)]
                    self.broken[k] = True
                if self.is_train and 2 * self.broken.sum() > len(self):
                    break
            else:
                for file, error in skipped:
                    self.report(error, file)
                return picture
        last = "".join(f" ({self.reason(error, file)})" for file, error in skipped[-1:])
        raise UsageError(f"{self.root}: {int(self.broken.sum())} of {len(self)} image files cannot be "
                         f"decoded; take them away, or give another folder{last}")

    @staticmethod
    def reason(error, file):
        """Why a file, or a folder, is left out: one line, whatever bytes its name has."""
        line = f"{file}: {error or type(error).__name__}"
        return line if line.isprintable() else line.encode("unicode_escape").decode()

    def report(self, error, file=None):
        tqdm.write(f"skipped {self.reason(error, file or error.filename)}", file=sys.stderr)

    def decodes(self, file):
        try:
            self.decode(file)
        except Exception:
            return False
        return True

    def decode(self, file):
        """-> an RGB image, upright."""
        if not os.path.isfile(file):                            # opening a pipe would wait for ever
            raise FileNotFoundError("no such file, or not a regular one")
        with Image.open(file) as image:
            image.draft(None, (2 * self.size, 2 * self.size))   # JPEG only, before it is decoded
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":                               # floats of [0, 1] as is usual, or of [0, 255]
                scale = 255 if image.getextrema()[1] <= 1 else 1
                image = image.point(lambda value: value * scale + 0.5).convert("L")
            if image.mode.startswith("I"):                      # 16-bit grey; 257 = 65535/255
                image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")

    def crop(self, image, generator):
        side = min(self.size, *image.size)
        spare = image.width - side, image.height - side
        x, y = (int(torch.randint(s + 1, (), generator=generator)) if generator else s // 2 for s in spare)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.size, self.size, 3).permute(2, 0, 1)              # (3, size, size)
        return pixels.flip(2) if generator and torch.rand((), generator=generator) < 0.5 else pixels


class DeadLeaves(torch.utils.data.Dataset):
    """Occluding discs with a power-law size: images with edges and textures at all scales, as photographs.

    Source: Lee, Mumford & Huang 2001: radii ∝ r^-3 make the statistics scale-invariant. Each disc has a
    colour and a grating. Item i, for any i >= 0, is a function of (seed, i): (3, size, size) uint8.
    Needs: seed_of, the package pillow.
    """
    def __init__(self, size, seed=0, length=100_000):
        self.size, self.seed, self.length = size, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(seed_of(self.seed, i))
        side = 2 * self.size                                    # drawn twice as large, averaged in the end
        r_min, r_max = 6.0, side / 2
        area = 2 * math.pi * r_min ** 2 * math.log(r_max / r_min)           # of a disc, on average
        n = int(4 * (1.5 * side) ** 2 / area)                   # four layers deep: e^-4 stays uncovered
        u = torch.rand(9, n, generator=generator)
        r = (r_min ** -2 + u[0] * (r_max ** -2 - r_min ** -2)) ** -0.5      # pdf ∝ r^-3
        x, y = (u[1:3] * 1.5 - 0.25) * side                     # some centres lie outside
        canvas = Image.new("I", (side, side))
        draw = ImageDraw.Draw(canvas)
        for leaf, box in enumerate(torch.stack([x - r, y - r, x + r, y + r], 1).tolist()):
            draw.ellipse(box, fill=leaf)                        # covers those before
        leaf = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.int32).view(side, side).long()
        colour = 0.1 + 0.8 * u[3] + 0.3 * (u[3:6] - u[3])       # (3, n): grey with a tint
        wave, angle, contrast = 2 * math.pi / (4 * 8 ** u[6]), 2 * math.pi * u[7], 0.2 * u[8] ** 2
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        phase = (wave * angle.cos())[leaf] * column + (wave * angle.sin())[leaf] * row
        image = colour[:, leaf] + contrast[leaf] * phase.sin()  # (3, side, side)
        return (F.avg_pool2d(image, 2) * 255).round().clamp(0, 255).to(torch.uint8)     # (3, size, size)


# ---- The training step: one forward and one backward of each network a batch. Then the loop around it.


def last_layer_gradient(conv, h, image_gradient):
    """J g: a gradient g at the image, (B, 3, H, W), carried on to the weight, (3, ch, 3, 3), of the last
    convolution, 3×3, that made the image of h, (B, ch, H, W). Needs: nothing."""
    h = h.to(image_gradient.dtype)
    return torch.nn.grad.conv2d_weight(h, conv.weight.shape, image_gradient, padding=1)


def generator_step(vae, disc, x, *, perceptual=None, pixel_loss="l1", perceptual_weight=1.0, kl_weight=1e-6,
                   disc_weight=0.5, adaptive=True, texture=None, logvar=None, generator=None,
                   amp=contextlib.nullcontext, loss_scale=1.0):
    """Accumulate the autoencoder's gradient of L_G, which is latent-diffusion's loss divided by N = 3·H·W.

    Cut at x̂: each loss is differentiated once, down to the image; both image gradients go through the last
    convolution alone, which gives λ; their weighted sum goes through the autoencoder, once. By the chain rule
    this equals two autograd.grad calls at the last layer and a backward of the total loss.
    x: (B, 3, H, W) in [-1, 1]. vae: may be wrapped in DistributedDataParallel; disc, perceptual: may not. An
    encoder whose weights require no gradient costs no backward pass.
    disc_weight: w(t)·disc_weight; 0 leaves D out. texture: (x, x_hat) -> scalar, a loss that takes the place
    of -E[D(x̂)]. logvar: 0-d parameter s, for L_rec/exp(s) + s instead of L_rec; its gradient isn't averaged
    over ranks. amp(): the networks' autocast context. loss_scale: factor of all gradients (fp16's scale,
    1/accumulate). -> x_hat, detached, and 0-d tensors under log.jsonl's names, means of the batch before
    weighting. D's own gradients are not touched.
    Needs: hinge_g_loss, adaptive_weight, last_layer_gradient, average_over_ranks.
    """
    N = x[0].numel()
    conv_out, inputs = getattr(vae, "module", vae).decoder.conv_out, []
    with conv_out.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach())), amp():
        x_hat, posterior = vae(x, generator=generator)          # through the wrapper, or ranks drift apart
    kl = posterior.kl().mean()
    leaf = x_hat.detach().requires_grad_()                      # of x's dtype: losses and λ are fp32

    # L_rec = |x - x̂| + LPIPS(x, x̂)
    l1, l2 = (x - leaf).abs().mean(), (x - leaf).pow(2).mean()
    with amp():
        lpips = perceptual(x, leaf).mean() if perceptual else torch.zeros_like(l1)
    rec_loss = (l1 if pixel_loss == "l1" else l2) + perceptual_weight * lpips
    nll = rec_loss if logvar is None else rec_loss / logvar.exp() + logvar
    torch.autograd.backward(loss_scale * nll, inputs=[leaf] if logvar is None else [leaf, logvar])
    g = leaf.grad
    terms = dict(l1=l1, l2=l2, lpips=lpips, rec_loss=rec_loss, kl=kl, kl_dim=kl / posterior.mean[0].numel())
    terms |= {} if logvar is None else dict(logvar=logvar.clone())

    # λ = ‖J g_rec‖ / (‖J g_adv‖ + ε), where J leads from the image to the last layer's weight
    if disc_weight > 0:
        with amp():
            g_loss = texture(x, leaf) if texture else hinge_g_loss(disc(leaf))
        g_adv, = torch.autograd.grad(loss_scale * g_loss, leaf)
        J = [last_layer_gradient(conv_out, inputs[0], image_gradient / loss_scale)
             for image_gradient in (g, g_adv)]                  # (3, ch, 3, 3) each
        J_rec, J_adv = average_over_ranks(torch.stack(J))
        lam = adaptive_weight(J_rec, J_adv, eps=1e-4 / N, max_weight=math.inf)      # ε and 1e4: LDM's
        w = disc_weight * (lam.clamp(max=1e4) if adaptive else torch.ones_like(lam))
        g = g + w * g_adv
        terms.update(g_loss=g_loss, lam=lam, lam_clamped=(lam > 1e4).float(), w=w,
                     grad_ratio=w * J_adv.norm() / J_rec.norm())

    inputs.clear()                                              # h is no longer needed

    # L_G = L_rec + kl_weight·KL/N + w·(-E[D(x̂)]): one call, as after one of two ranks average too early
    outputs, gradients = [x_hat], [g]
    if kl.requires_grad:                                        # that of a frozen encoder does not
        outputs += [kl_weight * kl / N]
        gradients += [loss_scale * torch.ones_like(kl)]
    torch.autograd.backward(outputs, gradients)
    return x_hat.detach(), {name: value.detach() for name, value in terms.items()}


def discriminator_step(disc, x, x_hat, *, loss=hinge_d_loss, r1=0.0, penalty=None,
                       amp=contextlib.nullcontext, loss_scale=1.0):
    """Accumulate D's gradient of L_D on the images that generator_step has just seen and made.

    Both go through D as one batch: there are no batch statistics. x, x_hat: (B, 3, H, W). loss: of the logits
    of real and of fake images. r1: γ, 0 for none, else the step runs in fp32. penalty: (x, x_hat) -> scalar
    with a graph to D's weights, in fp32. -> 0-d tensors under log.jsonl's names. The autoencoder gets no
    gradient.
    Needs: hinge_d_loss, r1_penalty.
    """
    # L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))] + γ/2 E‖∇D(x)‖²
    x = x.detach().requires_grad_(r1 > 0)
    with torch.autocast(x.device.type, enabled=False) if r1 else amp():
        real, fake = disc(torch.cat([x, x_hat.detach()])).chunk(2)                  # (B, 1, h, w) each
    d_loss = loss(real, fake)
    bound = r1 / 2 * r1_penalty(real, x) if r1 else 0.0
    (loss_scale * (d_loss + bound + (penalty(x, x_hat) if penalty else 0.0))).backward()
    d_acc = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    terms = dict(d_loss=d_loss, logits_real=real.mean(), logits_fake=fake.mean(), d_acc=d_acc)
    return {name: value.detach() for name, value in terms.items()}


class Trainer:
    """The networks, optimisers, warm-up and monitor of a run: its update, and what its checkpoints hold.

    Each rank has one; they start equal (same seed) and stay equal (same gradients). Needs: all above.
    """
    look_every = 10                                             # steps; the monitor is fed as often

    def __init__(self, cfg, device, rank=0, world=1):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.step, self.best = 0, [0, -math.inf]
        self.latents = dict(scaling_factor=None, latent_mean=None, latent_std=None)     # until it is measured
        self.drawn = 0                                          # images, by all ranks
        self.seen, self.events = [], []                         # terms and events since the last log record
        place = dict(device=device, memory_format=torch.channels_last)
        self.perceptual = Perceptual(cfg.perceptual_net).to(**place) if cfg.perceptual_weight else None
        torch.manual_seed(cfg.seed)
        self.vae = vae = autoencoder(cfg).to(**place)
        self.disc = PatchDiscriminator(3, cfg.ndf).to(**place)
        self.noise = torch.Generator(device)
        self.d_loss, self.penalty, self.texture = hinge_d_loss, None, None      # texture: see generator_step
        if cfg.gan != "hinge":
            take_road(self, cfg.gan)
        self.scale = nn.ParameterDict(dict(logvar=torch.zeros((), device=device)) if cfg.learn_logvar else {})
        if cfg.init:
            vae.load_state_dict(released(cfg.init)[0])
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not cfg.freeze_encoder)
        self.average = copy.deepcopy(vae) if cfg.ema else vae   # what is shown, measured and saved
        nets = dict(enc=[vae.encoder, vae.quant_conv], dec=[vae.post_quant_conv, vae.decoder],
                    scale=[self.scale], disc=[self.disc])
        self.weights = {name: [p for net in nets[name] for p in net.parameters() if p.requires_grad]
                        for name in nets}                       # what is trained
        self.precision, fused = suited(cfg.precision, device.type)
        adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.9), fused=fused)   # latent-diffusion's betas
        self.optimiser = adam([p for name in ("enc", "dec", "scale") for p in self.weights[name]], cfg.lr)
        self.optimiser_disc = adam(self.weights["disc"], cfg.lr_disc)
        window = max(cfg.steps // 20, 10)                       # a plateau is one at the scale of the run,
        self.warm_up = WarmUp(cfg.disc_start, cfg.disc_lead, cfg.disc_ramp, window,
                              most=cfg.steps // 2)              # and the GAN gets half of it at least
        self.monitor = CollapseMonitor(grace=1000 + cfg.lr_warmup)
        low = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[self.precision]
        self.amp = functools.partial(torch.autocast, device.type, low, enabled=low is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.parallel = [DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
                         for net in (vae, self.disc)]
        self.parts = dict(vae=vae, discriminator=self.disc, scale=self.scale, optimiser=self.optimiser,
                          optimiser_disc=self.optimiser_disc, scaler=self.scaler, warm_up=self.warm_up,
                          monitor=self.monitor)

    def compile(self, say):
        """With --compile: the networks, but not the decoder's last layer, so that λ has its input."""
        if not self.cfg.compile:
            return
        try:
            torch.compile(torch.neg)(torch.ones(2, device=self.device))
        except Exception as error:                              # no compiler, or one that does not work
            return say(f"--compile: {str(error).strip().splitlines()[0]}; goes on without")
        self.vae.decoder.body = torch.compile(self.vae.decoder.body, dynamic=False)
        disc = None if self.cfg.r1 or self.penalty else self.disc   # compiled code has no second derivative
        for net in filter(None, (self.vae.encoder, self.perceptual, disc)):
            net.compile(dynamic=False)

    def update(self, step, images):
        """One update from cfg.accumulate batches of `images`, (B, 3, H, W) uint8 -> the terms of each."""
        cfg, rows = self.cfg, []
        train_disc = cfg.disc_weight > 0 and self.d_loss is not None and self.warm_up.trains_disc(step)
        self.optimiser.zero_grad()
        self.optimiser_disc.zero_grad()
        loss_scale = self.scaler.scale(torch.ones((), device=self.device)) / cfg.accumulate
        for k in range(cfg.accumulate):
            x = to_model(next(images), self.device)
            self.noise.manual_seed(seed_of(cfg.seed, step, k, self.rank))
            for net in self.parallel:                           # as no_sync: ranks average once an update
                net.require_backward_grad_sync = k + 1 == cfg.accumulate
            x_hat, terms = generator_step(
                self.parallel[0], self.disc, x, perceptual=self.perceptual, pixel_loss=cfg.pixel_loss,
                perceptual_weight=cfg.perceptual_weight, kl_weight=cfg.kl_weight, adaptive=cfg.adaptive,
                disc_weight=self.warm_up.weight(step) * cfg.disc_weight, texture=self.texture,
                logvar=self.scale.get("logvar"), generator=self.noise, amp=self.amp, loss_scale=loss_scale)
            if train_disc:
                r1 = 16 * cfg.r1 if step % 16 == 0 else 0.0     # lazy: Karras et al. 2020, §3.1
                terms |= self.disc_step(x, x_hat, r1=r1, loss_scale=loss_scale)
            if (step + 1) % self.look_every == 0:
                terms |= self.look(step, x, x_hat)
            rows.append(terms)
        self.optimise(step, train_disc, terms)
        self.step, self.drawn = step + 1, self.drawn + self.images_an_update
        return rows

    def disc_step(self, x, x_hat, r1=0.0, loss_scale=1.0):
        """D's step with the losses of this run -> terms."""
        return discriminator_step(self.parallel[1], x, x_hat, loss=self.d_loss, r1=r1, penalty=self.penalty,
                                  amp=self.amp, loss_scale=loss_scale)

    def look(self, step, x, x_hat):
        """The monitor's look -> terms; every fifty steps with the decoder's slope, which costs three forwards
        of an image, in fp32, for rounding would drown it. Nothing is compiled for that one image."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            z = self.vae.encode(x[:1]).mode() if (step + 1) % 50 == 0 else None
            return self.monitor.look(x, x_hat, z, self.vae.decode)

    def optimise(self, step, train_disc, terms):
        """Take the gradients that are there into the weights, and the weights into their average."""
        for p in self.weights["scale"]:                         # no DistributedDataParallel has it
            average_over_ranks(p.grad)
        self.apply(self.optimiser, self.cfg.lr, step, ("enc", "dec"), terms)
        if train_disc:
            self.apply(self.optimiser_disc, self.cfg.lr_disc, step - self.warm_up.start, ("disc",), terms)
        self.scaler.update()
        if self.cfg.ema:                                        # AveragedModel would wait for the GPU
            average = get_ema_multi_avg_fn(self.cfg.ema if step else 0.0)
            average([*self.average.parameters()], [*self.vae.parameters()], None)

    @property
    def images_an_update(self):
        return self.world * self.cfg.batch_size * self.cfg.accumulate

    def apply(self, optimiser, lr, step, names, terms):
        """Clip each network's gradient, log the norm it had, and step at the warmed-up learning rate."""
        optimiser.param_groups[0]["lr"] = lr * min((step + 1) / max(self.cfg.lr_warmup, 1), 1.0)
        self.scaler.unscale_(optimiser)
        for name in filter(self.weights.get, names):
            terms["grad_norm_" + name] = clip_grad_norm_(self.weights[name], self.cfg.clip or math.inf)
        self.scaler.step(optimiser)

    def content(self):
        """What a checkpoint holds; its `state_dict` is what opens in diffusers."""
        loop = dict(drawn=self.drawn, images_an_update=self.images_an_update, seen=self.seen,
                    events=self.events)
        return dict(
            state_dict=self.average.state_dict(), config=asdict(self.cfg), step=self.step, best=self.best,
            **self.latents,
            training=dict({name: part.state_dict() for name, part in self.parts.items()}, loop=loop))

    def save(self, path):
        write_whole(path, functools.partial(torch.save, self.content()))

    def restore(self, path, checkpoint):
        """Continue from what load(path) gave -> what changed, as text. UsageError: it does not fit."""
        was, now = {f.name: f.default for f in fields(Config)} | checkpoint["config"], asdict(self.cfg)
        changed = {f.name: f for f in fields(self.cfg)
                   if was.get(f.name) != now[f.name] and f.name not in ("out", "resume")}
        if not now["init"] or Path(now["init"]).resolve() == Path(str(was.get("init"))).resolve():
            changed.pop("init", None)                           # it counted at the start
        for name, f in changed.items():
            if f.metadata["group"] == "model":
                raise UsageError(f"{flag_of(name)} {now[name]}: {path} was trained with {was.get(name)}; "
                                 "take that or another --out")
        self.cfg = replace(self.cfg, init=str(was.get("init", "")))
        groups = {f.metadata["group"] for f in changed.values()}
        wanted, training = self.content() | dict(config={}), checkpoint["training"]
        wanted["training"]["monitor"] = CollapseMonitor().state_dict()      # empty: its contents vary
        wanted["training"]["warm_up"]["start"] = None           # this too, as the next ones
        wanted |= dict.fromkeys(self.latents)
        try:
            same_kind("training", training, dict.fromkeys(wanted["training"]))
            for name in "optimiser", "optimiser_disc":          # the state of Adam comes with its first step,
                adam = {i: dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p)      # the rest with the flags
                        for i, p in enumerate(self.parts[name].param_groups[0]["params"])}
                wanted["training"][name]["state"] = adam if training[name]["state"] else {}
                training[name]["param_groups"] = wanted["training"][name]["param_groups"]
            if not training["scaler"]:                          # it was not fp16
                wanted["training"]["scaler"] = {}
            same_kind("checkpoint", checkpoint, wanted)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} does not fit: {error}; move it away") from None
        if groups & {"losses", "warm-up"}:
            training["warm_up"]["restarts"] = 0                 # a new try
        for name, part in self.parts.items():
            if training[name]:
                part.load_state_dict(training[name])
        if self.cfg.ema:
            self.average.load_state_dict(checkpoint["state_dict"])
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.latents, loop = {name: checkpoint[name] for name in self.latents}, training["loop"]
        self.drawn, self.seen, self.events = loop["drawn"], loop["seen"], loop["events"]
        data = {"data", "val", "image_size", "perceptual_weight", "perceptual_net"} & {*changed}
        if data or "pixel_loss" in changed:
            self.monitor = self.parts["monitor"] = CollapseMonitor(grace=self.monitor.grace)    # all is new
        if data or "disc_weight" in changed and 0 in (was["disc_weight"], now["disc_weight"]):
            self.best = [0, -math.inf]                          # of another measure
        changes = [(flag_of(name), was.get(name), now[name]) for name in changed]
        if loop["images_an_update"] != self.images_an_update:
            changes.append(("images an update", loop["images_an_update"], self.images_an_update))
        return "".join(f"; {name} {old} -> {new}" for name, old, new in changes)

    def roll_back(self, path):
        """Continue from a checkpoint with the GAN off, later at half of the weight that it had now."""
        restarts, best = self.warm_up.restarts + 1, self.best
        self.restore(path, load(path))
        self.warm_up.restart(self.step, restarts)
        self.best = best                                        # best.pt is still there


def train(cfg, road=""):
    """Train as `cfg` says, alone or as one of torchrun's processes, and continue the run that cfg.out holds.

    -> the Trainer. road: what no flag can change, see take_road; it must be given again to go on. Writes
    config.json, log.jsonl, samples/, last.pt, previous.pt, best.pt, healthy.pt and, where that is installed,
    tensorboard/. Raises UsageError before anything is changed, or when too many images have turned out bad;
    CollapseError after it has saved what shows it; RunError where a file cannot be written;
    KeyboardInterrupt(number of the signal, text) after it has saved the run.
    Needs: all of the file.
    """
    out = Path(cfg.out)
    if cfg.freeze_encoder and not cfg.init and not (cfg.resume and saves(out)):
        raise UsageError("--freeze-encoder: a new run has no trained encoder to keep; give --init FILE")
    device, rank, world = launch(cfg)
    say = tqdm.write if rank == 0 else lambda line: None
    train_set, val_set = open_data(cfg)
    trainer = Trainer(cfg, device, rank, world)
    if road:
        take_road(trainer, road)
    trainer.compile(say)
    millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (trainer.vae, trainer.disc)]
    say(f"{world} × {device.type}, {trainer.precision}; {millions[0]:.1f} M parameters, D {millions[1]:.1f} "
        f"M; {len(train_set)} images of {cfg.image_size} px, {len(val_set)} held out")
    few = torch.utils.data.Subset(val_set, range(0, len(val_set), -(-len(val_set) // 1024)))    # 1024 at most
    shown = to_model(torch.stack([few[i] for i in range(min(8, len(few)))]), device)
    with claimed(out) if rank == 0 else contextlib.nullcontext(), Signals(rank, world) as signals:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0      # by torchrun, after a fault
        path = resume(trainer, out, say) if cfg.resume or restarted else None
        compare_ranks(trainer)                                  # all have read the same; rank 0 may write
        if rank == 0:
            open_folder(out, trainer, path)
        with tqdm(total=cfg.steps, initial=trainer.step, disable=rank > 0, dynamic_ncols=True) as bar:
            while trainer.step < cfg.steps:
                bar.n = trainer.step
                with contextlib.closing(batches(trainer, train_set)) as images, \
                        tensorboard(out / "tensorboard", trainer) as board:
                    loop(trainer, images, train_set, few, shown, out, board, say, bar, signals)
        meet()                                                  # rank 0 measures and saves last
    trainer.caught = signals.caught                             # too late to end this run, but not ablate
    say(f"{out}: {max(trainer.step, cfg.steps)} steps done; a larger --steps goes on from here")
    return trainer


def loop(trainer, images, train_set, few, shown, out, board, say, bar, signals):
    """Update until cfg.steps or a rollback: watch, log, measure, save. Needs: all of the file."""
    cfg, warm_up, monitor = trainer.cfg, trainer.warm_up, trainer.monitor
    rows, warned, clock = [], set(), (trainer.step, time.perf_counter())
    unproven = trainer.step or None                             # the step of a last.pt not yet proven healthy

    while trainer.step < cfg.steps:
        step = trainer.step
        rows += [(step + 1, terms) for terms in trainer.update(step, images)]
        done = trainer.step
        bar.update()
        comes_on = False
        if cfg.disc_weight:
            if warm_up.start is None:
                warm_up.observe(average_over_ranks(rows[-1][1]["rec_loss"].clone()), step)
            if warm_up.start == done:
                trainer.events.append(f"step {done}: the warm-up is over: {warm_up.reason}")
                say(trainer.events[-1])
            comes_on = warm_up.start is not None and done == warm_up.start + warm_up.lead   # at the next step
        to_log, to_sample, to_save, to_check = (
            done % every == 0 or done == cfg.steps
            for every in (cfg.log_every, cfg.sample_every, cfg.save_every, trainer.look_every))
        stop = meet(signals.caught)                             # all processes, or none
        to_save |= comes_on
        to_log |= to_sample or to_save
        if not (to_log or to_check or stop):
            continue

        fresh = read(rows, scaled=trainer.scaler.is_enabled() and trainer.scaler.get_scale() >= 1)
        rows, error = [], None
        for at, terms in fresh.items():
            found = monitor.observe(at, terms)
            error = found if found and found.sign == "non_finite" else error or found
        for sign in monitor.since.keys() - warned:
            if done - monitor.since[sign] >= monitor.patience:
                say(f"step {done}: {sign}: {monitor.describe(sign)}; to do: {monitor.MEANING[sign][1]}")
                warned.add(sign)
        trainer.seen += fresh.values()
        if error and (cfg.on_collapse != "warn" or error.sign == "non_finite"):
            return collapse(error, trainer, out, shown[:4], say)                # raises it, or rolls back
        if error and "collapse" not in warned:
            say(f"warning: {error}")
            trainer.events.append(str(error).splitlines()[0])
            warned.add("collapse")
        alarm = [sign for sign, since in monitor.since.items()  # what has been so for long is no alarm
                 if sign in monitor.DAMAGE or sign in monitor.CAUSE and done - since < monitor.memory]
        if alarm:
            unproven = None
        else:
            warned.discard("collapse")
        if unproven is not None and done - unproven >= min(50, cfg.save_every):
            if trainer.rank == 0:
                second_name(out / "last.pt", out / "healthy.pt")
            unproven = None
        if to_save or stop:
            compare_ranks(trainer)
        if to_log:
            speed = (done - clock[0]) * trainer.images_an_update / (time.perf_counter() - clock[1])
            record = dict(step=done, **average(trainer.seen), lr=trainer.optimiser.param_groups[0]["lr"],
                          images_per_s=speed)
            texts = dict(event="; ".join(trainer.events), signs=", ".join(monitor.since))
            record |= {name: text for name, text in texts.items() if text}
            shorts = dict(l1="L1", lpips="LPIPS", kl_dim="KL", d_acc="D acc", grad_ratio="∇adv/∇rec")
            numbers = {shorts[key]: f"{record[key]:.3g}" for key in shorts if record.get(key)}
            broken = int(train_set.broken.sum()) if cfg.data else 0
            bar.set_postfix(numbers | (dict(skipped=broken) if broken else {}))
            trainer.seen, trainer.events = [], []
            if trainer.rank == 0:
                measured, picture = validate(trainer, few, shown, out) if to_sample else ({}, None)
                record |= measured
                add_record(out / "log.jsonl", record)           # before the save, or a kill could lose it
                board(record, picture)
            clock = done, time.perf_counter()
        if to_save or stop:
            if trainer.rank == 0:
                save_last(trainer, out)
                if (comes_on or done == cfg.steps) and not alarm:
                    second_name(out / "last.pt", out / "healthy.pt")
            unproven = done
        if stop and done < cfg.steps:
            meet()                                              # or torchrun ends rank 0 while it saves
            raise KeyboardInterrupt(stop, f"interrupted; {out}/last.pt holds step {done}. To go on:\n"
                                    + command_line(cfg))


def validate(trainer, few, shown, out):
    """Measure the averaged weights on 256 of `few` images, the latents of all; draw `shown`, keep the best ->
    the log's val_ keys, the picture."""
    with torch.compiler.set_stance("force_eager"):              # nothing is compiled for other batch sizes
        measured = evaluate(trainer.average, few, trainer.device, trainer.perceptual, trainer.cfg.batch_size,
                            every=-(-len(few) // 256))
        picture = save_pairs(trainer.average, shown, out / "samples" / f"{trainer.step:07d}.png")
    trainer.latents = {name: measured[name] for name in trainer.latents}
    warm_up = trainer.warm_up
    with_gan = trainer.cfg.disc_weight == 0 or warm_up.weight(trainer.step - 1) == warm_up.top
    score = [int(with_gan), -measured.get("lpips", -measured["psnr"])]
    if score > trainer.best:                                    # no blurred image of the warm-up stays best
        trainer.best = score
        trainer.save(out / "best.pt")
    keys = [key for key in ("psnr", "ssim", "lpips", "sharpness") if key in measured]
    return {f"val_{key}": measured[key] for key in keys}, picture


@torch.no_grad()
def collapse(error, trainer, out, shown, say):
    """Save what shows a collapse; go back to healthy.pt, or raise the error.

    Needs: all of the file.
    """
    rank_0, restarts = trainer.rank == 0, trainer.warm_up.restarts + 1
    gives_up = trainer.cfg.on_collapse != "rollback" or restarts > 3 or trainer.cfg.disc_weight == 0
    if rank_0:
        checkpoint, healthy = load(out / "healthy.pt"), autoencoder(trainer.cfg).to(trainer.device)
        for name in ("previous.pt", "last.pt"):                 # a kill from here on leaves a healthy run
            second_name(out / "healthy.pt", out / name)
        if gives_up:
            say(f"{out}: collapse.png and collapse.json show it; the same command, better with other flags, "
                f"goes on from the last healthy save, of step {checkpoint['step']}")
        try:
            healthy.load_state_dict(checkpoint["training"]["vae"])
            rows = {"image": shown, f"healthy, step {checkpoint['step']}": healthy(shown, sample=False)[0],
                    f"now, step {trainer.step}": trainer.vae(shown, sample=False)[0]}
            save_collapse(error, trainer.monitor, rows, out)
        except Exception as problem:                            # no picture is worth a run
            say(f"{out}: collapse.png or collapse.json could not be made: {problem}")
    meet()                                                      # or torchrun ends rank 0 while it writes
    if gives_up:
        raise error
    trainer.roll_back(out / "healthy.pt")
    event = (f"rollback {restarts} from step {error.step} ({error.sign}) to {trainer.step}: no GAN until the "
             f"next plateau, then {trainer.warm_up.top:g} of its weight")
    say(f"{error}\n{event}")
    trainer.events.append(event)
    meet()                                                      # or rank 0 writes what others read
    if rank_0:
        trainer.save(out / "last.pt")
        second_name(out / "last.pt", out / "healthy.pt")
        keep_records(out, trainer.step)


# ---- Plumbing: seeds, devices and processes, data sets, files, records.


def seed_of(*numbers):
    """A 63-bit seed of some integers, so well mixed that (seed, step) and (seed, step + 1) share nothing."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def to_model(images, device):
    """(B, 3, H, W) uint8 -> float in [-1, 1] on the device, in channels-last layout. Needs: nothing."""
    return images.to(device, non_blocking=True).to(memory_format=torch.channels_last).float() / 127.5 - 1.0


def average_over_ranks(tensor):
    """The mean over all processes, in place; as it is where there is one. Needs: nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def meet(number=0):
    """Wait until all processes are here -> the largest of their numbers, integers. Needs: nothing."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number)                              # on the CPU: no GPU has to wait
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def compare_ranks(trainer):
    """Raise RunError unless all processes have the same weights, to the bit. Needs: meet, RunError."""
    if trainer.world > 1:
        bits = sum(int(p.detach().view(torch.int32).sum(dtype=torch.int64))
                   for net in (trainer.vae, trainer.disc, trainer.scale) for p in net.parameters())
        if meet(bits) != -meet(-bits):
            raise RunError(f"step {trainer.step}: the processes' weights have drifted apart, by a fault of a "
                           "machine or of the code; not saved, the same command goes on from last.pt")


class Signals:
    """`with Signals() as signals`: signals.caught is 0, or the number of the SIGINT or SIGTERM that came.

    A second one ends the process at once; among several processes only a second later, for torchrun and the
    cluster may both send the first. Outside of the main thread it catches none. Needs: nothing.
    """
    def __init__(self, rank=0, world=1):
        self.rank, self.patience, self.caught, self.since, self.before = rank, world > 1, 0, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        if not self.caught:
            self.caught, self.since = number, time.monotonic()
            if self.rank == 0:                                  # print may not be called in a handler
                os.write(2, b"\nvaegan.py: saves after this step, then stops; once more: stops at once\n")
        elif time.monotonic() - self.since >= self.patience:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def outlive_signals(worker):
    """For a loader's process: a first signal is for the process that trains, which then still needs batches.
    Needs: Signals."""
    Signals(rank=1, world=2).__enter__()


def flag_words(name, value):
    """A field of Config as the words of a command line. Needs: flag_of."""
    values = [] if value is True else value if isinstance(value, tuple) else [value]
    return [flag_of("no_" + name)] if value is False else [flag_of(name), *map(str, values)]


def words_beside(usual, cfg, but):
    """The flags in which a Config differs from another one, as words; those named in `but` left out.

    Needs: flag_words.
    """
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in but}
    return [word for name, value in values.items() if value != getattr(usual, name)
            for word in flag_words(name, value)]


def command_line(cfg):
    """The command that goes on with this run; --init counted at its start. Needs: Config, words_beside."""
    words = words_beside(Config.of(cfg.preset), cfg, but=("resume", "init"))
    ranks = os.environ.get("LOCAL_WORLD_SIZE")                  # set by torchrun
    program = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    script = sys.argv[0] if os.path.basename(sys.argv[0]) == "vaegan.py" else "vaegan.py"
    return shlex.join([*program, script, "train", "--preset", cfg.preset, *words])


def launch(cfg):
    """-> device, rank, number of processes. Under torchrun it joins the others. Needs: UsageError."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(k for k in there if there[k]) if cfg.device == "auto" else cfg.device
    if not there[kind]:
        raise UsageError(f"--device {kind}: there is none on this machine; take --device auto or cpu")
    if kind == "cuda":
        torch.backends.cudnn.benchmark = True                   # the shapes stay the same
        torch.set_float32_matmul_precision("high")              # TF32, as convolutions have it by default
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(kind), 0, 1
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))        # after a restart it still holds the old
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":          # addresses (torch 2.15); nodes count apart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(minutes=30))
    return device, rank, world


def suited(precision, kind):
    """-> a run's precision and whether its Adam is fused, on a kind of device. Needs: nothing."""
    if precision == "auto":
        bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if kind != "cuda" else "bf16" if bf16 else "fp16"
    return precision, kind != "mps"


def autoencoder(cfg):
    """The AutoencoderKL of a Config, embed_dim = z_channels as in kl-f8. Needs: AutoencoderKL."""
    return AutoencoderKL(3, cfg.ch, cfg.ch_mult, cfg.num_res_blocks, cfg.z_channels, cfg.z_channels,
                         cfg.recompute)


def open_data(cfg):
    """-> training set, held-out set. Needs: ImageFolder, DeadLeaves."""
    if not cfg.data:
        return DeadLeaves(cfg.image_size, cfg.seed), DeadLeaves(cfg.image_size, cfg.seed + 1, length=64)
    hold_out = 0 if cfg.val else 20
    return (ImageFolder(cfg.data, cfg.image_size, True, cfg.seed, hold_out),
            ImageFolder(cfg.val or cfg.data, cfg.image_size, False, cfg.seed, hold_out))


def make_folder(flag, path):
    """Make a folder, or say which flag cannot have it. Needs: UsageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag}: cannot make {path}: {error.strerror}; choose another folder") from None


@contextlib.contextmanager
def writing(path):
    """Say in one line what cannot be written, and the way out. Needs: RunError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__      # torch.save hides it there
        if not isinstance(cause, OSError):
            raise
        raise RunError(f"{path} cannot be written: {cause.strerror or cause}. What was there is as it was; "
                       "once this is mended, the same command goes on from the last save") from None


def write_whole(path, write):
    """write(a binary file beside `path`), flush it to the disk, rename it: `path` is whole at any moment.

    Needs: writing.
    """
    beside = path.with_name(path.name + ".unfinished")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:                                   # on a full disk it would be in the way
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def second_name(path, name):
    """Make `name` the same file, at no cost; a copy where the disk has no hard links. Needs: write_whole,
    writing."""
    beside = name.with_name(name.name + ".unfinished")
    with writing(name):
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:
            with open(path, "rb") as source:
                return write_whole(name, functools.partial(shutil.copyfileobj, source))
        os.replace(beside, name)
        beside.unlink(missing_ok=True)                          # where it was the same file already


@contextlib.contextmanager
def claimed(out):
    """Make the run's folder and hold its lock, which ends with the process however that ends.

    Not flock, which a loader's process would inherit and keep for a while. Needs: UsageError, make_folder,
    writing.
    """
    make_folder("--out", out)
    try:
        import fcntl
    except ImportError:                                         # Windows
        yield
        return
    with writing(out / "lock"):
        file = open(out / "lock", "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):              # EAGAIN, EACCES: another process has it
            file.seek(0)
            raise UsageError(f"--out {out}: {file.read().strip()} trains there; wait until it has ended, or "
                             "take another --out") from None
        except OSError as error:
            tqdm.write(f"{out}: no lock, on this disk: {error.strerror}; keep other runs away from it")
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
        file.flush()
    with file:
        yield


def saves(out):
    """The checkpoints of a run that are there, the one to go on from first. Needs: nothing."""
    names = "last.pt", "previous.pt", "healthy.pt", "best.pt"
    return [out / name for name in names if (out / name).exists()]


def resume(trainer, out, say):
    """Continue from the first of its saves that can be read -> its path, or None if there are none.

    Needs: load, saves, UsageError.
    """
    problems = []
    for path in saves(out):
        try:
            checkpoint = load(path)
        except UsageError as problem:
            problems.append(problem)
            continue
        changes = trainer.restore(path, checkpoint)
        for problem in problems:
            say(str(problem))
        say(f"{out}: continues after step {trainer.step} of {trainer.cfg.steps}"
            f"{'' if path.name == 'last.pt' else f', from {path.name}'}{changes}")
        return path
    if problems:
        raise problems[0]


def open_folder(out, trainer, path):
    """Ready the run's folder for going on from `path`, or anew if that is None.

    Needs: keep_records, save_json, second_name, writing.
    """
    with writing(out):
        (out / "samples").mkdir(exist_ok=True)
        for left in [*out.glob("*.unfinished"), *out.glob("samples/*.unfinished")]:
            left.unlink()
        if path is None:
            for old in ("last.pt", "previous.pt", "best.pt", "healthy.pt", "collapse.json", "collapse.png"):
                (out / old).unlink(missing_ok=True)
        elif path.name != "last.pt":
            if (out / "last.pt").exists():
                os.replace(out / "last.pt", out / "last.pt.broken")
            second_name(path, out / "last.pt")
        keep_records(out, trainer.step)
        save_json(asdict(trainer.cfg), out / "config.json")
        if not (out / "healthy.pt").exists():
            trainer.save(out / "healthy.pt")


def save_last(trainer, out):
    """Write last.pt; the one before is previous.pt then. Needs: second_name."""
    if (out / "last.pt").exists():
        second_name(out / "last.pt", out / "previous.pt")
    trainer.save(out / "last.pt")


def keep_records(out, step):
    """Cut log.jsonl after a step; keep whole lines only, and the first of each step. Needs: write_whole."""
    log, records = out / "log.jsonl", {}
    for line in log.read_bytes().splitlines() if step and log.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            at = json.loads(line)["step"]
            if at <= step:
                records.setdefault(at, line + b"\n")
    write_whole(log, lambda file: file.writelines(records.values()))


def add_record(log, record):
    """Append one line to log.jsonl. Needs: writing."""
    record = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in record.items()}
    with writing(log), open(log, "a") as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def tensorboard(folder, trainer):
    """-> board(record, picture), which shows a record's numbers and (3, H, W) in [-1, 1], or None, in
    TensorBoard; it does nothing where that is not installed, and on ranks but 0. Needs: writing."""
    writer = None
    if trainer.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder, purge_step=trainer.step + 1)         # later steps are void now
        except ImportError:
            pass
        except Exception as error:                              # what it imports may be broken
            tqdm.write(f"goes on without TensorBoard: {error}")

    def board(record, picture):
        if not writer:
            return
        with writing(folder):
            for name, value in record.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, record["step"])
            if picture is not None:
                writer.add_image("samples", (picture.clamp(-1, 1) + 1) / 2, record["step"])
            writer.flush()

    try:
        yield board
    finally:
        with contextlib.suppress(OSError):                      # all is flushed, or has been complained of
            if writer:
                writer.close()


def batches(trainer, dataset):
    """This process' batches, from the image on that comes next: endless, (B, 3, H, W) uint8 each, so that no
    process can run out of them before another. Needs: outlive_signals, UsageError."""
    size, stride = trainer.cfg.batch_size, trainer.world * trainer.cfg.batch_size
    indices = (range(i, i + size) for i in itertools.count(trainer.drawn + trainer.rank * size, stride))
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=indices, num_workers=trainer.cfg.workers, worker_init_fn=outlive_signals,
        pin_memory=trainer.device.type == "cuda"))
    try:
        yield from loader
    except UsageError as error:
        line = str(error).split("UsageError: ")[-1].strip()     # a loader's process adds its traceback
        if trainer.rank:                                        # rank 0 says what all find out, this is ours
            tqdm.write(f"vaegan.py: {line}", file=sys.stderr)
        raise UsageError(line) from None
    finally:
        if trainer.cfg.workers:                                 # else they end when garbage is collected, in
            loader._shutdown_workers()                          # 5 s each; there is no public name for it


def same_kind(name, state, wanted):
    """Raise ValueError naming a key that is missing or too many, or a value of another shape or type. An
    empty dict stands for any dict, None for anything. Needs: nothing."""
    if wanted is None:
        return
    kinds = dict, torch.Tensor, (int, float), type(wanted)
    kind = next(kind for kind in kinds if isinstance(wanted, kind))
    if not isinstance(state, kind):
        raise ValueError(f"{name}: {type(state).__name__}, not {type(wanted).__name__}")
    if kind == torch.Tensor and state.shape != wanted.shape:
        raise ValueError(f"{name}: shape {[*state.shape]}, not {[*wanted.shape]}")
    if kind == dict and wanted:
        for what, keys in (("without", {*wanted} - {*state}), ("unknown", {*state} - {*wanted})):
            if keys:
                raise ValueError(f"{name}: {what} {', '.join(sorted(map(str, keys)))}"[:300])
        for key in wanted:
            same_kind(f"{name}.{key}", state[key], wanted[key])


def plain(path):
    """What torch.save wrote, as tensors and plain values: a file cannot run code. Raises ValueError with the
    reason. Needs: nothing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))           # torch's advice is to switch the safety off
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise ValueError(f"it would run {code[1]}" if code else
                         f"cut short, or not one at all: {text.splitlines()[0]}") from None


def load(path):
    """A checkpoint of vaegan.py. Needs: UsageError, plain, same_kind."""
    try:
        checkpoint = plain(path)
        wanted = dict(state_dict={}, config={}, step=0, best=[], scaling_factor=None, latent_mean=None,
                      latent_std=None, training={})
        same_kind("checkpoint", checkpoint, wanted)
    except ValueError as error:
        raise UsageError(f"{path}: no checkpoint of vaegan.py ({error}); give a last.pt or best.pt, or move "
                         "this file away") from None
    return checkpoint


def foreign(path):
    """As plain, for other programs' files: an object of a class that torch does not know for data, such as
    Lightning's callbacks in a .ckpt, becomes an empty one. Nothing of it runs. Containers of such classes are
    refused all the same. Needs: plain."""
    class Nothing:
        def __init__(self, *arguments):
            pass

        def __setstate__(self, state):
            pass

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                                           # plain says why
        names = []
    with torch.serialization.safe_globals([(Nothing, name) for name in names]):
        return plain(path)


def compvis_names(names):
    """{a parameter's name, CompVis' or diffusers': CompVis' name of it}. Needs: nothing."""
    top = max((int(n) for name in names for n in re.findall(r"up_blocks\.(\d+)", name)), default=0)
    table = (                                                   # diffusers', CompVis'
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"up_blocks\.(\d+)", lambda found: f"up.{top - int(found[1])}"), (r"down_blocks", "down"),
        (r"\.resnets\.", ".block."), (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"attn_1.\1."),
        (r"attn_1\.(?:to_out\.0|proj_attn)", "attn_1.proj_out"), (r"attn_1\.group_norm", "attn_1.norm"))
    return {name: functools.reduce(lambda text, row: re.sub(*row, text), table, name) for name in names}


def released(path):
    """-> the weights of a KL autoencoder, {CompVis' name: tensor}; its widths, as Config names them; and what
    a file of ours says beside them: dict(config, step, scaling_factor, latent_mean, latent_std).

    Reads .safetensors and what torch.save wrote, as weights only. Names may be CompVis' or diffusers', bare
    or below first_stage_model. or vae., as in a file of all of Stable Diffusion, whose other parts are left
    out, as are loss.* and model_ema.*. Raises UsageError that names what is missing, unknown or misshapen.
    Needs: UsageError, AutoencoderKL, compvis_names, foreign, same_kind.
    """
    about = dict(config={}, step=None, scaling_factor=None, latent_mean=None, latent_std=None)
    try:
        if str(path).endswith(".safetensors"):
            from safetensors import safe_open
            file = safe_open(path, "pt")                        # reads what is asked for, later
            names, get, said = file.keys(), file.get_tensor, file.metadata() or {}
            said = {name: json.loads(said[name]) for name in about} if about.keys() <= said.keys() else {}
        else:
            said = foreign(path)
            weights = said.get("state_dict", said)
            names, get = weights.keys(), weights.get
        about |= {name: said[name] for name in about if about.keys() <= said.keys()}    # else another's
        key = "decoder.conv_out.weight"
        prefix = next((p for p in ("", "first_stage_model.", "vae.") if p + key in names), None)
        if prefix is None:
            raise ValueError(f"without {key}")
        names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        ours = compvis_names([name for name in names if not name.startswith(("loss.", "model_ema."))])
        state = {ours[name]: get(prefix + name) for name in ours}
        state |= {name: weight[..., None, None] for name, weight in state.items()   # diffusers' attention:
                  if ".attn_1." in name and weight.dim() == 2}                      # (C, C) -> (C, C, 1, 1)
        ch, z_channels = len(state["encoder.conv_in.weight"]), state["decoder.conv_in.weight"].shape[1]
        blocks = re.findall(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", " ".join(state))
        levels, num_res_blocks = (1 + max(map(int, numbers)) for numbers in zip(*blocks))
        mult = tuple(len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(levels))
        widths = dict(ch=ch, ch_mult=mult, num_res_blocks=num_res_blocks, z_channels=z_channels)
        with torch.device("meta"):
            wanted = AutoencoderKL(**widths, embed_dim=z_channels).state_dict()
        same_kind("weights", state, wanted)
    except ImportError:
        raise UsageError(f"{path}: to read it takes `pip install safetensors`") from None
    except Exception as error:                                  # whatever stands in the file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{path}: no KL autoencoder ({reason}); give Stable Diffusion's as .safetensors, or "
                         "a save of vaegan.py") from None
    return state, widths, about


def json_text(content):
    """Plain values as JSON that reads well. Needs: nothing."""
    return json.dumps(content, indent=1) + "\n"


def save_json(content, path):
    """Write plain values as JSON. Needs: json_text, write_whole."""
    write_whole(path, lambda file: file.write(json_text(content).encode()))


def save_png(image, path):
    """Write (3, H, W) in [-1, 1] as PNG. Needs: write_whole, the package pillow."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    write_whole(path, functools.partial(Image.fromarray(pixels.permute(1, 2, 0).numpy()).save, format="PNG"))


@torch.no_grad()
def save_pairs(vae, x, path):
    """A picture of the images x, (n, 3, H, W), above their reconstructions. Needs: save_png."""
    rows = [torch.cat(list(images), dim=2) for images in (x, vae(x, sample=False)[0])]
    picture = torch.cat(rows, dim=1)                            # (3, 2·H, n·W)
    save_png(picture, path)
    return picture


@torch.no_grad()
def save_collapse(error, monitor, rows, out):
    """collapse.json: the error and the limits. collapse.png: rows, {label: (n, 3, H, W)}, and with matplotlib
    the signs of the last 200 steps as multiples of their limits. Needs: save_json, save_png, write_whole."""
    save_json(vars(error) | dict(limits=monitor.limits, up=monitor.since), out / "collapse.json")
    picture = torch.cat([torch.cat(list(images[:4]), dim=2) for images in rows.values()], dim=1)
    save_png(picture, out / "collapse.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(Image.open(out / "collapse.png"), interpolation="nearest")
    height = picture.shape[1] / len(rows)
    left.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(rows))
    left.set_xticks([])
    right.axhline(1, color="red", linewidth=3, label="limit")
    for sign, pairs in error.history.items():
        steps, values = [step for step, _ in pairs], [value / monitor.limits[sign] for _, value in pairs]
        line = dict(linewidth=2, label=sign) if sign in monitor.since else dict(linewidth=0.7, color="silver")
        right.plot(steps, [min(max(value, 0.1), 100) for value in values], **line)
    right.set(yscale="log", ylim=(0.1, None), xlabel="step", ylabel="sign / its limit (grey: below it)")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    right.legend(loc="upper left")
    figure.suptitle(str(error), ha="left", x=0.01)
    write_whole(out / "collapse.png", functools.partial(figure.savefig, format="png", dpi=80))


def read(rows, scaled=False):
    """[(step, terms)] -> {step: {term: number}}, means over ranks and a step's batches, in one transfer.

    scaled: leaves out gradients that are not finite, for fp16's scaler skips such steps.
    Needs: average_over_ranks, average.
    """
    values = torch.stack([value.float() for _, terms in rows for value in terms.values()])
    values, steps = iter(average_over_ranks(values).tolist()), {}
    for step, terms in rows:
        numbers = {name: next(values) for name in terms}
        steps.setdefault(step, []).append({
            name: value for name, value in numbers.items()
            if math.isfinite(value) or not (scaled and name.startswith(("grad_", "lam", "w")))})
    return {step: average(numbers) for step, numbers in steps.items()}


def average(dicts):
    """Of dicts of numbers: each name's mean over those that have it. Needs: nothing."""
    names = {name: None for numbers in dicts for name in numbers}
    values = {name: [numbers[name] for numbers in dicts if name in numbers] for name in names}
    return {name: sum(values[name]) / len(values[name]) for name in names}


# ---- Measures, of images in [-1, 1]: one number an image, (B,). By hand, as a package of metrics would be a
# fifth one to install, for a dozen lines.


def psnr(x, x_hat):
    """10·log10(1/MSE) in dB, of images scaled to [0, 1]; 100 dB if equal. Needs: nothing."""
    return -10 * torch.log10(((x - x_hat) / 2).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10))


def ssim(x, x_hat):
    """Structural similarity, 1 if equal: the mean over channels and whole windows; for 11 px and more.

    Source: Wang et al. 2004, eq. 13: Gaussian window of 11 px, σ 1.5, K 0.01, 0.03, range 1. Needs: nothing.
    """
    x, y = (x + 1) / 2, (x_hat + 1) / 2
    window = torch.exp(-torch.arange(-5, 6).to(x) ** 2 / (2 * 1.5 ** 2))
    kernel = (torch.outer(window, window) / window.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    blur = functools.partial(F.conv2d, weight=kernel, groups=x.shape[1])
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean(dim=(1, 2, 3))


def high_frequency_energy(x):
    """Spectral energy above half of Nyquist, a mean over all values. A Hann window hides the jump from one
    border to the opposite one. Needs: nothing."""
    h, w = x.shape[-2:]
    place = dict(dtype=x.dtype, device=x.device)                # a copy from the host would wait for the GPU
    window = torch.outer(*(torch.hann_window(n, False, **place) for n in (h, w)))
    frequency = torch.hypot(torch.fft.fftfreq(h, **place)[:, None], torch.fft.fftfreq(w, **place))
    spectrum = torch.fft.fft2(x * window, norm="ortho").abs().pow(2)
    return (spectrum * (frequency > 0.25)).mean(dim=(1, 2, 3))                      # cycles a pixel


@torch.no_grad()
def evaluate(vae, dataset, device="cpu", perceptual=None, batch_size=8, every=1, save_to=""):
    """Measure the reconstructions (decoded means, clamped to [-1, 1]) of one in `every` of a dataset of uint8
    images, and the latents (samples z of the posteriors) of all -> dict:

    images, how many were decoded; psnr, dB; ssim; lpips, with `perceptual` only; kl_dim, nats a latent
    dimension; sharpness, high-frequency energy of x̂ over that of x, over all images: 1 is as sharp;
    scaling_factor, 1/std of z over all values, by which a diffusion model multiplies it (Rombach et al. 2022,
    appendix G): 0.18215 for Stable Diffusion; latent_mean, latent_std, lists of a number a channel. save_to:
    folder for input/ and reconstruction/*.png.
    Needs: to_model, psnr, ssim, high_frequency_energy, save_png, make_folder.
    """
    for name in ("input", "reconstruction") if save_to else ():
        make_folder("--save", Path(save_to, name))
    noise, moments, seen, sums, count = torch.Generator(device).manual_seed(0), 0.0, 0, {}, 0
    for images in torch.utils.data.DataLoader(dataset, batch_size):
        x = to_model(images, device)
        posterior = vae.encode(x)
        z = posterior.sample(noise).cpu().double()                                      # (B, C, h, w)
        moments = moments + torch.stack([z, z ** 2]).sum(dim=(1, 3, 4))                 # (2, C)
        some, seen = [i for i in range(len(x)) if (seen + i) % every == 0], seen + len(x)
        if not some:
            continue
        x, x_hat = x[some], vae.decode(posterior.mode()[some]).clamp(-1, 1)
        values = dict(psnr=psnr(x, x_hat), ssim=ssim(x, x_hat), kl_dim=posterior.kl()[some] / z[0].numel(),
                      high=high_frequency_energy(x), high_hat=high_frequency_energy(x_hat))
        if perceptual:
            values["lpips"] = perceptual(x, x_hat)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + sum(value.tolist())
        for name, batch in dict(input=x, reconstruction=x_hat).items() if save_to else ():
            for i, image in enumerate(batch, count):
                save_png(image, Path(save_to, name, f"{i:06d}.png"))
        count += len(x)
    mean = {name: total / count for name, total in sums.items()}
    sharpness = mean.pop("high_hat") / mean.pop("high")
    z_mean, z_square = moments / (seen * z[0, 0].numel())                               # (C,) each
    std = float((z_square.mean() - z_mean.mean() ** 2).clamp(min=1e-20).sqrt())
    return dict(images=count, **mean, sharpness=sharpness, scaling_factor=1 / std,
                latent_mean=z_mean.tolist(),
                latent_std=(z_square - z_mean ** 2).clamp(min=0).sqrt().tolist())


# ---- What an update costs, and where.


def peak_memory(device, reset=False):
    """Bytes in use at most since the last reset: of a CUDA GPU, or of this process where Linux tells, else 0.

    Needs: nothing.
    """
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated()
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):                                # no such file, or no such line
        return 0


def measure(run, device, weights=(), patience=3.0):
    """-> of run(): seconds, a mean of 3 to 50 runs, for `patience` seconds; FLOP, two for each multiplication
    in a convolution or matrix product; bytes that autograd keeps, without `weights`; bytes in use at the
    peak. FLOP and what is kept are those of uncompiled code. Needs: peak_memory."""
    kept, counter = {}, FlopCounterMode(display=False)
    no_tracker = SimpleNamespace(parents={"Global"}, __enter__=bool, __exit__=bool)
    counter.mod_tracker = no_tracker                            # its own one cannot bear autograd.grad
    synchronize = torch.cuda.synchronize if device.type == "cuda" else bool

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def seconds(times):
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        synchronize()
        return (time.perf_counter() - start) / times

    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.compiler.set_stance("force_eager"):
            run()
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    run()                                                       # compiles, or chooses algorithms
    peak_memory(device, reset=True)
    took = seconds(max(3, min(50, int(patience / seconds(1)))))
    return took, counter.get_total_flops(), sum(kept.values()), peak_memory(device)


def matrix_peak(device, dtype):
    """FLOP a second of a matrix product or convolution, whichever is faster. Needs: measure, peak_memory."""
    n, place = 8 if device.type == "cuda" else 1, dict(device=device, dtype=dtype)
    a, b, weight = (torch.randn(shape, **place) for shape in (
        (1024 * n, 1024 * n), (2 * n, 256, 64, 64), (256, 256, 3, 3)))
    b, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (b, weight))
    runs = [measure(run, device) for run in (lambda: a @ a, lambda: F.conv2d(b, weight))]
    return max(flop / seconds for seconds, flop, *_ in runs)


def bench(cfg):
    """`python vaegan.py bench`: print what an update from one batch costs, and its stages, each forward and
    backward. Needs: all of the file."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("bench: measures one process; start it with python instead of torchrun")
    device, train_set = launch(cfg)[0], open_data(cfg)[0]
    trainer = Trainer(replace(cfg, accumulate=1, disc_lead=0, disc_ramp=0), device)
    trainer.compile(print)
    vae, disc, perceptual, amp = trainer.vae, trainer.disc, trainer.perceptual, trainer.amp
    weights = [p for net in (vae, disc, perceptual) if net for p in net.parameters()]
    peak = matrix_peak(device, trainer.amp.args[1] or torch.float32)
    images = torch.randint(256, (cfg.batch_size, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
    images = images.pin_memory() if device.type == "cuda" else images
    seconds = {}

    def row(name, run):
        seconds[name], flop, kept, most = measure(run, device, weights)
        kept = "" if "update" in name else f"{kept / 2 ** 20:.4g}"      # there graphs follow one another
        cells = (name, f"{seconds[name] * 1e3:.4g}", f"{seconds[name] / seconds['update']:.0%}",
                 f"{flop / 1e9:.4g}", f"{flop / seconds[name] / peak:.0%}", kept, f"{most / 2 ** 20:.0f}")
        print("|", " | ".join(cells), "|", flush=True)

    def update(step, disc_start=0):
        trainer.warm_up.start = disc_start
        return trainer.update(step, itertools.repeat(images))[0]

    def stage(forward, inputs):
        def run():
            with amp():
                value = forward()
            if value.requires_grad:                             # a frozen encoder's does not
                torch.autograd.grad(value, inputs)
        return run

    def watch():
        rows = [(step, terms | (trainer.look(step, x, x_hat) if (step + 1) % trainer.look_every == 0 else {}))
                for step in range(50)]
        for step, numbers in read(rows).items():
            trainer.monitor.observe(step, numbers)

    start = time.perf_counter()
    terms = update(1)
    read([(1, terms)])                                          # waits for the device
    first = time.perf_counter() - start
    print(f"{cfg.preset}: ch {cfg.ch}, {cfg.image_size} px, batch {cfg.batch_size}, {trainer.precision}; "
          + (torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads")
          + f"; torch {torch.__version__}; matrix peak {peak / 1e12:.3g} TFLOP/s; first update {first:.1f} s"
          "\n\n| forward and backward | ms | of the update | GFLOP | of the peak | saved, MiB | peak, MiB |\n"
          "|---|---|---|---|---|---|---|")
    row("update", lambda: update(1))
    row("update before the GAN", lambda: update(1, disc_start=2))
    if cfg.r1 and cfg.disc_weight:
        row("update with R1", lambda: update(16))
    x = to_model(images, device)
    x_hat = x.clone().requires_grad_()
    with torch.no_grad(), amp(), torch.compiler.set_stance("force_eager"):
        z = vae.encode(x).mode()
        h = vae.decoder.body(vae.post_quant_conv(z))            # x̂ = conv_out(h)
    z.requires_grad_()
    row("encoder", stage(lambda: vae.encode(x).kl().sum(), trainer.weights["enc"]))
    row("decoder", stage(lambda: vae.decode(z).sum(), [z, *trainer.weights["dec"]]))
    if perceptual:
        row("LPIPS", stage(lambda: perceptual(x, x_hat).mean(), [x_hat]))
    if cfg.disc_weight:
        row("D, for the decoder", stage(lambda: hinge_g_loss(disc(x_hat)), [x_hat]))
        row("λ", lambda: [last_layer_gradient(vae.decoder.conv_out, h, g).norm() for g in (x, x)])
        row("D, its own step", lambda: trainer.disc_step(x, x_hat))
    row("optimisers, average", lambda: trainer.optimise(1, cfg.disc_weight > 0, {}))
    row("monitor, for 50 steps", watch)
    with contextlib.closing(batches(trainer, train_set)) as loader:
        for _ in range(2 * cfg.workers):                        # what has been loaded ahead
            next(loader)
        seconds["loader"] = measure(lambda: next(loader), device)[0]
    print("\nimages/s: " + ", ".join(f"{name} {cfg.batch_size / seconds[name]:.4g}" for name in (
        "update", "update before the GAN", "loader")) + f" with --workers {cfg.workers}")


# ---- Roads not taken: other losses in the hinge GAN's place, by their definitions; ablate compares them.


def non_saturating_d_loss(logits_real, logits_fake):
    """½ E[softplus(-D(x))] + ½ E[softplus(D(x̂))]: ln 2 if D tells nothing apart, 0 if it has won.

    Source: Goodfellow et al. 2014, eq. 1, as softplus(-a) is -log sigmoid(a); ½ as for the hinge. Logits of
    any shape -> their mean. Needs: nothing.
    """
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_g_loss(logits_fake):
    """E[softplus(-D(x̂))], whose gradient stays where D has won. Logits of any shape -> scalar.

    Source: Goodfellow et al. 2014, §3. Needs: nothing.
    """
    return F.softplus(-logits_fake).mean()


def wasserstein_d_loss(logits_real, logits_fake):
    """E[D(x̂)] - E[D(x)], to be used with gradient_penalty; the decoder's loss is hinge_g_loss.

    Source: Gulrajani et al. 2017, eq. 3. Logits of any shape -> scalar. Needs: nothing.
    """
    return logits_fake.mean() - logits_real.mean()


def gradient_penalty(disc, x, x_hat, generator=None):
    """E(‖∇D(x̃)‖ - 1)² at random points x̃ between x and x̂, D(x̃) being an image's mean logit. L_D gets ten
    times as much.

    Source: Gulrajani et al. 2017, eq. 3. x, x_hat: (B, 3, H, W) -> scalar with a graph to D's weights. D must
    have no batch statistics. Needs: nothing.
    """
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    between = (u * x + (1 - u) * x_hat).detach().requires_grad_()
    value = disc(between).reshape(len(x), -1).mean(1)
    gradient, = torch.autograd.grad(value.sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()


def focal_frequency_loss(x, x_hat, alpha=1.0):
    """Mean over frequencies of w·|F(x) - F(x̂)|², F the orthonormal 2-D Fourier transform of a channel, w =
    |F(x) - F(x̂)|^alpha over its maximum, a constant: what is worst reconstructed counts most.

    Source: Jiang et al. 2021, eq. 8 and 9. x, x_hat: (B, C, H, W) -> (B,). Needs: nothing.
    """
    square = torch.view_as_real(torch.fft.fft2(x - x_hat, norm="ortho")).pow(2).sum(-1)     # (B, C, H, W)
    w = square.detach() ** (alpha / 2)
    w = w / w.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (w * square).mean(dim=(1, 2, 3))


def gram_loss(features, features_hat):
    """Σ over layers of ‖G - Ĝ‖², G = f·fᵀ/(h·w) of features f, (B, C, h·w): which features come together,
    wherever they are.

    Source: Gatys et al. 2016, eq. 3 to 5, but a mean over positions, without eq. 4's 1/(4·C²), for features
    of unit length such as those of Perceptual.features. Lists of (B, C, h, w) -> (B,). Needs: nothing.
    """
    gram = lambda f: f.flatten(2) @ f.flatten(2).transpose(1, 2) / f[0, 0].numel()          # (B, C, C)
    return sum((gram(f) - gram(f_hat)).pow(2).sum(dim=(1, 2)) for f, f_hat in zip(features, features_hat))


def sobel_loss(x, x_hat):
    """Mean |S(x) - S(x̂)| over Sobel's two derivatives, horizontal and vertical: that of a ramp is its slope.

    Source: Sobel & Feldman 1968. x, x_hat: (B, C, H, W) -> (B,). Needs: nothing.
    """
    smooth, slope = x.new_tensor([1.0, 2.0, 1.0]) / 4, x.new_tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]    # (2, 1, 3, 3)
    difference = (x - x_hat).flatten(0, 1)[:, None]                                     # (B·C, 1, H, W)
    return F.conv2d(difference, kernels).abs().unflatten(0, x.shape[:2]).mean(dim=(1, 2, 3, 4))


def take_road(trainer, road):
    """Let a Trainer train otherwise than with the hinge GAN, on a road of `variants` or a --gan.

    Needs: non_saturating_d_loss, non_saturating_g_loss, wasserstein_d_loss, gradient_penalty,
    focal_frequency_loss, gram_loss, sobel_loss.
    """
    disc, perceptual = trainer.disc, trainer.perceptual
    if road in ("no-spectral-norm", "wgan-gp"):                 # there the penalty alone bounds D's slope
        disc.spectral = False
    if road == "wgan-gp":                                       # 10: Gulrajani et al. 2017, §4; who take five
        trainer.d_loss = wasserstein_d_loss                     # steps of D an update, here it is one
        trainer.penalty = lambda x, x_hat: 10 * gradient_penalty(disc, x, x_hat, trainer.noise)
    if road == "ns":
        trainer.d_loss = non_saturating_d_loss
        trainer.texture = lambda x, x_hat: non_saturating_g_loss(disc(x_hat))
    if road in ("focal", "gram", "sobel"):                      # in the place of the GAN, so without D
        gram = lambda x, x_hat: gram_loss(perceptual.features(x), perceptual.features(x_hat))
        loss = dict(focal=focal_frequency_loss, gram=gram, sobel=sobel_loss)[road]
        trainer.d_loss, trainer.texture = None, lambda x, x_hat: loss(x, x_hat).mean()


def variants():
    """{group: {name: (flags beside the full recipe's, road)}}: what `ablate` compares. Needs: nothing."""
    no_gan, no_lpips, free = dict(disc_weight=0.0), dict(perceptual_weight=0.0), dict(adaptive=False)
    full, cold = ({}, ""), dict(disc_start=0, disc_lead=0, disc_ramp=0)
    return {
        "what each loss buys": {
            "l2": (no_gan | no_lpips | dict(pixel_loss="l2"), ""), "l1": (no_gan | no_lpips, ""),
            "l1+lpips": (no_gan, ""), "full": full},
        "other ways to texture, in the GAN's place": {
            "full": full, "ns": (dict(gan="ns"), ""), "wgan-gp": (dict(gan="wgan-gp"), ""),
            "focal": ({}, "focal"), "gram": ({}, "gram"), "sobel": ({}, "sobel")},
        "what keeps it stable": {
            "full": full, "no-warm-up": (cold, ""), "no-lambda-1": (free | dict(disc_weight=1.0), ""),
            "no-lambda-10": (free | dict(disc_weight=10.0), ""),
            "neither-1": (cold | free | dict(disc_weight=1.0), ""),
            "neither-10": (cold | free | dict(disc_weight=10.0), ""),
            "no-spectral-norm": ({}, "no-spectral-norm"), "no-clip": (dict(clip=0.0), ""),
            "no-lpips": (no_lpips, ""), "r1": (dict(r1=10.0), ""),
            "no-ramp": (dict(disc_lead=0, disc_ramp=0), "")}}


def telling(images):
    """Of images, (n, 3, H, W): the indices of one that is steep all over, one that is so in few places, and
    the flattest: texture, edges, smooth. Needs: nothing."""
    grey = images.mean(1)                                       # (n, H, W)
    slope = torch.hypot(grey.diff(dim=1)[:, :, 1:], grey.diff(dim=2)[:, 1:]).flatten(1)
    mean, median = slope.mean(1), slope.median(1).values        # (n,)
    return [int(score.argmax()) for score in (median, mean - median, -mean)]


def measure_run(trainer, dataset, judge, folder):
    """A run that has ended, for ablate -> dict of numbers, None where there is nothing to measure, and of the
    first collapse, in words; writes crops.png: three images above their reconstructions.

    Lowest and largest signs are of the steps after a sixth of all, when a cold start has learnt something.
    Needs: all of the file.
    """
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [re.search(r"collapse at step (\d+): (\w+)", record.get("event", "")) for record in records]
    later = [record for record in records if record["step"] > trainer.cfg.steps // 6]

    def of(summary, key, records=records):
        values = [record[key] for record in records if key in record]
        return summary(values) if values else None

    images = to_model(torch.stack([dataset[i] for i in range(len(dataset))]), trainer.device)
    save_pairs(trainer.average, images[telling(images)], folder / "crops.png")
    measured = evaluate(trainer.average, dataset, trainer.device, judge)
    x, disc_ms = images[:trainer.cfg.batch_size], None
    if trainer.cfg.disc_weight and trainer.d_loss:
        x_hat = trainer.average(x)[0].detach()
        disc_ms = 1e3 * measure(lambda: trainer.disc_step(x, x_hat), trainer.device, patience=1.0)[0]
    return dict(
        {key: measured.get(key) for key in ("psnr", "ssim", "lpips", "sharpness", "kl_dim")},
        grad_norm_dec=of(statistics.median, "grad_norm_dec"), grad_norm_dec_max=of(max, "grad_norm_dec"),
        grad_ratio_max=of(max, "grad_ratio"), d_acc=of(statistics.median, "d_acc"), disc_ms=disc_ms,
        other_z_min=of(min, "other_z", later), kl_dim_min=of(min, "kl_dim", later),
        lipschitz_max=of(max, "lipschitz", later),
        steps_per_s=of(statistics.median, "images_per_s") / trainer.images_an_update,
        collapsed=next((f"{match[2]} at {match[1]}" for match in found if match), ""))


def ablation_table(done):
    """The content of ablation.json as Markdown: two tables, mean ± standard deviation (n - 1) over seeds.
    "beside full": of the differences from the full recipe, seed by seed.

    Needs: variants, flag_words.
    """
    tables = (
        dict(psnr=("PSNR, dB", ".1f"), psnr_beside=("beside full", "+.1f"), ssim=("SSIM", ".3f"),
             lpips=("LPIPS ↓", ".3f"), lpips_beside=("beside full", "+.3f"),
             sharpness=("sharpness, x̂ / x", ".3f"), kl_dim=("KL a dimension", ".2f"),
             flags=("what it is", "")),
        dict(grad_norm_dec=("‖∇dec‖, median", ".2f"), grad_norm_dec_max=("largest", ".1f"),
             grad_ratio_max=("largest ∇adv/∇rec", ".1f"), d_acc=("D right", ".2f"),
             other_z_min=("lowest error, other z / own", ".2f"), kl_dim_min=("lowest KL", ".1f"),
             lipschitz_max=("largest slope of the decoder", ".2f"),
             steps_per_s=("steps/s", ".1f"), disc_ms=("D's step, ms", ".1f"),
             collapsed=("collapsed: sign and step", "")))

    def cell(name, flags, key, digits):
        if key == "flags":
            words = " ".join(word for item in flags.items() for word in flag_words(*item))
            return f"`{words}`" if words else {
                "full": "L1, LPIPS, hinge GAN", "focal": "`focal_frequency_loss` in the GAN's place",
                "gram": "`gram_loss`, likewise", "sobel": "`sobel_loss`, likewise",
                "no-spectral-norm": "D's weights as they are"}[name]
        number, rows = key.removesuffix("_beside"), done["rows"][name]
        values = {seed: row[number] for seed, row in rows.items() if row.get(number) not in (None, "")}
        if key == "collapsed":
            return f"{len(values)} of {len(rows)}" + ": " * bool(values) + ", ".join(values.values())
        if key != number:
            full = {} if name == "full" else done["rows"].get("full", {})
            values = {seed: value - full[seed][number] for seed, value in values.items()
                      if full.get(seed, {}).get(number) is not None}
        spread = f" ± {statistics.stdev(values.values()):{digits[-3:]}}" if len(values) > 1 else ""
        return f"{statistics.mean(values.values()):{digits}}{spread}" if values else "–"

    lines = [done["about"]]
    for columns in tables:
        lines += ["", "| | " + " | ".join(header for header, _ in columns.values()) + " |",
                  "|---" * (len(columns) + 1) + "|"]
        for group, members in variants().items():
            there = [name for name in members if name in done["rows"]]
            lines += [f"| **{group}** |" + " |" * len(columns)] if there else []
            for name in there:
                cells = [cell(name, members[name][0], key, digits) for key, (_, digits) in columns.items()]
                lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def save_ablation(done, out):
    """ablation.png: for each group of variants, the three images of crops.png and their reconstructions, of
    the first seed. Needs: variants, write_whole, the package pillow."""
    files = {name: out / f"{name}-{[*seeds][0]}" / "crops.png" for name, seeds in done["rows"].items()}
    pairs = {name: Image.open(file) for name, file in files.items() if file.exists()}
    bands = [[name for name in members if name in pairs] for members in variants().values()]
    bands = [["original"] + names for names in bands if names]
    if not bands:                                               # all ended before there was one
        return
    size = [*pairs.values()][0].height // 2
    side, left, head = size * -(-128 // size), 60, 20           # 128 px or more
    height = head + 3 * side
    picture = Image.new("RGB", (left + side * max(map(len, bands)), height * len(bands)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for top, names in zip(itertools.count(0, height), bands):
        for i, kind in enumerate(("texture", "edges", "smooth")):
            y = top + head + i * side
            draw.text((4, y + side // 2), kind, "black", font)
            for x, name in zip(itertools.count(left, side), names):
                draw.text((x + 4, top + 2), name, "black", font)
                row = 0 if name == "original" else size
                crop = pairs.get(name, pairs[names[1]]).crop((i * size, row, (i + 1) * size, row + size))
                picture.paste(crop.resize((side, side), Image.Resampling.NEAREST), (x, y))
    write_whole(out / "ablation.png", functools.partial(picture.save, format="PNG"))


def ablation_flags(flags):
    """The flags typed, over those that ablate has for a default. Needs: nothing."""
    return dict(perceptual_weight=1.0, log_every=1, on_collapse="warn") | flags


def ablation_config(cfg):
    """The flags of ablate, checked, with a step for --disc-start. Needs: UsageError, flag_of."""
    start, out = cfg.steps // 3 if cfg.disc_start == "plateau" else cfg.disc_start, Path(cfg.out)
    least = start + cfg.disc_lead + cfg.disc_ramp
    for refused, what, way_out in (
            (not 0 < start < cfg.steps, f"--disc-start {start}", "there the common warm-up ends; take a step "
             f"from 1 to {cfg.steps - 1}"),
            (least >= cfg.steps, f"--steps {cfg.steps}", f"the GAN is at full weight from {least} on; take "
             "more, or a smaller --disc-ramp"),
            (cfg.disc_weight == 0, "--disc-weight 0", "there are variants without GAN; leave it out"),
            (cfg.on_collapse != "warn", f"--on-collapse {cfg.on_collapse}", "all are to end; leave it out"),
            (not cfg.resume, "--no-resume", "take another --out to start anew"),
            (int(os.environ.get("WORLD_SIZE", 1)) > 1, "torchrun", "start it with python")):
        if refused:
            raise UsageError(f"ablate {what}: {way_out}")
    cfg = replace(cfg, disc_start=start, sample_every=cfg.steps)
    if (out / "ablation.json").exists():
        was = json.loads((out / "ablation.json").read_text())["config"]
        was["ch_mult"] = tuple(was["ch_mult"])
        for name, now in asdict(cfg).items():
            if was.get(name) != now and name not in ("out", "seed", "workers", "sample_every"):
                raise UsageError(f"{flag_of(name)} {now}: {out} was begun with {was.get(name)}; take that or "
                                 "another --out")
    return cfg


def write_ablation(cfg, about, names):
    """ablation.json, .md and .png of what has been measured below --out, by this call or by others.

    Needs: ablation_table, save_ablation, save_json, write_whole.
    """
    out = Path(cfg.out)
    found = [(*file.parent.name.rpartition("-")[::2], json.loads(file.read_text()))
             for file in sorted(out.glob("*/row.json"))]
    rows = {name: {seed: row for its, seed, row in found if its == name} for name in names}
    done = dict(about=about, config=asdict(cfg), rows={name: rows[name] for name in rows if rows[name]})
    save_json(done, out / "ablation.json")
    write_whole(out / "ablation.md", lambda file: file.write(ablation_table(done).encode()))
    save_ablation(done, out)


def measure_variant(cfg, name, seed, held_out, judge):
    """Train a variant below cfg.out, from the common warm-up unless it starts cold -> its row of the table.

    Needs: all of the file.
    """
    flags, road = next(group[name] for group in variants().values() if name in group)
    folder, warm_up = Path(cfg.out, f"{name}-{seed}"), Path(cfg.out, f"warm-up-{seed}")
    run = replace(cfg, out=str(folder), seed=seed, **flags)

    def trained(cfg, road=""):
        trainer = train(cfg, road)
        if trainer.caught:
            raise KeyboardInterrupt(trainer.caught)
        return trainer

    if run.disc_start and not saves(folder):                    # no cold start, and not begun yet
        trained(replace(cfg, out=str(warm_up), seed=seed, steps=cfg.disc_start, disc_weight=0.0))
        make_folder("--out", folder)
        second_name(warm_up / "last.pt", folder / "last.pt")
    try:
        return measure_run(trained(run, road), held_out, judge, folder)
    except CollapseError as error:                              # not finite: there is nothing to measure
        return dict(collapsed=f"{error.sign} at {error.step}, stopped")


def ablate(cfg, only=(), seeds=()):
    """`python vaegan.py ablate`: train each variant on from a common warm-up, measure it on held-out images,
    compare them in ablation.json, .md and .png. Each is a run of `train` in a folder below --out.

    The same command again continues, other --only and --seeds add to it. Needs: all of the file.
    """
    cfg, out = ablation_config(cfg), Path(cfg.out)
    names = dict.fromkeys(name for group in variants().values() for name in group
                          if cfg.perceptual_weight or name not in ("l1+lpips", "no-lpips", "gram"))
    for name in only:
        if name not in names:
            raise UsageError(f"--only {name}: choose from {', '.join(names)}")
    seeds = [replace(cfg, seed=seed).seed for seed in seeds or [cfg.seed]]      # checked
    device, held_out = launch(cfg)[0], open_data(cfg)[1]
    if not cfg.data:
        held_out = DeadLeaves(cfg.image_size, -1, length=64)    # no seed's run trains on these
    every = -(-len(held_out) // 256)
    held_out = torch.stack([held_out[i] for i in range(0, len(held_out), every)])       # decoded once for all
    if cfg.perceptual_weight:
        Perceptual(cfg.perceptual_net)                          # if it cannot be had, this says so now
    net = "squeeze" if cfg.perceptual_net == "alex" else "alex"             # no judge in its own cause
    try:
        judge = Perceptual(net).to(device)
    except UsageError as error:
        judge = print(f"goes on without measuring LPIPS: {error}")
    words = words_beside(Config.of(cfg.preset, **ablation_flags({})), cfg, but=(
        "data", "val", "out", "seed", "disc_start", "sample_every"))
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{device.type}, {torch.get_num_threads()} threads"
    about = (f"`{shlex.join(['ablate', '--preset', cfg.preset, *words])}`: {cfg.steps} steps, the first "
             f"{cfg.disc_start} a common warm-up without GAN; {len(held_out)} held-out images; LPIPS in "
             f"training: {cfg.perceptual_net}, here: {net}; {machine}; torch {torch.__version__}.")
    with claimed(out):
        write_ablation(cfg, about, names)                       # from now on other flags are refused
        for seed, name in itertools.product(seeds, only or names):
            row = out / f"{name}-{seed}" / "row.json"
            if row.exists():
                continue
            print(f"\n{name}, seed {seed}")
            try:
                save_json(measure_variant(cfg, name, seed, held_out, judge), row)
                for path in saves(row.parent)[1:]:              # the newest will do from now on
                    path.unlink()
            except KeyboardInterrupt as error:
                number = error.args[0] if error.args else signal.SIGINT
                raise KeyboardInterrupt(number, f"interrupted; {out} holds what is done; the same command "
                                        "goes on from there") from None
            write_ablation(cfg, about, names)
    print(f"\n{(out / 'ablation.md').read_text()}\n{out}: ablation.md, ablation.json, ablation.png")


# ---- The command line.


def open_released(checkpoint, data, image_size, device, batch_size=8, workers=0):
    """-> the autoencoder in a file, on its device; its Config; and what else the file says.

    Needs: Config, autoencoder, launch, released, same_kind, UsageError.
    """
    state, widths, about = released(checkpoint)
    try:
        was = dict(seed=0, image_size=256) | about["config"]
        same_kind("config", {name: was[name] for name in ("seed", "image_size")}, dict(seed=0, image_size=0))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{checkpoint}: {error}; give another one") from None
    cfg = Config.of("sd", **widths, data=data, device=device, seed=was["seed"], batch_size=batch_size,
                    workers=workers, image_size=image_size or was["image_size"])
    vae = autoencoder(cfg)
    vae.load_state_dict(state)
    return vae.to(launch(cfg)[0]), cfg, about


def eval_command(checkpoint, data, save_to, image_size, perceptual_net, device):
    """`python vaegan.py eval`: print one table. Needs: all of the file."""
    vae, cfg, about = open_released(checkpoint, data, image_size, device)
    device, without = vae.last_layer.device, ""
    dataset = ImageFolder(data, cfg.image_size, train=False) if data else open_data(cfg)[1]
    try:
        perceptual = Perceptual(perceptual_net).to(device)
    except UsageError as error:
        perceptual, without = None, f"  lpips           not measured: {error}\n"
    measured = evaluate(vae, dataset, device, perceptual, save_to=save_to)
    units = dict(psnr="dB", kl_dim="nats a latent dimension", lpips=f"({perceptual_net})",
                 sharpness="high frequencies, x̂ over x", scaling_factor="1/std of z",
                 latent_mean="of z, a channel", latent_std="of z, a channel")
    step = "" if about["step"] is None else f", step {about['step']}"
    print(f"{checkpoint}{step}: {measured.pop('images')} centre crops of {cfg.image_size} px, "
          f"{data or 'dead leaves'}")
    for name, value in measured.items():
        text = " ".join(f"{number:.4g}" for number in (value if isinstance(value, list) else [value]))
        print(f"  {name:15} {text:<10} {units.get(name, '')}".rstrip())
    print(without, end="")


def export_command(checkpoint, out):
    """`python vaegan.py export`: the averaged weights alone, as .safetensors. Needs: all of the file."""
    if not out.endswith(".safetensors"):
        raise UsageError(f"--out {out}: give a name that ends in .safetensors")
    state, _, about = released(checkpoint)
    try:
        from safetensors.torch import save
    except ImportError:
        raise UsageError(f"--out {out}: to write it takes `pip install safetensors`") from None
    for path in ("data", "val", "init", "out"):                 # of this machine, nobody else's business
        about["config"].pop(path, None)
    content = save({name: weight.contiguous().clone() for name, weight in state.items()},
                   {name: json.dumps(value) for name, value in about.items()} | dict(format="pt"))
    write_whole(Path(out), lambda file: file.write(content))
    known = ", ".join(f"{name} {about[name]}" for name in ("step", "scaling_factor") if about[name])
    print(f"{out}: {sum(weight.numel() for weight in state.values()) / 1e6:.1f} M parameters; {known}")


@torch.no_grad()
def encode_command(checkpoint, data, out, image_size, batch_size, workers, device):
    """`python vaegan.py encode`: the posteriors of centre crops, 1000 a file; again: continues.

    Needs: all of the file.
    """
    vae, cfg, about = open_released(checkpoint, data, image_size, device, batch_size, workers)
    images, out = ImageFolder(data, cfg.image_size, train=False), Path(out)
    names = [os.path.relpath(file, data) for file in images.files]
    of = hashlib.sha256(b"".join(weight.cpu().numpy().tobytes() for weight in vae.state_dict().values()))
    index = dict(weights=of.hexdigest(), image_size=cfg.image_size, files=names) | about
    make_folder("--out", out)
    if (out / "index.json").exists() and (out / "index.json").read_text() != json_text(index):
        raise UsageError(f"--out {out}: holds latents of other weights or images; take another one")
    save_json(index, out / "index.json")
    for start in range(0, len(names), 1000):
        path, part = out / f"{start // 1000:05d}.pt", range(len(names))[start:start + 1000]
        if path.exists():
            continue
        crops = torch.utils.data.Subset(images, part)
        crops = tqdm(torch.utils.data.DataLoader(crops, batch_size, num_workers=workers), path.name)
        found = [vae.encode(to_model(x, vae.last_layer.device)) for x in crops]
        whole = ~images.broken[part.start:part.stop]            # another image stands in for a broken one
        mean, logvar = (torch.cat([getattr(posterior, name) for posterior in found]).cpu().half()[whole]
                        for name in ("mean", "logvar"))         # (n, C, h, w) each
        files = [names[i] for i in part if not images.broken[i]]
        write_whole(path, functools.partial(torch.save, dict(mean=mean, logvar=logvar, files=files)))


def parse(argv):
    """Command line -> dict of its flags; for train, ablate, bench only of those typed. Raises UsageError."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(f"{message}; see {self.prog} --help")

    look = dict(allow_abbrev=False,
                formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32))
    parser = Parser(prog="vaegan.py", description=__doc__.splitlines()[0], **look)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="train|eval|export|encode|ablate|bench")
    texts = dict(train=("train on a folder of images, or continue", "Train on a folder of images; the same "
                        "command again continues. Flags go over the preset's values."),
                 ablate=("compare losses and safeguards, by training without each", "Train variants of the "
                         "recipe on from a common warm-up, measure them on held-out images, and compare them "
                         "in --out: ablation.md, ablation.png, ablation.json. The same command again "
                         "continues. The flags are those of train, LPIPS on in any preset (weight 1), "
                         "--log-every 1; --disc-start, where the warm-up ends, is a third of --steps."),
                 bench=("what an update of train costs", "Time, arithmetic and memory of an update and its "
                        "stages, to choose --batch-size by. The flags are those of train."))
    for command, (help, description) in texts.items():
        sub = commands.add_parser(command, **look, help=help, description=description)
        names = dict.fromkeys(f.metadata["group"] for f in fields(Config))
        groups = {name: sub.add_argument_group(name) for name in names}
        for f in fields(Config):
            meta = f.metadata
            kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else dict(
                type=meta["parse"], choices=meta["choices"], nargs="+" if f.name == "ch_mult" else None,
                metavar={int: "N", float: "N", str: None if meta["choices"] else "PATH"}.get(meta["parse"]))
            groups[meta["group"]].add_argument(flag_of(f.name), default=argparse.SUPPRESS, help=meta["help"],
                                               **kind)
        if command == "ablate":
            names = dict.fromkeys(name for group in variants().values() for name in group)
            sub.add_argument("--only", nargs="+", default=(), metavar="NAME",
                             help=f"these variants alone, of: {', '.join(names)}")
            sub.add_argument("--seeds", nargs="+", type=int, default=(), metavar="N",
                             help="one run of each variant for each of these (default: --seed)")
    texts = dict(
        eval=("measure an autoencoder on a folder of images", "Measure PSNR, SSIM, LPIPS, sharpness and KL "
              "of reconstructed centre crops, and the statistics of their latents."),
        export=("write the weights alone, for diffusers and ComfyUI", "Write the averaged weights as "
                ".safetensors under CompVis' names, with scaling_factor and config in the metadata."),
        encode=("write the latents of a folder of images", "Write the posteriors' mean and logvar of centre "
                "crops, to train a diffusion model on, 1000 in a file. The same command again continues."))
    subs = {name: commands.add_parser(name, **look, help=help, description=text)
            for name, (help, text) in texts.items()}
    for sub in subs.values():
        sub.add_argument("--checkpoint", required=True, metavar="FILE", help=(
            "last.pt or best.pt of a run, or any file that --init takes"))
    subs["eval"].add_argument("--save", default="", metavar="DIR", dest="save_to",
                              help="write DIR/input/*.png and DIR/reconstruction/*.png, for any FID tool")
    subs["eval"].add_argument("--perceptual-net", default="alex", choices=("vgg", "alex", "squeeze"),
                              help="trunk of LPIPS (default: alex, which papers report)")
    subs["export"].add_argument("--out", required=True, metavar="FILE", help="the file, NAME.safetensors")
    subs["encode"].add_argument("--out", required=True, metavar="DIR", help="folder of the latents")
    for name, default, text in ("--batch-size", 16, "images at once"), ("--workers", 8, "as for train"):
        subs["encode"].add_argument(name, default=default, type=int, metavar="N",
                                    help=f"{text} (default: {default})")
    for sub in subs["eval"], subs["encode"]:
        sub.add_argument("--data", required=sub is subs["encode"], default="", metavar="DIR",
                         help="folder of images" + "; empty: dead leaves" * (sub is subs["eval"]))
        sub.add_argument("--image-size", default=0, type=int, metavar="N",
                         help="side of a crop in pixels; 0: as trained, else 256")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return vars(parser.parse_args(argv))


def main(argv=None):
    """Run a command line -> exit status: 0 done, 1 a fault, 2 bad input, 3 collapsed, 130 and 143 interrupted
    by SIGINT and SIGTERM."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    for stream in (sys.stdout, sys.stderr):                     # a terminal or file name that is not UTF-8
        if hasattr(stream, "reconfigure"):                      # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    try:
        flags = parse(argv)
        command = flags.pop("command")
        others = dict(eval=eval_command, export=export_command, encode=encode_command)
        if command in others:
            others[command](**flags)
            return 0
        preset = flags.pop("preset", "auto")
        if preset == "auto":
            gpu = torch.cuda.is_available() and flags.get("device", "auto") in ("auto", "cuda")
            preset, other = ("sd", "tiny") if gpu else ("tiny", "sd")
            if is_main:
                print(f"preset {preset} (auto: sd on a CUDA GPU, else tiny); --preset {other} takes that one")
        if command == "ablate":
            which = flags.pop("only"), flags.pop("seeds")
            cfg = Config.of(preset, **ablation_flags(flags))
            ablate(cfg if "out" in flags else replace(cfg, out=cfg.out + "-ablation"), *which)
        else:
            (train if command == "train" else bench)(Config.of(preset, **flags))
        return 0
    except UsageError as error:
        status, line = 2, error
    except RunError as error:
        status, line = 1, error
    except CollapseError as error:
        status, line = 3, error
    except torch.OutOfMemoryError as error:                     # of a GPU
        status, line = 1, (". ".join(str(error).split(". ")[:2]) + ": take a smaller --batch-size, with "
                           "--accumulate for as many images an update, or --recompute where it is off")
    except KeyboardInterrupt as error:
        number, line = error.args or (signal.SIGINT, "interrupted")
        status = 128 + number
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if is_main:
        tqdm.write(f"vaegan.py: {line}", file=sys.stderr)       # above the bar, if there is one
    return status


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                # torch keeps gloo's threads after DDP, on
        sys.stdout.flush(), sys.stderr.flush()                  # which C++'s cleaning up sometimes aborts:
        os._exit(status)                                        # 5 of 300 runs of two processes, torch 2.15
    sys.exit(status)
