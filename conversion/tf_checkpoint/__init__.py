"""TensorFlow's own checkpoints and the variables of SavedModels, read and written without TensorFlow."""
