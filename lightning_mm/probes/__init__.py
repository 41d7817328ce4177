"""Pure estimators: what can be read from a representation, with baselines and intervals; nothing here knows a model."""
