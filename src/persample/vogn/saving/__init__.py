"""What an optimizer and a posterior save, and the way back."""
