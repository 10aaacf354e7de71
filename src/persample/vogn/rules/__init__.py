"""The update rules, one in each file: how a posterior follows from the gradients that were observed."""
