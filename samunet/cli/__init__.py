"""One file per command: argparse to pipeline; render is the only place that prints."""
