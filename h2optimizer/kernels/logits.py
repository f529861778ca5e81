"""The log-probability of a token in one pass over the logits, of which torch makes several in float32."""

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import on_its_device

BLOCK, WARPS = 8192, 8  # logits of an iteration


@triton.jit
def _token_logprobs_kernel(logits, tokens, output, size, stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * stride
    top, total = -float("inf"), 0.0
    for i in range(0, size, BLOCK):
        x = tl.load(logits + i + column, mask=i + column < size, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    own = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    tl.store(output + row, own - top - tl.log(total))


@on_its_device
def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log_softmax(logits) at the tokens, in float32.

    Args: logits: [B, vocabulary], float32 or half precision, the last dimension contiguous; tokens: int64 [B].

    Returns: float32 [B].
    """
    assert logits.stride(1) == 1 and tokens.is_contiguous()
    output = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    _token_logprobs_kernel[(len(logits),)](
        logits, tokens, output, logits.shape[1], logits.stride(0), BLOCK=block, num_warps=WARPS
    )
    return output
