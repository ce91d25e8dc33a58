"""The lab that all stages share: inputs, checks, pictures, the tour and the benchmark.

Notebooks and tests use it; the stages' own files never do, so that each of them can be copied alone.
"""
