setup demo test test-slow lint format:
	@./run $@
.PHONY: setup demo test test-slow lint format
