setup demo test test-slow test-torch mutants lint format:
	@./run $@
.PHONY: setup demo test test-slow test-torch mutants lint format
