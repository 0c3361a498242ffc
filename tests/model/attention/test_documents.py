"""One variable-length kernel for all documents against one attention call a document.

The kernel is replaced by float64 attention under an explicit mask; torch's own is called on meta
tensors, so that the arguments fit its schema. Not covered: the kernel, a GPU.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from nemotron_train.model.attention import layer
from nemotron_train.model.documents import PackedDocuments


def masked_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents for `varlen_attn`, in float64 with a mask over all tokens."""
    assert torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32
    assert window_size == (-1, 0) and longest_q == longest_k == int(starts_q.diff().max())
    tokens = len(q_THD)
    document_T = torch.zeros(tokens, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(starts_q.tolist())):
        document_T[start:end] = number
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = causal & (document_T[:, None] == document_T)
    assert enable_gqa == (q_THD.shape[1] != k_TGD.shape[1])
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1).to(q_THD.dtype)


def operands(rows: int, tokens: int, heads: int, key_heads: int) -> list[Tensor]:
    """q, k and v as the layer sees them: views of [S,B,...] tensors."""
    generator = torch.Generator().manual_seed(rows + 10 * tokens)
    shapes = [(tokens, rows, heads, 8), *[(tokens, rows, key_heads, 8)] * 2]
    return [torch.randn(shape, generator=generator).transpose(0, 1) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    heads_a_key=st.integers(1, 3),
    key_heads=st.integers(1, 2),
)
def test_one_kernel_equals_one_call_a_document(
    cuts: list[list[bool]], heads_a_key: int, key_heads: int
) -> None:
    documents = PackedDocuments.of(torch.tensor(cuts, dtype=torch.int64).cumsum(1))
    q, k, v = operands(len(cuts), 12, heads_a_key * key_heads, key_heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", masked_attention)
        one = layer._in_one_kernel(q, k, v, documents)
    assert one.shape == q.shape
    torch.testing.assert_close(one, layer._by_document(q, k, v, documents), atol=2e-6, rtol=1e-5)


def test_torchs_kernel_accepts_the_arguments() -> None:
    documents = PackedDocuments.of(torch.arange(16).div(5, rounding_mode="floor").expand(2, 16))
    q, k, v = (x.to("meta", torch.bfloat16) for x in operands(2, 16, 4, 2))
    assert layer._in_one_kernel(q, k, v, documents).shape == q.shape


def test_only_the_choice_of_the_kernel_differs() -> None:
    assert layer.CoreAttention._attend_documents is layer._by_document
    assert layer.VariableLengthAttention._attend_documents is layer._in_one_kernel
    assert layer.VariableLengthAttention.forward is layer.CoreAttention.forward
