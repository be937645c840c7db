"""Captioned images: samples, where they come from, the cache of their embeddings, batches of them."""
