"""PyTorch's zip and the pickles in it, read and written without torch."""
