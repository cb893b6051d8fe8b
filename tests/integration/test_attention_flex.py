"""Flex attention: the same exactness, where the kernel can take it; a refusal where it can't."""

from __future__ import annotations

import pytest
import torch

from tempering.attention.control.self_check import self_check
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.errors import ArchitectureError
from tempering.survey.families import task_of
from tempering.survey.judge import random_profile
from tempering.survey.models import small_model

pytestmark = [
    # From transformers and PyTorch, on every call.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


LLAMA = task_of("llama", "LlamaForCausalLM")
GEMMA = task_of("gemma2", "Gemma2ForCausalLM")


@pytest.fixture(autouse=True)
def uncompiled():
    """The kernel as it is written: compiling it for each shape takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_flex_attention_is_exact():
    flex, eager = (small_model(LLAMA, name) for name in ("flex_attention", "eager"))
    assert self_check(flex).share < 1e-3
    ids = torch.randint(5, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    profiles = [random_profile(layout(eager), seed) for seed in range(3)]
    plain = logits(flex, inputs)
    with tempered(eager, profiles):
        exact = logits(eager, inputs)
    with tempered(flex, [profile.adopt(flex) for profile in profiles]):
        actual = logits(flex, inputs)
    real = mask.bool()
    scale = exact.std()
    assert (actual - exact)[real].abs().max() < 1e-4 * scale
    assert (actual - plain)[real].abs().max() > 0.1 * scale
    assert torch.equal(logits(flex, inputs)[real], plain[real])


def test_a_soft_cap_inside_a_fused_kernel_is_refused():
    with pytest.raises(ArchitectureError, match=r"layers\.0\.self_attn caps its logits inside a f"):
        layout(small_model(GEMMA, "flex_attention"))
