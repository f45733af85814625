"""lissom.kernels: one operation per file, each with its plain torch definition."""
