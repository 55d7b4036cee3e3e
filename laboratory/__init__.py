"""The paper's second half in small: models trained generatively on made worlds, tuned on text alone, and measured.

`worlds` and `real` make world folders, `backbone` the model, `run` trains, `measure` and `probes` measure, `report`
tells. docs/laboratory.md says what each number means.
"""
