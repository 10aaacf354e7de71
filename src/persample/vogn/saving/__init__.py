"""Saving and loading optimizers and posteriors."""
