"""Each backend of `noise.add_noise` by itself: distribution, gradient, layouts, and what the noise may depend on.

The Triton kernels run on a GPU where there is one, else under Triton's interpreter (`make test-triton`).
"""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from trl_alp import ALPGRPOConfig, LayerwisePerturbation, noise
from trl_alp.noise import NoiseLevels, check_noise_backend
from trl_alp.perturbation import noise_seed


TRITON = noise.noise_triton
INTERPRETED = TRITON is not None and TRITON.INTERPRETED
DEVICE = tiny.DEVICE
needs_triton = [
    pytest.mark.skipif(TRITON is None, reason="Triton is not installed; see `make test-triton`"),
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; `make test-triton` runs the interpreter"),
]
needs_gpu = [pytest.mark.skipif(DEVICE == "cpu", reason="no GPU"), *needs_triton]
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
# The stream of 16-bit hidden states takes half a word where the other takes a whole one.
streams = pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(each, marks=needs_triton) for each in ("triton", "triton, 16 bits"))]
)
scales = pytest.mark.parametrize("noise_scale", ["absolute", "rms", "channel"])

SEED = 2**63 + 12345  # of 64 bits, the highest set
ODD = 0x9E3779B97F4A7C15


def add_noise(hidden, log_sigma, seed, noise_scale="absolute", backend="auto", **kwargs):
    """The noise of a model of one layer, and its measured power, asked and realised."""
    levels = NoiseLevels(log_sigma.reshape(1), measured=True, channels=channels_of(hidden)[None])
    return noise.add_noise(hidden, levels, 0, seed, noise_scale, backend, **kwargs), levels.take_power()[0]


def channels_of(hidden):
    """Sizes that a few channels lead, as they do in a model."""
    width = hidden.shape[-1]
    return torch.where(torch.arange(width, device=DEVICE) % 16 == 3, 4.0, 0.5) * torch.linspace(
        0.5, 1.5, width, device=DEVICE
    )


def scale_of(hidden, noise_scale):
    """`s(h)`, slow and obvious, in the dtype of `hidden`."""
    if noise_scale == "channel":
        return channels_of(hidden).to(hidden.dtype)
    return hidden.square().mean(-1, keepdim=True).sqrt() if noise_scale == "rms" else 1


def draw(backend, seed, *shape, dtype=torch.float32):
    """The noise itself: what is added to zeros at sigma 1."""
    hidden, log_sigma = torch.zeros(shape, dtype=dtype, device=DEVICE), torch.zeros((), device=DEVICE)
    if backend != "triton, 16 bits":
        return add_noise(hidden, log_sigma, seed, backend=backend)[0]
    with pytest.MonkeyPatch.context() as patch:  # not rounded to them
        patch.setattr(TRITON, "_is_short", lambda dtype: True)
        return add_noise(hidden, log_sigma, seed, backend="triton")[0]


def stream_of(backend, dtype):
    return "triton, 16 bits" if backend == "triton" and dtype.itemsize == 2 else backend


def random_hidden(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


# ---- The distribution ----

LAYERS, STEPS, SHAPE = 3, 2, (2, 64, 512)


@functools.cache
def draws(backend):
    """Noise of a few layers and micro-batches, under the seeds that a run gives them.  # (STEPS, LAYERS, B, T, H)"""
    seeds = [
        [(noise_seed(0, step) * LAYERS + layer) * ODD % 2**64 for layer in range(LAYERS)] for step in range(STEPS)
    ]
    return torch.stack([torch.stack([draw(backend, seed, *SHAPE) for seed in row]) for row in seeds]).double().cpu()


def within_four_standard_errors(value, expected, standard_error):
    assert abs(float(value) - expected) < 4 * standard_error, (float(value), expected, standard_error)


@streams
def test_noise_is_standard_normal(backend):
    delta = draws(backend).flatten()
    n = delta.numel()
    within_four_standard_errors(delta.mean(), 0, math.sqrt(1 / n))
    within_four_standard_errors(delta.var(), 1, math.sqrt(2 / n))
    within_four_standard_errors(delta.pow(3).mean(), 0, math.sqrt(15 / n))
    within_four_standard_errors(delta.pow(4).mean(), 3, math.sqrt(96 / n))
    for bound in (0.001, 0.5, 1, 2, 3, 4):
        expected = math.erf(bound / math.sqrt(2))
        within_four_standard_errors(
            (delta.abs() < bound).double().mean(), expected, math.sqrt(expected * (1 - expected) / n)
        )
    # Largest distance of the distribution functions; 1.95 is exceeded once in 1000 times (Kolmogorov).
    expected = torch.special.ndtr(delta.sort().values)
    assert (expected - torch.arange(n) / n).abs().max() * math.sqrt(n) < 1.95


@streams
@pytest.mark.parametrize("power", [1, 2])
def test_noise_is_uncorrelated_and_so_are_its_squares(backend, power):
    delta = draws(backend)
    delta = delta if power == 1 else (delta.square() - 1) / math.sqrt(2)
    pairs = {f"channels {lag} apart": (delta[..., lag:], delta[..., :-lag]) for lag in (1, 2, 3, 4, 5, 8, 64, 256)}
    pairs |= {f"tokens {lag} apart": (delta[..., lag:, :], delta[..., :-lag, :]) for lag in (1, 2, 32)}
    pairs |= {
        "samples": (delta[:, :, 0], delta[:, :, 1]),
        "layers": (delta[:, 1:], delta[:, :-1]),
        "steps": (delta[1:], delta[:-1]),
        "rank r, layer l and rank r + 1, layer l - 1": (delta[0, 1:], delta[1, :-1]),
    }
    for name, (one, other) in pairs.items():
        correlation = (one * other).mean()
        assert abs(correlation) < 4 / math.sqrt(one.numel()), (name, float(correlation))


@streams
def test_every_bit_of_the_seed_counts(backend):
    seeds = [SEED] + [SEED ^ (1 << bit) for bit in ([0, 1, 31] if backend == "torch" else range(0, 64, 9))]
    first = [tuple(draw(backend, seed, 1, 8)[0].tolist()) for seed in seeds]
    assert len(set(first)) == len(first)


# ---- The gradient ----


@backends
@scales
@pytest.mark.parametrize("shape", [(1, 2, 8), (2, 3)])
def test_gradients_equal_finite_differences(backend, noise_scale, shape):
    hidden = random_hidden(*shape, dtype=torch.float64)
    log_sigma = torch.tensor(-1.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    # The gradient of `h` passes through; under "rms" this is no derivative of the output, since s(h) is detached.
    inputs = (hidden.requires_grad_(noise_scale != "rms"), log_sigma)
    assert torch.autograd.gradcheck(lambda h, s: add_noise(h, s, SEED, noise_scale, backend)[0], inputs)


@backends
@scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 9, 96), (2, 3, 7)])
def test_gradients_equal_autograds_with_stored_noise(backend, noise_scale, dtype, shape):
    gradients = []
    target = random_hidden(*shape, seed=1)
    delta = draw(stream_of(backend, dtype), SEED, *shape)
    for stored in (False, True):
        hidden = random_hidden(*shape, dtype=dtype).requires_grad_()
        log_sigma = torch.tensor(-1.0, device=DEVICE, requires_grad=True)
        if stored:
            scale = scale_of(hidden.detach().float(), noise_scale)
            out = (hidden + log_sigma.exp() * scale * delta).to(dtype)
        else:
            out, _ = add_noise(hidden, log_sigma, SEED, noise_scale, backend)
        (out.float() - target).square().sum().backward()
        gradients.append((hidden.grad, log_sigma.grad))
    (grad, grad_log_sigma), (expected, expected_log_sigma) = gradients
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]  # outputs may be a unit apart
    torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_log_sigma, expected_log_sigma, rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.parametrize("width", [64, 13])
def test_backward_meets_the_noise_of_the_forward_element_by_element(backend, width):
    delta = draw(backend, SEED, 6, width)
    for index in (0, 1, 6, 5 * width, 6 * width - 1):
        hidden = torch.zeros(6, width, device=DEVICE)
        log_sigma = torch.zeros((), device=DEVICE, requires_grad=True)
        add_noise(hidden, log_sigma, SEED, backend=backend)[0].flatten()[index].backward()
        assert log_sigma.grad == delta.flatten()[index]


@backends
@scales
def test_gradient_of_the_hidden_state_passes_through_untouched(backend, noise_scale):
    hidden = random_hidden(2, 3, 32, dtype=torch.bfloat16).requires_grad_()
    gradient = random_hidden(2, 3, 32, dtype=torch.bfloat16, seed=1)
    for requires_grad in (True, False):
        hidden.grad = None
        log_sigma = torch.tensor(-1.0, device=DEVICE, requires_grad=requires_grad)
        add_noise(hidden, log_sigma, SEED, noise_scale, backend)[0].backward(gradient)
        assert torch.equal(hidden.grad, gradient)
        assert (log_sigma.grad is not None) == requires_grad


@backends
@scales
def test_the_same_seed_gives_the_same_bits(backend, noise_scale):
    runs = []
    for _ in range(3):
        log_sigma = torch.tensor(-1.0, device=DEVICE, requires_grad=True)
        out, power = add_noise(random_hidden(5, 7, 96), log_sigma, SEED, noise_scale, backend)
        out.backward(random_hidden(5, 7, 96, seed=1))
        runs.append((out.detach(), power, log_sigma.grad))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


# ---- Shapes, layouts, formats ----


@streams
def test_noise_depends_on_the_flat_index_alone(backend):
    expected = draw(backend, SEED, 120, 16).flatten()
    for shape in [(120, 16), (4, 30, 16), (2, 2, 30, 16), (640, 3), (128, 15), (60, 32), (2, 15, 64), (1, 1920)]:
        assert torch.equal(draw(backend, SEED, *shape).flatten(), expected), shape


@backends
@scales
def test_strides_and_views_make_no_difference(backend, noise_scale):
    hidden = random_hidden(4, 6, 32)
    log_sigma = torch.tensor(-1.0, device=DEVICE)
    expected, _ = add_noise(hidden, log_sigma, SEED, noise_scale, backend)
    padded = torch.zeros(9, 6, 40, device=DEVICE)
    padded[1::2, :, 3:35] = hidden
    views = [hidden.transpose(0, 1).contiguous().transpose(0, 1), hidden.mT.contiguous().mT, padded[1::2, :, 3:35]]
    for view in views:
        assert not view.is_contiguous() and torch.equal(view, hidden)
        out, _ = add_noise(view, log_sigma, SEED, noise_scale, backend)
        # torch sums the RMS of strided rows in another order, by which it may be off by a unit.
        tolerance = 1e-6 if (backend, noise_scale) == ("torch", "rms") else 0
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@backends
def test_gradients_of_any_layout_are_taken(backend):
    gradients = []
    for expand in (True, False):
        log_sigma = torch.tensor(-1.0, device=DEVICE, requires_grad=True)
        ones = torch.ones((), device=DEVICE).expand(3, 5, 24)
        out, _ = add_noise(random_hidden(3, 5, 24), log_sigma, SEED, "rms", backend)
        out.backward(ones if expand else ones.contiguous())
        gradients.append(log_sigma.grad)
    assert torch.equal(*gradients)


@backends
@scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 1, 1), (3, 7, 5), (33, 130)])
def test_the_sum_is_formed_in_high_precision_and_rounded_once(backend, noise_scale, dtype, shape):
    wide = torch.promote_types(dtype, torch.float32)
    hidden = random_hidden(*shape, dtype=dtype)
    out, _ = add_noise(hidden, torch.tensor(-2.0, device=DEVICE, dtype=wide), SEED, noise_scale, backend)
    assert out.dtype == dtype and out.shape == hidden.shape and out.is_contiguous()
    exact = hidden.double()
    scale = scale_of(exact, noise_scale)
    delta = draw(stream_of(backend, dtype), SEED, *shape, dtype=wide).double()  # torch's fp64 noise is its own
    added = math.exp(-2) * scale * delta
    exact = exact + added
    unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().log2().floor())
    # Triton's interpreter cuts bf16 off where the GPU rounds to nearest.
    last = unit if INTERPRETED and backend == "triton" and dtype == torch.bfloat16 else unit / 2
    before = 4 * torch.finfo(wide).eps * (hidden.double().abs() + added.abs())
    assert ((out.double() - exact).abs() <= 1.001 * last + before).all()


@backends
@scales
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_stays_empty(backend, noise_scale, shape):
    hidden = torch.zeros(shape, device=DEVICE, requires_grad=True)
    log_sigma = torch.zeros((), device=DEVICE, requires_grad=True)
    out, power = add_noise(hidden, log_sigma, SEED, noise_scale, backend)
    out.sum().backward()
    assert out.shape == hidden.grad.shape == shape
    assert log_sigma.grad == 0 and (power[1] / power[0]).isnan()


@backends
def test_the_global_random_state_is_untouched(backend):
    before = tiny.random_states()
    draw(backend, SEED, 4, 8)
    assert all(torch.equal(one, other) for one, other in zip(before, tiny.random_states(), strict=True))


@backends
@scales
def test_the_measured_noise_is_what_survives_rounding(backend, noise_scale):
    hidden = 3 * random_hidden(28, 64, 96)
    hidden[:, :16] = 0  # padding, which is left out
    sigma = torch.tensor(0.01, device=DEVICE)
    size = {"absolute": 1, "rms": 9, "channel": channels_of(hidden).square().mean().item()}[noise_scale]
    _, (asked, realised) = add_noise(hidden, sigma.log(), SEED, noise_scale, backend)
    assert asked.item() == pytest.approx(0.75 * size * 1e-4, rel=0.1)
    assert (realised / asked).item() == pytest.approx(1, abs=0.05)
    _, (asked, realised) = add_noise(hidden.half(), (sigma / 1e4).log(), SEED, noise_scale, backend)
    assert asked > 0 and realised < 0.1 * asked


# ---- The Triton kernels ----


def philox(counter, key, rounds):
    """Philox4x32 as Salmon et al. (2011) have it: counter of 128 bits, key of 64, four words of 32 bits."""
    c = [(counter >> (32 * i)) % 2**32 for i in range(4)]
    k = [key % 2**32, key >> 32]
    for _ in range(rounds):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_the_reference_philox_gives_the_published_words():
    assert philox(0, 0, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(2**128 - 1, 2**64 - 1, 7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def normal_by_hand(index, seed, bits=32):
    words = philox(index * bits // 128, seed, 7)
    if bits == 32:
        u, v = (1 - (word >> 9) / 2**23 for word in words[index % 4 // 2 * 2 :][:2])
        angle = 2 * math.pi * (v - 0.5)
    else:
        word = words[index % 8 // 2]
        u, angle = ((word >> 16) + 0.5) / 2**16, 2 * math.pi * (word % 2**16 / 2**16 - 0.5)
    return math.sqrt(-2 * math.log(u)) * (math.cos(angle) if index % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize("width", [16, 7, 12])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**64 - 1])
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_triton)])
def test_the_kernels_noise_is_box_muller_of_philox(marks, bits, seed, width):
    expected = [normal_by_hand(i, seed, bits) for i in range(3 * width)]
    found = draw("triton" if bits == 32 else "triton, 16 bits", seed, 3, width)
    # The upper cells of the angle of 16 bits are off by the rounding of 257 pi, a rotation that all share.
    assert found.flatten().tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.skipif(
    TRITON is None or DEVICE != "cpu", reason="without Triton; on a GPU every kernel is compiled anyway"
)
def test_every_kernel_compiles_for_a_gpu_and_not_for_the_interpreter_alone(tmp_path):
    environment = tiny.environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, str(Path(__file__).parent / "compiled_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "52"  # 26 cases, forward and backward


def add_noise_in_tiles(hidden, log_sigma, noise_scale, warps):
    levels = NoiseLevels(log_sigma.reshape(1), channels=channels_of(hidden)[None])
    return TRITON.AddNoiseTriton.apply(hidden, levels.token, levels, 0, SEED, noise_scale, 0, warps)


@scales
@pytest.mark.parametrize("shape", [(3, 5, 96), (2, 3, 100), (7, 33), (2, 2500)])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])
def test_tiles_make_no_difference_to_the_noise(backend, shape, noise_scale):
    results = []
    for warps in (1, 4, 16):
        log_sigma = torch.tensor(-1.0, device=DEVICE, requires_grad=True)
        out = add_noise_in_tiles(random_hidden(*shape), log_sigma, noise_scale, warps)
        out.backward(random_hidden(*shape, seed=1))
        results.append((out, log_sigma.grad))
    for out, gradient in results[1:]:
        # The RMS is summed in another order, by which it may be off by a unit.
        torch.testing.assert_close(out, results[0][0], rtol=1e-6 if noise_scale == "rms" else 0, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])
def test_a_wide_row_is_the_same_in_registers_and_read_again(backend, monkeypatch):
    hidden, log_sigma = random_hidden(3, 640), torch.tensor(-1.0, device=DEVICE)
    kept, _ = add_noise(hidden, log_sigma, SEED, "rms", "triton")
    monkeypatch.setattr(TRITON, "_KEPT_BYTES", 0)
    assert torch.equal(add_noise(hidden, log_sigma, SEED, "rms", "triton")[0], kept)


@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_gpu)])
def test_offsets_beyond_31_bits(marks):
    rows, width = 2**20 + 2, 2048  # 2**31 and two rows
    hidden = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    log_sigma = torch.zeros((), device="cuda", requires_grad=True)
    out, _ = add_noise(hidden, log_sigma, SEED, backend="triton")
    expected = [normal_by_hand((rows - 1) * width + i, SEED, 16) for i in range(8)]
    assert out[-1, :8].tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3)
    out[-1, 3].backward()
    assert log_sigma.grad.item() == pytest.approx(expected[3], abs=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_gpu)])
def test_nothing_waits_for_the_gpu(backend, marks):
    hidden = random_hidden(4, 64, 96).requires_grad_()
    log_sigma = torch.zeros((), device="cuda", requires_grad=True)
    add_noise(hidden, log_sigma, SEED, "rms", backend)[0].sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_noise(hidden, log_sigma, SEED + 1, "rms", backend)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- In a model ----

IDS = tiny.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def gradients(model, perturbation, seed=5):
    model.zero_grad()
    perturbation.zero_grad()
    with perturbation.applied(seed):
        model(IDS, attention_mask=(IDS != 0).long(), labels=IDS, use_cache=False).loss.backward()
    return [perturbation.log_sigma.grad.clone(), *(p.grad.clone() for p in model.parameters())]


def perturbed_model(backend, noise_scale="rms"):
    model = tiny.model().train()
    arguments = {"sigma_init": 0.1, "noise_scale": noise_scale, "noise_backend": backend}
    perturbation = LayerwisePerturbation(model, **arguments).to(DEVICE)
    perturbation.channel_rms = torch.rand(2, model.config.hidden_size, device=DEVICE)
    return model, perturbation


@backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_meets_the_same_noise(backend, use_reentrant):
    model, perturbation = perturbed_model(backend)
    plain = gradients(model, perturbation)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(model, perturbation), strict=True))
    assert (plain[0] != 0).all()


@backends
def test_a_compiled_model_has_the_gradients_of_the_eager_one(backend):
    model, perturbation = perturbed_model(backend)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        for one, other in zip(
            gradients(model, perturbation, seed), gradients(compiled, perturbation, seed), strict=True
        ):
            torch.testing.assert_close(one, other)


@backends
@scales
def test_the_perturbation_uses_the_backend_it_was_given(backend, noise_scale, monkeypatch):
    model, perturbation = perturbed_model(backend, noise_scale)
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[4:])
        return noise.add_noise(*args, **kwargs)

    monkeypatch.setattr("trl_alp.perturbation.add_noise", spy)
    gradients(model, perturbation)
    assert seen == [(noise_scale, backend)] * 2
    assert perturbation.effective_noise().tolist() == pytest.approx([1, 1], abs=0.2)


# ---- The setting ----


def test_auto_is_torch_on_a_cpu():
    hidden = random_hidden(2, 3, 16).cpu()
    outs = [add_noise(hidden, torch.tensor(-1.0), SEED, "rms", backend)[0] for backend in ("auto", "torch")]
    assert torch.equal(*outs)


@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_gpu)])
def test_auto_is_triton_on_a_gpu(marks):
    hidden, log_sigma = random_hidden(2, 3, 16), torch.tensor(-1.0, device="cuda")
    outs = [add_noise(hidden, log_sigma, SEED, "rms", backend)[0] for backend in ("auto", "triton")]
    assert torch.equal(*outs)


def test_a_backend_that_cannot_run_is_refused_at_construction(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^alp_noise_backend='cuda' is unknown.*'triton'"):
        tiny.config(tmp_path, alp_noise_backend="cuda")
    with pytest.raises(ValueError, match=r"^noise_backend='cuda' is unknown"):
        LayerwisePerturbation(tiny.model(), noise_backend="cuda")
    if not INTERPRETED:
        with pytest.raises(ValueError, match="alp_noise_backend='triton' needs"):
            tiny.config(tmp_path, alp_noise_backend="triton", use_cpu=True)
    monkeypatch.setattr(noise, "noise_triton", None)
    with pytest.raises(ValueError, match=r"needs Triton: `pip install triton`, or use `.auto.`"):
        check_noise_backend("triton")
    assert ALPGRPOConfig(str(tmp_path), use_cpu=True, bf16=False).alp_noise_backend == "auto"


@backends
def test_a_run_trains_with_either_backend(backend, tmp_path):
    trainer = tiny.trainer(tmp_path, alp_noise_backend=backend, max_steps=1)
    before = trainer.perturbation.sigma.clone()
    trainer.train()
    assert not torch.equal(trainer.perturbation.sigma, before)


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "noise.py"
    out = tmp_path / "noise.json"
    command = [sys.executable, str(script), "--device", "cpu", "--megabytes", "0.25", "--json", str(out)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 8  # fp32 and bf16, absolute and rms, forward and backward; torch alone
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in report["rows"])
    assert "of floor" in table.splitlines()[-len(report["rows"]) - 2]
