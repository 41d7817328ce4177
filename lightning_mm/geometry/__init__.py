"""Pure tensor maths on the representations of many layers at once; nothing here knows a model."""
