"""stub"""
from contextlib import contextmanager
@contextmanager
def fast_kernels():
    yield
