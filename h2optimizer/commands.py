"""The commands of an installed package, h2optimizer-NAME: each runs the program of that name."""

from functools import partial
from importlib import import_module

from h2optimizer.utils import cli


def _run(program: str) -> int:
    """The exit status of a program, a module of this package."""
    cli.begin()  # its imports take seconds
    return import_module(f"h2optimizer.{program}").main()


summarize = partial(_run, "run_summarization")
ablate = partial(_run, "scripts.ablate")
advise = partial(_run, "scripts.advise")
bench_attention = partial(_run, "scripts.bench_attention")
bench_decode = partial(_run, "scripts.bench_decode")
bench_summarization = partial(_run, "scripts.bench_summarization")
calibrate = partial(_run, "scripts.calibrate")
compare_policies = partial(_run, "scripts.compare_policies")
eval_harness = partial(_run, "scripts.eval_harness")
plot_ablation = partial(_run, "scripts.plot_ablation")
prepare_data = partial(_run, "scripts.prepare_data")
run_streaming = partial(_run, "scripts.run_streaming")
show_kept = partial(_run, "scripts.show_kept")
