"""Arms that `bench.worker` runs, one module each: `go(job)` trains once and returns its measurements.

A job is a JSON object: `task`, `model` and `data` (paths), `technique`, `batch_size`, `epochs`, `max_length`,
`learning_rate`, `device`, `precision`, and keys of the arm itself. The result has `seconds` and `cpu_seconds` of
training only, the number of `samples` and non-padding `tokens`, the trainable parameters (`learned`), and the mean
`loss` of the run. If a library is missing, importing the module fails and `bench.conduct` reports it.
"""
