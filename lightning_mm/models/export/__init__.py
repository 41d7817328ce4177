"""A trained model written as plain transformers or PEFT folders, and proved to load there."""
