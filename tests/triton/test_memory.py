"""A kernel would read the address of nothing: what has no memory is refused before a launch."""

from support import memory_tests


class TestMemory(memory_tests.MemoryTests):
    pass
