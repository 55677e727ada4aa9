"""Tests of vaegan.py. Each is named as the claim that it checks, against an independent oracle.

pytest test_vaegan.py                                 90 s on two cores; no network, no data
python test_vaegan.py bench [CH SIZE BATCH ROUNDS]    the textbook step beside vaegan.py's
"""

import ast
import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from torch.testing import assert_close

import vaegan
from vaegan import AutoencoderKL, CollapseMonitor, Config, PatchDiscriminator, Trainer, WarmUp

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SMALL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1)
fp32 = contextlib.nullcontext
bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
fp16 = functools.partial(torch.autocast, "cpu", torch.float16)
each = pytest.mark.parametrize

torch.set_num_threads(1)  # tensors as small as these are slower on two


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def images(batch=2, size=32, dtype=torch.float32, seed=1):
    return torch.rand(batch, 3, size, size, generator=seeded(seed), dtype=dtype) * 2 - 1


def away_from_zero(net):
    """As if it had been trained: no residual branch is silent."""
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return net


def small_nets(dtype=torch.float32):
    """-> autoencoder, discriminator; the same at each call."""
    torch.manual_seed(0)
    disc = PatchDiscriminator(ndf=8).eval()  # without power iterations
    return away_from_zero(AutoencoderKL(**SMALL)).to(dtype), disc.to(dtype)


def g_step(vae, x, disc=None, **options):
    """generator_step with the same noise at each call; with a GAN where there is a D."""

    def adversary(x, image):
        return -disc(image).mean()

    if disc is not None:
        options["adversary"] = adversary
    return vaegan.generator_step(vae, x, generator=seeded(), **options)


@contextlib.contextmanager
def untrained_lpips():
    """LPIPS around a random trunk: good for shapes and gradients, and there offline."""
    import lpips

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
        yield


def random_perceptual(dtype=torch.float32, net="squeeze"):
    torch.manual_seed(3)
    with untrained_lpips():
        return vaegan.Perceptual(net).to(dtype)


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def quiet_posterior(vae):
    """Posterior std e^-15: no noise, so that steps which draw it differently compare."""
    vae.quant_conv.weight.data[4:].zero_()
    vae.quant_conv.bias.data[4:].fill_(-30.0)


def same(a, b):
    """Equal to the last bit: dicts and lists of whatever depth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or a != a and b != b  # nan: a term that is missing


def write_photos(folder, n=6):
    """n JPEGs of 60 by 50 pixels with structure, no two of them alike."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = torch.meshgrid(torch.arange(50), torch.arange(60), indexing="ij")
    for i in range(n):
        pixels = torch.stack([x * 3 + 20 * i, y * 4, (x + y) * (i + 1)], -1) % 256
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{i:02d}.jpg")
    return folder


def without_network(monkeypatch, folder):
    """No network, and no weights of LPIPS but those in the folder."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


# ---- 3. Autoencoder


def test_the_default_is_kl_f8_with_83653863_parameters_in_248_tensors():
    with torch.device("meta"):
        state = AutoencoderKL().state_dict()
        flux = AutoencoderKL(z_channels=16, quant_conv=False)  # and SD3
        assert flux(torch.zeros(1, 3, 64, 64))[1].mean.shape == (1, 16, 8, 8)
    assert len(state) == 248 and sum(weight.numel() for weight in state.values()) == 83_653_863
    assert state.keys() - flux.state_dict() == {n for n in state if "quant_conv" in n}


def test_a_new_encoder_is_linear_up_to_its_last_norm_so_that_colour_is_not_buried():
    encoder = AutoencoderKL(**SMALL).encoder.double()

    def trunk(x):
        return encoder.mid(encoder.down(encoder.conv_in(x)))

    a, b = images(dtype=torch.double).split(1)
    assert_close(trunk(a + b), trunk(a) + trunk(b) - trunk(0 * a))


def test_the_posterior_is_torch_distributions_with_a_clamped_logvar():
    moments = torch.randn(3, 8, 50, 50, dtype=torch.double)
    posterior, (mean, logvar) = vaegan.DiagonalGaussian(moments), moments.chunk(2, dim=1)
    assert posterior.mean.is_contiguous()  # which a view of half the channels is not
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert_close(posterior.kl(), kl.sum(dim=(1, 2, 3)))
    z = posterior.sample(seeded())
    assert torch.equal(z, posterior.sample(seeded()))
    z = (z - mean) / normal.stddev
    assert [z.mean().item(), z.std().item()] == approx([0, 1], abs=0.02)
    extreme = torch.tensor([0.0, -1000, 0, 1000]).view(2, 2, 1, 1)
    assert vaegan.DiagonalGaussian(extreme).logvar.flatten().tolist() == [-30, 20]


def kept_bytes(net, x):
    """Bytes of the tensors that autograd keeps of a forward, without the parameters."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = net(x)  # which must live until the bytes are counted
    count = sum(kept[place].nbytes() for place in kept.keys() - parameters)
    del result
    return count


@each("autocast", [fp32, bf16])
def test_recompute_keeps_40_percent_of_the_activations_with_the_same_gradients(autocast):
    kept, found = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        vae = away_from_zero(AutoencoderKL(ch=32, recompute=recompute))
        g_step(vae, images(), small_nets()[1], autocast=autocast)
        found.append(gradients(vae))
        kept.append(kept_bytes(vae, images()))
    assert torch.equal(*found)
    assert 2**20 < kept[1] <= 0.4 * kept[0]


# ---- 4. Discriminator


def test_one_logit_of_2764737_parameters_sees_exactly_70_by_70_pixels_of_one_image():
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_764_737
    disc, x = small_nets(torch.double)[1], images(2, 160, torch.double).requires_grad_()
    logits = disc(x)
    assert logits.shape == (2, 1, 160 // 8 - 2, 160 // 8 - 2)
    assert_close(disc(x[:1]), logits[:1])  # no batch statistics
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], x)
    for other in (2, 3):
        seen = gradient.abs().sum(dim=(0, 1, other)).nonzero().flatten()
        assert len(seen) == seen[-1] - seen[0] + 1 == 70


@each("autocast", [fp32, bf16])
def test_every_convolution_has_spectral_norm_1_also_under_autocast(autocast):
    disc = PatchDiscriminator(ndf=8)
    for conv in disc.convs:  # as if it had been trained
        conv.parametrizations.weight.original.data.mul_(7.0).add_(0.05)
    with autocast():
        for _ in range(60):  # a power iteration each
            disc(images())
    for conv in disc.eval().convs:
        norm = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert norm.item() == approx(1, abs=1e-3)


def test_without_spectral_norm_it_convolves_with_its_weights_as_they_are():
    disc, h = PatchDiscriminator(ndf=8, spectral=False), images()
    for i, conv in enumerate(disc.convs):
        if i > 0:
            h = torch.where(h > 0, h, 0.2 * h)
        h = F.conv2d(h, conv.weight, conv.bias, stride=(2, 2, 2, 1, 1)[i], padding=1)
    assert_close(disc(images()), h)


# ---- 5. Losses, and when the adversarial one is switched on


def test_lambda_is_vqgans_ratio_when_d_is_strong_and_its_bound_when_d_is_weak():
    g_rec, g_adv = torch.randn(3, 8, 8), torch.randn(3, 8, 8, requires_grad=True)
    norm, norm_adv = [math.sqrt(g.detach().square().sum()) for g in (g_rec, g_adv)]
    strong = vaegan.adaptive_weight(g_rec, 100 * g_adv)
    assert strong.item() == approx(norm / (100 * norm_adv + 1e-4)) and not strong.requires_grad
    for weak in (g_adv, 0 * g_adv):
        assert vaegan.adaptive_weight(g_rec, weak).item() == approx(0.05)
        ratio = norm / (weak.norm().item() + 1e-4)
        assert vaegan.adaptive_weight(g_rec, weak, max_weight=math.inf).item() == approx(ratio)


def test_hinge_losses_have_textbook_values_and_no_gradient_beyond_the_margin():
    real = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    fake = torch.tensor([-3.0, 0.0, 0.5], requires_grad=True)
    loss = vaegan.hinge_d_loss(real, fake)
    loss.backward()
    assert loss.item() == approx(0.5 * (0 + 0.5 + 2) / 3 + 0.5 * (0 + 1 + 1.5) / 3)
    assert_close(real.grad, torch.tensor([0, -1 / 6, -1 / 6]))
    assert_close(fake.grad, torch.tensor([0, 1 / 6, 1 / 6]))
    assert vaegan.hinge_g_loss(fake).item() == approx(2.5 / 3)


def test_lpips_equals_the_package_and_is_frozen_even_in_a_training_parent():
    perceptual = random_perceptual()
    torch.nn.ModuleList([perceptual]).train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(p.requires_grad for p in perceptual.parameters())
    x, x_hat = images().requires_grad_(), images(seed=2).requires_grad_()
    distance = perceptual(x, x_hat)
    theirs = perceptual.lpips(x, x_hat).flatten()
    assert_close(distance, theirs, rtol=1e-4, atol=1e-6)
    perceptual.lpips.net.slice1[0].bias.data.fill_(-100.0)  # all features are zero
    (distance + perceptual(x, x_hat)).sum().backward()
    assert x.grad is None and x_hat.grad.isfinite().all() and x_hat.grad.any()


def test_warm_up_by_step_has_a_lead_of_d_and_a_linear_ramp():
    warm_up = WarmUp(10, lead=5, ramp=20)
    assert [warm_up.trains_disc(step) for step in (0, 9, 10, 99)] == [0, 0, 1, 1]
    weights = [warm_up.weight(step) for step in (0, 10, 15, 16, 25, 34, 35, 99)]
    assert weights == approx([0, 0, 0, 0.05, 0.5, 0.95, 1, 1])
    assert [WarmUp(3).weight(step) for step in (2, 3, 4)] == [0, 1, 1]


def observe(warm_up, records):
    """Feed noisy records of a loss that falls by a fifth in 50 records, until the 500th."""
    for k in records:
        noise = random.Random(k).gauss(0, 0.1)
        warm_up.observe(0.8 ** (min(k, 500) / 50) * math.exp(noise), 10 * k)
    return warm_up


def test_plateau_waits_while_a_noisy_loss_falls_and_half_of_the_steps_at_most():
    assert observe(WarmUp(steps=10_000), range(500)).start is None
    assert 5000 <= observe(WarmUp(steps=20_000), range(1000)).start < 9000
    assert observe(WarmUp(steps=3000), range(200)).start == 1500


def test_warm_up_continues_from_its_state_unless_a_step_is_given():
    whole, part, asked = observe(WarmUp(steps=20_000), range(300)), WarmUp(steps=20_000), WarmUp(7)
    part.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert observe(whole, range(300, 999)).start == observe(part, range(300, 999)).start > 5000
    asked.load_state_dict(whole.state_dict())
    assert asked.start == 7


# ---- 6. Collapse

HEALTHY = dict(  # term: its level in a healthy run, and the noise of its logarithm
    l2=(0.05, 0.1),
    rec_loss=(0.16, 0.05),
    kl_dim=(3, 0.05),
    grad_ratio=(0.5, 0),
    corr=(0.8, 0.08),
    grad_norm_dec=(1, 0.12),
    other_z=(2.5, 0.25),
    batch_spread=(0.4, 0.1),
)


def watch(*phases, monitor=None, seed=0, step=0):
    """Feed phases (records, {term: factor, or its growth}) -> monitor, first error."""
    monitor, error = monitor or CollapseMonitor(), None
    for k, factors in [(k, factors) for records, factors in phases for k in range(records)]:
        step += 10
        noise, terms = random.Random(f"{seed} {step}"), {}
        for name, (level, spread) in HEALTHY.items():
            growth = factors.get("growth of " + name, 1)
            level *= factors.get(name, 1) * growth**k
            terms[name] = level * math.exp(noise.gauss(0, spread))
        try:
            monitor.assert_healthy(step, terms)
        except vaegan.CollapseError as raised:
            error = error or raised
    return monitor, error


WRONG = dict(  # sign: what shows it and no other
    domination=dict(grad_ratio=12),
    spike=dict(grad_norm_dec=12),
    rebound=dict(l2=3.2, rec_loss=1.8),
    z_ignored=dict(other_z=0.2),
    noise=dict(corr=0.05),
    kl_gone=dict(kl_dim=0.003),
)


@each("sign", WRONG)
def test_each_sign_is_up_on_its_own_stream_and_damage_alone_stops_the_run(sign):
    monitor, error = watch((60, {}))
    assert error is None and monitor.limits.keys() == WRONG.keys()
    monitor, error = watch((4, WRONG[sign]), monitor=monitor, step=600)
    assert sign in monitor.over[-1] and (error is None) == (sign in ("domination", "spike"))
    if error is not None:
        assert isinstance(error, AssertionError) and error.sign == sign
        assert 600 < error.step <= 640 and error.value > error.limit == monitor.limits[sign]
        for part in (f"step {error.step}", sign, error.cause, error.remedy):
            assert part in str(error)


QUIET = {  # what a healthy run may do
    "noise": [(300, {})],
    "a dip of 1.5 dB": [(60, {}), (10, dict(l2=1.41, rec_loss=1.19)), (60, {})],
    "a slow decline": [(200, {"growth of l2": 1.001, "growth of rec_loss": 1.0005})],
    "a falling loss": [(200, {"growth of l2": 0.98, "growth of rec_loss": 0.99})],
    "a bad batch": [(50, {}), (1, dict(l2=1.8, rec_loss=1.4, grad_norm_dec=2, corr=0.1)), (50, {})],
    "texture that costs PSNR alone": [(60, {}), (99, dict(l2=1.9))],
    "no picture yet": [(30, dict(corr=0.01, other_z=0.4))],
    "a batch of equal images": [(50, {}), (1, dict(other_z=0.4, batch_spread=1e-4)), (50, {})],
    "images that are all alike": [(60, dict(other_z=0.4, batch_spread=0.1))],
}


@each("seed", range(3))
@each("name", QUIET)
def test_the_monitor_is_silent_on(name, seed):
    monitor, error = watch(*QUIET[name], seed=seed)
    assert error is None and monitor.over == 6 * [{}]


def test_images_that_become_alike_count_for_a_collapse():
    _, error = watch((60, {}), (4, dict(other_z=0.2, batch_spread=1e-4)))
    assert error.sign == "z_ignored"


@each("later, stops", [(1, True), (5, True), (6, False)])
def test_one_record_of_damage_counts_within_five_records_of_a_cause(later, stops):
    gone = (1, dict(kl_dim=0.003))
    assert watch((60, {}), gone, (9, {}))[1] is None
    _, error = watch((60, {}), (1, dict(grad_ratio=12)), (later - 1, {}), gone)
    assert (error is not None) == stops
    if stops:
        assert error.sign == "kl_gone" and "GAN" in error.cause
        assert "--adaptive" in error.remedy


def test_a_missing_term_is_no_sign_and_one_that_is_not_finite_stops_at_once():
    monitor = CollapseMonitor()
    for record in range(200):
        monitor.assert_healthy(record, {"kl_dim": 3.0} if record % 2 else {})
    for value in (math.nan, math.inf):
        with pytest.raises(vaegan.CollapseError, match="lpips"):
            monitor.assert_healthy(10, dict(l1=0.1, lpips=torch.tensor(value)))


def test_a_look_measures_what_its_terms_say():
    x, shift = images(3), torch.tensor([0.7, 0.0, -0.2]).view(3, 1, 1)
    x_hat = 0.5 * x + 0.3 * images(3, seed=9) + shift
    terms = CollapseMonitor.look(x, x_hat)
    centred = [(t - t.mean(dim=(0, 2, 3), keepdim=True)).flatten() for t in (x, x_hat)]
    corr = torch.corrcoef(torch.stack(centred))[0, 1]
    small, small_hat = F.avg_pool2d(x, 2), F.avg_pool2d(x_hat, 2)
    other, own = small - small_hat[[2, 0, 1]], small - small_hat
    energy, energy_hat = [vaegan.high_frequency_energy(t).mean() for t in (x, x_hat)]
    assert terms["corr"].item() == approx(corr.item(), abs=0.01)
    assert terms["other_z"].item() == approx((other.norm(1) / own.norm(1)).item(), rel=0.02)
    assert terms["saturation"].item() == approx((x_hat.abs() > 1).float().mean().item())
    assert terms["high_freq"].item() == approx((energy_hat / energy).item())
    blind = CollapseMonitor.look(x, x_hat[:1].expand(3, -1, -1, -1))
    assert 0.99 < blind["other_z"] < 1 / 0.95
    flat = torch.zeros_like(x)
    corr = [CollapseMonitor.look(*pair)["corr"] for pair in ((x, flat), (flat, x), (flat, flat))]
    assert max(corr[:2]) < 0.1 and corr[2] > 0.99
    spread = (small - small[[2, 0, 1]]).abs().mean()
    assert terms["batch_spread"].item() == approx(spread.item())


@each("cycles, share", [(0.1, 0), (0.2, 0), (0.3, 1), (0.45, 1)])
def test_high_frequency_energy_is_what_lies_above_half_of_nyquist(cycles, share):
    wave = torch.sin(2 * math.pi * cycles * torch.arange(64.0)).expand(1, 3, 64, 64)
    window = torch.outer(torch.hann_window(64, False), torch.hann_window(64, False))
    total = (wave * window).square().mean()  # Parseval
    energy = vaegan.high_frequency_energy(wave)
    assert (energy / total).item() == approx(share, abs=0.01)


# ---- 7. Data


def test_images_of_every_kind_become_upright_rgb_squares(tmp_path):
    grey16 = torch.full((36, 40), 99 * 257 + 200, dtype=torch.int32).numpy()  # nearest: 100
    palette = Image.new("P", (40, 36), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    Image.fromarray(grey16.astype("uint16")).save(tmp_path / "a.png")
    Image.fromarray(grey16).save(tmp_path / "b.pgm")
    palette.save(tmp_path / "c.png")
    Image.new("RGB", (3, 1000), (1, 2, 3)).save(tmp_path / "d_UPPER.TIFF")  # is enlarged
    pixels, exif = torch.arange(32 * 70).reshape(32, 70) % 251, Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels.byte().numpy()).save(tmp_path / "e.png", exif=exif)
    data = vaegan.ImageFolder(tmp_path, 32, train=False)
    assert torch.equal(data[4][0].long(), pixels.rot90(-1)[19:51])  # pixel by pixel
    middle = [data[i][:, 16, 16].tolist() for i in range(4)]
    assert middle == [[100] * 3, [100] * 3, [10, 200, 30], [1, 2, 3]]
    assert data[3].shape == (3, 32, 32) and data[3].dtype == torch.uint8


@each("train", [True, False])
def test_a_picture_shows_the_same_part_as_png_and_as_large_jpeg(tmp_path, train):
    y, x = torch.meshgrid(torch.arange(1200), torch.arange(1600), indexing="ij")
    pixels = torch.stack([x * 255 / 1600, y * 255 / 1200, 0 * x], -1)  # its place is its colour
    found = []
    for name in ("a.png", "a.jpg"):
        (tmp_path / name[2:]).mkdir()
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / name[2:] / name, quality=95)
        data = vaegan.ImageFolder(tmp_path / name[2:], 64, train)
        crops = torch.stack([data[i] for i in range(8 if train else 1)]).float()
        edges = torch.stack([crops[..., 0].mean(2), crops[..., -1].mean(2)], 2)  # left and right
        found.append(edges[:, 0] * 1600 / 255)  # in pixels of the picture
    assert (found[0] - found[1]).abs().max() < 1600 / 255 + 8  # a step of colour, a decoded pixel
    width = (found[0][:, 1] - found[0][:, 0]).abs()  # some are flipped
    if train:  # of 1/2 to 1 times the shorter side, at other places
        assert width.min() > 550 and width.max() < 1210 and width.std() > 50
    else:  # the whole shorter side, in the middle
        assert width.item() == approx(1200, rel=0.03)
        assert found[0].mean().item() == approx(800, rel=0.02)


def test_a_broken_file_is_reported_once_and_another_one_drawn_stands_in(tmp_path, capfd):
    write_photos(tmp_path, 8)
    for name in ("01.jpg", "05.jpg"):  # truncated
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:400])
    Image.new("F", (40, 40), 0.5).save(tmp_path / "08.tif")  # would be black
    Image.new("I", (40, 40), 200).save(tmp_path / "09.tif")
    data = vaegan.ImageFolder(tmp_path, 32, train=False)
    whole = [data[i] for i in (0, 2, 3, 4, 6, 7)]
    instead = [data[i] for i in (1, 5, 8, 9, 1, 5, 8, 9)]
    assert all(any(torch.equal(a, b) for b in whole) for a in instead)
    assert len(torch.stack(instead).flatten(1).unique(dim=0)) > 1  # not the same for all
    reported = capfd.readouterr().err
    assert [reported.count(f"{i:02d}.") for i in range(10)] == [0, 1, 0, 0, 0, 1, 0, 0, 1, 1]


def test_training_crops_are_a_function_of_seed_and_index_whatever_the_workers(tmp_path):
    data, passes = vaegan.ImageFolder(write_photos(tmp_path, 5), 32, seed=1), []
    (tmp_path / "03.jpg").write_bytes(b"broken")
    indices = [range(i, i + 3) for i in range(0, 24, 3)]
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(data, batch_sampler=indices, num_workers=workers)
        passes.append(torch.cat(list(loader)))
    assert torch.equal(*passes) and torch.equal(data[17], passes[0][17])  # in any order
    assert not torch.equal(vaegan.ImageFolder(tmp_path, 32, seed=2)[17], data[17])
    assert len(passes[0].flatten(1).unique(dim=0)) > 20  # of four files: they move


@each("n, held_out", [(41, 3), (20, 1), (2, 1)])
def test_every_20th_file_is_held_out_and_nothing_is_in_both_sets(tmp_path, n, held_out):
    write_photos(tmp_path / "a", n - 1)
    write_photos(tmp_path / "b/deeper", 1)
    sets = [vaegan.ImageFolder(tmp_path, 32, kind, hold_out=20) for kind in (True, False)]
    assert [len(data) for data in sets] == [n - held_out, held_out]
    assert not set(sets[0].files) & set(sets[1].files)


def test_no_file_counts_twice_and_what_is_hidden_or_of_a_run_does_not_count(tmp_path):
    write_photos(tmp_path / "a", 3)
    for folder in ("a/.ipynb_checkpoints", "__MACOSX", "run/tiny/samples"):
        write_photos(tmp_path / folder, 1)
    (tmp_path / "run/tiny/log.jsonl").touch()
    (tmp_path / "a/._00.jpg").write_bytes(b"of macOS")
    for link, target in (("a/back", ".."), ("a/loop", "."), ("b", "a")):
        (tmp_path / link).symlink_to(target)
    for suffix in ("jfif", "jp2", "pgm"):
        Image.new("L", (40, 40)).save(tmp_path / f"c.{suffix}")
    Image.new("L", (40, 40)).save(tmp_path / "program.eps")
    names = [Path(file).name for file in vaegan.ImageFolder(tmp_path, 32).files]
    assert sorted(names) == ["00.jpg", "01.jpg", "02.jpg", "c.jfif", "c.jp2", "c.pgm"]
    assert len(vaegan.ImageFolder(tmp_path / "a/.ipynb_checkpoints", 32)) == 1  # asked for


def test_dead_leaves_follow_seed_and_index_and_have_photographs_power_spectrum():
    data, again = vaegan.DeadLeaves(128), vaegan.DeadLeaves(128)
    assert torch.equal(data[3], again[3]) and not torch.equal(data[3], vaegan.DeadLeaves(128, 1)[3])
    grey = torch.stack([data[i].float().mean(0) for i in range(16)])
    window = torch.outer(torch.hann_window(128), torch.hann_window(128))
    centred = grey - grey.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred * window).abs().square().mean(0)
    cycles = torch.hypot(torch.fft.fftfreq(128)[:, None], torch.fft.fftfreq(128)) * 128
    low, high = [power[(cycles >= f) & (cycles < 2 * f)].mean().log2() for f in (4, 16)]
    assert -3.2 < (high - low) / 2 < -1.6  # an octave; photographs: about -2, Field 1987


# ---- 8. The training step


def textbook_step(vae, disc, x, perceptual, kl_weight, weight, generator, bound=0.05):
    """The autoencoder's update as in taming-transformers and latent-diffusion: one graph, two
    autograd.grad at the last layer, one large backward. Sums are divided by N = 3·H·W."""
    x_hat, posterior = vae(x, generator=generator)
    lpips = perceptual(x, x_hat).view(-1, 1, 1, 1)
    nll = ((x - x_hat).abs() + lpips).sum() / x.numel()
    g_loss = -disc(x_hat).mean()
    (at_rec,) = torch.autograd.grad(nll, vae.last_layer, retain_graph=True)
    (at_adv,) = torch.autograd.grad(g_loss, vae.last_layer, retain_graph=True)
    lam = (at_rec.norm() / (at_adv.norm() + 1e-4)).clamp(max=bound).detach()
    kl = posterior.kl().sum() / x.numel()
    (nll + kl_weight * kl + weight * lam * g_loss).backward()
    return x_hat, lam


def assert_same_gradients(vae, ours, tolerance, scale=1.0):
    """Parameter by parameter; that of k's bias is rounding alone, so beside the total."""
    total = gradients(vae).norm()
    for p, q in zip(vae.parameters(), ours.parameters()):
        error = (p.grad - scale * q.grad).norm()
        assert error <= tolerance * (p.grad.norm() + 1e-3 * total)


@each("bound", [0.05, math.inf])
@each("dtype, tolerance", [(torch.double, 1e-10), (torch.float, 2e-4)])
def test_all_gradients_and_lambda_equal_the_textbook_steps(dtype, tolerance, bound):
    x, (vae, disc), lpips = images(dtype=dtype), small_nets(dtype), random_perceptual(dtype)
    ours = copy.deepcopy(vae)
    x_hat, lam = textbook_step(vae, disc, x, lpips, 0.1, 0.5, seeded(), bound)
    disc.zero_grad()
    out, terms = g_step(ours, x, disc, perceptual=lpips, kl_weight=0.1, lambda_max=bound)
    assert torch.equal(out, x_hat) and abs(terms["lam"] / lam - 1) < tolerance
    assert (lam == bound) == (bound == 0.05)  # here it holds
    assert all(p.grad is None for p in disc.parameters())  # D's stay as they are
    assert_same_gradients(vae, ours, tolerance)


def test_latent_diffusions_sums_with_its_clamp_are_our_means_with_the_bound():
    x, (_, disc) = images(1, 256, torch.double), small_nets(torch.double)
    vae = away_from_zero(AutoencoderKL(ch=4, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)).double()
    ours = copy.deepcopy(vae)
    x_hat, posterior = vae(x, generator=seeded())  # as ldm/modules/losses/contperceptual.py
    nll, g_loss = (x - x_hat).abs().sum() / len(x), -disc(x_hat).mean()
    (at_rec,) = torch.autograd.grad(nll, vae.last_layer, retain_graph=True)
    (at_adv,) = torch.autograd.grad(g_loss, vae.last_layer, retain_graph=True)
    d_weight = at_rec.norm() / (at_adv.norm() + 1e-4)
    assert d_weight > 1e4  # so that it is clamped
    (nll + 1e-6 * posterior.kl().sum() / len(x) + 0.5 * 1e4 * g_loss).backward()
    g_step(ours, x, disc, lambda_max=1e4 / 196_608)
    assert_same_gradients(vae, ours, 1e-10, scale=196_608)


@each("adaptive", [True, False])
def test_terms_are_means_before_weighting_and_grad_ratio_is_the_gans_share(adaptive):
    x, (vae, disc), at_last = images(dtype=torch.double), small_nets(torch.double), []
    options = dict(kl_weight=0.0, pixel_loss="l2", adaptive=adaptive)
    for weight in (0.0, 0.3):
        vae.zero_grad()
        out, terms = g_step(vae, x, disc, weight=weight, **options)
        at_last.append(vae.last_layer.grad.clone())
    l2, kl = (x - out).square().mean(), vae.encode(x).kl().mean()
    ratio = (at_last[1] - at_last[0]).norm() / at_last[0].norm()
    w = 0.3 * terms["lam"] if adaptive else 0.3
    expected = dict(
        l1=(x - out).abs().mean(),
        l2=l2,
        rec_loss=l2,
        lpips=0,
        kl=kl,
        kl_dim=kl / 1024,
        w=w,
        grad_ratio=ratio,
    )
    for name, value in expected.items():
        assert terms[name] == approx(float(value), rel=1e-6), name


def test_a_batch_is_one_forward_and_one_backward_of_each_network():
    calls, (vae, disc), lpips = Counter(), small_nets(), random_perceptual()
    inner = dict(
        encoder=vae.encoder.down,
        decoder=vae.decoder.mid,
        disc=disc,
        lpips=lpips.lpips.scaling_layer,
    )
    for name, net in inner.items():
        net.register_forward_hook(lambda *_, name=name: calls.update([name]))
        net.register_full_backward_hook(lambda *_, name=name: calls.update(["∇" + name]))
    once = {"encoder": 1, "∇encoder": 1, "decoder": 1, "∇decoder": 1, "lpips": 2, "∇lpips": 1}
    g_step(vae, images(), disc, perceptual=lpips, weight=0.0)
    assert calls == once  # LPIPS of x and of x̂; D is not needed yet
    calls.clear()
    g_step(vae, images(), disc, perceptual=lpips)
    assert calls == {**once, "disc": 1, "∇disc": 1}


@each("r1", [0.0, 10.0])
def test_the_discriminator_step_is_the_gradient_of_hinge_plus_r1_and_ds_alone(r1):
    x, (vae, disc) = images(dtype=torch.double), small_nets(torch.double)
    reference, (x_hat, _) = copy.deepcopy(disc), vae(x)
    terms = vaegan.discriminator_step(disc, x, x_hat, r1=r1)
    assert all(p.grad is None for p in vae.parameters())
    x.requires_grad_()
    real, fake = reference(x), reference(x_hat.detach())
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    loss = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    (loss + r1 / 2 * slope.square().sum() / 2).backward()
    assert_close(gradients(disc), gradients(reference))
    d_acc = ((real > 0).double() + (fake < 0).double()).mean() / 2
    found = [terms[name].item() for name in ("d_loss", "logits_real", "logits_fake", "d_acc")]
    assert found == approx([loss.item(), real.mean().item(), fake.mean().item(), d_acc.item()])


@each("term", ["l2", "lpips", "kl", "gan"])
def test_every_term_reaches_the_encoder_and_all_but_kl_the_last_layer(term):
    (vae, disc), lpips = small_nets(), random_perceptual()
    options = dict(
        l2=dict(pixel_loss="l2"),
        lpips=dict(perceptual=lpips),
        kl=dict(kl_weight=1.0),
        gan=dict(disc=disc),
    )[term]
    g_step(vae, images())  # L1 alone
    first, last = vae.encoder.conv_in.weight.grad.clone(), vae.last_layer.grad.clone()
    vae.zero_grad()
    g_step(vae, images(), **options)
    assert first.norm() > 0 and not torch.equal(vae.encoder.conv_in.weight.grad, first)
    assert torch.equal(vae.last_layer.grad, last) == (term == "kl")


@each("autocast, scale, tolerance", [(bf16, 1.0, 0.2), (fp16, 65536.0, 0.05)])
def test_low_precision_is_near_fp32_with_losses_and_lambda_in_fp32(autocast, scale, tolerance):
    found = []
    for context, factor in (fp32, 1.0), (autocast, torch.tensor(scale)):
        x, (vae, disc), lpips = images(), small_nets(), random_perceptual()
        with context():
            assert vae.encode(x).kl().dtype == torch.float32
        options = dict(autocast=context, scale=factor)
        losses = dict(perceptual=lpips, perceptual_weight=0.01, lambda_max=math.inf)
        x_hat, terms = g_step(vae, x, disc, **losses, **options)
        terms |= vaegan.discriminator_step(disc, x, x_hat, **options)
        assert {value.dtype for value in terms.values()} == {torch.float32}
        found.append([terms["lam"], gradients(vae) / factor, gradients(disc) / factor])
    for full, low in zip(*found):
        assert 0 < (low - full).norm() < tolerance * full.norm()


def test_accumulated_batches_give_the_gradient_of_their_union():
    x, (vae, _) = images(4, dtype=torch.double), small_nets(torch.double)
    quiet_posterior(vae)
    whole = copy.deepcopy(vae)
    g_step(whole, x, kl_weight=0.1)
    for half in x.chunk(2):
        g_step(vae, half, kl_weight=0.1, scale=0.5)
    assert_close(gradients(vae), gradients(whole))


# ---- 9. Training


def trainer(device=CPU, kind=Trainer, **flags):
    warm_up = dict(disc_start=0, disc_lead=0, disc_ramp=0)
    tiny = dict(SMALL, image_size=32, batch_size=2, ndf=8, device=device.type, **warm_up)
    return kind(Config.of("tiny", **tiny | flags), device)


def batches(n, batch=2):
    """n batches of uint8 images, each another one."""
    for i in range(n):
        yield ((images(batch, seed=100 + i) + 1) * 127).byte()


def test_the_averaged_weights_follow_their_recursion_and_are_what_is_saved():
    run, expected = trainer(ema=0.7), None
    for step in range(4):
        run.update(batches(1))
        new = run.vae.last_layer.detach().clone()
        expected = new if step == 0 else 0.7 * expected + 0.3 * new
    saved = run.state_dict()["state_dict"]["decoder.conv_out.weight"]
    assert_close(saved, expected)
    assert not torch.allclose(saved, new, atol=1e-6)


def test_an_fp16_overflow_skips_the_step_halves_the_scale_and_goes_on():
    run, stream, found = trainer(precision="fp16", disc_weight=0.0), batches(40), []
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**38)
    before = copy.deepcopy(run.vae.state_dict())
    run.update(stream)
    assert same(run.vae.state_dict(), before) and run.scaler.get_scale() == 2.0**37
    while run.step < 40:
        run.update(stream)
        if run.step % 10 == 0:
            record = run.read_record()
            run.monitor.assert_healthy(run.step, record)
            found.append("grad_norm_dec" in record)
    assert not found[0] and found[-1]
    assert not same(run.vae.state_dict(), before)


class Overflowing(Trainer):
    """Whose discriminator's gradients overflow in fp16, and no other."""

    def penalty(self, x, x_hat):
        return 1e38 * sum(p.sum() for p in self.disc.parameters())


def test_where_the_gans_gradient_overflows_in_fp16_lambda_is_nan_so_that_the_step_is_skipped():
    vae, options = small_nets()[0], dict(autocast=fp16, scale=torch.tensor(65536.0))
    options.update(adversary=lambda x, image: 100 * image.mean())
    _, terms = vaegan.generator_step(vae, images(), **options)
    assert terms["lam"].isnan() and not gradients(vae).isfinite().any()


def test_an_fp16_overflow_in_d_does_not_skip_the_autoencoders_step():
    run = trainer(kind=Overflowing, precision="fp16")
    vae, disc = copy.deepcopy(run.vae.state_dict()), [p.clone() for p in run.disc.parameters()]
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.update(batches(1))
    assert same(list(run.disc.parameters()), disc) and run.scaler.get_scale() == 512
    last = "decoder.conv_out.weight"
    assert not torch.equal(run.vae.state_dict()[last], vae[last])


def test_a_folder_that_vanishes_is_a_fault_of_the_machine_with_its_remedy(tmp_path):
    stream = trainer(data=write_photos(tmp_path / "photos")).batches()  # a Path is fine
    next(stream)
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(OSError, match="photos"):
        list(itertools.islice(stream, 9))


def test_a_full_disk_leaves_the_older_save_whole_and_no_other_file(tmp_path):
    path = tmp_path / "last.pt"
    vaegan.write_whole(path, dict(step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="last.pt"):
            vaegan.write_whole(path, dict(step=torch.zeros(9999)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint(path) == dict(step=1) and list(tmp_path.iterdir()) == [path]


def two_ranks(rank, folder):
    """Three updates on this rank's halves of two batches each."""
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=2)
    run, results = trainer(clip=0.0, accumulate=2, kl_weight=0.1), []
    quiet_posterior(run.vae)
    for _ in range(3):
        run.update(batch[rank::2] for batch in batches(2, 4))
        results += [gradients(run.vae), gradients(run.disc)]
    torch.save(results + [run.vae.state_dict()], f"{folder}/{rank}.pt")
    os._exit(0)


def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, monkeypatch):
    processes, spawn = [], torch.multiprocessing.get_context("spawn")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as torchrun sets it
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        processes.append(spawn.Process(target=two_ranks, args=(rank, str(tmp_path))))
        processes[rank].start()
    monkeypatch.undo()
    for process in processes:
        process.join(60)
    ranks = [checkpoint(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert same(*ranks)
    one = trainer(clip=0.0, accumulate=2, kl_weight=0.1, batch_size=4)
    quiet_posterior(one.vae)
    one.update(batches(2, 4))
    for net, theirs in zip((one.vae, one.disc), ranks[0]):
        assert (gradients(net) - theirs).norm() < 1e-4 * theirs.norm()


# ---- 11. Measures


@each("layout", [torch.contiguous_format, torch.channels_last])
def test_ssim_equals_a_loop_over_windows(layout):
    x, expected = images(1, 14), 0
    y = 0.6 * x + 0.4 * images(1, 14, seed=2)
    taps = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)])
    weight = torch.outer(taps, taps) / taps.sum() ** 2
    for c, i, j in itertools.product(range(3), range(4), range(4)):
        p, q = [(t[0, c, i : i + 11, j : j + 11] + 1) / 2 for t in (x, y)]
        mp, mq = (weight * p).sum(), (weight * q).sum()
        covariance = (weight * (p - mp) * (q - mq)).sum()
        variances = (weight * ((p - mp) ** 2 + (q - mq) ** 2)).sum()
        above = (2 * mp * mq + 0.01**2) * (2 * covariance + 0.03**2)
        expected += above / ((mp**2 + mq**2 + 0.01**2) * (variances + 0.03**2)) / 48
    x, y = x.to(memory_format=layout), y.to(memory_format=layout)
    assert vaegan.ssim(x, y).item() == approx(expected.item(), rel=1e-4)


class Linear:
    """An autoencoder with a posterior N(x, ¼²), which it decodes to gain·z."""

    def __init__(self, gain):
        self.gain = gain

    def encode(self, x):
        return vaegan.DiagonalGaussian(torch.cat([x, torch.full_like(x, 2 * math.log(0.25))], 1))

    def decode(self, z):
        return self.gain * z


@each("gain", [1.0, 0.5])
def test_evaluate_measures_every_image_of_a_known_autoencoder(gain):
    data = vaegan.DeadLeaves(32, length=9)
    measured = vaegan.evaluate(Linear(gain), data, perceptual=random_perceptual(), batch_size=4)
    x = torch.stack([data[i] for i in range(9)]) / 127.5 - 1
    mse = ((x - gain * x) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)  # to 100 dB
    kl = 0.5 * (x.square().mean() + 0.0625 - 1 - 2 * math.log(0.25))
    expected = dict(
        images=9,
        psnr=(10 * (1 / mse).log10()).mean(),
        kl_dim=kl,
        ssim=vaegan.ssim(x, gain * x).mean(),
        sharpness=gain**2,
        lpips=random_perceptual()(x, gain * x).mean(),
        shift_factor=x.mean(),
        scaling_factor=1 / (x.var() + 0.0625).sqrt(),
    )
    for name, value in expected.items():
        assert measured[name] == approx(float(value), rel=0.01, abs=5e-3), name


# ---- 12. The command line, by real commands


def flags_of(out, *more):
    """Ten steps of this take a third of a second. Of a flag given twice the second counts."""
    flags = ["train", "--preset", "tiny", "--device", "cpu", "--image-size", 32, "--ch", 8]
    flags += ["--ch-mult", 1, 2, "--ndf", 8, "--batch-size", 2, "--disc-start", 10]
    flags += ["--disc-lead", 10, "--disc-ramp", 20, "--sample-every", 20, "--save-every", 20]
    return [str(flag) for flag in [*flags, "--out", out, *more]]


def run_tiny(out, *more):
    return vaegan.main(flags_of(out, *more))


def checkpoint(path):
    return torch.load(path, weights_only=True)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps_of(run):
    return [record["step"] for record in log_of(run)]


def outcome(run):
    """What must not depend on interruptions: all but where and how far the run was to go."""
    saves = [checkpoint(run / name) for name in ("last.pt", "best.pt")]
    for save, name in itertools.product(saves, ("out", "workers", "steps")):
        del save["config"][name]
    return saves, log_of(run)


def test_train_writes_the_run_folder_and_the_same_command_continues(tmp_path):
    assert run_tiny(tmp_path, "--steps", 40) == 0
    found = {path.name for path in tmp_path.rglob("*")}
    files = "config.json log.jsonl last.pt previous.pt best.pt samples 0000020.png 0000040.png"
    assert found == set(files.split())
    records = log_of(tmp_path)
    assert [record["step"] for record in records] == [10, 20, 30, 40]
    assert [record.get("w", 0) > 0 for record in records] == [0, 0, 1, 1]
    assert ["d_loss" in record for record in records] == [0, 1, 1, 1]
    assert ["val_psnr" in record for record in records] == [0, 1, 0, 1]
    assert {"l1", "kl_dim", "grad_norm_enc", "grad_norm_dec"} <= records[0].keys()
    for steps in (40, 50):
        assert run_tiny(tmp_path, "--steps", steps) == 0
        assert log_of(tmp_path)[:4] == records and steps_of(tmp_path)[-1] == steps
    saved = checkpoint(tmp_path / "last.pt")
    assert {"state_dict", "config", "step", "scaling_factor", "shift_factor"} <= saved.keys()
    assert Config(**saved["config"]).ch_mult == (1, 2) and saved["step"] == 50


def workers_of(process):
    """The process numbers of those that load images."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


def run_until(step, act, *flags):
    """Run the command in a process of its own, act on it at a step -> its status, last words."""
    left_over = dict(RANK="3", WORLD_SIZE="2")  # which does not count without torchrun
    process = subprocess.Popen(
        [sys.executable, HERE / "vaegan.py", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf8",
        env=dict(os.environ, OMP_NUM_THREADS="1", TQDM_MININTERVAL="0", **left_over),
    )
    for line in process.stderr:  # each carriage return of the progress bar ends one
        shown = re.search(r" (\d+)/\d+ \[", line)
        if shown and int(shown[1]) >= step:
            break
    act(process)
    _, words = process.communicate(timeout=60)
    return process.returncode, words


def test_whatever_ends_a_run_it_goes_on_to_the_same_end(tmp_path):
    photos, parts = write_photos(tmp_path / "photos"), tmp_path / "parts"
    flags, last = ["--data", photos, "--accumulate", 2, "--steps", 100], parts / "last.pt"
    assert run_tiny(parts, *flags, "--steps", 20, "--disc-ramp", 40) == 0  # now D leads
    status, _ = run_until(45, subprocess.Popen.kill, *flags_of(parts, *flags))
    assert status == -signal.SIGKILL
    assert checkpoint(last)["step"] >= 40  # the newest save, or a later one
    with open(parts / "log.jsonl", "a") as log:
        log.write('{"step": 52, "l1"')  # as a kill in the middle of a write leaves it
    for number in (signal.SIGINT, signal.SIGTERM):
        before = checkpoint(last)["step"]

        def act(process, number=number):
            for each_one in (*workers_of(process), process.pid):
                os.kill(each_one, number)

        status, _ = run_until(before + 2, act, *flags_of(parts, *flags, "--workers", 2))
        assert status == 128 + number and before < checkpoint(last)["step"] < 100
    for run in (parts, tmp_path / "whole"):
        assert run_tiny(run, *flags) == 0
    assert same(outcome(parts), outcome(tmp_path / "whole"))


@each("kill", [False, True])
def test_a_worker_that_fails_or_is_killed_ends_the_run_at_once_with_the_reason(tmp_path, kill):
    photos = write_photos(tmp_path / "photos")
    flags = flags_of(tmp_path / "run", "--data", photos, "--workers", 2, "--steps", 5000)

    def act(process):
        if kill:
            os.kill(workers_of(process)[0], signal.SIGKILL)
        else:
            shutil.rmtree(photos)

    start = time.monotonic()
    status, words = run_until(5, act, *flags)
    last = words.splitlines()[-1]
    assert status == 1 and "Traceback" not in words and time.monotonic() - start < 60
    assert ("no more images" if kill else "photos") in last and "the last save" in last


RUIN = "--ndf 16 --batch-size 4 --disc-start 40 --disc-lead 0 --disc-ramp 0 --sample-every 1000"
RUIN = f"{RUIN} --steps 90 --no-adaptive --disc-weight 10".split()


def test_a_collapse_is_status_3_and_its_remedy_goes_on_from_the_save_before(tmp_path, capsys):
    assert run_tiny(tmp_path, *RUIN) == 3
    report, err = json.loads((tmp_path / "collapse.json").read_text()), capsys.readouterr().err
    assert 40 < report["step"] <= 90 and report["value"] > report["limit"]
    assert "Traceback" not in err and report["sign"] in err and "--adaptive" in err
    assert Image.open(tmp_path / "collapse.png").height == 3 * 32
    newest = (report["step"] - 1) // 20 * 20
    assert checkpoint(tmp_path / "last.pt")["step"] == newest - 20
    assert not (tmp_path / "previous.pt").exists()
    assert steps_of(tmp_path)[-1] == report["step"]  # kept, to be plotted
    assert run_tiny(tmp_path, *RUIN, "--adaptive", "--disc-weight", 0.5) == 0
    assert steps_of(tmp_path) == list(range(10, 100, 10))


def test_on_collapse_warn_says_so_and_goes_on(tmp_path, capsys):
    assert run_tiny(tmp_path, *RUIN, "--on-collapse", "warn") == 0
    events = [record["event"] for record in log_of(tmp_path) if "event" in record]
    assert "collapse" in events[0] and steps_of(tmp_path)[-1] == 90
    assert events[0] in capsys.readouterr().out


VALID = ["--lr 0", "--ema 0", "--clip 0", "--disc-weight 0", "--lambda-max 0", "--precision bf16"]
VALID += ["--disc-start plateau", "--disc-start 0 --r1 10", "--recompute"]


@each("flags", VALID)
def test_these_flags_are_valid_and_only_lr_0_trains_nothing(tmp_path, flags):
    assert run_tiny(tmp_path, "--steps", 20, "--disc-lead", 30, *flags.split()) == 0
    start, end = checkpoint(tmp_path / "previous.pt"), checkpoint(tmp_path / "last.pt")
    assert same(start["training"]["vae"], end["training"]["vae"]) == (flags == "--lr 0")


class Hostile:
    """Its pickle makes a folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("made",)


BAD = """--data nowhere|--data empty|--image-size 33|--image-size 24|--steps 15|--batch-size 0
--lr nan|--save-every 7|--disc-start soon|--lr inf|--init nan.pt|--nonsense|--preset huge
--precision fp8|--perceptual-net resnet|--perceptual-weight 1|--freeze-encoder|--init nowhere.pt
--init foreign.pt|--init hostile.pt|--init torn.safetensors|--init flux2.pt|--device cuda
--init good.pt --ch 16|--data photos --val photos/val|--data photos/train --val photos
--data photos --out photos|--ch-mult 0"""


@each("flags", re.split(r"[|\n]", BAD.strip()))
def test_bad_input_is_status_2_in_one_line(tmp_path, monkeypatch, capsys, flags):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    without_network(monkeypatch, tmp_path)
    state = small_nets()[0].state_dict()
    torch.save(state, "good.pt")
    torch.save(state | {"bn.running_mean": torch.zeros(4)}, "flux2.pt")
    torch.save(dict(unet=torch.zeros(3)), "foreign.pt")
    torch.save({name: weight * math.nan for name, weight in state.items()}, "nan.pt")
    torch.save(dict(state_dict=state, more=Hostile()), "hostile.pt")
    Path("torn.safetensors").write_bytes(b"torn")
    Path("empty").mkdir()
    before = set(tmp_path.iterdir())
    assert run_tiny("run", *flags.split()) == 2
    err = re.sub("Downloading: .*\n", "", capsys.readouterr().err)  # of torch 2.6, about LPIPS
    assert err.count("\n") == 1 and flags.split()[-1].lstrip("-") in err
    assert set(tmp_path.iterdir()) - {tmp_path / "hub"} == before  # torch.hub's own folder
    way_out = dict(hostile=".safetensors", foreign="no encoder.conv_in, but unet", empty=".jfif")
    for name, text in way_out.items():
        assert name not in flags or text in err


def test_eval_prints_a_row_a_checkpoint_and_saves_a_picture(tmp_path, capsys, monkeypatch):
    without_network(monkeypatch, tmp_path)
    photos, (vae, _) = write_photos(tmp_path / "photos"), small_nets()
    assert run_tiny(tmp_path, "--data", photos, "--steps", 10) == 0
    files = [str(tmp_path / name) for name in ("last.pt", "previous.pt")]
    command = ["eval", "--data", str(photos), "--save", str(tmp_path / "eval"), "--checkpoint"]
    capsys.readouterr()
    assert vaegan.main([*command, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == files
    vae.load_state_dict(checkpoint(files[0])["state_dict"])
    measured = vaegan.evaluate(vae, vaegan.ImageFolder(photos, 32, train=False))
    assert f"{measured['psnr']:.2f}" in rows[1]
    assert Image.open(tmp_path / "eval/compare.png").height == 3 * 32  # x, and a row each
    assert vaegan.main([*command, str(photos / "00.jpg")]) == 2
    assert vaegan.main([*command, files[0], "--image-size", "33"]) == 2
    assert "multiple of 2" in capsys.readouterr().err


def test_an_unreadable_last_pt_is_left_alone_and_without_it_previous_pt_is_taken(tmp_path, capsys):
    last = tmp_path / "last.pt"
    assert run_tiny(tmp_path, "--steps", 40) == 0
    assert run_tiny(tmp_path, "--steps", 60, "--ch", 12) == 2  # the run has 8
    assert run_tiny(last / "run", "--steps", 10) == 1  # which is no folder
    last.write_bytes(b"torn")
    assert run_tiny(tmp_path, "--steps", 60) == 2
    assert capsys.readouterr().err.count("last.pt") >= 3
    assert last.read_bytes() == b"torn" and steps_of(tmp_path)[-1] == 40
    last.unlink()
    assert checkpoint(tmp_path / "previous.pt")["step"] == 20
    assert run_tiny(tmp_path, "--steps", 60) == 0
    assert "after step 20 " in capsys.readouterr().out
    assert steps_of(tmp_path) == [10, 20, 30, 40, 50, 60]


def test_torchrun_trains_two_processes_into_one_folder(tmp_path):
    flags = ["--steps", 10, "--disc-start", 0, "--lr", 0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", HERE / "vaegan.py", *flags_of(tmp_path / "two", *flags)]
    process = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert run_tiny(tmp_path / "one", *flags, "--batch-size", 4) == 0
    (two,), (one,) = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert two["l1"] == approx(one["l1"], rel=0.01)  # the same images, each seen once


def test_a_save_of_other_data_or_edition_is_refused_with_a_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = flags_of("", "--steps", 10, "--data", write_photos(tmp_path / "a/train"))
    assert vaegan.main(flags) == 0
    assert vaegan.main([*flags, "--data", str(write_photos(tmp_path / "b/train"))]) == 2
    assert "a/train'; give this one its own --out" in capsys.readouterr().err
    saved = checkpoint("run/tiny-train/last.pt")
    del saved["version"]
    torch.save(saved, "run/tiny-train/last.pt")
    assert vaegan.main(flags) == 2
    assert "--init run/tiny-train/best.pt" in capsys.readouterr().err


def test_help_is_printed_where_the_terminal_lacks_its_letters():
    command = [sys.executable, HERE / "vaegan.py", "train", "--help"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    assert b"--lambda-max" in subprocess.check_output(command, env=environment)


# ---- Other programs' files


def diffusers_autoencoder(ch, blocks, mult, **options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(mult),
        layers_per_block=blocks,
        up_block_types=["UpDecoderBlock2D"] * len(mult),
        block_out_channels=[ch * m for m in mult],
        **options,
    )


@torch.no_grad()
def assert_same_autoencoder(ours, theirs):
    x, ours, theirs = images(1, 32, torch.double), ours.double(), theirs.double().eval()
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert_close([posterior.mean, posterior.logvar], [expected.mean, expected.logvar])
    assert_close(ours.decode(posterior.mean), theirs.decode(posterior.mean).sample)


def begun_from(path):
    return Trainer(Config.of("tiny", init=str(path), device="cpu", ndf=8), CPU)


SD = dict(latent_channels=4)  # 1.x, 2.x, XL
FLUX = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)  # and SD3


@each("options", [SD, FLUX])
def test_init_reads_diffusers_files_and_takes_the_widths_from_them(tmp_path, options):
    theirs = diffusers_autoencoder(32, 1, (1, 2, 2), **options)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    run = begun_from(tmp_path / "theirs.pt")
    assert (run.cfg.ch, run.cfg.ch_mult, run.cfg.num_res_blocks) == (32, (1, 2, 2), 1)
    assert run.cfg.z_channels == options["latent_channels"] and run.cfg.disc_start == "0"
    assert_same_autoencoder(run.vae, theirs)


@each("prefix", ["", "first_stage_model.", "vae.", "module._orig_mod."])
@each("wrapper", ["", "state_dict", "model", "ema", ".safetensors"])
def test_init_reads_compvis_names_bare_or_wrapped(tmp_path, prefix, wrapper):
    expected, path = small_nets()[0].state_dict(), tmp_path / f"a{wrapper}"
    state = {prefix + name: weight for name, weight in expected.items()}
    state["model.diffusion_model.out.0.bias"] = torch.zeros(2)
    if wrapper == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    assert same(vaegan.load_autoencoder(path)[0].state_dict(), expected)


def test_from_diffusers_through_ten_steps_of_the_decoder_alone_and_back(tmp_path):
    theirs = diffusers_autoencoder(32, 1, (1, 2, 2), latent_channels=4)
    last = tmp_path / "run/last.pt"
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    before = begun_from(file).vae.state_dict()
    flags = ["--preset", "tiny", "--image-size", "32", "--ndf", "8", "--disc-lead", "0"]
    flags += ["--device", "cpu", "--out", str(last.parent), "--init", str(file), "--freeze-encoder"]
    assert vaegan.main(["train", *flags, "--steps", "10"]) == 0
    for name, weight in checkpoint(last)["state_dict"].items():
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(weight, before[name]) == frozen, name
    opened = type(theirs).from_single_file(str(last), config=str(tmp_path))
    assert_same_autoencoder(begun_from(last).vae, opened)
    file.unlink()
    assert vaegan.main(["train", *flags, "--steps", "20"]) == 0  # all it needs is in last.pt


# ---- The file itself

SOURCE = (HERE / "vaegan.py").read_text(encoding="utf8")
README = (HERE / "README.md").read_text(encoding="utf8")


def test_sections_3_to_6_run_with_torch_and_the_standard_library_alone():
    names, known = {}, {"torch", *sys.stdlib_module_names}
    for node in ast.parse(SOURCE).body:
        imported = getattr(node, "module", None) or getattr(node, "names", None)
        if imported and (isinstance(imported, list) or imported.split(".")[0] in known):
            exec(ast.unparse(node), names)
    exec("#" + SOURCE.split("# ---- 3.")[1].split("# ---- 7.")[0], names)
    vae, disc = names["AutoencoderKL"](**SMALL, recompute=True), names["PatchDiscriminator"]()
    x_hat, posterior = vae(images())
    (names["hinge_g_loss"](disc(x_hat)) + posterior.kl().mean()).backward()
    monitor = names["CollapseMonitor"]()
    monitor.assert_healthy(10, monitor.look(images(), x_hat))
    assert names["WarmUp"](0).weight(0) == 1 and not {"ImageFolder", "tqdm"} & names.keys()


def test_importing_does_nothing(tmp_path):
    code = (
        "import random, torch; before = random.getstate(), torch.initial_seed()\n"
        "import vaegan; assert before == (random.getstate(), torch.initial_seed())"
    )
    environment = dict(os.environ, PYTHONPATH=str(HERE), PYTHONDONTWRITEBYTECODE="1")
    python = [sys.executable, "-c", code]
    out = subprocess.check_output(python, cwd=tmp_path, env=environment, stderr=subprocess.STDOUT)
    assert out == b"" and not list(tmp_path.iterdir())


def test_files_are_read_as_weights_only():
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)


def test_the_readmes_loop_with_a_monitor_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    (block,) = [block for block in blocks if "CollapseMonitor(" in block]
    exec(block, {})


def test_help_has_every_field_of_config_and_every_flag_that_readme_and_monitor_name(capsys):
    for command in ("train", "eval"):
        assert vaegan.main([command, "--help"]) == 0
    flags = set(re.findall(r"--([a-z0-9-]+)", capsys.readouterr().out))
    named = README.replace("--nproc-per-node", "") + inspect.getsource(CollapseMonitor)
    assert set(re.findall(r"(?<![-\w])--([a-z][a-z0-9-]+)", named)) <= flags
    assert {name.replace("_", "-") for name in Config.__dataclass_fields__} <= flags


# ---- The alternative losses: .github/experiments/alternatives.py


def script(name):
    """A script of .github/experiments as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f".github/experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


alternatives = script("alternatives")


def test_non_saturating_losses_are_cross_entropies_and_wassersteins_a_difference():
    (real, fake), bce = torch.randn(2, 50), F.binary_cross_entropy_with_logits
    d_loss = (bce(real, torch.ones(50)) + bce(fake, torch.zeros(50))) / 2
    assert_close(alternatives.non_saturating_d_loss(real, fake), d_loss)
    assert_close(alternatives.non_saturating_g_loss(fake), bce(fake, torch.ones(50)))
    assert_close(alternatives.wasserstein_d_loss(real, fake), (fake - real).sum() / 50)


def test_the_gradient_penalty_of_a_linear_critic_is_exact():
    x, w = images(4, 8), torch.randn(3, 8, 8, requires_grad=True)

    def critic(between):  # whose value is the mean of its patches
        return (w * between).sum(dim=(1, 2, 3)).view(4, 1, 1, 1).expand(4, 1, 2, 3)

    penalty = alternatives.gradient_penalty(critic, x, -x)
    (gradient,) = torch.autograd.grad(penalty, w)
    assert_close(penalty, (w.norm() - 1) ** 2)
    assert_close(gradient, 2 * (w.norm() - 1) * w / w.norm())


def test_focal_frequency_loss_weighs_each_frequency_by_its_own_error():
    x, x_hat = images(2, 8), images(2, 8, seed=2).requires_grad_()
    distance = torch.fft.fft2(x - x_hat, norm="ortho").abs()
    largest = distance.flatten(2).max(dim=2).values[:, :, None, None]
    expected = ((distance / largest).detach() * distance**2).mean(dim=(1, 2, 3))
    loss = alternatives.focal_frequency_loss(x, x_hat)
    assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss.sum(), x_hat)
    (theirs,) = torch.autograd.grad(expected.sum(), x_hat)
    assert_close(ours, theirs)


def test_gram_loss_sees_which_features_occur_together_at_any_place():
    f, g = torch.randn(2, 2, 5, 6, 7)
    shuffled = f.flatten(2)[:, :, torch.randperm(42)].view(f.shape)
    assert alternatives.gram_loss([f], [shuffled]).max() < 1e-10
    expected = torch.zeros(2)
    for b, i, j in itertools.product(range(2), range(5), range(5)):
        expected[b] += ((f[b, i] * f[b, j]).mean() - (g[b, i] * g[b, j]).mean()) ** 2
    assert_close(alternatives.gram_loss([f, f], [g, g]), 2 * expected)


def test_sobel_loss_is_zero_for_an_offset_and_for_ramps_their_slopes_difference():
    ramp = torch.arange(12.0).expand(1, 3, 12, 12)
    assert alternatives.sobel_loss(images(), images() + 0.3).max() < 1e-6
    for image in (ramp, ramp.mT):  # 1 instead of 3 in one direction, 0 in the other: their mean
        assert alternatives.sobel_loss(image, 3 * image).item() == approx(1)


@each("name", alternatives.ALTERNATIVES)
def test_each_alternative_trains_at_its_weight(tmp_path, name):
    flags = ["--steps", 10, "--disc-start", 0, "--disc-lead", 0, "--disc-ramp", 0]
    flags += ["--lambda-max", 0, "--perceptual-weight", 0.1]
    with untrained_lpips():
        assert alternatives.main([name, *flags_of(tmp_path, *flags)]) == 0
    (record,) = log_of(tmp_path)
    assert record["grad_ratio"] == approx(0.5, rel=0.05)
    assert ("d_loss" in record) == (name in ("ns", "wgan-gp", "no-spectral"))
    names = checkpoint(tmp_path / "last.pt")["training"]["disc"]
    is_spectral = any("parametrizations" in name for name in names)
    assert is_spectral == (name not in ("wgan-gp", "no-spectral"))


@each("words", ["", "vgg", "ns train", "gram train --preset tiny --out run"])
def test_the_script_refuses_in_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert alternatives.main(words.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
@each("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_no_update_waits_for_the_device(precision):
    run = trainer(torch.device("cuda", 0), precision=precision)
    stream = iter([batch.pin_memory() for batch in batches(20)])
    for step in range(20):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            run.update(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.read_record()["l1"] > 0


@needs_cuda
def test_on_a_gpu_a_run_continues(tmp_path):
    for steps in (20, 40):
        assert run_tiny(tmp_path, "--device", "cuda", "--steps", steps) == 0
    assert steps_of(tmp_path) == [10, 20, 30, 40]


# ---- python test_vaegan.py bench: the textbook step beside vaegan.py's


def textbook(vae, disc, perceptual, x, autocast):
    """A step as of latent-diffusion: two optimisers, each of which runs autoencoder and LPIPS."""
    textbook_step(vae, disc, x, perceptual.lpips, 1e-6, 0.5, seeded())
    disc.zero_grad()
    x_hat, _ = vae(x, generator=seeded(8))
    perceptual.lpips(x, x_hat)
    vaegan.hinge_d_loss(disc(x), disc(x_hat.detach())).backward()


def ours(vae, disc, perceptual, x, autocast):
    x_hat, _ = g_step(vae, x, disc, perceptual=perceptual, autocast=autocast)
    vaegan.discriminator_step(disc, x, x_hat, autocast=autocast)


class Diffusers(torch.nn.Module):
    """diffusers' AutoencoderKL, called as ours."""

    def __init__(self, ch):
        super().__init__()
        self.vae = diffusers_autoencoder(ch, 2, (1, 2, 4, 4), latent_channels=4)
        self.last_layer = self.vae.decoder.conv_out.weight

    def forward(self, x, generator=None):
        posterior = self.vae.encode(x).latent_dist
        return self.vae.decode(posterior.sample(generator)).sample, posterior


def bench(ch=64, size=128, batch=2, rounds=7):
    """Print a table of steps, interleaved, after a first round that does not count. LPIPS is
    untrained, which takes the same time. Memory is what autograd keeps of the autoencoder."""
    vae, disc, perceptual = AutoencoderKL(ch=ch), PatchDiscriminator(), random_perceptual(net="vgg")
    plain, last = torch.contiguous_format, torch.channels_last
    ways = [
        ("textbook, as latent-diffusion", textbook, vae, plain, False, fp32),
        ("vaegan.py", ours, vae, plain, False, fp32),
        ("and channels last", ours, vae, last, False, fp32),
        ("and recompute", ours, vae, last, True, fp32),
        ("and bf16", ours, vae, last, True, bf16),
        ("bf16 without recompute", ours, vae, last, False, bf16),
    ]
    with contextlib.suppress(pytest.skip.Exception):  # where there is no diffusers
        ways += [("textbook, diffusers", textbook, Diffusers(ch), plain, False, fp32)]
    table = {}
    for name, step, net, layout, recompute, autocast in ways:
        nets = [copy.deepcopy(n).to(memory_format=layout) for n in (net, disc, perceptual)]
        for module in nets[0].modules():
            module.recompute = recompute
        table[name] = step, nets, images(batch, size).to(memory_format=layout), autocast, []
    for step, nets, x, autocast, seconds in [*table.values()] * (rounds + 1):
        start = time.perf_counter()
        step(*nets, x, autocast)
        seconds.append(time.perf_counter() - start)
    print(
        f"ch {ch}, {size} px, batch {batch}, {torch.get_num_threads()} threads\n\n| step | "
        "median, s | from, to | textbook's time over it | MiB kept |\n" + "|---" * 5 + "|"
    )
    for name, (_, nets, x, autocast, seconds) in table.items():
        median = statistics.median(seconds[1:])
        over = statistics.median(table["textbook, as latent-diffusion"][4][1:]) / median
        with autocast():
            kept = kept_bytes(nets[0], x) / 2**20
        print(
            f"| {name} | {median:.2f} | {min(seconds[1:]):.2f}, {max(seconds[1:]):.2f} | "
            f"{over:.2f} | {kept:.0f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        torch.set_num_threads(os.cpu_count())
        bench(*map(int, sys.argv[2:]))
    else:
        sys.exit(__doc__)
