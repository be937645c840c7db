"""``llm2clip llava data``: a data set as LLaVA's pretraining reads it."""
