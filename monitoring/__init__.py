"""What a person sees of a run: the terminal, the files of metrics and samples, the plots."""
