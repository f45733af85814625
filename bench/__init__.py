"""lissom.bench: training demo, memory profiler, benchmarks."""
