"""Predicting on images and videos: which files, by which model, and what is written."""
