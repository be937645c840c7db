"""Vision towers: families, EVA02, the text adapter, the dual encoder, export; ``convert`` for other
formats.

Runs on transformers 4.37.2 to 5.x and torch 2.1 to now, with nothing beyond LLaVA's own
dependencies.
"""
