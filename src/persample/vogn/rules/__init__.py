"""The update rules, one per file: from observed gradients to the new posterior."""
