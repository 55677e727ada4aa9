"""Alternatives to the hinge GAN of vaegan.py, and an example of how that file is extended.

    python .github/experiments/alternatives.py wgan-gp train --data DIR --out DIR

The first word is an alternative, all others are for vaegan.py. Each one is a loss, and a subclass
of vaegan.Trainer that says where the loss goes:

    ns            non-saturating GAN                     Goodfellow et al. 2014
    wgan-gp       Wasserstein GAN, gradient penalty      Gulrajani et al. 2017
    focal         focal frequency loss, without a D      Jiang et al. 2021
    gram          Gram (style) loss, without a D         Gatys et al. 2016
    sobel         Sobel (edge) loss, without a D         Sobel & Feldman 1968
    no-spectral   hinge GAN, D without spectral norm     (Miyato et al. 2018 introduced it)

Weight, λ and warm-up are those of the GAN: --disc-weight, --adaptive, --disc-start and so on. The
bound of λ is made for a D: focal and sobel, whose gradients are small, want --lambda-max 0.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import vaegan  # noqa: E402, it lies in the repository's root

# ---- Losses. A logit is of one patch, and logits may have any shape.


def non_saturating_d_loss(logits_real, logits_fake):
    """½ E[softplus(-D(x))] + ½ E[softplus(D(x̂))] -> scalar. Source: Goodfellow et al. 2014, eq. 1,
    for D = sigmoid(logit)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_g_loss(logits_fake):
    """E[softplus(-D(x̂))] -> scalar. Source: Goodfellow et al. 2014, §3."""
    return F.softplus(-logits_fake).mean()


def wasserstein_d_loss(logits_real, logits_fake):
    """E[D(x̂)] - E[D(x)] -> scalar. Source: Gulrajani et al. 2017, eq. 3."""
    return logits_fake.mean() - logits_real.mean()


def gradient_penalty(disc, x, x_hat, generator=None):
    """E(‖∇D(x̃)‖ - 1)² at random x̃ between x and x̂, D(x̃) being an image's mean logit.
    Source: Gulrajani et al. 2017, eq. 3. x, x_hat: (B, 3, H, W) -> scalar with a graph to D."""
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    between = (u * x + (1 - u) * x_hat).detach().requires_grad_()
    logits = disc(between).flatten(1).mean(dim=1)  # (B,)
    (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()


def focal_frequency_loss(x, x_hat, alpha=1.0):
    """Mean over frequencies of w·|F(x) - F(x̂)|², with w = |F(x) - F(x̂)|^alpha over its maximum in
    the channel: what is wrong counts more. Source: Jiang et al. 2021, eq. 8 and 9.
    x, x_hat: (B, C, H, W) -> (B,). w gets no gradient."""
    spectrum = torch.fft.fft2(x - x_hat, norm="ortho")
    square = torch.view_as_real(spectrum).pow(2).sum(dim=-1)  # (B, C, H, W)
    w = square.detach() ** (alpha / 2)
    w = w / w.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (w * square).mean(dim=(1, 2, 3))


def gram_loss(features, features_hat):
    """Σ over layers of ‖G - Ĝ‖², G = f·fᵀ/(h·w): which features occur together, at any place.
    Source: Gatys et al. 2016, eq. 3 to 5, for f of unit length. Lists of (B, C, h, w) -> (B,)."""
    loss = 0.0
    for f, f_hat in zip(features, features_hat):
        f, f_hat = f.flatten(2), f_hat.flatten(2)  # (B, C, h·w)
        difference = (f @ f.mT - f_hat @ f_hat.mT) / f.shape[2]  # (B, C, C)
        loss = loss + difference.pow(2).sum(dim=(1, 2))
    return loss


def sobel_loss(x, x_hat):
    """Mean |S(x) - S(x̂)| over Sobel's two derivatives S; that of a ramp is its slope.
    Source: Sobel & Feldman 1968. x, x_hat: (B, C, H, W) -> (B,)."""
    d = x - x_hat  # S is linear
    # Smooth by 1, 2, 1 in one direction and differentiate in the other: (B, C, H-2, W-2).
    smooth_rows = (d[:, :, :-2] + 2 * d[:, :, 1:-1] + d[:, :, 2:]) / 4
    smooth_columns = (d[..., :-2] + 2 * d[..., 1:-1] + d[..., 2:]) / 4
    along_x = (smooth_rows[..., 2:] - smooth_rows[..., :-2]) / 2
    along_y = (smooth_columns[:, :, 2:] - smooth_columns[:, :, :-2]) / 2
    return (along_x.abs() + along_y.abs()).mean(dim=(1, 2, 3)) / 2


# ---- Trainers. Only what differs from vaegan.Trainer, whose GAN is a hinge GAN.


class NonSaturating(vaegan.Trainer):
    """Another loss for D, and its counterpart for the autoencoder."""

    d_loss = staticmethod(non_saturating_d_loss)

    def adversary(self, x, x_hat):
        """(B, 3, H, W) twice -> scalar, as for all adversaries."""
        return non_saturating_g_loss(self.disc(x_hat))


class WassersteinGP(vaegan.Trainer):
    """A critic whose slope a penalty holds at 1. The autoencoder's loss is that of hinge, E[-D]."""

    spectral = False  # it would bound the slope a second time
    d_loss = staticmethod(wasserstein_d_loss)

    def penalty(self, x, x_hat):
        """The term of L_D beside d_loss. 10: Gulrajani et al. 2017, §4."""
        return 10 * gradient_penalty(self.disc, x, x_hat, self.noise)


class FocalFrequency(vaegan.Trainer):
    """A loss on images takes the GAN's place; with d_loss None no D trains."""

    d_loss = None

    def adversary(self, x, x_hat):
        """The mean over the batch."""
        return focal_frequency_loss(x, x_hat).mean()


class Gram(vaegan.Trainer):
    """A loss on the features of LPIPS takes the GAN's place."""

    d_loss = None

    def __init__(self, cfg, device):
        if cfg.perceptual_weight == 0:
            raise vaegan.UsageError("gram compares features of LPIPS; give --perceptual-weight 1")
        super().__init__(cfg, device)

    def adversary(self, x, x_hat):
        """The mean over the batch. The features are of x's dtype, and so are the products here."""
        features, features_hat = self.perceptual.features(x), self.perceptual.features(x_hat)
        with torch.autocast(x.device.type, enabled=False):
            return gram_loss(features, features_hat).mean()


class Sobel(vaegan.Trainer):
    """A loss on edges takes the GAN's place."""

    d_loss = None

    def adversary(self, x, x_hat):
        """The mean over the batch."""
        return sobel_loss(x, x_hat).mean()


class NoSpectralNorm(vaegan.Trainer):
    """The hinge GAN with a D that may be as steep as it likes."""

    spectral = False


ALTERNATIVES = {
    "ns": NonSaturating,
    "wgan-gp": WassersteinGP,
    "focal": FocalFrequency,
    "gram": Gram,
    "sobel": Sobel,
    "no-spectral": NoSpectralNorm,
}


def main(argv):
    """Run an alternative's command line -> exit status, as vaegan.main."""
    name = argv[0] if argv else ""
    if name not in ALTERNATIVES:
        problem = f"no alternative {name!r}; choose from {', '.join(ALTERNATIVES)}"
    elif not any(word.startswith("--out") for word in argv):
        problem = "give --out DIR, or one alternative would continue another's run"
    else:
        return vaegan.main(argv[1:], trainer=ALTERNATIVES[name])
    print(f"alternatives.py: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_status)  # the reasons are at the end of vaegan.py
