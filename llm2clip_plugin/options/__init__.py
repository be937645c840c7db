"""Options of the commands: one vocabulary, from the words of a command line to settings, and the text of --help."""
