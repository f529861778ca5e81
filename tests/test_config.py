"""H2OConfig: which flags work, and when a model takes them up."""

import dataclasses

import pytest

from conftest import assert_row_is_oracles, generate, new_oracle, new_tokens, prompt, with_flags
from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from utils.cache import HHCache

REFUSED = {
    "no such slimming": ({"slimming": "h"}, "H, mask"),
    "no such backend": ({"backend": "flash"}, "eager, sdpa"),
    "no such score": ({"score": "attention"}, "mass, sink, streaming_llm, random"),
    "no such norm": ({"score_norm": "max"}, "sum, mean"),
    "no such reduction": ({"group_reduce": "last"}, "sum, first"),
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


def test_new_flags_take_effect_at_the_next_generate(llamas):
    """Flags copied at construction; and a cache that is given keeps its own, whatever the model's have become."""
    flags = {"window_length": 8, "update_interval": 4}
    model = with_flags(llamas, **flags)
    for changes in ({"update_interval": 1}, {"window_length": 5}, {"position_rolling": True}, {"num_heavy_hitters": 0}):
        flags |= changes
        given_cache = HHCache(model.h2o)
        before = given_cache.h2o
        model.h2o = dataclasses.replace(model.h2o, **changes)
        oracle = new_oracle(llamas, **flags)
        result = generate(model, [prompt(12)], 9)
        assert new_tokens(result, [prompt(12)])[0] == oracle.generate(prompt(12), 9)
        assert_row_is_oracles(result.past_key_values, 0, oracle)
        generate(model, [prompt(12)], 9, past_key_values=given_cache)
        assert given_cache.h2o == before != model.h2o and max(given_cache.lengths) <= before.capacity
        old = new_oracle(llamas, **{**flags, **{name: getattr(before, name) for name in changes}})
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
