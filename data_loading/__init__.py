"""Rows from files: read line by line, checked once, then streamed to the trainers.

In: a path, a Hugging Face data set, a list. Out: sequences of plain mappings, as ``PPOTrainer.train``,
``SFTTrainer.train`` and ``RewardTrainer.train`` take them, that hold where each row is rather than the row.
"""
