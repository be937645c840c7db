"""Towers whose code is saved with a LLaVA that is exported to Hugging Face; each file stands alone when it is written.

An import of this package's in them is of a function that is written in its place
(``llava_integration.serve.tower_code``). EVA02's file is ``vision/eva02.py``.
"""
