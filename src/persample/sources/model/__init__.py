"""What is asked of the user's model: its modules, its autograd graph, and leaving no trace on it."""
