"""Parameter-efficient tuning: modules injected from outside into an unchanged SAM."""
