"""Vision checkpoints become tower directories, and towers other formats."""
