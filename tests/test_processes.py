"""run_summarization.py in several processes, which talk over gloo: tensor parallel, and with the requests shared out;
and models that one process spreads over devices, or loads with quantised weights.

Processes are forks of this one, which has imported everything: that takes longer than all else here.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import accelerate  # once for all forks, as ROUGE and the parts of torch and transformers below
import pytest
import rouge_score.rouge_scorer  # noqa: F401
import torch
import torch.distributed.tensor
import transformers.distributed.tensor_parallel  # noqa: F401
from transformers import AutoTokenizer

import run_summarization
from checkpoints import make_checkpoint, make_requests, write_requests
from forks import Fork, stop_while_writing
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, batching, fused, loading, sharing, summarizing
from h2optimizer.decoder import is_replayable
from h2optimizer.utils import processes
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.processes import Processes
from h2optimizer.utils.requests import InputError
from h2optimizer.utils.results import JsonlFile, ResultsFile, part_path, parts_of
from summaries import Outcome, alone, assert_same_results, metrics_path  # noqa: F401
from test_benchmarks import load

H2O = ["--enable_h2o_generation", "--num_window_length", "16", "--update_interval", "4"]
SPLIT = ["--tensor_parallel"]
both_caches = pytest.mark.parametrize("flags", [H2O, []], ids=["h2o", "full"])
REQUESTS = make_requests(4, max_tokens=8) + make_requests(4, max_tokens=8, temperature=0.8, top_p=0.9, n=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_checkpoint(folder / "model")
    write_requests(folder / "in.jsonl", REQUESTS)
    return folder


class Group:
    """Forks that run `work(rank)`, as a launcher would start them. Those in `stops` stop in the middle of a result,
    after so many whole ones.

    They are never short of time: what they have to do before another process leaves, or gives up, they get to do.
    """

    def __init__(self, count: int, work, folder, stops: dict[int, int] | None = None):
        self._port = socket.socket()  # held, or another process may be given it before process 0 listens there
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        self._left, self._leaving = os.pipe()  # at its end when all others than process 0 have left
        self.forks = []
        for rank in range(count):
            self.forks.append(Fork(partial(self._run, rank, count, work, (stops or {}).get(rank)), folder, rank))
        os.close(self._leaving)
        os.close(self._left)

    def _run(self, rank: int, count: int, work, whole: int | None, fork: Fork) -> int | None:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._port.getsockname()[1])}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        processes.MEETING, processes.GLANCE = timedelta(hours=1), 0.05
        if rank:
            processes.time = SimpleNamespace(sleep=lambda seconds: time.sleep(10_000 * seconds))
        else:
            os.close(self._leaving)
            Processes.leave = self._leave_last(Processes.leave)
        accelerate.PartialState._reset_state()  # lm_eval may have let it look around, alone
        if whole is not None:
            stop_while_writing(whole, fork.stop)
        return work(rank)

    def _leave_last(self, leave):
        def leave_last(processes, status):
            if status == 2:
                os.read(self._left, 1)
            return leave(processes, status)

        return leave_last

    def wait(self) -> list[Fork]:
        """All of them, ended."""
        try:
            assert all(fork.status is not None for fork in self.forks)
        finally:
            self.kill()
        return self.forks

    def kill(self) -> None:
        """With -9: first those that wait for others, which would see them end."""
        for fork in reversed(self.forks):
            fork.kill()
        self._port.close()


def errors(process: Fork) -> list[str]:
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def start(folder, tmp_path):
    """start(count, *flags, ...) starts the program in so many processes; `patch(rank)` is called in each before it, and
    `stops` are a `Group`'s."""

    def start(count, *flags, output="out.jsonl", patch=None, stops=None):
        argv = ["--input-path", folder / "in.jsonl", "--output-path", tmp_path / output]
        argv = [*map(str, argv), "--model-name", str(folder / "model"), "--device", "cpu", *flags]

        def work(rank):
            if patch is not None:
                patch(rank)
            return run_summarization.main(argv)

        return Group(count, work, tmp_path, stops)

    return start


@pytest.fixture
def finish(start, tmp_path):
    """finish(count, *flags, ...) runs it to its end: one that succeeds, in which process 0 alone has spoken."""

    def finish(count, *flags, **kwargs) -> Outcome:
        ended = start(count, *flags, **kwargs).wait()
        assert [process.status for process in ended] == [0] * count, [process.stderr for process in ended]
        assert not any(process.stdout or process.stderr for process in ended[1:])
        path = tmp_path / kwargs.get("output", "out.jsonl")
        assert not parts_of(path)
        metrics = json.loads(metrics_path(path).read_text())
        return Outcome(ended[0].stdout, [ended[0].stderr], path, path.read_bytes().splitlines(), metrics)

    return finish


@pytest.fixture(scope="module")
def expected(folder):
    """expected(flags): what a single process writes."""
    made = {}

    def expected(flags) -> Outcome:
        path = folder / f"expected{len(flags)}.jsonl"
        if not path.exists():
            argv = ["--input-path", folder / "in.jsonl", "--output-path", path, "--model-name", folder / "model"]
            assert run_summarization.main([*map(str, argv), "--device", "cpu", *flags]) == 0
            made[path] = path.read_bytes().splitlines(), json.loads(metrics_path(path).read_text())
        return Outcome("", [], path, *made[path])

    return expected


def only_error(ended: list[Fork]) -> str:
    """The one line that all processes together say; each has left with status 2."""
    assert [process.status for process in ended] == [2] * len(ended), [process.stderr for process in ended]
    assert not any("Traceback" in process.stderr for process in ended)
    (line,) = [line for process in ended for line in errors(process)]
    return line


@pytest.mark.parametrize("way, flags", [(SPLIT, H2O), ([], [])], ids=["split h2o", "shared out full"])
def test_several_processes_write_what_one_would(finish, expected, way, flags):
    """Other samples, a cache that is counted by one process's heads, results lost, twice or out of order, a line on
    stderr from each process, a throughput that adds up what passed at the same time."""
    several, one = finish(2, *flags, *way, "--batch_size", "3"), expected(flags)
    assert_same_results(several, one)
    for name in ("rouge", "tokens_generated", "kv_bytes_per_request", "slots_kept_per_request", "settings"):
        assert several.metrics[name] == one.metrics[name]
    assert several.metrics["processes"] == 2 and several.metrics["tensor_parallel"] == bool(way)


@pytest.mark.parametrize("way, flags", [(SPLIT, []), ([], H2O)], ids=["split full", "shared out h2o"])
def test_processes_share_beginnings(finish, expected, way, flags):
    """Parts of a model that compute another beginning, or hold fewer, and wait for each other for ever."""

    def patch(rank):
        sharing.LEAST_TOKENS = sharing.LEAST_SAVED = 1
        sharing.most_snapshot_bytes = summarizing.most_snapshot_bytes = lambda model: 2**40 + rank

    outcome = finish(2, *flags, *way, "--batch_size", "3", patch=patch)
    assert_same_results(outcome, expected(flags))
    assert outcome.metrics["prompt_tokens_shared"] > expected(flags).metrics["prompt_tokens_shared"]


def test_heads_of_their_own_windows_are_split_with_the_model(finish, expected, folder):
    """Windows of another process's heads, or a cache counted as if all processes held as much as the first."""
    (folder / "plan.json").write_text('{"windows": [[1, 3], [2, 4]]}')
    flags = [*H2O, "--head_budgets", str(folder / "plan.json"), "--score", "value_mass", "--score_norm", "mean"]
    several, one = finish(2, *flags, *SPLIT, "--batch_size", "3"), expected(flags)
    assert_same_results(several, one)
    for name in ("tokens_generated", "kv_bytes_per_request", "slots_kept_per_request", "settings"):
        assert several.metrics[name] == one.metrics[name]


def test_parts_choose_what_the_first_chooses(finish, expected):
    """Rounding that differs from GPU to GPU, and then parts of two texts that are fed to one model."""

    def patch(rank):
        if rank == 1:
            batching.choose_greedily = lambda logits: logits.argmin(-1)

    flags = [*H2O, "--sample_num", "2"]
    assert finish(2, *flags, *SPLIT, patch=patch).texts == expected(H2O).texts[:2]


def test_wall_times_of_shares_add_up_to_the_run(finish):
    """Seconds of several processes added up, as if one had followed the other."""

    def slow(rank):
        run, now = summarizing.Summarizer.decode, [0.0]

        def decode(self, prompts):
            for job in run(self, prompts):
                now[0] += 2.0 if rank else 1.0
                yield job

        summarizing.Summarizer.decode = decode
        run_summarization.time = summarizing.time = SimpleNamespace(perf_counter=lambda: now[0])

    metrics = finish(2, *H2O, "--greedy", patch=slow).metrics
    assert metrics["seconds"] == pytest.approx(8)  # 4 requests each, of which process 1 takes 2 s


def killed(start, count: int, *flags, **stops: int) -> None:
    """Processes, all killed with -9 when those in `stops` (r0=…, r1=…) have stopped in the middle of a result."""
    group = start(count, *flags, stops={int(rank[1:]): whole for rank, whole in stops.items()})
    try:
        for rank in stops:
            group.forks[int(rank[1:])].await_mark()
    finally:
        group.kill()
    assert all(process.status == -signal.SIGKILL for process in group.forks)


def test_killed_at_any_moment_and_gone_on_with_in_another_number(start, finish, expected, tmp_path):
    """kill -9 of all: what had been written to a part is lost, or comes twice; a run of more, fewer or split processes
    that cannot go on with it; parts that stay."""
    path = tmp_path / "out.jsonl"

    def written() -> dict[int, dict]:
        lines = [line for file in (path, *parts_of(path)) for line in file.read_bytes().splitlines(keepends=True)]
        results = [json.loads(line) for line in lines if line.endswith(b"\n")]
        assert len({result["index"] for result in results}) == len(results)
        return {result["index"]: result for result in results}

    def includes(later, earlier):
        return all(later.get(index) == result for index, result in earlier.items())

    killed(start, 3, *H2O, r0=0, r1=1, r2=2)  # of 3, 3 and 2 requests: nothing in the main file
    assert not path.read_bytes().count(b"\n") and len(first := written()) == 3
    killed(start, 2, *H2O, r0=4, r1=1)  # the three, and two more
    second = written()
    assert includes(second, first) and len(second) == 5
    killed(start, 2, *H2O, r0=0)  # while it takes in what the part holds
    assert written() == second and len(parts_of(path)) == 1
    killed(start, 2, *H2O, *SPLIT, r0=2)  # the part's, and one more
    third = written()
    assert includes(third, second) and len(third) == 6
    outcome = finish(1, *H2O)
    assert includes({result["index"]: result for result in outcome.results}, third)
    assert_same_results(outcome, expected(H2O))


def test_processes_without_a_folder_in_common(start, tmp_path):
    """A KeyError of the first process, or metrics of a part of the results."""

    def patch(rank):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        run_summarization.part_path = lambda path, rank: tmp_path / "elsewhere" / f"part{rank}"

    line = only_error(start(2, *H2O, "--greedy", patch=patch).wait())
    assert "4 results are missing" in line and "one folder" in line


@pytest.mark.parametrize("batch_size", ["1", "auto"])
def test_no_results_left_to_share(finish, expected, batch_size):
    """More processes than requests: one that has none waits, and a second run finds nothing to do."""
    flags = [*H2O, "--sample_num", "2", "--batch_size", batch_size]
    first = finish(3, *flags)
    assert [result["index"] for result in first.results] == [0, 1]
    before = first.files
    second = finish(2, *flags)
    assert second.files == before and second.stdout == first.stdout


def runs_out_of_memory(ranks: tuple[int, ...], at: int):
    """A patch: the prefill number `at` of these processes does not fit."""

    def patch(rank):
        prefill, tried = batching.Batcher._prefill, []

        def limited(self, group, rows):
            tried.append(group)
            if rank in ranks and len(tried) == at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            prefill(self, group, rows)

        batching.Batcher._prefill = limited

    return patch


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_memory_that_runs_out_in_parts_of_the_model(start, finish, expected, tmp_path, ranks):
    """The other process waits for ever in the middle of a step, or each says something; results that are lost."""
    line = only_error(start(2, *H2O, *SPLIT, patch=runs_out_of_memory(ranks, at=3)).wait())
    assert any(f"process {rank}: out of memory with 1 sequences" in line for rank in ranks) and "--batch_size" in line
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 2
    if len(ranks) > 1:
        assert_same_results(finish(2, *H2O, *SPLIT, "--batch_size", "3"), expected(H2O))


def test_memory_that_the_longest_prompt_exceeds_in_parts_of_the_model(start):
    """A traceback of each process, or one that waits for the other's number of rows."""

    def patch(rank):
        def fits(*args):
            if rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return 1

        summarizing.rows_that_fit = fits

    line = only_error(start(2, *H2O, *SPLIT, "--batch_size", "auto", patch=patch).wait())
    assert line.startswith("error: process 1: out of memory with the longest prompt (") and "--prefill_chunk" in line


def test_memory_that_runs_out_where_requests_are_shared_out(finish, expected):
    """Each process halves its own batches: nobody else need know."""
    outcome = finish(2, *H2O, "--batch_size", "3", patch=runs_out_of_memory((1,), at=1))
    assert_same_results(outcome, expected(H2O))


def test_automatic_batch_size_is_the_least_of_all_parts(finish):
    """A process with less free memory that gets as many rows as the others: they would not even have the same steps."""

    def patch(rank):
        summarizing.rows_that_fit = lambda *args: 3 - rank

    outcome = finish(2, *H2O, *SPLIT, "--batch_size", "auto", patch=patch)
    assert "--batch_size auto: up to 2 sequences at once" in outcome.stderr[0]
    assert max(result["result"]["request_time"]["batch_size"] for result in outcome.results) == 2


@pytest.mark.parametrize("way, rank", [(SPLIT, 1), ([], 0)], ids=["split", "shared out"])
def test_process_that_is_killed_ends_the_others(start, way, rank):
    """kill -9 of one process, by the kernel for memory, say: the other waits for it as it waits for slow ones."""

    def patch(own):
        if own == rank:
            batching.Batcher._decode = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

    killed, other = sorted(start(2, *H2O, *way, patch=patch).wait(), key=lambda process: process.status)
    assert (killed.status, other.status) == (-signal.SIGKILL, 2)
    (line,) = errors(other)
    assert "another process has ended" in line and "Traceback" not in other.stderr


def test_process_that_fails_by_itself_ends_the_others(start):
    """A bug in one process: its traceback is what one gets to see, and nobody hangs."""

    def patch(rank):
        if rank == 1:
            batching.Batcher._look = lambda *args: 1 / 0

    for way in (SPLIT, []):
        first, second = start(2, *H2O, *way, patch=patch).wait()
        assert (first.status, second.status) == (2, 1), first.stderr
        assert "ZeroDivisionError" in second.stderr and "Traceback" not in first.stderr


def test_what_one_process_finds_wrong_takes_one_line(start):
    """A device, or a checkpoint, that one process cannot use: the others start, or say the same."""

    def patch(rank):
        if rank == 1:
            run_summarization.load_model = fails

    def fails(*args):
        raise InputError("--model-name x: is not on this machine")

    for way in (SPLIT, []):
        assert "is not on this machine" in only_error(start(2, *H2O, *way, patch=patch).wait())


@pytest.mark.parametrize("count, flags, words", [
    (3, SPLIT, ["--tensor_parallel", "3 processes", "2 KV heads", "start 1 or 2"]),
    (2, ["--device", "cuda:1"], ["--device cuda:1", "leave it out"]),
    (2, [*SPLIT, "--quantize", "bitsandbytes-int4"], ["--quantize", "--tensor_parallel"]),
    (2, ["--no-such-flag"], ["--no-such-flag", "--help"]),
    (2, ["--score", "sink"], ["--score", "--enable_h2o_generation"]),
    (2, [*SPLIT, "--input-path", "/nowhere"], ["--input-path /nowhere"]),
])  # fmt: skip
def test_bad_input_takes_one_line(start, count, flags, words):
    """As many lines as processes, or none, or one process that waits for one that has left."""
    line = only_error(start(count, *flags).wait())
    assert all(word in line for word in words), line


def test_several_processes_without_accelerate(start):
    """ImportError once a process."""

    def patch(rank):
        sys.modules["accelerate"] = None
        processes.GLANCE = 0.0

    line = only_error(start(2, patch=patch).wait())
    assert "2 processes: need accelerate: pip install accelerate" in line


@pytest.mark.parametrize("absent", [0, 1])
def test_processes_of_a_left_over_environment(folder, tmp_path, absent):
    """One that waits for ever for others that nobody has started."""

    def work(rank):
        if rank == absent:
            return 0
        processes.MEETING = timedelta(seconds=1)
        return run_summarization.main(["--output-path", str(tmp_path / "out.jsonl")])

    ended = Group(2, work, tmp_path).wait()
    assert [process.status for process in ended] == ([0, 2] if absent == 0 else [2, 0])
    (error,) = errors(ended[1 - absent])  # beside what torch says
    assert error.startswith("error: 2 processes: they did not meet (") and "Traceback" not in ended[1 - absent].stderr
    assert error.endswith("with RANK, LOCAL_RANK and WORLD_SIZE unset")


def test_interrupted_before_the_others_have_come(tmp_path):
    """Ctrl-C that nobody hears until the wait is over."""
    rendezvous = processes.distributed.rendezvous

    def work(fork):
        def waits(*args, **kwargs):
            fork.mark()
            return rendezvous(*args, **kwargs)

        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }
        processes.distributed.rendezvous = waits
        Processes.launched().join()

    fork = Fork(work, tmp_path)
    fork.await_mark()
    fork.send(signal.SIGINT)
    assert fork.status == -signal.SIGINT


def test_launcher_that_says_not_where(monkeypatch, capsys):
    """A traceback of a port that is none."""
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes.Processes, "leave", lambda self, status: status)
    for name in ("MASTER_PORT", "MASTER_ADDR"):
        assert run_summarization.main(["--help"]) == 2
        assert capsys.readouterr().err.startswith("error: 2 processes: they did not meet (")
        monkeypatch.delenv(name)


def test_help_is_said_once(tmp_path):
    """As many times as there are processes."""

    def work(rank):
        with pytest.raises(SystemExit, match="0"):
            run_summarization.main(["--help"])

    ended = Group(2, work, tmp_path).wait()
    assert [process.status for process in ended] == [0, 0], ended[0].stderr
    assert ended[0].stdout.startswith("usage: ") and not ended[1].stdout


def test_split_model_without_a_launcher(folder, capsys):
    """One process that silently holds the whole model."""
    assert run_summarization.main(["--tensor_parallel", "--model-name", str(folder / "model")]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_parts_alone_are_not_gone_on_with(folder, tmp_path, capsys):
    """Results of unknown settings under one ROUGE, or two runs at once; --overwrite that leaves them for the next."""
    output = tmp_path / "out.jsonl"
    part = part_path(output, 1)
    part.write_text('{"index": 0}\n')
    argv = ["--input-path", folder / "in.jsonl", "--output-path", output, "--model-name", folder / "model"]
    argv = [*map(str, argv), "--device", "cpu", "--greedy", "--sample_num", "2"]

    def refused(words: str, *flags) -> None:
        assert run_summarization.main([*argv, *flags]) == 2
        assert words in capsys.readouterr().err and part.read_text() == '{"index": 0}\n'

    refused("out.jsonl.part1")
    output.touch()
    refused("without its out.metrics.json")
    anew = ResultsFile(output, {}, overwrite=True)
    assert parts_of(output)
    anew.start()
    assert not parts_of(output)
    anew.close()
    assert run_summarization.main([*argv, "--overwrite"]) == 0
    capsys.readouterr()
    part.mkdir()
    before = output.read_bytes()
    assert before and run_summarization.main([*argv, "--overwrite"]) == 2
    assert "out.jsonl.part1 is not a regular file" in capsys.readouterr().err and output.read_bytes() == before
    part.rmdir()
    other = JsonlFile(part, "index", "result")
    part.write_text('{"index": 0}\n')
    refused("another run is writing to it")
    other.close()


def test_parts_of_a_model(folder, tmp_path):
    """A saved part instead of the whole; a recorded step, or a merged product, that leaves out the sum over the parts;
    caches of all heads, or weights that scripts/advise.py counts otherwise."""
    h2o = H2OConfig(window_length=16, update_interval=4)
    whole = H2OLlamaForCausalLM.from_pretrained(folder / "model", h2o=h2o, dtype=torch.float32)
    ids = torch.arange(5, 45).view(2, 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = whole.generate(**inputs)

    def work(rank):
        group = Processes.launched()
        group.tensor_parallel = True
        group.join()
        place = loading.loading_options(folder / "model", torch.device("cpu"), "auto", group)
        model = H2OLlamaForCausalLM.from_pretrained(folder / "model", h2o=h2o, dtype=torch.float32, **place)
        cache = HHCache(h2o)
        assert torch.equal(model.generate(**inputs, past_key_values=cache), expected)
        assert cache.layers[0].keys.shape[1] == 1 and cache.nbytes * 2 == held
        prefix = model.prefill_prefix(ids[0, :9])
        assert prefix.layers[0].keys.shape[1] == 1
        shared = model.generate(ids[:1], prefix=prefix, max_new_tokens=12, do_sample=False)
        assert torch.equal(shared, expected[:1])
        parts = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in model.parameters()]
        unsplit = parts[0].nbytes // 2 * (len(parts[0]) == model.config.vocab_size)  # transformers 5.17's embedding
        assert sum(part.nbytes for part in parts) - unsplit == advised.held
        assert not is_replayable(model)
        model.capture_sharded = True
        assert is_replayable(model)
        model.model.layers[0].self_attn.q_proj.forward = lambda x: x
        assert not is_replayable(model)
        attention = model.model.layers[0].self_attn
        attention.merged.merge(attention.q_proj, attention.k_proj, attention.v_proj)
        assert attention.merged.weight is None
        model.save_pretrained(tmp_path / "saved", is_main_process=rank == 0)
        return group.close(0)

    cache = HHCache(h2o)
    whole.generate(**inputs, past_key_values=cache)
    held = cache.nbytes
    advised = load("advise").Prediction(whole, {}, 1, None, None, 1.0, 0.1, gpus=2)
    for process in Group(2, work, tmp_path).wait():
        assert process.status == 0, process.stderr
    saved = H2OLlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(map(torch.equal, saved.state_dict().values(), whole.state_dict().values()))
    assert "distributed" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: test_gpu_programs.py")
def test_parts_of_a_model_merge_their_products(folder, tmp_path):
    """Products of all heads for the part's own; a merged product of layers whose outputs are summed, without the sum;
    a style that gathers its outputs, which a product of the part's rows does not; rows saved in another order."""
    kernel_doubles = pytest.importorskip("kernel_doubles")
    h2o = H2OConfig(window_length=16, update_interval=4)
    whole = H2OLlamaForCausalLM.from_pretrained(folder / "model", h2o=h2o, dtype=torch.float32)
    ids = torch.arange(5, 45).view(2, 20)
    inputs = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    expected = whole.generate(**inputs)

    def work(rank):
        group = Processes.launched()
        group.tensor_parallel = True
        group.join()
        kernel_doubles.install(pytest.MonkeyPatch())
        place = loading.loading_options(folder / "model", torch.device("cpu"), "auto", group)
        model = H2OLlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **place)
        model.h2o = dataclasses.replace(h2o, backend="triton")
        for model.capture_sharded in (False, True):
            assert torch.equal(model.generate(**inputs), expected)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            assert attention.merged.is_current(*projections) and mlp.merged.is_current(mlp.gate_proj, mlp.up_proj)
            assert attention.merged.widths == [projection.out_features // 2 for projection in projections]
            assert fused.stored(attention.o_proj) is None and fused.stored(mlp.down_proj) is None
        assert fused.stored(model.lm_head) is None
        model.save_pretrained(tmp_path / "saved", is_main_process=rank == 0)
        return group.close(0)

    for process in Group(2, work, tmp_path).wait():
        assert process.status == 0, process.stderr
    saved = H2OLlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(map(torch.equal, saved.state_dict().values(), whole.state_dict().values()))


# One process: layers spread over devices, quantised weights


@pytest.fixture
def alone_with(folder, tmp_path, monkeypatch):
    """alone_with(*flags, ...) runs the program in this process: exit status, and the model where one was loaded."""
    load_model, loaded = run_summarization.load_model, []

    def recorded(*args):
        loaded.append(load_model(*args))
        return loaded[-1]

    monkeypatch.setattr(run_summarization, "load_model", recorded)

    def alone_with(*flags, model=None, output="out.jsonl"):
        loaded.clear()
        argv = ["--input-path", folder / "in.jsonl", "--output-path", tmp_path / output]
        status = run_summarization.main([*map(str, argv), "--model-name", str(model or folder / "model"), *flags])
        return status, loaded[0][0] if loaded else None

    return alone_with


@both_caches
def test_layers_spread_over_what_there_is(alone_with, expected, tmp_path, monkeypatch, flags):
    """A model that is moved once more after it has been spread, or says something else."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: pytest.fail("moved"))
    assert alone_with(*flags, "--device_map", "auto")[0] == 0
    monkeypatch.undo()
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert_same_results(Outcome("", [], tmp_path / "out.jsonl", lines, None), expected(flags))


@pytest.mark.parametrize("flags, words", [
    (["--device", "cpu"], ["--device_map", "--device"]),
    (["--quantize", "torchao-int4", "--device", "cpu"], ["--quantize torchao-int4", "GPU"]),
    (["--quantize", "torchao-float8", "--device", "cpu"], ["--quantize torchao-float8", "GPU"]),
    (["--quantize", "int8"], ["--quantize", "bitsandbytes-int4"]),
])  # fmt: skip
def test_placement_that_cannot_be(alone_with, capsys, flags, words):
    """A traceback of another library, after minutes of loading."""
    map_too = ["--device_map", "auto"] if "--quantize" not in flags else []
    assert alone_with(*flags, *map_too) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_library_that_is_not_installed(alone_with, monkeypatch, capsys):
    """ImportError from the depths of transformers."""
    monkeypatch.setattr(loading, "is_installed", lambda library: False)
    for flags in (["--quantize", "torchao-int8", "--device", "cpu"], ["--device_map", "auto"]):
        assert alone_with(*flags)[0] == 2
        assert "pip install" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose rows are as long as a group of quantised weights."""
    return make_checkpoint(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize("choice", ["torchao-int8", "bitsandbytes-int8", "bitsandbytes-int4"])
def test_quantised_weights(alone_with, wide, tmp_path, capsys, choice):
    """Weights that stay as they were, or are merged as if they were plain; results of both under one ROUGE; a saved
    checkpoint of them that has to be told what it is."""
    pytest.importorskip(choice.split("-")[0])
    flags = ["--device", "cpu", "--greedy", "--sample_num", "2"]
    for cache in (H2O, []):
        status, model = alone_with(*cache, *flags, "--quantize", choice, "--overwrite", model=wide)
        assert status == 0 and fused.stored(model.model.layers[0].self_attn.q_proj) is None
    plain = H2OLlamaForCausalLM.from_pretrained(wide, dtype=torch.float32)
    ids = torch.arange(5, 45)[None]

    def error(other) -> float:
        expected = other(ids, use_cache=False).logits
        return ((model(ids, use_cache=False).logits - expected).norm() / expected.norm()).item()

    assert 1e-3 < error(plain) < 1
    capsys.readouterr()
    assert alone_with(*flags, model=wide) == (2, None)
    assert f"--quantize is None, but {choice!r}" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(wide).save_pretrained(tmp_path / "saved")
    status, saved = alone_with(*H2O, *flags, model=tmp_path / "saved", output="saved.jsonl")
    assert status == 0 and type(saved.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)
    assert error(saved) < error(plain) / 3  # bitsandbytes packs 4 bits anew on a CPU, with scales in bfloat16
    capsys.readouterr()
    assert alone_with("--quantize", choice, *flags, model=tmp_path / "saved", output="other.jsonl") == (2, None)
    assert "is already quantised" in capsys.readouterr().err
