"""Sums of products: in place, and unrounded where PyTorch can."""

import pytest
import torch

from slimepo.kernels.products import accumulate


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_a_part_of_a_sum(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((48, 64), (64, 80)))
    total = torch.ones(100, 80, device=device)
    for _ in range(20):
        accumulate(total[30:78], left, right)
    exact = 1 + 20 * (left.double() @ right.double())
    assert (total[:30] == 1).all()
    assert (total[78:] == 1).all()
    # Rounded to bfloat16 each of them would be 2**-9 off.
    close = 1e-5 if device == "cuda" or dtype == torch.float32 else 2**-8
    assert (total[30:78] - exact).abs().max() <= close * exact.abs().max()
