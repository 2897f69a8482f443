"""From a dataset's facts and a hardware budget to a plan whose every field has its reason; never imports torch."""
