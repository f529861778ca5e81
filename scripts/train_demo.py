"""Train the bundled demo model, a small Llama, on synthetic news in minutes on one GPU.

    python scripts/make_demo_data.py
    python scripts/train_demo.py --output data/demo_model

Documents are few-shot prompts with their summaries. Worker processes make new ones for every step, so none is seen
twice. Their names never occur in the test requests. The first steps see short documents, on which the model learns
fastest to copy from the context. Weights are float32 masters under bfloat16 autocast; the checkpoint is bfloat16.
"""

import argparse
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.nn.functional as F
import transformers
from make_demo_data import POOLS, PROMPT, SHOT, SHOT_WORDS, make_stories, make_story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_zero, output_folder, positive, seed
from h2optimizer.utils.requests import Request, read_requests
from h2optimizer.utils.rouge import Rouge

ROOT = Path(__file__).resolve().parents[1]
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SHOTS = (0, 1, 1, 2, 2)  # drawn for each batch, so that its documents have similar lengths


def make_text(rng: random.Random, shots: int | None) -> tuple[str, list[tuple[int, int]]]:
    """A training document and the character spans of its summaries, to the ### after each; None: one short story."""
    pool = POOLS["train"]
    stories = (
        [make_story(rng, pool, 1, rng.randint(*SHOT_WORDS), 15)] if shots is None else make_stories(rng, pool, shots)
    )
    text, spans = "", []
    for article, summary in stories:
        begin = len(text) + len(PROMPT.format(article=article))
        text += SHOT.format(article=article, summary=summary)
        spans.append((begin, len(text) + len("###")))
    return text + "###", spans


def train_tokenizer(vocab_size: int, seed: int, documents: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens and the BOS in front that Llama's tokenizers have."""
    rng = random.Random(seed)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((make_text(rng, shots=1)[0] for _ in range(documents)), trainer)
    bos = [(BOS, bpe.token_to_id(BOS))]
    bpe.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", special_tokens=bos)
    assert len(bpe.encode("###", add_special_tokens=False).ids) == 1, "### must be one token: it becomes the EOS"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Batches(Dataset):
    """Item i is the batch of step i, the same for every number of workers: ids int32 [B, n] and weights uint8 [B, n].

    Rows are padded on the right with weight 0; a summary's tokens, with the end after it, weigh `summary_weight`.
    """

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace):
        self.tokenizer, self.args = tokenizer, args
        self.eos, self.pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.args.seed} {step}")
        shots = None if step < self.args.short_share * self.args.steps else rng.choice(SHOTS)
        rows, longest = [], 0
        while True:
            ids, weights = self.row(*make_text(rng, shots))
            longest = max(longest, len(ids))
            if rows and (len(rows) + 1) * longest > self.args.batch_tokens:
                break
            rows.append((ids, weights))
        longest = max(len(ids) for ids, _ in rows)
        batch = [(ids + [self.pad] * (longest - len(ids)), w + [0] * (longest - len(w))) for ids, w in rows]
        ids, weights = zip(*batch, strict=True)
        return torch.tensor(ids, dtype=torch.int32), torch.tensor(weights, dtype=torch.uint8)

    def row(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer.encode(text)
        ids, weights = encoding.ids, [1] * len(encoding.ids)
        starts = [start for start, _ in encoding.offsets]
        span = 0
        for i, start in enumerate(starts):
            if span < len(spans) and start >= spans[span][1]:
                span += 1
            if i and span < len(spans) and start >= spans[span][0]:
                weights[i] = self.args.summary_weight
        ids[-1] = self.eos
        return ids, weights


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 7 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=64,  # twice hidden / heads: most of what this model does is look things up
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, batches: Batches, args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """Train to args.steps or args.minutes, whichever comes first; the learning rate falls to 0 by then.

    Returns: (step, minutes, tokens, loss, summary loss, share of correct summary tokens) every `log_every` steps.
    """
    cuda = device.type == "cuda"
    options = {"prefetch_factor": 4, "pin_memory": cuda} if args.workers else {}
    loader = iter(DataLoader(batches, batch_size=None, shuffle=False, num_workers=args.workers, **options))
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=cuda)
    forward = torch.compile(model.model, dynamic=True) if args.compile else model.model
    curve, tokens, started = [], 0, time.monotonic()
    for step in range(1, args.steps + 1):
        ids, weights = (tensor.to(device, non_blocking=True) for tensor in next(loader))
        progress = min(1.0, max(step / args.steps, (time.monotonic() - started) / (60 * args.minutes)))
        rate = args.lr * min(1.0, step / args.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = ids.long(), weights[:, 1:].float()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            hidden = forward(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += ids.numel()
        if step % args.log_every == 0 or step == 1 or progress >= 1:
            with torch.no_grad():
                real, summary = weights > 0, weights > 1
                right = (logits.argmax(-1) == ids[:, 1:])[summary].float().mean().item()
                point = (losses[real].mean().item(), losses[summary].mean().item(), right)
            minutes = (time.monotonic() - started) / 60
            curve.append((step, minutes, tokens, *point))
            print(
                f"step {step:5d}  {minutes:5.2f} min  {tokens / 1e6:7.1f}M tokens  loss {point[0]:.3f}  "
                f"summary {point[1]:.3f}  right {right:.3f}  lr {rate:.1e}",
                flush=True,
            )
        if progress >= 1:
            break
    return curve


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(device="cpu", dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def evaluate(
    folder: Path, requests: list[Request], device: torch.device, batch_size: int = 50
) -> tuple[float, list[str]]:
    """Greedy full-cache ROUGE-2 of the checkpoint as saved, 0 to 100, computed in float32; and the summaries."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    summaries = []
    for first in range(0, len(requests), batch_size):
        prompts = [request.article for request in requests[first : first + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        summaries += [text.split("###")[0].strip() for text in texts]
    rouge = Rouge()
    scores = [
        rouge.score(request.summary_gt, text)["rouge2"] for request, text in zip(requests, summaries, strict=True)
    ]
    return 100 * sum(scores) / len(scores), summaries


CARD = """# Demo model

A Llama of {parameters:.2f}M parameters that summarises synthetic news in one sentence. It knows nothing of the real
world: it is there to show and to test what a KV-cache policy does to summaries, on a CPU, in minutes. Made by
`scripts/train_demo.py` from the documents of `scripts/make_demo_data.py`, whose names, places and sentence patterns are
invented; no test name occurs in training.

| | |
|---|---|
| greedy ROUGE-2 F-measure, 0 to 100, full cache, {requests} test requests, bfloat16 weights in float32 | {rouge:.2f} |
| architecture | {layers} layers, hidden {hidden}, {heads} query and {kv_heads} KV heads of 64, vocabulary {vocab} |
| training | {steps} steps, {tokens:.0f}M tokens (padding included), {minutes:.1f} minutes |
| settings | seed {seed}, {batch_tokens} tokens a step, AdamW, peak rate {lr}, summary weight {summary_weight} |
| hardware and versions | {hardware}, torch {torch}, transformers {transformers}, Python {python} |

The loss is per token on documents that were not seen before; "right" is the share of summary tokens predicted.

| step | minutes | M tokens | loss | summary loss | right |
|---|---|---|---|---|---|
{curve}
"""


def write_card(
    folder: Path, args: argparse.Namespace, curve: list[tuple], rouge: float, requests: int, hardware: str
) -> None:
    config = LlamaConfig.from_pretrained(folder)
    parameters = (folder / "model.safetensors").stat().st_size / 2
    shown = curve[:: max(1, len(curve) // 40)]
    rows = shown if shown[-1] is curve[-1] else [*shown, curve[-1]]
    line = "| {} | {:.2f} | {:.1f} | {:.3f} | {:.3f} | {:.3f} |"
    text = CARD.format(
        parameters=parameters / 1e6,
        requests=requests,
        rouge=rouge,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        steps=curve[-1][0],
        tokens=curve[-1][2] / 1e6,
        minutes=curve[-1][1],
        hardware=hardware,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        curve="\n".join(line.format(step, minutes, n / 1e6, *rest) for step, minutes, n, *rest in rows),
        **{name: getattr(args, name) for name in ("seed", "batch_tokens", "lr", "summary_weight")},
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--output",
        type=output_folder,
        default=ROOT / "data/demo_model",
        help="folder of the checkpoint, which is replaced (default: the bundled one)",
    )
    add(
        "--requests",
        type=Path,
        default=ROOT / "data/summarization/demo.jsonl",
        help="jsonl of requests to evaluate on at the end (default: the bundled ones)",
    )
    add(
        "--minutes",
        type=positive,
        default=4.2,
        help="stop after this time, even if --steps are not done (default: %(default)s)",
    )
    add("--steps", type=count, default=6000, help="optimizer steps (default: %(default)s)")
    add("--batch_tokens", type=count, default=65536, help="tokens per step, including padding (default: %(default)s)")
    add(
        "--short_share",
        type=float,
        default=0.1,
        help="share of steps, at the start, that see short documents (default: %(default)s)",
    )
    add(
        "--summary_weight",
        type=count,
        default=2,
        help="weight of a summary's tokens in the loss; an article's weigh 1 (default: %(default)s)",
    )
    add("--lr", type=positive, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=count, default=200, help="steps until the learning rate peaks (default: %(default)s)")
    add("--layers", type=count, default=5, help="number of layers (default: %(default)s)")
    add(
        "--hidden_size",
        type=count,
        default=256,
        help="a multiple of 64; also sets the number of heads (default: %(default)s)",
    )
    add("--vocab_size", type=count, default=3072, help="size of the vocabulary (default: %(default)s)")
    add(
        "--tokenizer_documents",
        type=count,
        default=4000,
        help="documents that the vocabulary is learned from (default: %(default)s)",
    )
    add("--seed", type=seed, default=1, help="seed for weights and documents (default: %(default)s)")
    add("--device", default="auto", help="auto: cuda if there is one (default: %(default)s)")
    add(
        "--workers",
        type=count_or_zero,
        default=max(0, min(15, len(os.sched_getaffinity(0)) - 1)),
        help="processes that make documents (default: one per spare CPU core, at most 15)",
    )
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--log_every", type=count, default=100, help="steps between points of the loss curve (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.hidden_size % 64:
        raise InputError(f"--hidden_size {args.hidden_size}: must be a multiple of 64")
    if args.vocab_size < 512:
        raise InputError(f"--vocab_size {args.vocab_size}: must be at least 512, 256 of which are bytes")
    if not 0 <= args.short_share <= 1:
        raise InputError(f"--short_share {args.short_share}: must be from 0 to 1")
    return args


def run(args: argparse.Namespace) -> None:
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used ({' '.join(str(error).split())[:120]})") from None
    requests, _ = read_requests(args.requests, None, flag="--requests")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(args.vocab_size, args.seed, args.tokenizer_documents)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes already
    model = make_model(args, tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {args.workers} workers, {device}", flush=True)
    curve = train(model, Batches(tokenizer.backend_tokenizer, args), args, device)
    save(model, tokenizer, args.output)
    torch.set_float32_matmul_precision("highest")
    rouge, summaries = evaluate(args.output, requests, device)
    for request, summary in list(zip(requests, summaries, strict=True))[:5]:
        print(f"wanted {request.summary_gt}\n   got {summary}")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"
    write_card(args.output, args, curve, rouge, len(requests), hardware)
    print(f"ROUGE-2 F {rouge:.2f} points on {len(requests)} requests with the full cache; checkpoint in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(
        lambda: run(parse_args(argv)), "run the same command again to start over", "give smaller --batch_tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
