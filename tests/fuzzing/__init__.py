"""The parts of the fuzzer; ``tests/fuzz.py`` is its command."""
