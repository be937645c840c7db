"""Towers whose code is saved with a LLaVA that is exported to Hugging Face; each file stands alone when it is written.

Functions that they import from this package are copied into the saved file (``llava_integration.serve.build``).
EVA02's file is ``vision/eva02.py``.
"""
