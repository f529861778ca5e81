"""Launches that are made once for some shapes: that the compiled kernel runs only with what it was compiled for."""

import pytest
import torch

from kernel_cases import on_each_device, placed  # noqa: F401  placed: autouse

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from h2optimizer.kernels import layer, mlp, prefill
from h2optimizer.kernels.common import Launch


class Kernel:
    """Stands for a Triton function, and for what it compiles to; remembers how it was launched."""

    arg_names = ("states", "output", "rows", "SIZE", "BLOCK")

    def __init__(self):
        self.compiled = self.direct = 0
        self.arguments, self.options = [], {}

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)

        def bound(*arguments, **options):
            self.compiled, self.options = self.compiled + 1, options
            self.arguments.append(arguments)
            return Compiled(self)

        return bound


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)

        def direct(*arguments):
            self.kernel.direct += 1
            self.kernel.arguments.append(arguments)

        return direct


def launches(*calls):
    """A kernel after such launches of its two tensors."""
    kernel = Kernel()
    launch = Launch(kernel, 3, 7, BLOCK=64, SIZE=48, options=dict(num_warps=4))
    for tensors in calls:
        launch(*tensors)
    assert kernel.options == dict(num_warps=4)
    for tensors, given in zip(calls, kernel.arguments, strict=True):
        assert all(a is b for a, b in zip(tensors, given, strict=False)), "the tensors of this call"
        assert given[2:] == (7, 48, 64), "in the order of the parameters"
    return kernel.compiled, kernel.direct


def test_what_was_compiled_runs_again():
    """Every launch at the price of the first one, or the first call's tensors in all later ones."""
    assert launches(*((torch.zeros(8), torch.zeros(8)) for _ in range(3))) == (1, 2)


@pytest.mark.parametrize("other", [
    (torch.zeros(8, dtype=torch.float16), torch.zeros(8)), (torch.zeros(8), None),
    (torch.zeros(8), TensorDescriptor(torch.zeros(1, 8, dtype=torch.float16), [1, 8], [8, 1], [1, 8])),
], ids=["dtype", "None", "descriptor's dtype"])  # fmt: skip
def test_another_kind_of_tensor_is_compiled_for(other):
    """A kernel for another dtype, which would read half of the bytes or twice as many."""
    assert launches((torch.zeros(8), torch.zeros(8)), other, (torch.zeros(8), torch.zeros(8)), other) == (2, 2)


def test_tensors_off_the_alignment():
    """Wide loads at addresses that do not allow them, where the first tensors did; or none for good."""
    odd = torch.zeros(9)[1:], torch.zeros(8)
    assert launches(odd, odd) == (2, 0)
    assert launches((torch.zeros(8), torch.zeros(8)), odd, (torch.zeros(8), torch.zeros(8))) == (2, 1)


@on_each_device
def test_second_launches(device):
    """A compiled kernel that takes its arguments in another order, or only those that it was compiled with."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for dtype in (torch.float32, torch.float16, torch.float32):
        for _ in range(3):
            states, branch, weight = (random(*shape, dtype=dtype) for shape in ((1, 3, 32), (1, 3, 32), (32,)))
            summed, normed = layer.add_and_normalise(states, branch, weight, 1e-5)
            expected = torch.nn.functional.rms_norm(summed.float(), (32,), weight.float(), 1e-5)
            assert torch.equal(summed, states + branch)
            torch.testing.assert_close(normed.float(), expected, atol=1e-2, rtol=1e-2)

            gate, up = random(1, 3, 64, dtype=dtype).chunk(2, -1)
            active = mlp.silu_and_multiply(torch.cat([gate, up], -1))
            torch.testing.assert_close(active, torch.nn.functional.silu(gate) * up, atol=1e-2, rtol=1e-2)

            query, key = random(1, 2, 5, 16, dtype=dtype), random(1, 1, 5, 16, dtype=dtype)
            logits = (query.float() @ key.float().transpose(2, 3)).masked_fill(
                torch.ones(5, 5).triu(1).bool().to(device), -torch.inf
            )
            spans = torch.tensor([[0], [5], [0]], dtype=torch.int32, device=device)
            output, lse = prefill.attention_with_lse(query, key, key, spans, 1.0)
            mass = prefill.attention_mass(query, key, lse, spans, 1.0, first_head=False)
            weights = logits.softmax(-1)
            torch.testing.assert_close(output.float(), weights @ key.float(), atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(mass, weights.sum(2).sum(1, keepdim=True), atol=1e-2, rtol=1e-2)
