"""MLLM benchmarks: ``answer`` asks a model, ``benchmarks`` scores its answers, ``compare`` compares
models. Scoring and comparing need no torch.
"""
