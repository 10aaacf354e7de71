"""Recording the forward and backward passes that the user runs."""
