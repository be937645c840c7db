"""LLaVA checkpoints as Hugging Face models that servers open, and back."""
