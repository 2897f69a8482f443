"""Measurements behind the claims of the documentation, one script per claim; results/ holds what they found."""
