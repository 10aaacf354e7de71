"""The user's model: walking its modules and its autograd graph, and leaving no trace on it."""
