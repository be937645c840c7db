"""LLaVA 1.5's unmodified code on today's libraries: one file per function that is completed, found because it is there.

Each file defines ``COMPLETION`` (`completion.Completion`): the module of LLaVA that it belongs to, whether it runs
before or after that module executes, the versions of libraries for which it is needed, and one function; its docstring
says why. ``boot`` runs them through `runner`. Where no installed version needs one, as with LLaVA's own pins, nothing
is touched. ``LLM2CLIP_LLAVA_COMPAT=0`` disables them all.
"""
