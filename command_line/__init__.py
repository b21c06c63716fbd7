"""The command line: one file per command, all behind ``python main.py``; no MLX until a command needs it."""
