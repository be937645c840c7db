"""LLaVA 1.5's unmodified code on today's libraries: ``runner`` runs the functions of ``patches``,
which ``completion`` describes."""
