"""Captioned images: samples, their sources, the cache of their embeddings, batches of them."""
