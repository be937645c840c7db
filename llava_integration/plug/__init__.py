"""What LLaVA meets: the hook that adds our towers to its builder, the towers themselves, and what
completes LLaVA's code on today's libraries. ``llava_integration.boot`` starts it in every process.
"""
