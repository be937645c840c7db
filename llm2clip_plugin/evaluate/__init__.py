"""Is the tower better? Retrieval, zero-shot classification, probes, caption retrieval accuracy."""
