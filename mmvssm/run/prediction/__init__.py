"""The parts of prediction: which files to read, the model with its pipeline, and what is written."""
