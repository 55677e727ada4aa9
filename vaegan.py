"""vaegan.py: train the autoencoder of Stable Diffusion (KL-VAE + PatchGAN), in one readable file.

    python vaegan.py train --data DIR                         a folder of images; again: continues
    torchrun --nproc-per-node 8 vaegan.py train --data DIR    the same on 8 GPUs
    python vaegan.py eval --checkpoint run/sd-DIR/best.pt --data DIR

For images x in [-1, 1] of N = 3·H·W values, z ~ q(z|x) = N(mean, std²), and x̂ = decode(z):

    autoencoder     L_G = L_rec + kl_weight·KL(q ‖ N(0, I))/N - w(t)·disc_weight·λ·E[D(x̂)]
    reconstruction  L_rec = |x - x̂| + perceptual_weight·LPIPS(x, x̂)      Rombach et al. 2022
    adaptive λ      λ = ‖∇L_rec‖ / (‖∇E[D(x̂)]‖ + ε)  at the last layer   Esser et al. 2021, eq. 7
    discriminator   L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]  Lim & Ye 2017
    warm-up         w(t) = 0 until L_rec has saturated and D has a lead, then a linear ramp to 1

This is latent-diffusion's objective divided by N: there the pixel term and LPIPS are summed over
the values of an image, here they are means. So kl_weight and disc_weight keep their published
meaning, λ does not grow with the image, and a gradient norm of 1 means the same at every size.
"""

import argparse, contextlib, copy, functools, hashlib, io, itertools, json, math, os, re, signal
import statistics, sys, time, warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

# ---- 2. Configuration: one dataclass is the flags, their help, and the record in each checkpoint.
class UsageError(ValueError):
    """Bad input, in one line that names the flag or file and the way out; exit status 2."""

def arg(default, help, least=0, most=math.inf, choices=None, parse=None):
    """A field of Config that is also a flag."""
    limits = dict(least=least, most=most, choices=choices)
    return field(default=default, metadata=dict(limits, help=help, parse=parse or type(default)))

# The defaults in Config are preset sd, which is kl-f8. Preset tiny learns in minutes on a CPU.
TINY = dict(image_size=64, batch_size=4, workers=0, ch=16, ch_mult=(1, 2, 4), num_res_blocks=1,
            ndf=32, perceptual_weight=0.0, perceptual_net="squeeze", kl_weight=1e-2, disc_lead=50,
            disc_ramp=100, steps=1500, lr=4e-4, lr_disc=5e-4, ema=0.98, recompute=False,
            sample_every=100, save_every=100)

@dataclass(frozen=True)
class Config:
    """All that decides a run. Raises UsageError for values that cannot work."""
    data: str = arg("", "folder of images, with those below; none: built-in dead leaves")
    val: str = arg("", "folder of held-out images; none: every 20th file of --data")
    image_size: int = arg(256, "side of the square crops in pixels", least=24)
    batch_size: int = arg(12, "images a batch, in each process", least=1)
    workers: int = arg(8, "processes that load images; 0: the training process itself")
    ch: int = arg(128, "channels of the first level", least=1)
    ch_mult: tuple = arg((1, 2, 4, 4), "channels of each level / ch", parse=int)
    num_res_blocks: int = arg(2, "residual blocks a level (decoder: one more)", least=1)
    z_channels: int = arg(4, "channels of the latent", least=1)
    ndf: int = arg(64, "channels of the discriminator's first layer", least=1)
    spectral: bool = arg(True, "spectral norm in the discriminator")
    init: str = arg("", "start from this file: SD 1.x, 2.x, XL, 3, FLUX.1 or one of ours")
    freeze_encoder: bool = arg(False, "train the decoder alone; latents do not change")
    pixel_loss: str = arg("l1", "pixel term, a mean over values", choices=("l1", "l2"))
    perceptual_weight: float = arg(1.0, "weight of LPIPS; 0: off")
    perceptual_net: str = arg("vgg", "net of LPIPS", choices=("vgg", "alex", "squeeze"))
    kl_weight: float = arg(1e-6, "weight of an image's KL divided by 3·H·W")
    texture: str = arg("hinge", "the GAN, a loss in its place, or none", choices=(
        "hinge", "ns", "wgan-gp", "focal", "gram", "sobel", "none"))
    disc_weight: float = arg(0.5, "gradient of GAN / reconstruction, at the last layer")
    adaptive: bool = arg(True, "scale the GAN's gradient by λ, VQGAN eq. 7")
    r1: float = arg(0.0, "γ of D's R1 penalty, every 16 steps; 10 is usual; 0: off")
    disc_start: str = arg("plateau", "step from which D trains; plateau: once L_rec has saturated")
    disc_lead: int = arg(1000, "steps D trains before the decoder feels it")
    disc_ramp: int = arg(5000, "steps from no to full weight of the GAN")
    steps: int = arg(200_000, "updates of the autoencoder", least=10)
    lr: float = arg(1e-4, "learning rate (LDM: 4.5e-6 an image of the update)")
    lr_disc: float = arg(1e-4, "the discriminator's learning rate")
    clip: float = arg(1.0, "largest gradient norm of encoder, decoder, D; 0: any")
    ema: float = arg(0.999, "decay of the averaged weights that are saved; 0: off", most=1)
    accumulate: int = arg(1, "batches an update", least=1)
    seed: int = arg(0, "of weights, crops and noise")
    device: str = arg("auto", "to train on", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = arg("auto", "of the networks", choices=("auto", "fp32", "bf16", "fp16"))
    recompute: bool = arg(True, "half of the memory for a few percent of the time")
    preset: str = arg("auto", "auto: sd on a CUDA GPU, else tiny", choices=("auto", "sd", "tiny"))
    out: str = arg("", "folder of the run; none: run/PRESET-NAME, NAME being --data's")
    sample_every: int = arg(1000, "steps between validations with pictures", least=10)
    save_every: int = arg(1000, "steps between saves of last.pt", least=10)
    on_collapse: str = arg("stop", "stop: back to the last healthy save", choices=("stop", "warn"))

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # JSON has lists only
        for name in ("steps", "sample_every", "save_every", "disc_start"):
            value = str(getattr(self, name))
            if value != "plateau" and not (value.isdigit() and value.endswith("0")):
                self.refuse(name, "must be a multiple of 10, as a record is made every 10 steps")
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            if about["choices"] and value not in about["choices"]:
                self.refuse(f.name, f"choose from {', '.join(about['choices'])}")
            if isinstance(value, (int, float)) and not about["least"] <= value <= about["most"]:
                self.refuse(f.name, f"must lie between {about['least']} and {about['most']}")
        if self.image_size % 2 ** (len(self.ch_mult) - 1):
            self.refuse("image_size", f"must be a multiple of {2 ** (len(self.ch_mult) - 1)}")
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
        values, widths = dict(TINY) if preset == "tiny" else {}, {}
        if flags.get("init"):
            widths = load_autoencoder(flags["init"])[0].widths
            values.update(widths, disc_start=0)  # a trained reconstruction has saturated
        cfg = cls(**{**values, **flags, "preset": preset})
        for name, width in widths.items():
            if getattr(cfg, name) != width:
                cfg.refuse(name, f"{cfg.init} has {width}; leave the flag out")
        return cfg

# Sections 3 to 6 depend on torch and the standard library alone (Perceptual on lpips too): copy all
# of section 3, and of the others what you want, with what a docstring names under "Needs:".
# ---- 3. Autoencoder: kl-f8's computation under CompVis' names, so that files open elsewhere.
class GroupNorm(nn.GroupNorm):
    """32 groups where 32 divides `channels`, else of four channels; in fp32 under autocast too."""
    def __init__(self, channels):
        groups = 32 if channels % 32 == 0 else math.gcd(channels, max(channels // 4, 1))
        super().__init__(groups, channels, eps=1e-6)
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))

def norm_silu_conv(norm, conv, x, recompute=False):
    """conv(silu(norm(x))). recompute: norm and SiLU run again in backward, to save memory."""
    if recompute:
        return checkpoint(norm_silu_conv, norm, conv, x,
                          use_reentrant=False, preserve_rng_state=False)
    return conv(F.silu(norm(x)))

class ResnetBlock(nn.Module):
    """x + two times norm, SiLU, convolution. (B, c_in, H, W) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.norm1, self.conv1 = GroupNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # at first x passes as it is: see AutoencoderKL
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
        self.q, self.k = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.v, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
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
        nn.init.dirac_(self.conv.weight)
    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom

class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2H, 2W)."""
    def __init__(self, channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
    def double(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    def forward(self, x):
        if self.recompute:  # as in norm_silu_conv
            return checkpoint(self.double, x, use_reentrant=False, preserve_rng_state=False)
        return self.double(x)

def residual_level(c_in, c_out, n, recompute):
    """n residual blocks, the first of which changes the width; a change of size may be added."""
    blocks = [ResnetBlock(c, c_out, recompute) for c in [c_in] + [c_out] * (n - 1)]
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks)))

def middle(channels, recompute):
    """Block, attention, block, at the lowest resolution."""
    block_1, block_2 = [ResnetBlock(channels, channels, recompute) for _ in range(2)]
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=AttnBlock(channels), block_2=block_2))

class Encoder(nn.Module):
    """Image to moments: (B, in_channels, H, W) -> (B, 2·z_channels, H/f, W/f)."""
    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, z_channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, c = nn.Sequential(), ch
        for mult in ch_mult:
            if len(self.down) > 0:
                self.down[-1].downsample = Downsample(c)
            self.down.append(residual_level(c, ch * mult, num_res_blocks, recompute))
            c = ch * mult
        self.mid = middle(c, recompute)
        self.norm_out, self.conv_out = GroupNorm(c), nn.Conv2d(c, 2 * z_channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv_out.weight, nonlinearity="linear")  # or noise hides z
    def forward(self, x):
        h = self.mid(self.down(self.conv_in(x)))  # (B, ch·ch_mult[-1], H/f, W/f)
        return norm_silu_conv(self.norm_out, self.conv_out, h, self.recompute)

class Decoder(nn.Module):
    """Latent to image: (B, z_channels, h, w) -> (B, out_channels, h·f, w·f)."""
    def __init__(self, out_channels, ch, ch_mult, num_res_blocks, z_channels, recompute=False):
        super().__init__()
        self.recompute = recompute
        c = ch * ch_mult[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, c, 3, padding=1), middle(c, recompute)
        self.up = nn.ModuleList()  # up[0] is the finest level and runs last
        for mult in reversed(ch_mult):
            if len(self.up) > 0:
                self.up[0].upsample = Upsample(c, recompute)
            self.up.insert(0, residual_level(c, ch * mult, num_res_blocks + 1, recompute))
            c = ch * mult
        self.norm_out, self.conv_out = GroupNorm(c), nn.Conv2d(c, out_channels, 3, padding=1)
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
        return self.mean + self.std * torch.empty_like(self.mean).normal_(generator=generator)
    def mode(self):
        return self.mean
    def kl(self):
        """KL(q ‖ N(0, I)) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

class AutoencoderKL(nn.Module):
    """The KL autoencoder; the defaults are kl-f8 of Stable Diffusion 1.x, of 83,653,863 parameters.
    Source: Rombach et al. 2022; CompVis ldm/models/autoencoder.py. x: (B, in_channels, H, W) in
    [-1, 1], multiples of f = 2^(levels - 1); z: (B, z_channels, H/f, W/f); x_hat: as x, unbounded;
    all of x's dtype, under autocast too. quant_conv=False: the layout of SD3 and FLUX.1.
    recompute: keep at most 40 % of the activations, with the same gradients. Its start is ours:
    residual branches are zero, resampling and the 1×1 around z the identity. Random layers bury
    colour under brightness on the way to z; the decoder then learns grey, and colour late."""
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
            nn.init.dirac_(self.quant_conv.weight)
            nn.init.dirac_(self.post_quant_conv.weight)
    @property
    def last_layer(self):
        """The weight at which λ compares two gradients: (in_channels, ch, 3, 3)."""
        return self.decoder.conv_out.weight
    def encode(self, x):
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
    """70×70 PatchGAN: one realness logit for each of many overlapping patches.
    Source: Isola et al. 2017, §6.1.2; layout and N(0, 0.02) weights of taming-transformers; with
    spectral norm (Miyato et al. 2018), not BatchNorm, D works at batch 1, treats real and fake
    alike, and is smooth. x: (B, in_channels, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2)."""
    def __init__(self, in_channels=3, ndf=64, n_layers=3, spectral=True):
        super().__init__()
        widths = [in_channels] + [ndf * min(2 ** i, 8) for i in range(n_layers + 1)] + [1]
        self.convs = nn.ModuleList()
        for i, stride in enumerate([2] * n_layers + [1, 1]):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            self.convs.append(nn.utils.parametrizations.spectral_norm(conv) if spectral else conv)
    def forward(self, x):
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
    g_rec, g_adv: gradients of both losses at the decoder's last layer -> scalar without a graph.
    Source: Esser et al. 2021, eq. 7, without a bound; ε is latent-diffusion's."""
    return (g_rec.norm() / (g_adv.norm() + eps)).clamp(max=max_weight).detach()

def r1_penalty(logits_real, x):
    """E‖∇ₓ D(x)‖², D(x) being an image's sum of logits. L_D gets γ/2 of it: D stays flat around x.
    Source: Mescheder et al. 2018, eq. 9. logits_real: of x, (B, 3, H, W), which requires grad."""
    gradient, = torch.autograd.grad(logits_real.sum(), x, create_graph=True)
    return gradient.pow(2).sum(dim=(1, 2, 3)).mean()

class Perceptual(nn.Module):
    """LPIPS, the distance of two images in the features of a trained network: frozen, in eval mode.
    Source: Zhang et al. 2018, eq. 1. x, x_hat: (B, 3, H, W) in [-1, 1] -> (B,); x gets no gradient.
    Raises ImportError where package or weights cannot be had: there is never a random trunk."""
    def __init__(self, net="vgg"):
        super().__init__()
        try:
            import lpips
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's, about lpips
                self.lpips = lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()
        except Exception as error:  # no package, no network, a torn file, …
            raise ImportError(f"LPIPS net {net}: {error}; put it into {torch.hub.get_dir()}"
                              "/checkpoints, or take --perceptual-weight 0") from None
    def train(self, mode=True):
        return super().train(False)  # nothing wakes its dropout
    def features(self, x):
        """Of unit length (without lpips' NaN gradient at 0), a list of (B, C, h, w)."""
        layers = self.lpips.net(self.lpips.scaling_layer(x))
        return [F.normalize(f.to(x.dtype), dim=1, eps=1e-10) for f in layers]
    def forward(self, x, x_hat):
        with torch.no_grad():
            real = self.features(x)
        layers = zip(self.lpips.lins, real, self.features(x_hat))
        with torch.autocast(x.device.type, enabled=False):
            return sum(head((a - b) ** 2).mean(dim=(1, 2, 3)) for head, a, b in layers)

class WarmUp:
    """When the GAN comes on.

        step       0 ........ T ........ T + lead ........ T + lead + ramp ........
        D trains       no         yes               yes                   yes
        w(t)           0           0           rises linearly to 1         1

    start: T, or "plateau": where the median loss of `window` records is less than 3 % below
    that of the `window` before, three times in a row, half a window on; by step `latest`."""
    def __init__(self, start="plateau", lead=0, ramp=0, window=10, latest=math.inf):
        self.start = None if start == "plateau" else int(start)
        self.lead, self.ramp, self.window, self.latest = lead, ramp, window, latest
        self.losses, self.flat = [], 0  # flat: comparisons in a row without a fall
    def observe(self, rec_loss, step):
        """Feed the reconstruction loss of a record (ten steps) -> whether that decides T."""
        if self.start is not None:
            return False
        self.losses.append(rec_loss)
        if len(self.losses) >= 2 * self.window:
            before = statistics.median(self.losses[-2 * self.window:-self.window])
            now = statistics.median(self.losses[-self.window:])
            self.flat = self.flat + 1 if now > 0.97 * before else 0
            self.losses = self.losses[(self.window + 1) // 2 - 2 * self.window:]  # half a window on
        if self.flat >= 3 or step >= self.latest:
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
    """Spectral energy above half of Nyquist, a mean over all values: (B, C, H, W) -> (B,)."""
    height, width = x.shape[-2:]
    like = dict(dtype=x.dtype, device=x.device)
    window = torch.outer(torch.hann_window(height, periodic=False, **like),
                         torch.hann_window(width, periodic=False, **like))
    spectrum = torch.view_as_real(torch.fft.fft2(x * window, norm="ortho"))
    rows, columns = torch.fft.fftfreq(height, **like), torch.fft.fftfreq(width, **like)
    cycles_a_pixel = torch.hypot(rows[:, None], columns)
    return (spectrum.pow(2).sum(-1) * (cycles_a_pixel > 0.25)).mean(dim=(1, 2, 3))

class CollapseError(AssertionError):
    """Training has collapsed: step, sign, value, limit, likely cause, remedy (flags to change)."""
    def __init__(self, **facts):
        self.__dict__.update(facts)
        super().__init__("collapse at step {step}: {sign} is {value:.3g} (limit {limit:g}); likely "
                         "cause: {cause}; remedy: {remedy}".format(**facts))

class CollapseMonitor:
    """Notices, from a record every ten steps, that the training of a VAE-GAN goes wrong.
    Feed assert_healthy with means of ten steps, as far as you have them, of l2, rec_loss, kl_dim,
    grad_norm_dec (before clipping) and grad_ratio (w·‖∇adv‖/‖∇rec‖), and with what `look` measures.
    A sign is up over its limit (CollapseMonitor(rebound=4) sets it). Collapsed: damage is up in two
    records running, or in one within five records of a cause, or a term is not finite. z_ignored
    and noise count once there was a picture (correlation over ½), if the GAN dominates, or after
    100 records. Needs: CollapseError, high_frequency_energy."""
    SIGNS = dict(  # sign: limit, what is measured, remedy
        domination=(3.0, "gradient of GAN / reconstruction", "--adaptive, a smaller --disc-weight"),
        spike=(5.0, "decoder's gradient norm in deviations", "a smaller --lr or --disc-weight"),
        rebound=(3.5, "dB of the reconstruction above its best", "a smaller --lr or --disc-weight"),
        z_ignored=(0.95, "error with own z / another's", "a smaller --disc-weight or --kl-weight"),
        noise=(0.75, "1 - correlation of x̂ with x", "a smaller --disc-weight or --lr"),
        kl_gone=(10.0, "peak of the KL / now", "a smaller --kl-weight"))
    CAUSES = ("domination", "spike")
    DAMAGE = ("rebound", "z_ignored", "noise", "kl_gone")
    TERMS = ("grad_ratio", "grad_norm_dec", "l2", "rec_loss", "other_z", "corr", "kl_dim")
    def __init__(self, **limits):
        self.limits = {sign: limits.pop(sign, row[0]) for sign, row in self.SIGNS.items()}
        if limits:
            raise TypeError(f"no such sign: {', '.join(limits)}")
        self.records, self.alarm = 0, False  # how many were fed; a cause or damage lately?
        self.series = {term: [] for term in self.TERMS}  # their last 21 values
        self.best = dict(corr=0.0, kl_dim=0.03, l2=math.inf, rec_loss=math.inf)
        self.values = {}  # {sign: its value in the newest record}
        self.last_up = {sign: [-9, 0.0] for sign in self.SIGNS}  # in which record, and its value
    @staticmethod
    @torch.no_grad()
    def look(x, x_hat):
        """Measure images and their reconstructions, (B, 3, H, W) -> 0-d tensors, without a sync."""
        x, x_hat = x.float(), x_hat.float()
        a = x - x.mean(dim=(0, 2, 3), keepdim=True)
        b = x_hat - x_hat.mean(dim=(0, 2, 3), keepdim=True)
        energy = high_frequency_energy(x).mean().clamp(min=1e-12)
        terms = dict(corr=((a * b).mean() + 1e-3) / (a.norm() * b.norm() / a.numel() + 1e-3),
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
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if broken:
            raise CollapseError(step=step, sign="non_finite", value=len(broken), limit=0,
                                cause=f"overflow of {', '.join(broken)}; all terms: {terms}",
                                remedy="a smaller --lr, or --precision fp32")
        was_damaged = any(self.last_up[sign][0] == self.records for sign in self.DAMAGE)
        self.records += 1
        self.values = {sign: v for sign, v in self.measure(terms).items() if not math.isnan(v)}
        for sign, value in self.values.items():
            if value > self.limits[sign]:
                self.last_up[sign] = [self.records, value]
        causes = [sign for sign in self.CAUSES if self.last_up[sign][0] >= self.records - 5]
        damage = [sign for sign in self.DAMAGE if self.last_up[sign][0] == self.records]
        self.alarm = bool(causes or damage)
        if damage and (causes or was_damaged):
            sign, culprit = damage[0], (causes + damage)[0]
            _, measured, remedy = self.SIGNS[culprit]
            cause = f"{culprit}: {measured} was {self.last_up[culprit][1]:.3g}"
            raise CollapseError(step=step, sign=sign, value=self.values[sign],
                                limit=self.limits[sign], cause=cause, remedy=remedy)
    def measure(self, terms):
        """-> {sign: value}; nan, which exceeds no limit, where a term is missing."""
        for term in self.TERMS:
            self.series[term] = [*self.series[term], terms.get(term, math.nan)][-21:]
        grad_ratio, kl_dim = self.series["grad_ratio"][-1], self.series["kl_dim"][-1]
        self.best["kl_dim"] = max(self.best["kl_dim"], min(kl_dim, 1.0))  # at least 0.03, at most 1
        self.best["corr"] = max(self.best["corr"], self.median("corr"))
        dominates = grad_ratio > self.limits["domination"]
        has_picture = self.best["corr"] > 0.5 or dominates or self.records >= 100
        return dict(
            domination=grad_ratio,
            spike=self.deviations("grad_norm_dec"),
            rebound=min(self.rise("l2"), 2 * self.rise("rec_loss")),  # both: texture may cost PSNR
            z_ignored=has_picture / self.median("other_z"),
            noise=has_picture * (1 - self.median("corr")),
            kl_gone=self.best["kl_dim"] / max(kl_dim, 1e-12))
    def median(self, term):
        """Of the last three records, so that one odd batch does not count."""
        return float(torch.tensor(self.series[term][-3:]).median())
    def rise(self, term):
        """dB of the last 2 records' mean above the best mean of 5, forgotten by 0.005 a record."""
        levels = 10 * torch.tensor(self.series[term][-5:]).clamp(min=1e-12).log10()
        if len(levels) < 5 or levels.isnan().any():
            return 0.0
        self.best[term] = min(self.best[term] + 0.005, float(levels.mean()))
        return float(levels[-2:].mean()) - self.best[term]
    def deviations(self, term):
        """Robust deviations of the logarithm above the 20 records before: what lasts is usual."""
        levels = torch.tensor(self.series[term]).clamp(min=1e-12).log()
        if len(levels) <= 5:
            return 0.0
        usual = levels[:-1].nanmedian()
        spread = 1.4826 * (levels[:-1] - usual).abs().nanmedian()
        return float((levels[-1] - usual) / spread.clamp(min=0.2))
    def state_dict(self):
        return copy.deepcopy({key: value for key, value in vars(self).items() if key != "limits"})
    def load_state_dict(self, state):
        self.__dict__.update(copy.deepcopy(state))

# ---- 7. Data: a folder of images, or dead leaves, as uint8.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which is a program

def seed_of(*numbers):
    """A 63-bit seed. Where randomness comes from: weights are of --seed, the noise in z of (seed,
    step, rank), image i of (seed, pass, place): on a CPU a stopped run goes on to the bit."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

def to_model(images, device):
    """(B, 3, H, W) uint8 -> float in [-1, 1] on the device, in channels-last layout."""
    images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
    return images.float() / 127.5 - 1.0

def pixels_of(image):
    """An RGB image as (3, H, W) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)

class ImageFolder(Dataset):
    """Square crops of all images in a folder and below: (3, size, size) uint8.
    train=True: item i, for any i >= 0, is of the i-th file of endless shuffled passes, cropped and
    flipped at random: a function of (seed, i). train=False: the centre of the i-th file by name.
    hold_out=n: every n-th file is for train=False, the others for train=True. A file that cannot be
    decoded is reported once, and the next one stands in. Raises UsageError if none can be."""
    def __init__(self, root, size, train=True, seed=0, hold_out=0):
        self.root, self.size, self.is_train, self.seed = root, size, train, seed
        self.files = []
        for folder, _, names in os.walk(root, followlinks=True):
            self.files += [f"{folder}/{name}" for name in names if name.lower().endswith(SUFFIXES)]
        self.files.sort()
        self.epoch, self.order = None, None  # the newest shuffled pass
        if hold_out and len(self.files) > 1:
            first, _ = self.decodable(0, report=False)
            held_out = self.files[first::hold_out]
            self.files = sorted({*self.files} - {*held_out}) if train else held_out
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # by workers
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
    def decodable(self, k, report=True):
        """-> index and image of file k, or of the next one that can be decoded."""
        for index in itertools.chain(range(k, len(self)), range(k)):
            try:
                return index, self.decode(self.files[index])
            except Exception as error:  # decoders raise what they like
                if report and not self.broken[index]:
                    self.broken[index] = True
                    tqdm.write(f"skipped {self.files[index]!r}: {error}", file=sys.stderr)
        raise UsageError(f"{self.root}: no image here or below; give a folder that holds some")
    def decode(self, file):
        with Image.open(file, formats=FORMATS) as image:
            image.draft("RGB", (2 * self.size, 2 * self.size))  # a large JPEG at 1/2, 1/4 or 1/8
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey; 257 = 65535/255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            return image.convert("RGB")
    def crop(self, image, generator=None):
        side = min(self.size, *image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        if generator:
            x = int(torch.randint(image.width - side + 1, (), generator=generator))
            y = int(torch.randint(image.height - side + 1, (), generator=generator))
        box = (x, y, x + side, y + side)
        pixels = pixels_of(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box))
        if generator and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(2)
        return pixels

class DeadLeaves(Dataset):
    """Occluding discs with radii ∝ r^-3: edges at all scales, as in photographs (Lee, Mumford &
    Huang 2001), each with a grating. Item i is a function of (seed, i): (3, size, size) uint8."""
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
        grating = 51 * contrast ** 2 * torch.sin(2 * math.pi / (4 * 8 ** frequency) * across)
        return F.avg_pool2d(pixels_of(colour) + grating, 2).round().clamp(0, 255).to(torch.uint8)

def open_data(cfg, train):
    """The training set of a Config, or the held-out one."""
    folder = cfg.data if train else cfg.val or cfg.data
    if folder:
        return ImageFolder(folder, cfg.image_size, train, cfg.seed, hold_out=0 if cfg.val else 20)
    leaves = dict(seed=cfg.seed) if train else dict(seed=cfg.seed + 1, length=64)
    return DeadLeaves(cfg.image_size, **leaves)

# ---- 8. The training step: one forward and one backward of the autoencoder a batch.
def generator_step(vae, x, *, adversary=None, perceptual=None, pixel_loss="l1",
                   perceptual_weight=1.0, kl_weight=1e-6, weight=0.5, adaptive=True,
                   autocast=contextlib.nullcontext, scale=1.0, generator=None):
    """Accumulate the autoencoder's gradient of L_G -> x_hat, detached, and terms.
    Each loss is differentiated down to x̂ and no further; the sum of these image gradients goes
    through the autoencoder, once: by the chain rule the textbook's gradient.
    x: (B, 3, H, W) in [-1, 1]. vae: may be wrapped in DistributedDataParallel. adversary(x, image)
    -> scalar: -E[D(image)], or a loss in its place. weight: w(t)·disc_weight; 0 leaves it out.
    autocast(): the networks' context; losses, norms and λ are of x's dtype. scale: factor of all
    gradients, a float or 0-d tensor. terms: 0-d tensors, means before weighting: l1, l2, lpips,
    rec_loss, kl (nats an image), kl_dim (a latent dimension); with an adversary g_loss, lam, w (λ·
    weight, or weight), grad_ratio (w·‖∇adv‖/‖∇rec‖). Needs: adaptive_weight, average_over_ranks."""
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
        grad_ratio = w * adv_last.norm() / rec_last.norm()
        terms.update(g_loss=adv_loss, lam=lam, w=w, grad_ratio=grad_ratio)

    # One backward of the autoencoder in one call: with two, ranks would average after the first.
    outputs, gradients = [x_hat], [image_grad]
    if kl.requires_grad:  # not with a frozen encoder
        outputs.append(kl_weight * kl / x[0].numel())
        gradients.append(scale * torch.ones_like(kl))
    torch.autograd.backward(outputs, gradients)
    return x_hat.detach(), {name: value.detach() for name, value in terms.items()}

def discriminator_step(disc, x, x_hat, *, loss=hinge_d_loss, penalty=None, r1=0.0,
                       autocast=contextlib.nullcontext, scale=1.0):
    """Accumulate D's gradient of L_D, on the images that generator_step has just seen and made.
    x, x_hat: (B, 3, H, W). loss(logits of x, of x̂) and penalty(x, x_hat) -> scalar. r1: γ of R1,
    with which the step runs in fp32. -> terms, 0-d tensors: d_loss, logits_real, logits_fake, d_acc
    (share of patches that D judges rightly). Needs: hinge_d_loss, r1_penalty."""
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
    """All that a run holds. Ranks start equal (same seed) and stay equal (averaged gradients)."""
    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        name = Path(cfg.data).resolve().name if cfg.data else "leaves"  # other data, other folder
        self.folder = Path(cfg.out or f"run/{cfg.preset}-{name}")
        self.has_gan = cfg.disc_weight > 0 and cfg.texture != "none"  # or what is in its place
        self.step, self.drawn = 0, 0  # updates done; images drawn for them, by all ranks
        self.best, self.latents = -math.inf, dict(scaling_factor=None, shift_factor=None)
        self.unread, self.clock = [], time.perf_counter()  # terms since the last record, its time
        self.has_last, self.alarmed = False, False  # is there a last.pt; any alarm since then
        self.train_set, val_set = open_data(cfg, train=True), open_data(cfg, train=False)
        self.val_set = Subset(val_set, range(0, len(val_set), len(val_set) // 256 + 1))
        on = dict(device=device, memory_format=torch.channels_last)
        self.perceptual = Perceptual(cfg.perceptual_net).to(**on) if cfg.perceptual_weight else None
        torch.manual_seed(cfg.seed)
        if cfg.init:
            self.vae, _ = load_autoencoder(cfg.init, cfg.recompute)
        else:
            self.vae = AutoencoderKL(3, cfg.ch, cfg.ch_mult, cfg.num_res_blocks, cfg.z_channels,
                                     recompute=cfg.recompute)
        self.vae.to(**on)
        self.average = copy.deepcopy(self.vae)  # what is measured, drawn, and saved for use
        self.vae.encoder.requires_grad_(not cfg.freeze_encoder)
        self.vae.quant_conv.requires_grad_(not cfg.freeze_encoder)
        spectral = cfg.spectral and cfg.texture != "wgan-gp"  # whose penalty bounds D instead
        self.disc = PatchDiscriminator(3, cfg.ndf, spectral=spectral).to(**on)
        self.d_loss = {"hinge": hinge_d_loss, "ns": non_saturating_d_loss,
                       "wgan-gp": wasserstein_d_loss}.get(cfg.texture)  # None: no D trains
        self.noise = torch.Generator(device)
        encoder = [*self.vae.encoder.parameters(), *self.vae.quant_conv.parameters()]
        decoder = [*self.vae.decoder.parameters(), *self.vae.post_quant_conv.parameters()]
        groups = [dict(name="enc", params=encoder), dict(name="dec", params=decoder),
                  dict(name="disc", params=self.disc.parameters())]
        self.optimiser = torch.optim.Adam(groups, betas=(0.5, 0.9), fused=device.type != "mps")
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.precision)  # else fp32
        if cfg.precision == "auto" and device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if has_bf16 else torch.float16
        self.autocast = functools.partial(torch.autocast, device.type, self.dtype, bool(self.dtype))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.warm_up = WarmUp(cfg.disc_start, cfg.disc_lead, cfg.disc_ramp,
                              window=max(cfg.steps // 200, 5), latest=cfg.steps // 2)
        self.monitor = CollapseMonitor()
        self.parts = dict(vae=self.vae, disc=self.disc, optimiser=self.optimiser,
                          scaler=self.scaler, warm_up=self.warm_up, monitor=self.monitor)
        self.vae_ddp, self.disc_ddp = self.vae, self.disc
        if WORLD_SIZE > 1:
            self.vae_ddp = DistributedDataParallel(self.vae, gradient_as_bucket_view=True)
            self.disc_ddp = DistributedDataParallel(self.disc, gradient_as_bucket_view=True)

    def adversary(self, x, x_hat):
        """The loss that brings texture: -E[D(x̂)], or a road not taken."""
        if self.cfg.texture == "focal":
            return focal_frequency_loss(x, x_hat).mean()
        if self.cfg.texture == "sobel":
            return sobel_loss(x, x_hat).mean()
        if self.cfg.texture == "gram":
            return gram_loss(self.perceptual.features(x), self.perceptual.features(x_hat)).mean()
        g_loss = non_saturating_g_loss if self.cfg.texture == "ns" else hinge_g_loss
        return g_loss(self.disc(x_hat))
    def penalty(self, x, x_hat):
        return 10 * gradient_penalty(self.disc, x, x_hat, self.noise)  # 10: Gulrajani 2017, §4

    def batches(self):
        """This rank's batches, (B, 3, H, W) uint8, from the next image on, without end."""
        size = self.cfg.batch_size
        starts = itertools.count(self.drawn + RANK * size, WORLD_SIZE * size)
        indices = (range(start, start + size) for start in starts)
        yield from DataLoader(self.train_set, batch_sampler=indices, num_workers=self.cfg.workers,
                              worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda")

    def update(self, batches):
        """One update of the autoencoder, and of D once it trains, from cfg.accumulate batches."""
        cfg, step = self.cfg, self.step
        trains_disc = self.has_gan and self.d_loss and self.warm_up.trains_disc(step)
        self.optimiser.zero_grad()
        self.noise.manual_seed(seed_of(cfg.seed, step, RANK))
        scale = self.scaler.scale(torch.ones((), device=self.device)) / cfg.accumulate
        for _ in range(cfg.accumulate):
            x = to_model(next(batches), self.device)
            x_hat, terms = generator_step(
                self.vae_ddp, x, adversary=self.adversary if self.has_gan else None,
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
        for group, lr in zip(self.optimiser.param_groups, (cfg.lr, cfg.lr, cfg.lr_disc)):
            group["lr"] = lr
            if group["params"][0].grad is not None:  # else a frozen encoder, or D before it trains
                norm = nn.utils.clip_grad_norm_(group["params"], cfg.clip or math.inf)
                self.unread.append({f"grad_norm_{group['name']}": norm})
        self.scaler.step(self.optimiser)
        self.scaler.update()
        decay = cfg.ema if step > 0 else 0.0  # the first update copies
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(list(self.average.parameters()), list(self.vae.parameters()), None)
        self.step += 1
        self.drawn += WORLD_SIZE * cfg.batch_size * cfg.accumulate
        if self.step % 10 == 0:
            self.unread.append(self.monitor.look(x, x_hat))

    def read_record(self):
        """-> the means of ten steps over all ranks, in one transfer from the device.
        What an fp16 overflow does: the scaler has skipped the step and halved its scale; terms of
        gradients are dropped here. With a scale below 1 they are kept, and the monitor stops."""
        series = {}
        for terms in self.unread:
            for name, value in terms.items():
                series.setdefault(name, []).append(value.float())
        self.unread = []
        means = average_over_ranks(torch.stack([torch.stack(v).mean() for v in series.values()]))
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        record = dict(step=self.step)
        for name, value in zip(series, means.tolist()):
            if math.isfinite(value) or not (may_skip and name.startswith(("grad_", "lam", "w"))):
                record[name] = value
        images = 10 * WORLD_SIZE * self.cfg.batch_size * self.cfg.accumulate
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        return dict(record, lr=self.cfg.lr, images_per_s=images / seconds)

    def validate(self):
        """Measure and draw the averaged weights, keep the best -> the val_ terms of the log."""
        measured = evaluate(self.average, self.val_set, self.device, self.perceptual)
        self.latents = {name: measured[name] for name in self.latents}
        picture = self.folder / f"samples/{self.step:07d}.png"
        save_grid(picture, self.val_set, self.device, self.average)
        score = measured["psnr"] if measured["lpips"] is None else -measured["lpips"]
        score = float(average_over_ranks(torch.tensor(score)))  # the same on all, to the bit
        if self.has_gan and self.warm_up.weight(self.step - 1) < 1:
            score -= 1e6  # no blurred image stays the best
        if score > self.best:
            self.best = score
            write_whole(self.folder / "best.pt", self.state_dict())
        return {f"val_{name}": measured[name] for name in ("psnr", "ssim", "lpips", "sharpness")
                if measured[name] is not None}

    def save(self, gan_comes_on=False):
        """Write last.pt. healthy.pt becomes the save before, if no cause or damage was up since; at
        the start, and without alarm at the last record before the GAN is felt, this one."""
        last, healthy = self.folder / "last.pt", self.folder / "healthy.pt"
        if self.has_last and not self.alarmed:
            write_whole(healthy, last)
        write_whole(last, self.state_dict())
        if self.step == 0 or (gan_comes_on and not self.monitor.alarm):
            write_whole(healthy, last)
        self.has_last, self.alarmed = True, self.monitor.alarm

    def report_collapse(self, error):
        """Write collapse.json, collapse.png (rows: image, healthy, now); go back to healthy.pt."""
        report = dict(vars(error), signs=self.monitor.values, limits=self.monitor.limits)
        write_whole(self.folder / "collapse.json", json.dumps(report, indent=1).encode())
        saved, healthy = read_file(self.folder / "healthy.pt"), copy.deepcopy(self.vae)
        healthy.load_state_dict(saved["training"]["vae"])
        save_grid(self.folder / "collapse.png", self.val_set, self.device, healthy, self.vae)
        write_whole(self.folder / "last.pt", self.folder / "healthy.pt")
        cut_log(self.folder / "log.jsonl", saved["step"])

    def state_dict(self):
        """What a checkpoint holds. `state_dict`, the averaged weights, opens in diffusers as it is;
        `training` is what continuing takes, with the weights that are trained."""
        training = {name: part.state_dict() for name, part in self.parts.items()}
        weights = {name: weight.contiguous() for name, weight in self.average.state_dict().items()}
        return dict(self.latents, state_dict=weights, config=asdict(self.cfg), step=self.step,
                    training=dict(training, drawn=self.drawn, best=self.best))

    def load_state_dict(self, saved):
        training = saved["training"]
        for name, part in self.parts.items():
            if training[name]:  # the scaler's is empty in fp32
                part.load_state_dict(training[name])
        self.average.load_state_dict(saved["state_dict"])
        self.step, self.drawn = saved["step"], training["drawn"]
        self.best, self.latents = training["best"], {name: saved[name] for name in self.latents}

    def begin_or_continue(self):
        """Go on from last.pt, or where there is none from healthy.pt; else begin the folder."""
        saves = [*self.folder.glob("last.pt"), *self.folder.glob("healthy.pt")]
        if saves:
            try:
                self.load_state_dict(read_file(saves[0]))
            except Exception as error:  # whatever does not fit
                raise UsageError(f"{saves[0]}: {error}; take the flags it was trained with "
                                 "or another --out, or move it away for healthy.pt") from None
            tqdm.write(f"{self.folder}: continues after step {self.step} of {self.cfg.steps}")
        self.has_last, self.alarmed = self.folder / "last.pt" in saves, self.monitor.alarm
        wait_for_ranks()  # all have read before one writes
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        cut_log(self.folder / "log.jsonl", self.step)
        write_whole(self.folder / "config.json", json.dumps(asdict(self.cfg)).encode())
        if not saves:
            self.save()

def train(cfg, signals=()):
    """Train as cfg says, alone or as one of torchrun's processes; the same cfg again continues.
    Raises UsageError before it writes anything, CollapseError after a report, and after a save
    KeyboardInterrupt(number, text), once `signals` has the number of a signal."""
    run = Trainer(cfg, launch(cfg.device))
    tqdm.write(f"preset {cfg.preset} on {run.device}, {len(run.train_set)} images to {run.folder}")
    run.begin_or_continue()
    warned = False
    with contextlib.closing(run.batches()) as batches, \
            tqdm(total=cfg.steps, initial=run.step, disable=RANK > 0, dynamic_ncols=True) as bar:
        while run.step < cfg.steps:
            run.update(batches)
            bar.update()
            if run.step % 10:
                continue  # below: the only place that waits for the device

            record = run.read_record()
            stop = wait_for_ranks(max(signals, default=0))  # the signal that any rank got
            event = ""
            if run.has_gan and run.warm_up.observe(record["rec_loss"], run.step):
                event = f"L_rec has saturated; the GAN is felt after {cfg.disc_lead} more steps"
            try:
                run.monitor.assert_healthy(run.step, record)
            except CollapseError as error:
                if cfg.on_collapse == "stop" or error.sign == "non_finite":
                    run.report_collapse(error)
                    raise
                event, warned = event if warned else str(error), True
            run.alarmed |= run.monitor.alarm
            if event:
                record["event"] = event
                tqdm.write(f"step {run.step}: {event}")
            ends = run.step == cfg.steps
            if ends or run.step % cfg.sample_every == 0:
                record |= run.validate()
            if RANK == 0:  # before the save, or a kill could lose the record
                with open(run.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            gan_comes_on = run.warm_up.weight(run.step - 1) == 0 < run.warm_up.weight(run.step + 9)
            if ends or run.step % cfg.save_every == 0 or gan_comes_on or stop:
                run.save(gan_comes_on)
            shown = record.keys() & {"l1", "lpips", "kl_dim", "d_acc", "w"}
            bar.set_postfix({name: f"{record[name]:.3g}" for name in sorted(shown)})
            if stop and not ends:
                raise KeyboardInterrupt(stop, f"saved step {run.step}; the same command goes on")
    tqdm.write(f"{run.folder}: {run.step} steps done; a larger --steps goes on from here")

# ---- 10. Processes, files, pictures.
# Rank 0 alone writes. DDP averages gradients, average_over_ranks λ's, each record, the score.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def launch(kind):
    """-> the device of a kind, or of the best kind. Under torchrun it joins the other processes."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is none on this machine; take --device auto")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    return device

def average_over_ranks(tensor):
    """The mean over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor

def wait_for_ranks(number=0):
    """Wait until all processes are here -> the largest of their numbers."""
    largest = torch.tensor(number)  # on the CPU, so by gloo
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)

def catch_signals():
    """-> a list that gets the number of a SIGINT or SIGTERM: train saves within ten steps, main
    exits with 128 + number. The same one again ends the process (not under torchrun)."""
    caught = []
    def catch(number, frame):
        caught.append(number)
        if WORLD_SIZE == 1:  # torchrun and the cluster may both send the first
            signal.signal(number, signal.SIG_DFL)
        if RANK == 0:  # print is not for handlers
            os.write(2, b"\nvaegan.py: saves within ten steps, then stops\n")
    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught

def ignore_signals(worker):
    """For a process that loads images: the one that trains decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def write_whole(path, content):
    """Rank 0 writes bytes, what another path holds, or a dict by torch.save: beside, flushed,
    renamed, so never half a file. The others wait: if one left, torchrun would end rank 0."""
    if RANK == 0:
        beside = path.with_name(path.name + ".tmp")
        with open(beside, "wb") as file:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content.read_bytes() if isinstance(content, Path) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    wait_for_ranks()

def cut_log(path, step):
    """Keep the whole records of log.jsonl up to a step."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"}\n")]
    write_whole(path, b"".join(line for line in whole if json.loads(line)["step"] <= step))

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
    except Exception as error:  # whatever stands in the file, or no safetensors
        raise UsageError(f"{path} cannot be read, {error}; give another file, or move it "
                         "away; .safetensors take `pip install safetensors`") from None

DIFFUSERS = (  # a pattern in the names of others, what CompVis writes there
    (r"^(first_stage_model|vae)\.", ""), (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"), (r"conv_shortcut", "nin_shortcut"),
    (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"), (r"to_out\.0|proj_attn", "proj_out"),
    (r"attn_1\.(to_)?([qkv])(uery|ey|alue)?\.", r"attn_1.\2."))

def load_autoencoder(path, recompute=False):
    """-> the AutoencoderKL in a file, of the widths found there, and all that the file holds.
    Names may be CompVis' or diffusers'. Raises UsageError that says what does not fit."""
    content, state = read_file(path), {}
    try:
        weights = content.get("state_dict", content)
        if "bn.running_mean" in weights:
            raise ValueError("this is FLUX.2's, which is of another kind")
        ups = [name for name in weights if re.search(r"decoder\.up_blocks.*upsamplers.*bias", name)]
        for name, weight in weights.items():  # diffusers counts up_blocks from the coarsest
            name = re.sub(r"up_blocks\.(\d)", lambda i: f"up_blocks.{len(ups) - int(i[1])}", name)
            for pattern, replacement in DIFFUSERS:
                name = re.sub(pattern, replacement, name)
            if ".attn_1." in name and weight.dim() == 2:
                weight = weight[:, :, None, None]  # a linear layer as a 1×1 convolution
            if name.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
                state[name] = weight
        ch = len(state["encoder.conv_in.bias"])
        z_channels = state["decoder.conv_in.weight"].shape[1]
        down = [name.split(".") for name in state if name.startswith("encoder.down.")]
        blocks = len({parts[4] for parts in down if parts[3] == "block"})
        wide = [f"encoder.down.{level}.block.0.conv1.bias" for level in range(len(down))]
        ch_mult = [len(state[name]) // ch for name in wide if name in state]
        quant_conv = "quant_conv.weight" in state
        vae = AutoencoderKL(3, ch, ch_mult, blocks, z_channels, quant_conv, recompute)
        vae.load_state_dict(state)
    except Exception as error:  # whatever the file holds
        raise UsageError(f"{path} holds no KL autoencoder ({error}); give Stable "
                         "Diffusion's, or a checkpoint of vaegan.py") from None
    return vae, content

# ---- 11. Measures, of images in [-1, 1]: one number an image, (B,).
def psnr(x, x_hat):
    """10·log10(1/MSE) in dB, of images scaled to [0, 1]; 100 dB if equal."""
    return -10 * torch.log10(((x - x_hat) / 2).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10))

def ssim(x, x_hat):
    """Structural similarity, 1 if equal: the mean over channels and whole windows, in fp32.
    Source: Wang et al. 2004, eq. 13: Gaussian window of 11 px, σ 1.5, K 0.01, 0.03, range 1."""
    taps = torch.exp(-torch.arange(-5, 6, device=x.device) ** 2 / (2 * 1.5 ** 2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    def blur(image):
        return F.conv2d(image.contiguous(), window, groups=x.shape[1])  # never in TF32
    x, y = (x.float() + 1) / 2, (x_hat.float() + 1) / 2
    mx, my = blur(x), blur(y)
    variances = blur(x * x) - mx * mx + blur(y * y) - my * my
    covariance = blur(x * y) - mx * my
    similarity = (2 * mx * my + 0.01 ** 2) / (mx * mx + my * my + 0.01 ** 2)
    similarity = similarity * (2 * covariance + 0.03 ** 2) / (variances + 0.03 ** 2)
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
        row = dict(psnr=psnr(x, x_hat), ssim=ssim(x, x_hat), kl_dim=posterior.kl() / z.shape[1],
                   energy=high_frequency_energy(x), energy_hat=high_frequency_energy(x_hat),
                   z=z.mean(1), z_square=z.pow(2).mean(1))
        if perceptual is not None:
            row["lpips"] = perceptual(x, x_hat)
        rows.append(row)
    mean = {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}
    return dict(images=len(dataset), psnr=mean["psnr"], ssim=mean["ssim"], lpips=mean.get("lpips"),
                sharpness=mean["energy_hat"] / mean["energy"], kl_dim=mean["kl_dim"],
                scaling_factor=max(mean["z_square"] - mean["z"] ** 2, 1e-20) ** -0.5,
                shift_factor=mean["z"])

# ---- 12. Roads not taken: what was not chosen for texture.
def non_saturating_d_loss(logits_real, logits_fake):
    """½ E[softplus(-D(x))] + ½ E[softplus(D(x̂))], of any shape. Goodfellow et al. 2014, eq. 1."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())

def non_saturating_g_loss(logits_fake):
    """E[softplus(-D(x̂))], of any shape. Source: Goodfellow et al. 2014, §3."""
    return F.softplus(-logits_fake).mean()

def wasserstein_d_loss(logits_real, logits_fake):
    """E[D(x̂)] - E[D(x)], of any shape, beside hinge_g_loss. Gulrajani et al. 2017, eq. 3."""
    return logits_fake.mean() - logits_real.mean()

def gradient_penalty(disc, x, x_hat, generator=None):
    """E(‖∇D(x̃)‖ - 1)² at random x̃ between x and x̂, D(x̃) being an image's mean logit.
    Source: Gulrajani et al. 2017, eq. 3. x, x_hat: (B, 3, H, W) -> scalar with a graph to D."""
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    between = (u * x + (1 - u) * x_hat).detach().requires_grad_()
    logits = disc(between).flatten(1).mean(1)
    gradient, = torch.autograd.grad(logits.sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()

def focal_frequency_loss(x, x_hat, alpha=1.0):
    """Mean over frequencies of w·|F(x) - F(x̂)|², w = |F(x) - F(x̂)|^alpha / its maximum.
    Source: Jiang et al. 2021, eq. 8 and 9. x, x_hat: (B, C, H, W) -> (B,)."""
    square = torch.view_as_real(torch.fft.fft2(x - x_hat, norm="ortho")).pow(2).sum(-1)
    w = square.detach() ** (alpha / 2)  # (B, C, H, W)
    w = w / w.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (w * square).mean(dim=(1, 2, 3))

def gram_loss(features, features_hat):
    """Σ over layers of ‖G - Ĝ‖², G = f·fᵀ/(h·w): which features come together, wherever they are.
    Source: Gatys et al. 2016, eq. 3 to 5, for unit-length f. Lists of (B, C, h, w) -> (B,)."""
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
    parser = Parser(prog="vaegan.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                              help="train on a folder of images; again: continue")
    for f in fields(Config):
        text = f.metadata["help"]
        if f.name in TINY:
            text += f" (sd: {f.default}, tiny: {TINY[f.name]})"
        elif f.default != "":
            text += f" (default: {f.default})"
        options = dict(help=text)
        if isinstance(f.default, bool):
            options.update(action=argparse.BooleanOptionalAction)
        else:
            options.update(type=f.metadata["parse"], choices=f.metadata["choices"])
        if f.name == "ch_mult":
            options.update(nargs="+")
        sub.add_argument("--" + f.name.replace("_", "-"), **options)
    sub = commands.add_parser("eval", allow_abbrev=False, help="measure autoencoders on images")
    add = sub.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help="any file that --init takes")
    add("--data", default="", metavar="DIR", help="folder of images, all of them; none: leaves")
    add("--image-size", type=int, default=0, help="side of the crops; 0: as trained, else 256")
    add("--perceptual-net", default="alex", choices=("vgg", "alex", "squeeze"))
    add("--save", default="", metavar="DIR", help="folder for compare.png")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return vars(parser.parse_args(argv))

def eval_command(checkpoint, data, image_size, perceptual_net, save, device):
    """Print a table of what evaluate gives, a row a checkpoint; draw compare.png with `save`."""
    device = launch(device)
    vaes, contents = zip(*[load_autoencoder(path) for path in checkpoint])
    size = image_size or contents[0].get("config", {}).get("image_size", 256)
    dataset = ImageFolder(data, size, train=False) if data else DeadLeaves(size, 1, length=64)
    perceptual, about = None, f"LPIPS-{perceptual_net}"
    try:
        perceptual = Perceptual(perceptual_net).to(device)
    except ImportError as error:
        about = f"LPIPS not measured, as {error}"
    columns = ("psnr", "ssim", "lpips", "sharpness", "kl_dim", "scaling_factor", "shift_factor")
    print(f"{len(dataset)} centre crops of {size} px, decoded means, {about}\n")
    print(f"| checkpoint | step | {' | '.join(columns)} |\n{'|---' * 9}|")
    for path, vae, content in zip(checkpoint, vaes, contents):
        measured = evaluate(vae.to(device), dataset, device, perceptual)
        cells = ["–" if measured[name] is None else f"{measured[name]:.4g}" for name in columns]
        print(f"| {path} | {content.get('step', '–')} | {' | '.join(cells)} |", flush=True)
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        save_grid(Path(save) / "compare.png", dataset, device, *vaes)

def main(argv=None):
    """Run a command line -> exit status: 0 done, 1 a fault of the machine, 2 bad input,
    3 collapsed, 130 and 143 interrupted by SIGINT and SIGTERM."""
    try:
        flags = parse(argv)
        if flags.pop("command") == "eval":
            eval_command(**flags)
        else:
            train(Config.of(flags.pop("preset", "auto"), **flags), catch_signals())
        return 0
    except (UsageError, ImportError) as error:
        status, text = 2, error
    except CollapseError as error:
        status, text = 3, error
    except (OSError, torch.OutOfMemoryError) as error:
        status, text = 1, f"{type(error).__name__}: {error}"
    except KeyboardInterrupt as error:
        number, text = error.args or (signal.SIGINT, "interrupted")
        status = 128 + number
    if status == 1 or RANK == 0:
        tqdm.write(f"vaegan.py: {' '.join(str(text).split())[:600]}", file=sys.stderr)
    return status

if __name__ == "__main__":
    exit_status = main()
    if WORLD_SIZE > 1:
        # Two gloo ranks with DDP and sys.exit aborted in 8 of 66 runs, in 0 of 22 with os._exit.
        sys.stdout.flush()
        time.sleep(2 * (exit_status > 0 and RANK > 0))  # rank 0 speaks first, or torchrun ends it
        os._exit(exit_status)
    sys.exit(exit_status)
