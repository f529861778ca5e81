"""H2OConfig: which flags work, and when a model takes them up."""

import dataclasses
import json

import numpy as np
import pytest

from conftest import assert_row_is_oracles, generate, new_oracle, new_tokens, prompt, with_flags
from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.utils.budgets import HeadBudgets
from h2optimizer.utils.cache import HHCache

REFUSED = {
    "no such slimming": ({"slimming": "h"}, "H, mask"),
    "no such backend": ({"backend": "flash"}, "eager, sdpa"),
    "no such score": ({"score": "attention"}, "mass, sink, streaming_llm, random"),
    "no such norm": ({"score_norm": "max"}, "sum, mean"),
    "no such reduction": ({"group_reduce": "last"}, "sum, first"),
    "no such slots": ({"slots": "fp8"}, "auto, int8"),
    "window of one": ({"window_length": 1}, "at least 2"),
    "a fraction of a window": ({"window_length": 0.2}, "whole number"),
    "true is no number": ({"update_interval": True}, "whole number"),
    "no interval": ({"update_interval": 0}, "at least 1"),
    "no recent slot": ({"window_length": 8, "num_heavy_hitters": 8}, "window_length=8"),
    "more than the window": ({"window_length": 8, "num_heavy_hitters": 9}, "window_length=8"),
    "no room for 4 sinks": ({"score": "streaming_llm", "window_length": 4}, "give at least 5"),
    "heavy -2": ({"num_heavy_hitters": -2}, "at least -1"),
    "negative decay": ({"score_decay": -0.1}, "between 0 and 1"),
    "growing decay": ({"score_decay": 1.1}, "between 0 and 1"),
    "not a decay": ({"score_decay": float("nan")}, "between 0 and 1"),
    "a decay in quotes": ({"score_decay": "0.5"}, "between 0 and 1"),
    "a switch in quotes": ({"score_every_step": "no"}, "True or False"),
    "no queries": ({"score_queries": 0}, "at least 1"),
    "no chunk": ({"prefill_chunk": 0}, "at least 1"),
    "half a chunk": ({"prefill_chunk": 512.5}, "whole number"),
    "a fraction of a seed": ({"score_seed": 1.5}, "whole number"),
    "a seed of 40 bits": ({"score_seed": 2**40}, "must be below"),
}


@pytest.mark.parametrize(("flags", "way_out"), REFUSED.values(), ids=REFUSED)
def test_flags_that_cannot_work(flags, way_out):
    """A typing error that runs for hours with a default; the message names the flag and the way out."""
    with pytest.raises(ValueError, match=way_out) as raised:
        H2OConfig(**flags)
    assert list(flags)[-1] in str(raised.value)


def test_flags_that_work_at_their_bounds():
    """A check that is off by one; and flags that change under a running generation."""
    config = H2OConfig(window_length=2, num_heavy_hitters=1, update_interval=1, score_decay=0.0, score_queries=1)
    assert (config.heavy, config.recent, config.capacity) == (1, 1, 3)
    assert H2OConfig(window_length=7).heavy == 3 and H2OConfig(num_heavy_hitters=0).recent == 256
    streaming = H2OConfig(window_length=5, score="streaming_llm")
    assert (streaming.heavy, streaming.recent, streaming.needs_mass) == (4, 1, False)
    assert H2OConfig(score="streaming_llm").recent == 252 and H2OConfig(score="sink").recent == 128
    assert H2OConfig(window_length=4, score="streaming_llm", num_heavy_hitters=2).heavy == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window_length = 3


def test_budgets_as_an_array():
    """numpy's error about the truth of an array, for what a measurement gives."""
    table = ((6, 10), (7, 9))
    config = H2OConfig(window_length=8, head_budgets=np.array(table))
    assert config == H2OConfig(window_length=8, head_budgets=table) and hash(config)


@pytest.mark.parametrize(
    ("flags", "recent"),
    [({}, 32), ({"num_heavy_hitters": "31/32"}, 2), ({"num_heavy_hitters": 40}, 24), ({"score": "streaming_llm"}, 60)],
    ids=str,
)
def test_plan_is_its_table(tmp_path, flags, recent):
    """Settings that depend on a file after they are made, or heads with other numbers of newest slots."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"windows": [[1, 9], [3, 3]]}))
    plan = H2OConfig(window_length=64, head_budgets=str(path), **flags)
    table = HeadBudgets.load(path).windows(64, recent)
    path.unlink()
    assert plan == H2OConfig(window_length=64, head_budgets=table, **flags)
    assert plan.recent == plan.head_windows.recent == recent and min(map(min, table)) > recent
    other = dataclasses.replace(plan, update_interval=1)
    assert other.head_budgets == table and other == dataclasses.replace(other)
    with pytest.raises(ValueError, match=r"^head_budgets: the windows' mean is 64: it must be window_length=65$"):
        dataclasses.replace(plan, window_length=65, num_heavy_hitters=65 - recent)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (((32, 97),), "the windows' mean is 64.5: it must be window_length=64"),
        (((31, 97),), "31: a head's window must be a whole number of at least 32, for it holds the 32 newest slots"),
        (((64.0, 64),), "64.0: a head's window must be a whole number"),
        (((64, 64), (64,)), "needs rows of one length"),
        ((), "needs rows of one length"),
        (64, "must be 'even', or a table"),
    ],
)
def test_tables_that_cannot_work(table, said):
    """Heads without room for the newest slots, or more bytes than the window promises."""
    with pytest.raises(ValueError) as raised:
        H2OConfig(window_length=64, head_budgets=table)
    message = str(raised.value)
    assert message.startswith("head_budgets: ") and said in message and "\n" not in message


def test_plan_needs_slots_to_divide(tmp_path):
    """A traceback, or a message without a way out."""
    path = tmp_path / "plan.json"
    path.write_text('{"windows": [[1, 2]]}')
    with pytest.raises(ValueError, match=r"^window_length=2: 1 of its slots hold the newest tokens, .* at least 3, or"):
        H2OConfig(window_length=2, head_budgets=str(path))
    with pytest.raises(ValueError, match=r"^head_budgets .*none\.json: cannot be read"):
        H2OConfig(head_budgets=str(tmp_path / "none.json"))


def test_new_flags_take_effect_at_the_next_generate(gqa):
    """Flags copied at construction; and a cache that is given keeps its own, whatever the model's have become."""
    flags = {"window_length": 8, "update_interval": 4}
    model = with_flags(gqa, **flags)
    for changes in ({"update_interval": 1}, {"window_length": 5}, {"position_rolling": True}, {"num_heavy_hitters": 0}):
        flags |= changes
        given_cache = HHCache(model.h2o)
        before = given_cache.h2o
        model.h2o = dataclasses.replace(model.h2o, **changes)
        oracle = new_oracle(gqa, **flags)
        result = generate(model, [prompt(12)], 9)
        assert new_tokens(result, [prompt(12)])[0] == oracle.generate(prompt(12), 9)
        assert_row_is_oracles(result.past_key_values, 0, oracle)
        generate(model, [prompt(12)], 9, past_key_values=given_cache)
        assert given_cache.h2o == before != model.h2o and max(given_cache.lengths) <= before.capacity
        old = new_oracle(gqa, **{**flags, **{name: getattr(before, name) for name in changes}})
        old.generate(prompt(12), 9)
        assert given_cache.evictions == [old.evictions] and given_cache.lengths == [old.length()]


def test_settings_given_as_a_dict(gqa):
    """A dict that is kept as it is, and fails in the first forward; a field that does not exist, or no settings."""
    model = H2OLlamaForCausalLM(gqa.stock.config, h2o={"window_length": 8, "update_interval": 2})
    assert model.h2o == H2OConfig(window_length=8, update_interval=2)
    for wrong, said in (({"window": 8}, "'window' is not a field"), (8, "must be an H2OConfig"), ("H", "must be")):
        with pytest.raises(ValueError, match=said):
            model.h2o = wrong
        with pytest.raises(ValueError, match=said):
            H2OLlamaForCausalLM(gqa.stock.config, h2o=wrong)
    with pytest.raises(ValueError, match="HHCache: give an H2OConfig"):
        HHCache({"window_length": 8})
