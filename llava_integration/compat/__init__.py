"""LLaVA 1.5's unmodified code on today's libraries.

``runner`` runs the functions that ``runner.completes`` marks in the files of this folder, found because they are there:
each completes one module of LLaVA, before or after it executes, for the versions of libraries that need it. Where no
installed version needs one, as with LLaVA's own pins, nothing is touched. ``LLM2CLIP_LLAVA_COMPAT=0`` disables all.
"""
