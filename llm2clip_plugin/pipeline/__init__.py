"""``llm2clip run``: all stages of one training in order, and a page about it."""
