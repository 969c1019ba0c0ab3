"""A network answers in each type, whatever kernel was chosen for another one."""

from __future__ import annotations

import warnings

import pytest
import torch
from e2ediff_testing import make_batch, make_nets

from e2ediff.errors import ResourceError
from e2ediff.nn.attention import BACKENDS, sdpa, use_attention
from e2ediff.nn.layers import SelfAttention
from e2ediff.parts.backbones import ViTConfig

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_or_skipped(net, kernel, device, dtype) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why a kernel that is asked for refuses
            use_attention(net, kernel, device, dtype, 64)
    except ResourceError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("asked", TYPES)
@pytest.mark.parametrize("chosen", TYPES)
@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_kernel_chosen_for_one_type_serves_or_is_replaced_in_each(
    kernel, chosen, asked, device
) -> None:
    module = SelfAttention(128, 2, qk_norm=True).to(device)
    chosen_or_skipped(module, kernel, device, TYPES[chosen])
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 64, 2, 64, generator=g).to(device, TYPES[asked]).requires_grad_()
        for _ in range(3)
    ]
    ours, theirs = module.attend(*inputs), sdpa(*inputs)
    assert ours.dtype == TYPES[asked]
    # averages of unit normals, rounded to 2^-8 in bfloat16; TF32 products in float32
    near = 2e-3 if asked == "float32" else 0.03
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=near)
    pulls = (torch.autograd.grad(out.float().square().sum(), inputs) for out in (ours, theirs))
    for a, b in zip(*pulls, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=3 * near)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_network_prepared_for_bfloat16_encodes_denoises_and_decodes_in_float32(
    kernel, device
) -> None:
    config = ViTConfig(width=128, depth=1, heads=2, patch=4, latent_dim=4)
    net = make_nets(config).online.to(device).eval()
    chosen_or_skipped(net, kernel, device, torch.bfloat16)
    batch = make_batch(size=4)
    x, condition = batch.x.to(device), batch.condition.to(device)
    t = torch.full((4,), 0.5, device=device)
    with torch.no_grad():
        z = net.encode(x)
        made = net.decode(net.denoise(z, t, condition))
    assert z.dtype == made.dtype == torch.float32
    assert bool(made.isfinite().all())
