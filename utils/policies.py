"""What slots can be ranked by: the names that settings, command lines and figures share."""

SCORES = ("mass", "sink", "streaming_llm", "random")
STREAMING_LLM_SINKS = 4  # as StreamingLLM was published, arXiv 2309.17453
