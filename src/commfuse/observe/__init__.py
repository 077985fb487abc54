"""Seeing what happens: figures of every group, log lines, ranges for the profiler. Nothing here changes a result."""
