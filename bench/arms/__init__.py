"""What `bench.worker` runs, a module each: `go(job)` trains once and says what it took.

A job is a JSON object: `task`, `model` and `data` (paths), `technique`, `batch_size`, `epochs`, `max_length`,
`learning_rate`, `device`, `precision`, and what the arm alone is told. What comes back: `seconds` and `cpu_seconds` of
training alone, `samples` and valid `tokens` in it, `learned` parameters, and the mean `loss` of the run. A module that
lacks a library fails to be imported, and the conductor says so.
"""
