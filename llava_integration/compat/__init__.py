"""LLaVA 1.5's unmodified code on today's libraries.

``runner`` runs the functions of ``patches``: each completes one module of LLaVA, before or after it executes, for the
versions of libraries that need it. With LLaVA's own pins nothing is touched. ``LLM2CLIP_LLAVA_COMPAT=0`` disables all.
"""
