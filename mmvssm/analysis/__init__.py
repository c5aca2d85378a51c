"""Looking at models: what they cost, and what pruning does."""
