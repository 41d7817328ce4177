"""Export of a trained model as a plain transformers or PEFT folder, and the verification that it loads there."""
