"""Worked examples: each says its command in the first lines and the number to expect."""
