"""The study: arms of tuning policies over seeds, from one first stage, measured alike and compared."""
