"""Files of training data, read into samples."""
