"""The command line on one GPU and on several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_models
from checkpoints import made_up_text, make_checkpoint, make_requests, write_requests
from h2optimizer.loading import QUANTIZERS

pytestmark = gpu_models.MARKS

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ON_H2O = ["--enable_h2o_generation", "--num_window_length", "16", "--update_interval", "4"]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@pytest.fixture(scope="module")
def requests_and_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    make_checkpoint(folder / "model", hidden_size=128, intermediate_size=256)
    sampled = make_requests(6, max_tokens=40, temperature=0.8, top_p=0.9)
    write_requests(folder / "in.jsonl", make_requests(6, max_tokens=40) + sampled)
    return folder


@pytest.fixture
def summarize(requests_and_model, tmp_path):
    """summarize(*flags, launch=[]): results of the program, in float32, without times and memory."""

    def summarize(*flags, launch=(), code=0):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        argv = [sys.executable, *launch, "run_summarization.py", "--input-path", requests_and_model / "in.jsonl"]
        argv += ["--model-name", requests_and_model / "model", "--output-path", output]
        dtype = [] if "--dtype" in flags else ["--dtype", "float32"]
        ended = subprocess.run([*map(str, argv), *dtype, *flags], cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert (ended.returncode == 0) == (code == 0), ended.stderr
        if code:
            return ended.stderr
        results = [json.loads(line) for line in output.read_text().splitlines()]
        for result in results:
            del result["result"]["request_time"], result["peak_memory_bytes"]
            for choice in result["result"]["choices"]:
                choice["logprobs"].pop("token_logprobs")
        return results

    return summarize


@two_gpus
@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_parts_of_a_model_on_two_gpus(summarize, flags):
    """Kernels that take the model's heads for their own, processes that choose different tokens, one that hangs; a
    recorded step without the sums over the parts, or whose communicator never ends."""
    flags = [*flags, "--batch_size", "4"]
    expected = summarize(*flags)
    assert summarize(*flags, "--tensor_parallel", launch=[*LAUNCH, "2"]) == expected
    if "--enable_h2o_generation" in flags:
        assert summarize(*flags, "--no-capture", "--tensor_parallel", launch=[*LAUNCH, "2"]) == expected
    auto = summarize(*flags[:-1], "auto", "--tensor_parallel", launch=[*LAUNCH, "2"])
    assert [result["result"]["choices"] for result in auto] == [result["result"]["choices"] for result in expected]


@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_requests_shared_out_to_all_gpus(summarize, flags):
    """All processes on the first GPU, or one whose kernels run on another's."""
    count = torch.cuda.device_count()
    assert summarize(*flags, launch=[*LAUNCH, str(count)]) == summarize(*flags)
    said = summarize(launch=[*LAUNCH, str(count + 1)], code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"{count} CUDA devices are visible" in line


@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_layers_spread_over_all_gpus(summarize, flags):
    """A slot, a sampler's number or a mask on another device than the layer; --batch_size auto that asks one GPU."""
    expected = summarize(*flags, "--batch_size", "4")
    assert summarize(*flags, "--device_map", "auto", "--batch_size", "4") == expected
    auto = summarize(*flags, "--device_map", "auto", "--batch_size", "auto")
    assert [result["result"]["choices"] for result in auto] == [result["result"]["choices"] for result in expected]


@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_beginnings_computed_once_on_a_gpu(summarize, tmp_path, flags):
    """Recorded steps or slots of rows that began after a prefix, nested ones included; rows that join others."""
    requests = make_requests(12, max_tokens=24, temperature=0.8)
    for i, request in enumerate(requests):
        request["article"] = made_up_text(30) + made_up_text(20, seed=1) * (i % 2) + request["article"]
    flags = [*flags, "--input-path", str(write_requests(tmp_path / "shared.jsonl", requests))]
    expected = summarize(*flags, "--no-share_prefixes", "--batch_size", "4")
    assert summarize(*flags, "--batch_size", "4") == summarize(*flags, "--batch_size", "auto") == expected
    metrics = max(tmp_path.glob("*.metrics.json"), key=lambda path: path.stat().st_mtime)
    assert json.loads(metrics.read_text())["prompt_tokens_shared"] > 10 * 300


@pytest.mark.parametrize("choice", QUANTIZERS)
def test_quantised_weights_on_a_gpu(summarize, choice):
    """A graph recorded over layers that ask the device; weights that are merged, or moved, as if they were plain."""
    pytest.importorskip(choice.split("-")[0])
    if choice == "torchao-float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products")
    flags = [*ON_H2O, "--quantize", choice, "--dtype", "bfloat16"]
    assert summarize(*flags) == summarize(*flags, "--no-capture")
    assert len(summarize("--quantize", choice, "--dtype", "bfloat16")) == 12
