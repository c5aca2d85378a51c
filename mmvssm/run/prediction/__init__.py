"""Parts of prediction: sources (files), predictor (model and pipeline), outputs."""
