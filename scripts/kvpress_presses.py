"""Measure kvpress' presses on given tokens. `scripts/compare_policies.py` starts this in kvpress' own environment.

kvpress needs an older transformers than this project, so the project's models are not used here. A line on stdin is a
job, a JSON object:

    request      a number, returned as it is
    prompt, text tokens; the text is fed to the cache
    nll          what the text's tokens after the first cost with this project's full cache, in nats
    cuts         [[press, budget], …]: the prompt is cut to `budget` slots a head on average, the text stays on top
    max_tokens   how many tokens to generate greedily from the cut prompt; 0 generates none
    eos          tokens that end such a text

For each cut one line goes to stdout: request, press and budget, and then either

    tokens, agreed, kl, nll   sums over the text's tokens after the first, as h2optimizer.fidelity.Fidelity's
    slots_kept, kv_bytes      slots a head can attend to, on average, and bytes held, both at the end of the text
    said                      the generated tokens

or `error`, the reason why the press cannot do this cut. The reference is the same model with its full cache. It must
find the text as likely as this project does, or the two libraries do not read the checkpoint alike.
"""

import argparse
import functools
import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

if Path(__file__).resolve().parents[1].joinpath("h2optimizer").is_dir():  # a clone; what is installed is found
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from h2optimizer.utils.cli import OneLineParser

PRESSES = {  # by name: how it is made by kvpress, with its own defaults
    "ObservedAttention": lambda kvpress, cut: kvpress.ObservedAttentionPress(**cut),
    "ExpectedAttention": lambda kvpress, cut: kvpress.ExpectedAttentionPress(**cut),
    "AdaKV+ExpectedAttention": lambda kvpress, cut: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(**cut, epsilon=1e-2)
    ),
    "TOVA": lambda kvpress, cut: kvpress.TOVAPress(**cut),
    "SnapKV": lambda kvpress, cut: kvpress.SnapKVPress(**cut),
    "PyramidKV": lambda kvpress, cut: kvpress.PyramidKVPress(**cut),
    "CriticalKV+SnapKV": lambda kvpress, cut: kvpress.CriticalKVPress(kvpress.SnapKVPress(**cut)),
    "KeyDiff": lambda kvpress, cut: kvpress.KeyDiffPress(**cut),
    "LagKV": lambda kvpress, cut: kvpress.LagKVPress(**cut),
    "StreamingLLM": lambda kvpress, cut: kvpress.StreamingLLMPress(**cut),
    "Random": lambda kvpress, cut: kvpress.RandomPress(**cut),
}


@functools.cache
def library() -> types.ModuleType:
    """kvpress, whose import changes how transformers attends: call it before a model is loaded.

    Presses that are not used here need `datasets` and `fire`; empty modules stand in for them.
    """
    for name in ("datasets", "fire"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["datasets"].load_dataset = None
    import kvpress

    return kvpress


TOLERANCE = 0.02  # nats a token between the two libraries: half precision stays below it


def with_old_names(config):
    """The settings of RoPE where this transformers looks for them. Newer ones save them as `rope_parameters`.

    Without this it would take its own default base, without a word.
    """
    if rope := getattr(config, "rope_parameters", None):
        config.rope_theta = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config.rope_scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return config


class CutPrompt:
    """A prompt's cache as a press has cut it, from which texts go on.

    Args:
        budget: slots a head keeps on average; a prompt that is not longer stays whole.
    """

    def __init__(self, model, prompt: list[int], name: str, budget: int):
        self.model, self.position, self.cache = model, len(prompt), DynamicCache()
        cut = None
        if budget < len(prompt):  # half a slot more than wanted: presses round down
            cut = PRESSES[name](library(), {"compression_ratio": 1 - (budget + 0.5) / len(prompt)})
        # observed attention reads the matrix of probabilities, which eager attention alone returns
        model.set_attn_implementation("eager" if name == "ObservedAttention" else "sdpa")
        with cut(model) if cut else nullcontext():
            ids = torch.tensor([prompt], device=model.device)
            self.logits = model(ids, past_key_values=self.cache, logits_to_keep=1).logits[0, -1]
        self.lengths = [layer.keys.shape[2] for layer in self.cache.layers]

    def feed(self, text: list[int]) -> torch.Tensor:
        """Logits [n, vocabulary] after each of the tokens, which begin right after the prompt.

        One step each where layers differ in length: the causal mask of several tokens would be that of the first layer.
        """
        at_once = len(text) if len(set(self.lengths)) == 1 else 1
        pieces = [text[at : at + at_once] for at in range(0, len(text), max(at_once, 1))]
        return torch.cat([self._forward(piece) for piece in pieces])

    def say(self, most: int, eos: list[int]) -> list[int]:
        """Up to `most` greedy tokens, of which an end-of-text token is the last."""
        logits, said = self.logits, []
        while len(said) < most and not (said and said[-1] in eos):
            if said:
                logits = self._forward(said[-1:])[-1]
            said.append(logits.argmax().item())
        return said

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        positions = self.position + torch.arange(len(tokens), device=ids.device)[None]
        self.position += len(tokens)
        return self.model(ids, past_key_values=self.cache, position_ids=positions).logits[0]

    def rewind(self, prompt: int) -> None:
        """Forget what came after a prompt of so many tokens."""
        self.position = prompt
        for layer, length in zip(self.cache.layers, self.lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def held(self) -> tuple[float, int]:
        """Slots a head attends to on average, and bytes held: presses that choose per head mask slots and keep them."""
        heads = self.cache.layers[0].keys.shape[1] * len(self.cache.layers)
        slots = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in self.cache.layers)
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        slots -= sum(len(indices[2]) for indices in masked if indices is not None)
        return slots / heads, sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def nll_of(logprobs: torch.Tensor, text: list[int]) -> float:
    """Nats of the text's tokens after the first; log-probabilities [text tokens - 1, vocabulary]."""
    if not len(logprobs):
        return 0.0
    return -logprobs.gather(1, torch.tensor(text[1:], device=logprobs.device)[:, None]).double().sum().item()


def measure(model, job: dict, wanted: torch.Tensor, name: str, budget: int) -> dict:
    """`wanted`: the full cache's log-probabilities [text tokens - 1, vocabulary] after each token but the last."""
    prompt, text = job["prompt"], job["text"]
    cut = CutPrompt(model, prompt, name, budget)
    said = cut.say(job["max_tokens"], job["eos"]) if job["max_tokens"] else None
    cut.rewind(len(prompt))
    sums = {"tokens": len(wanted), "agreed": 0, "kl": 0.0, "nll": 0.0}
    if len(wanted):
        got = cut.feed(text[:-1]).log_softmax(-1, dtype=torch.float32)
        sums["agreed"] = (got.argmax(-1) == wanted.argmax(-1)).sum().item()
        sums["kl"] = (wanted.exp() * (wanted - got)).sum(-1).double().sum().item()
        sums["nll"] = nll_of(got, text)
    slots, kv_bytes = cut.held()
    return sums | {"slots_kept": slots, "kv_bytes": kv_bytes, "said": said}


def results(model, job: dict) -> Iterator[dict]:
    """A result for each of the job's cuts."""
    prompt, text = job["prompt"], job["text"]
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt + text[:-1]], device=model.device)
    logits = model(ids, logits_to_keep=len(text), use_cache=False).logits[0, 1:]  # the first is the prompt's own
    wanted = logits.log_softmax(-1, dtype=torch.float32)
    nll, problem = nll_of(wanted, text), None
    if abs(nll - job["nll"]) > TOLERANCE * len(text):
        found = f"{nll:.2f} nats for the full cache's text, not {job['nll']:.2f}"
        problem = f"transformers {transformers.__version__} reads the checkpoint in another way: {found}"
    for name, budget in job["cuts"]:
        cut = {"request": job["request"], "press": name, "budget": budget}
        torch.manual_seed(job["request"])  # of the random press, which would choose alike in all layers by its own seed
        try:
            yield cut | ({"error": problem} if problem else measure(model, job, wanted, name, budget))
        except Exception as error:  # whatever a press finds wrong, others can go on
            yield cut | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-name", required=True, help="a folder, a name on the hub or a GGUF file")
    parser.add_argument("--device", required=True, help="torch's name of it")
    parser.add_argument("--dtype", required=True, help="torch's name of it")
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # what libraries print is no result
        library()
        path, kwargs = args.model_name, {}
        if path.endswith(".gguf"):
            path, kwargs = Path(path).parent, {"gguf_file": Path(path).name}
        config = with_old_names(AutoConfig.from_pretrained(path, **kwargs))
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, args.dtype), **kwargs)
        model = model.to(args.device).eval()
        for line in sys.stdin:
            for result in results(model, json.loads(line)):
                print(json.dumps(result), file=out, flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "results so far were written")


if __name__ == "__main__":
    sys.exit(main())
