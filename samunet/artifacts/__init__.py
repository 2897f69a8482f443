"""One file per arrow of the pipeline: the schema of what a stage writes and the next one reads."""
