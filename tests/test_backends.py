"""The triton and flash_attn backends around their kernels: which one runs, what it is given, and the whole model.

The kernels run in Triton's interpreter, flash-attn is a stand-in with the semantics that its docstrings promise.
"""

import importlib.machinery
import itertools
import os
import sys
import types

import pytest
import torch

from conftest import (
    SCALING,
    assert_close,
    assert_invariants,
    assert_row_is_oracles,
    forward,
    generate,
    make_llamas,
    make_states,
    make_step,
    new_cache,
    new_oracle,
    own_columns,
    plain_attention,
    prompt,
)
from h2optimizer import H2OConfig, attention, backends
from h2optimizer.attention import Inputs, find_flash_attn
from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.utils.cache import HHCache

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: test_gpu_results.py"),
    # the interpreter computes both sides of a tl.where
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning"),
]


# The whole model on the kernels

# slimming by torch but in one case: its kernels take the interpreter's time, and have tests of their own
SMALL = {"window_length": 6, "update_interval": 2, "slimming": "mask"}
FLAGS = {  # layers, heads, KV heads
    "H2O": ((2, 4, 2), {"update_interval": 1}),
    "rolling": (
        (1, 4, 2),
        {"position_rolling": True, "score_norm": "mean", "score_decay": 0.75, "score_queries": 4},
    ),
    "first head": ((1, 2, 1), {"group_reduce": "first", "score_decay": 0.5, "slimming": "H"}),
    "last due step only": ((1, 4, 2), {"score_decay": 0.0, "score_every_step": False}),
    "random": ((1, 2, 1), {"score": "random", "position_rolling": True}),
    "local": ((1, 2, 2), {"num_heavy_hitters": 0}),
}


@pytest.mark.parametrize("size, flags", FLAGS.values(), ids=FLAGS)
def test_a_ragged_conversation_is_the_oracles(size, flags):
    """Mass that goes to other slots, twice or not at all, a flag that the kernels are not told, or a row that shows in
    another: prompts, decode steps and a turn of two left-padded rows against the oracle, row by row."""
    sizes = dict(zip(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), size, strict=True))
    llamas, flags = make_llamas(**sizes, head_dim=16), {**SMALL, **flags}
    cache = new_cache(**flags, backend="triton")
    oracles = [new_oracle(llamas, **flags) for _ in range(2)]
    decode = [[[token] for token in prompt(2, step)] for step in range(3)]  # the last two of them due
    for block in ([prompt(11), prompt(3)], *decode[:2], [prompt(2), prompt(5, 1)], *decode[2:]):
        logits = forward(llamas.h2o, block, cache)
        for b, oracle in enumerate(oracles):
            expected = oracle.forward(block[b])
            assert_close(logits[b], expected, what=f"forward {oracle.clock}, row {b}")
            assert logits[b][-1].argmax() == expected[-1].argmax()
            assert_row_is_oracles(cache, b, oracle)
        assert_invariants(cache)
    assert min(cache.evictions) >= 1


def test_tokens_are_eagers():
    """Any difference that shows in what is generated."""
    llamas = make_llamas(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    rows, sequences = [prompt(11), prompt(3)], []
    for backend in ("eager", "triton"):
        llamas.h2o.h2o = H2OConfig(**SMALL, backend=backend)
        sequences.append(generate(llamas.h2o, rows, 5).sequences.tolist())
    assert sequences[0] == sequences[1]


def test_a_row_without_tokens_leaves_no_nan(gqa):
    """NaN of a softmax over nothing, put into slots that another backend multiplies by zero later."""
    results = []
    for backend in ("eager", "triton"):
        cache = new_cache(window_length=8, update_interval=2, slimming="mask", backend=backend)
        forward(gqa.h2o, [prompt(9), []], cache)
        assert not any(layer.keys.isnan().any() or layer.values.isnan().any() for layer in cache.layers)
        logits = [*forward(gqa.h2o, [[3], [4]], cache), *forward(gqa.h2o, [[5, 6], [7]], cache)]
        token = torch.tensor([[8], [9]])
        logits.append(gqa.h2o(token, past_key_values=cache).logits.detach())  # gradients: not by kernel
        results.append(logits)
    for triton, eager in zip(*results, strict=True):
        assert_close(triton, eager)


# The backends' own part of an attention

STEPS = {
    "prefill": dict(start=[0, 0], new=[9, 9]),
    "ragged prefill, last queries": dict(start=[0, 0, 0], new=[9, 2, 6], score_queries=4),
    "one token": dict(start=[0, 0], new=[1, 1]),
    "decode": dict(start=[7, 7], new=[1, 1], decode=True),
    "ragged decode": dict(start=[7, 2, 5], new=[1, 1, 1], decode=True),
    "turn": dict(start=[7, 7], new=[5, 5]),
    "ragged turn": dict(start=[7, 2, 0], new=[3, 5, 1]),
    "turn of one row": dict(start=[7, 4], new=[3, 0]),
}


def tables(width, head_dim=16, dtype=torch.float32):
    angle = torch.arange(width)[:, None] * torch.tensor([0.7**i for i in range(head_dim // 2)])
    return tuple(torch.cat([f(angle), f(angle)], dim=-1).to(dtype) for f in (torch.cos, torch.sin))


@pytest.mark.parametrize("which", STEPS)
def test_triton_is_eager_on_any_step(which):
    """A log-sum-exp of other queries, keys that are rotated twice or never, or mass where nobody asked."""
    case, plain, rotated = STEPS[which], (2, "sum", False), (1, "first", True)
    ways = (plain, rotated) if "ragged" in which else (rotated,) if which == "turn" else (plain,)
    for kv_heads, group_reduce, rope in ways:
        step, unscored = make_step(**case), make_step(**case, scored=False)
        states = make_states(step, kv_heads)
        rotation = tables(step.width) if rope else None
        expected, expected_mass = attention.eager_attention(Inputs(*states, step, SCALING, group_reduce, rope=rotation))
        output, mass = attention.triton_attention(Inputs(*states, step, SCALING, group_reduce, rope=rotation))
        assert_close(own_columns(output, step), own_columns(expected, step))
        assert_close(mass, expected_mass)
        output, mass = attention.triton_attention(Inputs(*states, unscored, SCALING, group_reduce, rope=rotation))
        assert mass is None
        assert_close(own_columns(output, step), own_columns(expected, step))


@pytest.mark.parametrize("wanting", ["query", "key", "value"])
@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
@pytest.mark.parametrize("scored", [True, False])
def test_gradients_are_sdpas(backend, scored, wanting):
    """A kernel without a backward pass under states that want gradients: they would be lost without a word, also where
    the values alone are trained."""
    for case in (STEPS["prefill"], STEPS["ragged turn"], STEPS["ragged decode"]):
        step, gradients = make_step(**case, scored=scored), []
        for name in ("sdpa", backend):
            states = dict(zip(("query", "key", "value"), make_states(step, 2), strict=True))
            states[wanting].requires_grad_()
            output, _ = ATTENTION_BACKENDS[name](Inputs(*states.values(), step, SCALING, "sum"))
            own_columns(output, step).square().sum().backward()
            gradients.append(states[wanting].grad)
        assert_close(gradients[1], gradients[0])


def test_a_training_step_has_gradients(gqa):
    """The same through a model: parameters that get no gradient."""
    gradients = []
    for backend in ("sdpa", "triton"):
        gqa.h2o.zero_grad()
        ids = torch.tensor([prompt(9), prompt(9, 1)])
        gqa.h2o(ids, labels=ids, past_key_values=new_cache(window_length=8, backend=backend)).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in gqa.h2o.named_parameters()})
    gqa.h2o.zero_grad()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-4, name)


@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 16), (torch.float32, 2), (torch.float32, 264)])
def test_what_kernels_cannot_take_goes_to_sdpa(backend, dtype, head_dim):
    """A dtype or head_dim that a kernel computes wrongly, or dies of."""
    for case in (STEPS["prefill"], STEPS["ragged turn"], STEPS["ragged decode"]):
        step = make_step(**case)
        states = make_states(step, 2, dtype, head_dim)
        for result, expected in zip(
            ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, "sum")),
            attention.sdpa_attention(Inputs(*states, step, SCALING, "sum")),
            strict=True,
        ):
            assert torch.equal(result, expected)


# Which backend runs


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    """A Hopper GPU is what any machine has here; what is remembered of it is of this test's."""
    monkeypatch.setattr(backends, "_least_capability", lambda: 9)
    for remembered in (resolve_backend, find_flash_attn):
        remembered.cache_clear()
    yield
    for remembered in (resolve_backend, find_flash_attn):
        remembered.cache_clear()


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def hide(monkeypatch, *names):
    """As if these modules were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_auto_on_a_cpu_is_sdpa(monkeypatch):
    """Minutes in the interpreter because triton happens to be importable."""
    assert resolve_backend("auto", "cpu") == "sdpa"
    for capability, expected in ((0, "sdpa"), (7, "sdpa"), (8, "triton"), (9, "triton")):
        resolve_backend.cache_clear()
        monkeypatch.setattr(backends, "_least_capability", lambda capability=capability: capability)
        assert resolve_backend("auto", "cuda") == expected
    resolve_backend.cache_clear()
    hide(monkeypatch, "triton")
    assert resolve_backend("auto", "cuda") == "sdpa"


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch, gqa):
    """A backend that cannot run on this device, found out deep inside a forward."""
    assert resolve_backend("triton", "cpu") == "triton"
    resolve_backend.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    for name in ("triton", "flash_attn"):
        with pytest.raises(ValueError, match=r"needs a CUDA device.*'cpu'.*backend='auto'") as error:
            resolve_backend(name, "cpu")
        one_line(error)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        forward(gqa.h2o, [prompt(3)], new_cache(backend="triton"))
    for name in ("eager", "sdpa"):
        assert resolve_backend(name, "cpu") == name


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_without_triton_the_message_says_how_to_install_it(monkeypatch, name):
    """An ImportError from inside a forward."""
    hide(monkeypatch, "triton")
    with pytest.raises(ValueError, match=r"triton is not installed: pip install triton.*backend='sdpa'") as error:
        resolve_backend(name, "cuda")
    one_line(error)


# flash-attn


class Flash(types.ModuleType):
    """flash-attn's documented functions in plain torch, version 2 or 3, and the arguments of every call.

    states [B, n, H, D]; causal is aligned to the bottom right corner of each row's keys.
    """

    def __init__(self, version, early=False):
        super().__init__({2: "flash_attn", 3: "flash_attn_interface"}[version])
        self.__spec__ = importlib.machinery.ModuleSpec(self.__name__, None)
        self.calls = []

        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
            self.calls.append(("flash_attn_func", q, k, v, return_attn_probs))
            output, lse = self.attend(q, k, v, [k.shape[1]] * len(q), softmax_scale, causal)
            if version == 3:
                return (output, lse) if return_attn_probs else output
            return (output, lse, None) if return_attn_probs else output

        def early_flash_attn_func(q, k, v, softmax_scale=None, causal=False):
            return flash_attn_func(q, k, v, softmax_scale, causal, True)

        def flash_attn_with_kvcache(
            q, k_cache, v_cache, *, cache_seqlens, softmax_scale=None, causal=False, return_softmax_lse=False
        ):
            assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (len(q),)
            assert max(cache_seqlens) <= k_cache.shape[1]
            self.calls.append(("flash_attn_with_kvcache", q, k_cache, v_cache, return_softmax_lse))
            output, lse = self.attend(q, k_cache, v_cache, cache_seqlens.tolist(), softmax_scale, causal)
            return (output, lse) if return_softmax_lse else output

        self.flash_attn_func = early_flash_attn_func if early else flash_attn_func
        self.flash_attn_with_kvcache = flash_attn_with_kvcache

    @staticmethod
    def attend(q, k, v, lengths, scale, causal):
        assert q.dtype in (torch.float16, torch.bfloat16) and causal and q.stride(3) == k.stride(3) == 1
        output, lse = torch.zeros_like(q), torch.zeros(len(q), q.shape[2], q.shape[1])
        for b, length in enumerate(lengths):
            group = q.shape[2] // k.shape[2]
            query = q[b].transpose(0, 1).float()
            key, value = (states[b, :length].transpose(0, 1).float().repeat_interleave(group, 0) for states in (k, v))
            logits = query @ key.transpose(1, 2) * scale
            last = torch.arange(q.shape[1])[:, None] + length - q.shape[1]
            logits.masked_fill_(torch.arange(length) > last, -torch.inf)
            lse[b] = logits.logsumexp(-1)
            output[b] = (logits.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
        return output, lse


def install(monkeypatch, *modules):
    hide(monkeypatch, "flash_attn", "flash_attn_interface")
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return modules[0] if modules else None


MODULES = {"2": dict(version=2), "3": dict(version=3), "early 3": dict(version=3, early=True)}


@pytest.mark.parametrize("module, case", [
    *(("2", case) for case in STEPS),
    *itertools.product(["3", "early 3"], ["prefill", "ragged decode", "ragged turn"]),
])  # fmt: skip
def test_flash_attention_is_eager_on_any_step(monkeypatch, case, module):
    """Causal aligned to another corner than flash-attn's, lengths without the new tokens, a tuple taken for a tensor,
    or a log-sum-exp of another layout."""
    install(monkeypatch, Flash(**MODULES[module]))
    case = STEPS[case]
    for kv_heads, group_reduce, rope in ((2, "sum", False), (1, "first", True)):
        step, unscored = make_step(**case), make_step(**case, scored=False)
        states = make_states(step, kv_heads, torch.float16)
        rotation = tables(step.width, dtype=torch.float16) if rope else None
        exact = [states[0].double(), states[1].double(), states[2].double()]
        exact[1] = exact[1] if not rope else attention.rotate(exact[1], *(table.double() for table in rotation))
        expected, _ = plain_attention(*exact, step, group_reduce)
        eager, eager_mass = attention.eager_attention(Inputs(*states, step, SCALING, group_reduce, rope=rotation))
        allowed = (own_columns(eager, step).double() - own_columns(expected, step)).abs().max()
        output, mass = attention.flash_attention(Inputs(*states, step, SCALING, group_reduce, rope=rotation))
        pure, nothing = attention.flash_attention(Inputs(*states, unscored, SCALING, group_reduce, rope=rotation))
        assert nothing is None
        for each in (output, pure):
            assert each.shape == states[0].shape and each.dtype == torch.float16
            error = (own_columns(each, step).double() - own_columns(expected, step)).abs().max()
            assert error <= 2 * allowed + 1e-6
        assert_close(mass, eager_mass, 2e-5 if not rope else 5e-3)


def test_flash_attention_takes_slots_as_they_are(monkeypatch):
    """A copy of the keys, repeated KV heads, or kernels of our own where flash-attn was asked for."""
    flash = install(monkeypatch, Flash(2))
    for case, function in (("prefill", "flash_attn_func"), ("ragged decode", "flash_attn_with_kvcache")):
        step = make_step(**STEPS[case], scored=False)
        states = make_states(step, 2, torch.float16)
        attention.flash_attention(Inputs(*states, step, SCALING, "sum"))
        name, q, k, v, wants_lse = flash.calls.pop()
        assert name == function and not wants_lse and not flash.calls
        for given, ours in zip((q, k, v), states, strict=True):
            assert given.data_ptr() == ours.data_ptr() and given.shape == ours.transpose(1, 2).shape


def test_flash_attn_3_is_preferred(monkeypatch):
    """The slower of two installed versions."""
    two, three = Flash(2), Flash(3)
    install(monkeypatch, two, three)
    assert find_flash_attn() is three
    find_flash_attn.cache_clear()
    install(monkeypatch, two)
    assert find_flash_attn() is two
    assert resolve_backend("flash_attn", "cuda") == "flash_attn"


def test_without_flash_attn_the_message_says_how_to_install_it(monkeypatch):
    """An ImportError from inside a forward, or another backend taken in silence."""
    install(monkeypatch)
    with pytest.raises(ValueError, match=r"not installed: pip install flash-attn.*backend='triton'") as error:
        resolve_backend("flash_attn", "cuda")
    one_line(error)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_a_flash_attn_of_another_torch_is_one_line(monkeypatch, tmp_path, name):
    """A traceback of undefined symbols, from a package that was built for another torch."""
    hide(monkeypatch, "flash_attn", "flash_attn_interface")
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{name}.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} does not import \(undefined symbol.*reinstall.*triton") as error:
        resolve_backend("flash_attn", "cuda")
    one_line(error)


def test_a_broken_flash_attn_3_leaves_a_working_2(monkeypatch, tmp_path):
    """The one that cannot be imported hides the one that can."""
    two = install(monkeypatch, Flash(2))
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_flash_attn() is two


def test_another_flash_attn_is_one_line(monkeypatch):
    """An AttributeError inside the first prefill, from a version 4 or a namespace of that name."""
    other = types.ModuleType("flash_attn")
    other.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    install(monkeypatch, other)
    with pytest.raises(ValueError, match=r"has no flash_attn_func.*install flash-attn 2 or 3.*triton") as error:
        resolve_backend("flash_attn", "cuda")
    one_line(error)


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_an_old_gpu_is_one_line(monkeypatch, name):
    """A compiler's error in the middle of a forward, on a GPU that Triton's half precision does not know."""
    install(monkeypatch, Flash(2))
    monkeypatch.setattr(backends, "_least_capability", lambda: 7)
    with pytest.raises(ValueError, match=r"compute capability 8.*backend='sdpa'") as error:
        resolve_backend(name, "cuda")
    one_line(error)
    assert resolve_backend("auto", "cuda") == "sdpa"


def test_flash_attn_gives_no_scores_in_a_decode_step():
    """Mass that is asked of flash-attn on every step, and would silently never come."""
    for flags in ({}, {"num_heavy_hitters": 5}):
        with pytest.raises(ValueError, match=r"score_every_step=False.*backend='triton'") as error:
            H2OConfig(backend="flash_attn", **flags)
        one_line(error)
    for flags in ({"score_every_step": False}, {"score": "sink"}, {"score": "random"}, {"num_heavy_hitters": 0}):
        assert H2OConfig(backend="flash_attn", **flags).backend == "flash_attn"


@pytest.mark.parametrize("rolling", [False, True])
def test_the_model_on_flash_attn(monkeypatch, rolling):
    """Steps that miss flash-attn or the cache's own slots, and scores that go wrong beside it: rows of half precision
    against eager attention, up to rounding."""
    flash = install(monkeypatch, Flash(2))
    for where in ("backends", "modeling"):
        monkeypatch.setattr(f"h2optimizer.{where}.resolve_backend", lambda name, device: name)
    layers = 1 if rolling else 2  # rolling decodes by our kernel, in the interpreter
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    llamas = make_llamas(torch.float16, initializer_range=0.06, **sizes)
    flags = {"window_length": 8, "update_interval": 2, "score_every_step": False, "slimming": "mask"}
    flags["position_rolling"] = rolling
    caches = {name: new_cache(**flags, backend=name) for name in ("eager", "flash_attn")}
    blocks = [
        [prompt(13), prompt(3)],
        *([[token], [token + 1]] for token in range(1, 3)),
        [prompt(4), prompt(2)],
        [[5], [6]],
    ]
    for block in blocks:
        results = {name: forward(llamas.h2o, block, cache) for name, cache in caches.items()}
        cache, calls = caches["flash_attn"], flash.calls[:]
        flash.calls.clear()
        due = (cache.clock - 1) % 2 == 0 or len(block[0]) > 1
        if len(block[0]) == 1:
            assert len(calls) == (0 if due or rolling else layers)  # a call for each layer
            for (name, _, k, v, _), layer in zip(calls, cache.layers, strict=bool(calls)):
                assert name == "flash_attn_with_kvcache"
                assert (k.data_ptr(), v.data_ptr()) == (layer.keys.data_ptr(), layer.values.data_ptr())
                assert k.shape[2] == layer.keys.shape[1]
        else:
            assert [call[0] for call in calls] == [
                "flash_attn_func" if cache.clock == 1 else "flash_attn_with_kvcache"
            ] * layers
        for logits, expected in zip(results["flash_attn"], results["eager"], strict=True):
            assert_close(logits, expected, 0.02)
        assert_invariants(cache)
    eager = caches["eager"]
    assert (cache.lengths, cache.seen, cache.evictions) == (eager.lengths, eager.seen, eager.evictions)
    for layer_idx in range(layers):
        assert (cache.positions(layer_idx) == eager.positions(layer_idx)).float().mean() > 0.9
    assert isinstance(cache, HHCache)
