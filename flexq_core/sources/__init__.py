"""What comes in: models, texts, tasks, and the embedded demo models."""
