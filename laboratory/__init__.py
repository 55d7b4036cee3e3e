"""The paper's second half in small.

Models are trained generatively on made worlds, tuned on text alone, and measured. `worlds` and
`real` make world folders, `backbone` makes the model, `run` trains, `measure` and `probes` measure,
`report` writes what was found. docs/laboratory.md explains each number.
"""
