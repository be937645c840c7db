"""The options of the commands that measure; read without torch."""
